"""``tedlab checkpoint verify``: does an import compute what transformers computes, and if not, which matrix is wrong?

Both models get the weights of one folder by their own ways, the same tokens, and one step of AdamW. Their layers are
also compared one by one, each with the input that transformers' has, so that a mistake shows in the layer that has it
and in no other. If a layer differs, the usual mistakes are undone one after the other until one makes it right.
"""

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tedlab.certify.compare import relative_error
from tedlab.checkpoint.pieces import PieceReader
from tedlab.config import ModelConfig
from tedlab.exchange.imports import Opened, open_folder, read_pieces
from tedlab.models import GPT
from tedlab.models.families import essence
from tedlab.models.families.family import head_width, key_heads
from tedlab.models.families.mapping import PairsApart
from tedlab.moe import MoELayer
from tedlab.opened import default_dtype, model_of
from tedlab.progress import Advance, advancing
from tedlab.topology import Topology
from tedlab.weights import PREFIX

TOLERANCES = {"float64": 1e-10, "float32": 2e-3}
_TOKENS = 64  # of a sample, at most
_SAMPLES = 2
# AdamW divides by the root of a gradient's square, so that rounding of a gradient near 0 would move a weight as far as
# a gradient does; a large eps bounds that.
_ADAMW: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3}


class SinglePrecisionIsDouble(TorchFunctionMode):
    """transformers computes norms, rotations and gates in float32, whatever the model's precision: here in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widened(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            return args[0].double()
        return func(*map(widened, args), **{name: widened(value) for name, value in (kwargs or {}).items()})


class Row(NamedTuple):
    """One quantity of both models.

    Attributes:
        quantity: What was compared.
        error: The largest difference, relative to the largest magnitude of its tensor.
        worst: The name of the tensor with that error.
        tolerance: The largest error that counts as equal.
    """

    quantity: str
    error: float
    worst: str
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether both are equal."""
        return self.error <= self.tolerance


class Verdict(NamedTuple):
    """What a comparison found.

    Attributes:
        rows: Logits, loss, gradients and weights after one step.
        found: For each layer that differs, what is wrong in it.
    """

    rows: list[Row]
    found: list[str]

    @property
    def ok(self) -> bool:
        """Whether both models are the same."""
        return not self.found and all(row.ok for row in self.rows)


class _Layer(NamedTuple):
    """A layer of both models: its name with us, their module, and what ours computes of theirs' input."""

    name: str
    theirs: nn.Module
    ours: Callable[[Tensor], Tensor]


def verify(checkpoint: Path, path: Path, dtype: str = "float64", layers: int | None = None) -> Verdict:
    """Compares a checkpoint with the folder that it was imported from.

    Args:
        checkpoint: The checkpoint.
        path: The folder.
        dtype: ``float64``, or ``float32`` for less memory.
        layers: How many blocks of both to compare; None: all. Both models are held in memory, with gradients.

    Raises:
        ValueError: If transformers is not installed, or the two cannot be compared.
    """
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "verify compares with transformers, which is not installed: pip install 'tedlab[transformers]'"
        ) from None
    if dtype not in TOLERANCES:
        raise ValueError(f"dtype={dtype} is none of {', '.join(TOLERANCES)}")
    opened = open_folder(path)
    if "quantization_config" in opened.folder.config:
        raise ValueError(
            f"{path} is quantised, and dequantised by an import: make a folder of that with tedlab checkpoint export, "
            "and compare with it"
        )
    model, moe = model_of(checkpoint)
    ours, theirs = essence(model, moe), essence(opened.model, opened.moe)
    different = [name for name in theirs if ours.get(name) != theirs[name]]
    if different:
        name = different[0]
        raise ValueError(f"{checkpoint} has {name}={ours.get(name)}, and {path} {theirs[name]}: they are other models")
    kind: torch.dtype = getattr(torch, dtype)
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    if layers is not None:
        config.num_hidden_layers = min(layers, model.layers)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
    model = replace(model, layers=config.num_hidden_layers, compile="none", loss_chunk=None)
    draw = torch.Generator().manual_seed(0)
    length = min(model.sequence_length, _TOKENS)
    ids = torch.randint(model.vocab_size or 1, (_SAMPLES, length + 1), generator=draw)
    padding = getattr(config, "pad_token_id", None)
    if padding is not None:  # transformers gives its embedding no gradient
        ids = ids.where(ids != padding, (padding + 1) % (model.vocab_size or 1))
    with default_dtype(kind):
        with _wide(kind):
            peer = transformers.AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=kind,
                attn_implementation="eager",
                experts_implementation="eager",
                local_files_only=True,
                use_safetensors=True,
            ).eval()
        network = GPT(model, replace(moe, capacity_factor=None), Topology.single(), seed=None).eval()
        reader = PieceReader(checkpoint)
        # Weights are read once, and gradients and new weights are brought into our form.
        with advancing("comparing", 3 * sum(tensor.numel() for tensor in network.state_dict().values())) as advance:
            fill(network, reader, advance)
            return compare(network, peer, ids, opened, TOLERANCES[dtype], advance)


def fill(network: GPT, reader: PieceReader, advance: Advance) -> None:
    """Puts a checkpoint's weights into a model that is whole in this process, and may have fewer blocks.

    Args:
        network: The model.
        reader: Reads the checkpoint.
        advance: Is told how many elements more have been read.
    """
    for name, tensor in network.state_dict().items():
        _local(tensor).copy_(reader.read(PREFIX + name))
        advance(tensor.numel())


def compare(network: GPT, peer: Any, ids: Tensor, opened: Opened, tolerance: float, advance: Advance) -> Verdict:
    """Compares two models in whole, and if they differ, layer by layer.

    Args:
        network: Our model.
        peer: The model of transformers.
        ids: (B, S+1) tokens.
        opened: The folder whose rules say which of their tensors are ours.
        tolerance: The largest relative error that counts as equal.
        advance: Is told how many elements more of theirs have been brought into our form.
    """
    tokens, targets = ids[:, :-1], ids[:, 1:]
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    rest: dict[str, tuple[Any, ...]] = {}
    layers = list(_layers(network, peer, rest))
    with _watching(layers, seen), _wide(peer.dtype):
        their_logits = peer(input_ids=tokens).logits
        their_loss = nn.functional.cross_entropy(their_logits.flatten(0, 1), targets.flatten())
        their_loss.backward()
    with _arguments(network, rest):
        logits = network(tokens)[0].detach()
    loss = network.loss(tokens, targets)[0]
    loss.backward()
    parameters = dict(network.named_parameters())
    gradients = {name: _local(parameter.grad) for name, parameter in parameters.items() if parameter.grad is not None}
    rows = [
        Row("logits", relative_error(logits, their_logits.detach()), "logits", tolerance),
        Row("loss", relative_error(loss.detach(), their_loss.detach()), "loss", tolerance),
        _worst("gradients", gradients, _as_ours(peer, opened, lambda p: p.grad, advance), tolerance),
    ]
    step = {name: _local(p).detach().clone().requires_grad_() for name, p in parameters.items()}
    for name, weight in step.items():
        weight.grad = gradients[name]
    for stepped in (step.values(), peer.parameters()):
        torch.optim.AdamW(stepped, **_ADAMW).step()
    stepped_peer = _as_ours(peer, opened, lambda p: p.detach(), advance)
    rows.append(_worst("weights after a step of AdamW", step, stepped_peer, tolerance))
    found = list(_diagnosed(network, layers, seen, tolerance))
    if not found and not all(row.ok for row in rows):
        found = ["every layer alone is equal, but together they are not"]
    return Verdict(rows, found)


def _worst(quantity: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float) -> Row:
    errors = {name: relative_error(ours[name], theirs[name]) if name in theirs else math.inf for name in ours}
    worst = max(errors, key=lambda name: errors[name])
    return Row(quantity, errors[worst], worst, tolerance)


def _as_ours(
    peer: Any, opened: Opened, values: Callable[[nn.Parameter], Tensor | None], advance: Advance
) -> dict[str, Tensor]:
    """Returns what each of their parameters has, by our names: written by transformers, read like any folder."""
    kept = {name: parameter.data for name, parameter in peer.named_parameters()}
    with tempfile.TemporaryDirectory() as place:
        for parameter in peer.parameters():
            value = values(parameter)
            parameter.data = torch.zeros_like(parameter) if value is None else value.clone()
        try:
            peer.save_pretrained(place)
        finally:
            for name, parameter in peer.named_parameters():
                parameter.data = kept[name]
        written = open_folder(Path(place))
        found: dict[str, Tensor] = {}
        for piece in read_pieces(written._replace(rules=_of_first(opened, written))):
            if piece.row is None:
                found[piece.name] = piece.values.clone()
            else:
                found.setdefault(piece.name, torch.empty(piece.shape, dtype=piece.values.dtype))[piece.row] = (
                    piece.values
                )
            advance(piece.values.numel())
        written.folder.close()
    return found


def _of_first(opened: Opened, written: Opened) -> list[Any]:
    """Returns the rules that are judged, of the blocks that are compared."""
    return [rule for rule in opened.rules if rule.ours in written.shapes]


# ---- layer by layer --------------------------------------------------------------------------------------------------


def _layers(network: GPT, peer: Any, rest: dict[str, tuple[Any, ...]]) -> Iterator[_Layer]:
    inner = peer.model
    yield _Layer("embedding", inner.embed_tokens, network.embedding)
    for index, (ours, theirs) in enumerate(zip(network.blocks, inner.layers, strict=True)):
        block: Any = ours
        name = f"blocks.{index}"

        def attention(x: Tensor, block: Any = block, name: str = name) -> Tensor:
            return block.attention(x, *rest[name])

        def feed_forward(x: Tensor, block: Any = block) -> Tensor:
            y = block.feed_forward(x)
            return y[0] if isinstance(y, tuple) else y

        yield _Layer(f"{name}.norm1", theirs.input_layernorm, block.norm1)
        yield _Layer(f"{name}.attention", theirs.self_attn, attention)
        yield _Layer(f"{name}.norm2", theirs.post_attention_layernorm, block.norm2)
        yield _Layer(f"{name}.feed_forward", theirs.mlp, feed_forward)
    yield _Layer("norm", inner.norm, network.norm)
    yield _Layer("output", peer.lm_head, network.embedding.logits if network.output is None else network.output)


@contextmanager
def _watching(layers: Sequence[_Layer], seen: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Keeps what each of their layers maps to what."""

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            made = result[0] if isinstance(result, tuple) else result
            seen[name] = given.detach(), made.detach()

        return hook

    handles = [layer.theirs.register_forward_hook(watch(layer.name), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _arguments(network: GPT, rest: dict[str, tuple[Any, ...]]) -> Iterator[None]:
    """Keeps what else our attention layers are given beside activations."""

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            rest[name] = args[1:]

        return hook

    blocks: Any = network.blocks
    handles = [b.attention.register_forward_pre_hook(keep(f"blocks.{index}")) for index, b in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _diagnosed(
    network: GPT, layers: Sequence[_Layer], seen: Mapping[str, tuple[Tensor, Tensor]], tolerance: float
) -> Iterator[str]:
    for layer in layers:
        given, expected = seen[layer.name]

        def error(layer: _Layer = layer, given: Tensor = given, expected: Tensor = expected) -> float:
            return relative_error(layer.ours(given), expected)

        if error() <= tolerance:
            continue
        own = {n: _local(p) for n, p in network.named_parameters() if n.startswith(f"{layer.name}.")}
        unfilled = [name for name, values in own.items() if not values.isfinite().all()]
        if unfilled:
            yield f"{', '.join(unfilled)} has numbers that are not finite: it is missing or damaged"
            continue
        suspects: list[int] = []
        module = network.get_submodule(layer.name)
        if isinstance(module, MoELayer):
            suspects = _suspects(module, given, layer.ours(given), expected, tolerance)
        for what, changes in _mistakes(network.config, layer.name, own, suspects):
            before = {name: own[name].clone() for name in changes}
            for name, values in {name: values.clone() for name, values in changes.items()}.items():
                own[name].copy_(values)
            right = error() <= tolerance
            for name, values in before.items():
                own[name].copy_(values)
            if right:
                yield what
                break
        else:
            among = f"; the tokens that chose experts {', '.join(map(str, suspects))} are wrong" if suspects else ""
            yield f"{layer.name} computes something else; look at {', '.join(own) or 'the configuration'}{among}"


def _suspects(layer: MoELayer, x: Tensor, ours: Tensor, theirs: Tensor, tolerance: float) -> list[int]:
    """Returns the experts all of whose tokens are wrong."""
    x_TH = x.flatten(0, 1)
    routing = layer.router(x_TH, x.shape[1], None)
    chosen_TK = torch.bucketize(routing.slot_TK, routing.counts_E.cumsum(0), right=True)
    wrong_T = (ours - theirs).flatten(0, 1).abs().amax(-1) > tolerance * theirs.abs().max()
    experts = range(layer.experts.num_experts)
    tokens = {expert: (chosen_TK == expert).any(-1) for expert in experts}
    return [expert for expert in experts if tokens[expert].any() and bool(wrong_T[tokens[expert]].all())]


Mistake = tuple[str, dict[str, Tensor]]


def _mistakes(model: ModelConfig, layer: str, own: Mapping[str, Tensor], suspects: Sequence[int]) -> Iterator[Mistake]:
    """Yields what may have gone wrong in a layer, with the parameters as they would be if it had not."""
    for first, second in itertools.combinations(suspects, 2):
        order = torch.arange(next(len(v) for n, v in own.items() if ".experts." in n))
        order[[first, second]] = order[[second, first]]
        for kinds in (("up",), ("down",), ("up", "down")):
            names = [name for name in own if name.partition(".experts.")[2].partition("_")[0] in kinds]
            yield (
                f"experts {first} and {second} are swapped in {', '.join(names)}",
                {name: own[name][order] for name in names},
            )
    for name, values in own.items():
        last = name.removesuffix(".weight").rpartition(".")[2]
        if last == "up" and model.activation != "gelu":
            of_rows = values if values.ndim == 2 else values.mT
            swapped = of_rows.unflatten(-2, (-1, 2)).flip(-2).flatten(-3, -2)
            yield (
                f"{name} has gate and linear part swapped",
                {name: swapped if values.ndim == 2 else swapped.mT},
            )
        if values.ndim >= 2 and values.shape[-1] == values.shape[-2]:
            yield f"{name} is transposed", {name: values.mT}
            for expert in suspects if values.ndim == 3 else ():
                one = values.clone()
                one[expert] = values[expert].mT
                yield f"expert {expert} of {name} is transposed", {name: one}
    if layer.endswith(".attention"):
        yield from _of_attention(model, own)


def _of_attention(model: ModelConfig, own: Mapping[str, Tensor]) -> Iterator[Mistake]:
    for name in own:
        other = name.replace("q_norm", "k_norm")
        if other != name and other in own:
            yield f"{name} and {other} are swapped", {name: own[other], other: own[name]}
    if model.attention.latent.kv_rank is not None:
        yield from _of_latents(model, own)
        return
    kinds = sorted({name.rpartition(".")[2] for name in own if name.split(".")[-2] in ("qkv", "q", "kv")}, reverse=True)
    for several in range(1, len(kinds) + 1):
        for some in itertools.combinations(kinds, several):
            yield from _of_rows(model, own, some)


def _of_latents(model: ModelConfig, own: Mapping[str, Tensor]) -> Iterator[Mistake]:
    """Yields the wrong orders of the rotary features of queries, of the shared key, and of both."""
    latent = model.attention.latent
    assert latent.kv_rank is not None
    rows = {"q": PairsApart(model.heads, latent.nope_dim), "kv_down": PairsApart(1, latent.kv_rank)}
    rows["q_up"] = rows["q"]
    orders = {name: rows[name.split(".")[-2]] for name in own if name.split(".")[-2] in rows}
    for several in range(1, len(orders) + 1):
        for some in itertools.combinations(orders, several):
            what = f"{', '.join(some)} has rotary features in the wrong order"
            yield what, {name: orders[name].split(own[name])[0] for name in some}
            yield what, {name: orders[name].join([own[name]]) for name in some}


def _of_rows(model: ModelConfig, own: Mapping[str, Tensor], kinds: Sequence[str]) -> Iterator[Mistake]:
    """Yields mistakes in the rows of queries, keys and values, of weights, biases, or both."""
    heads, width = key_heads(model), head_width(model)
    layer = next(iter(own)).partition(".attention.")[0] + ".attention."
    fused = heads == model.heads

    def changed(what: str, change: Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]) -> Mistake:
        """Changes them, each given by head: (heads, features, …)."""
        found = {}
        for kind in kinds:
            if fused:
                values = own[f"{layer}qkv.{kind}"]
                q, k, v = change(*values.unflatten(0, (heads, 3, width)).unbind(1))
                found[f"{layer}qkv.{kind}"] = torch.stack((q, k, v), 1).flatten(0, 2)
            else:
                q = own[f"{layer}q.{kind}"].unflatten(0, (model.heads, width))
                q, k, v = change(q, *own[f"{layer}kv.{kind}"].unflatten(0, (heads, 2, width)).unbind(1))
                found[f"{layer}q.{kind}"] = q.flatten(0, 1)
                found[f"{layer}kv.{kind}"] = torch.stack((k, v), 1).flatten(0, 2)
        names = (name for name, values in found.items() if not torch.equal(values, own[name]))
        return f"{', '.join(names)} has {what}", found

    def as_is(x: Tensor) -> Tensor:
        return x

    def apart(x: Tensor) -> Tensor:
        return PairsApart(len(x)).join([x.flatten(0, 1)]).unflatten(0, (len(x), -1))

    def together(x: Tensor) -> Tensor:
        return PairsApart(len(x)).split(x.flatten(0, 1))[0].unflatten(0, (len(x), -1))

    def by_head(*parts: Tensor) -> list[Tensor]:
        """Undoes that the rows of several parts followed each other."""
        rows = torch.stack(parts, 1).flatten(0, 2).chunk(len(parts))
        return [part.unflatten(0, (-1, width)) for part in rows]

    for order in (apart, together):
        for of_q, of_k in ((order, order), (order, as_is), (as_is, order)):
            what = "rotary features in the wrong order"
            yield changed(what, lambda q, k, v, f=of_q, g=of_k: (f(q), g(k), v))  # type: ignore[misc]
    yield changed("keys and values swapped", lambda q, k, v: (q, v, k))
    if fused:
        yield changed("queries and keys swapped", lambda q, k, v: (k, q, v))
        yield changed("queries and values swapped", lambda q, k, v: (v, k, q))
        yield changed("all queries before all keys, not head by head", by_head)
    else:
        yield changed("all keys before all values, not head by head", lambda q, k, v: (q, *by_head(k, v)))


def _wide(dtype: torch.dtype) -> Any:
    """Returns a context in which transformers computes everything in ``dtype``."""
    return SinglePrecisionIsDouble() if dtype == torch.float64 else nullcontext()


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
