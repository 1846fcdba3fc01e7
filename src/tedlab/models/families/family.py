"""What a family of published models is: a description of it over our GPT, in both directions.

A family reads its ``config.json`` into our configuration and writes it from ours, by one table of fields, and states
which of its tensors each of our parameters is made of. Nothing that a ``config.json`` says is ignored silently: a field
is in the table, or has one value that we can express, or is listed as one that changes neither weights nor forward
pass; any other is an error.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from tedlab.config import BiasUpdate, ModelConfig, MoEConfig, QKNorm
from tedlab.models.families.mapping import Alternated, ByHead, Rule, Then, Transform, Transposed
from tedlab.untrusted import typed

REQUIRED = object()
_MOST_LAYERS = 10_000

# Fields that change neither weights nor forward pass: what a tokenizer or generation needs, what other libraries' code
# does, initial weights, and training.
MEANINGLESS = frozenset(
    {
        *("architectures", "model_type", "transformers_version", "auto_map", "_name_or_path", "dtype", "torch_dtype"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "output_router_logits"),
        *("initializer_range", "router_aux_loss_coef", "pretraining_tp", "chunk_size_feed_forward"),
        *("id2label", "label2id", "problem_type", "is_encoder_decoder", "task_specific_params"),
    }
)

# Our values that change neither weights nor what they compute for a sample, as long as no expert is full.
_OF_TRAINING = frozenset(
    {
        *("model.parametrization", "model.base_hidden"),
        *("model.sequence_length", "model.init_std", "model.loss_chunk", "model.compile", "model.architecture"),
        *("moe.dispatch", "moe.capacity_factor", "moe.capacity_multiple", "moe.capacity_groups"),
        *("moe.kernel", "moe.slice"),
        *("moe.aux_loss", "moe.z_loss", "moe.drop_policy", "moe.router.bias_rate", "moe.router.jitter"),
        *("moe.router.noise", "moe.router.noise_std", "moe.min_capacity", "moe.random_token_selection"),
        *("moe.second_expert_sampling", "moe.every", "moe.first_dense", "moe.blocks"),
    }
)
_GROUPS_OF_TRAINING = ("model.recompute.", "moe.balance.", "moe.lend.")


class UnknownField(ValueError):
    """A ``config.json`` says something that tedlab cannot express."""


class Family:
    """Base of families.

    Attributes:
        model_type: The name of the family in ``config.json``.
        architecture: The name of its class in transformers.
        fields: Their field to our value and what an absent field means (``REQUIRED``: it must be there).
        only: Their fields of which we can express some values, the first of which an absent field means.
        always: Our values that all models of the family have.
        aliases: Other names of their fields, as some releases of transformers write them.
        meaningless: Further fields that change neither weights nor forward pass.
        left_out: Patterns of tensors that a folder of any model may have beside those that the model needs.
        rope_theta: The base of rotary positions if ``config.json`` does not say.
        rope_scaling: How positions are stretched if ``config.json`` does not say, in its own words; empty: not at all.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    fields: ClassVar[Mapping[str, tuple[str, Any]]]
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    always: ClassVar[Mapping[str, Any]] = {}
    aliases: ClassVar[Mapping[str, str]] = {}
    meaningless: ClassVar[frozenset[str]] = frozenset()
    left_out: ClassVar[tuple[str, ...]] = (r".*\.rotary_emb\.inv_freq",)
    rope_theta: ClassVar[float] = 10_000.0
    rope_scaling: ClassVar[Mapping[str, Any]] = {}

    # ---- configuration -----------------------------------------------------------------------------------------------

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns our values by dotted name.

        Args:
            config: The content of a ``config.json``.

        Raises:
            UnknownField: If it lacks a field, or has one that we cannot express; the message names all of these.
        """
        named = {self.aliases.get(name, name): value for name, value in config.items()}
        left = {name: value for name, value in named.items() if name not in MEANINGLESS | self.meaningless}
        values = dict(self.always)
        missing = [theirs for theirs, (_, default) in self.fields.items() if default is REQUIRED and theirs not in left]
        if missing:
            raise UnknownField(f"it lacks {', '.join(missing)}")
        for theirs, (ours, default) in self.fields.items():
            values[ours] = left.pop(theirs, default)
        layers = values["model.layers"]
        if not isinstance(layers, int) or not 0 < layers <= _MOST_LAYERS:  # lists of so many are made below
            raise UnknownField(f"it has {layers!r} layers; there can be 1 to {_MOST_LAYERS}")
        values |= read_rotary(left, self.rope_theta, self.rope_scaling, values["model.sequence_length"])
        values |= self.read_further(left, values)
        wrong = []
        for theirs, known in self.only.items():
            value = left.pop(theirs, known[0])
            if value not in known:
                wrong.append(f"{theirs}={value!r} (it can be {' or '.join(map(repr, known))})")
        wrong += [f"{name}={value!r}" for name, value in left.items()]
        if wrong:
            raise UnknownField(f"tedlab has no counterpart of {', '.join(wrong)}")
        return values

    def write(self, model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        """Returns the ``config.json`` of a model, which :meth:`read` reads back."""
        # transformers takes a null for a number.
        ours = flat(model, moe) | {"model.kv_heads": key_heads(model), "model.head_dim": head_width(model)}
        config: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        config |= {theirs: ours[name] for theirs, (name, _) in self.fields.items()}
        config |= {theirs: known[0] for theirs, known in self.only.items()}
        rotary = write_rotary(model)
        if self.rope_scaling:  # which being silent would mean
            rotary.setdefault("rope_scaling", {"rope_type": "default"})
        return config | rotary | self.write_further(model, moe)

    def read_further(self, left: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns values that need more than the table; takes what it has read out of ``left``."""
        return {}

    def write_further(self, model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        """Inverts :meth:`read_further`."""
        return {}

    def left_out_of(self, model: ModelConfig) -> tuple[str, ...]:
        """Returns the patterns of tensors that a folder may have beside those that this model needs."""
        return self.left_out

    # ---- weights -----------------------------------------------------------------------------------------------------

    def rules(self, model: ModelConfig, moe: MoEConfig) -> Iterator[Rule]:
        """Yields what each of our parameters is made of, in the order of blocks."""
        yield Rule("embedding.weight", ("model.embed_tokens.weight",))
        routed = moe.routed(model.layers)
        for index in range(model.layers):
            ours, theirs = f"blocks.{index}.", f"model.layers.{index}."
            yield Rule(f"{ours}norm1.weight", (f"{theirs}input_layernorm.weight",))
            yield from self.attention(model, f"{ours}attention.", f"{theirs}self_attn.")
            yield Rule(f"{ours}norm2.weight", (f"{theirs}post_attention_layernorm.weight",))
            if index in routed:
                yield from self.experts(model, moe, f"{ours}feed_forward.", theirs)
            else:
                yield from feed_forward(f"{ours}feed_forward.", f"{theirs}mlp.", model.bias)
        yield Rule("norm.weight", ("model.norm.weight",))
        if not model.tie_embeddings:
            yield Rule("output.weight", ("lm_head.weight",))

    def attention(self, model: ModelConfig, ours: str, theirs: str) -> Iterator[Rule]:
        """Yields the rules of a block's attention."""
        heads, width = key_heads(model), head_width(model)
        of_qkv, of_out = attention_biases(model)
        for part in ("weight", "bias") if of_qkv else ("weight",):
            q, k, v = (f"{theirs}{name}_proj.{part}" for name in "qkv")
            if heads == model.heads:
                yield Rule(f"{ours}qkv.{part}", (q, k, v), ByHead(heads, (width, width, width)))
            else:
                yield Rule(f"{ours}q.{part}", (q,))
                yield Rule(f"{ours}kv.{part}", (k, v), ByHead(heads, (width, width)))
        for part in ("weight", "bias") if of_out else ("weight",):
            yield Rule(f"{ours}out.{part}", (f"{theirs}o_proj.{part}",))
        if model.qk_norm != QKNorm.NONE:
            for name in ("q_norm", "k_norm"):
                yield Rule(f"{ours}{name}.weight", (f"{theirs}{name}.weight",))
        if model.attention.sinks:
            yield Rule(f"{ours}sinks", (f"{theirs}sinks",))

    def experts(self, model: ModelConfig, moe: MoEConfig, ours: str, theirs: str) -> Iterator[Rule]:
        """Yields the rules of a block's router and experts; ``theirs`` is the prefix of the block."""
        yield Rule(f"{ours}router.weight", (f"{theirs}mlp.gate.weight",))
        yield from each_expert(moe, f"{ours}experts.", f"{theirs}mlp.experts.", ("gate_proj", "up_proj", "down_proj"))


def each_expert(moe: MoEConfig, ours: str, theirs: str, names: tuple[str, str, str]) -> Iterator[Rule]:
    """Yields the rules of SwiGLU experts that have tensors of their own, by their names of gate, linear and down."""
    gate, linear, down = names
    up: Transform = Then(Alternated(), Transposed())
    for expert in range(moe.num_experts):
        matrices = (f"{theirs}{expert}.{gate}.weight", f"{theirs}{expert}.{linear}.weight")
        yield Rule(f"{ours}up", matrices, up, expert)
        yield Rule(f"{ours}down", (f"{theirs}{expert}.{down}.weight",), Transposed(), expert)


def feed_forward(ours: str, theirs: str, bias: bool = False) -> Iterator[Rule]:
    """Yields the rules of a dense SwiGLU layer."""
    for part in ("weight", "bias") if bias else ("weight",):
        yield Rule(f"{ours}up.{part}", (f"{theirs}gate_proj.{part}", f"{theirs}up_proj.{part}"), Alternated())
        yield Rule(f"{ours}down.{part}", (f"{theirs}down_proj.{part}",))


def key_heads(model: ModelConfig) -> int:
    """Returns the number of heads of keys."""
    return model.kv_heads or model.heads


def attention_biases(model: ModelConfig) -> tuple[bool, bool]:
    """Returns whether the projections to queries, keys and values have biases, and whether the one after them has."""
    own = model.attention.qkv_bias, model.attention.out_bias
    of_qkv, of_out = (model.bias if one is None else one for one in own)
    return of_qkv, of_out


def head_width(model: ModelConfig) -> int:
    """Returns the number of features of a head."""
    return model.head_dim or model.hidden // model.heads


# ---- rotary positions ------------------------------------------------------------------------------------------------

# Our names of scalings, of their values, and of the values that each has.
_SCALINGS = {"linear": "linear", "dynamic": "ntk", "yarn": "yarn", "llama3": "llama3"}
_SCALED = {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
}
_OF_SCALING = {
    "linear": ("factor",),
    "ntk": ("factor", "original_length"),
    "yarn": (
        *("factor", "original_length", "beta_fast", "beta_slow", "truncate"),
        *("attention_factor", "mscale", "mscale_all_dim"),
    ),
    "llama3": ("factor", "original_length", "low_freq_factor", "high_freq_factor"),
}


def read_rotary(left: dict[str, Any], theta: float, default: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """Returns the values of rotary positions, whose fields are at two places in transformers 4 and at one in 5.

    Args:
        left: The fields, of which it takes its own.
        theta: The base if they do not say.
        default: The scaling if they do not say.
        longest: The longest text that the model knows, which is the original length if they do not say.
    """
    found = {**(left.pop("rope_scaling", None) or {}), **(left.pop("rope_parameters", None) or {})} or {**default}
    above = left.pop("rope_theta", theta)
    values: dict[str, Any] = {"model.rotary_base": float(found.pop("rope_theta", above))}
    kinds = {found.pop(name, "default") for name in ("rope_type", "type")} - {"default"}
    if not kinds:
        left |= {f"rope_scaling.{name}": value for name, value in found.items()}
        return values
    kind = kinds.pop()
    if kind not in _SCALINGS:
        left["rope_scaling.rope_type"] = kind
        return values
    scaling = _SCALINGS[kind]
    values["model.rotary.scaling"] = scaling
    if "original_length" in _OF_SCALING[scaling] and not found.get("original_max_position_embeddings"):
        found["original_max_position_embeddings"] = left.get("original_max_position_embeddings") or longest
    for theirs, value in found.items():
        ours = _SCALED.get(theirs)
        if ours is None or (ours not in _OF_SCALING[scaling] and value is not None):
            left[f"rope_scaling.{theirs}"] = value
        elif value is not None:
            values[f"model.rotary.{ours}"] = value
    return values


def write_rotary(model: ModelConfig) -> dict[str, Any]:
    """Inverts :func:`read_rotary`, in the form that all releases of transformers read."""
    config: dict[str, Any] = {"rope_theta": model.rotary_base}
    rotary = asdict(model).get("rotary", {})
    scaling = rotary.get("scaling", "none")
    if scaling != "none":
        theirs = next(name for name, ours in _SCALINGS.items() if ours == scaling)
        kept = {name: rotary[ours] for name, ours in _SCALED.items() if ours in _OF_SCALING[scaling]}
        known = {name: value for name, value in kept.items() if value is not None}
        config["rope_scaling"] = {"rope_type": theirs, **known}
    return config


# ---- configurations --------------------------------------------------------------------------------------------------


def flat(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """Returns all values of a model by dotted name."""

    def leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    return dict(leaves({"model": asdict(model), "moe": asdict(moe)}, ""))


def configured(values: Mapping[str, Any]) -> tuple[ModelConfig, MoEConfig]:
    """Makes a model's configuration of values by dotted name.

    Raises:
        OmegaConfBaseException: If there is no value of a name, or one has the wrong type.
    """
    groups: dict[str, Any] = {"model": {}, "moe": {"num_experts": 0}}
    for name, value in values.items():
        *above, last = name.split(".")
        place = groups
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    return typed(ModelConfig, groups["model"]), typed(MoEConfig, groups["moe"])


def essence(model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    """Returns the values that say what weights there are and what they compute, in one spelling each."""
    values = flat(model, moe)
    routed = moe.routed(model.layers)
    for name in list(values):
        if name in _OF_TRAINING or name.startswith(_GROUPS_OF_TRAINING) or (not routed and name.startswith("moe.")):
            del values[name]
    values |= {"model.kv_heads": key_heads(model), "model.head_dim": head_width(model), "moe.routed blocks": routed}
    biases = attention_biases(model)
    values |= {"model.attention.qkv_bias": biases[0], "model.attention.out_bias": biases[1]}
    if len(routed) == model.layers:
        del values["model.ffn"]
    if routed:
        router = moe.router
        values["moe.ffn"] = moe.ffn or model.ffn
        values["moe.router.bias_update"] = router.bias_update != BiasUpdate.NONE
        values["moe.router.gates"] = router.gates or ("raw" if moe.top_k == 1 else "normalized")
    return values
