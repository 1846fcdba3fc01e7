"""The typed configuration: one dataclass per config group.

Every value of a YAML file in ``conf/`` lands in one field here, and constructors take these objects themselves: the
options of communication, sharding and checkpoints are one object each, from the command line to the line that obeys
them. No object changes after it is made. Hydra uses the same classes as its schema, so composition refuses a misspelt
key or an ill-typed value. Nothing here imports torch. A number declares its range beside its default (``whole`` or
``real``), and a word its enumeration (``word``). ``validate`` checks what fields must satisfy *together*.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from tedlab.ranges import real, whole, word
from tedlab.registry import mixtures

# Bounds of numbers that nothing but a slip of the hand exceeds.
_WIDEST = 1 << 24  # of a dimension of the model
_MOST_PROCESSES = 1 << 20
_YEAR_S = 365 * 24 * 3600


# Words that are one of few. Members have the words' names in capitals.
AverageKind = StrEnum("AverageKind", "EMA MEAN")
Activation = StrEnum("Activation", "GELU SWIGLU CLAMPED_SWIGLU")
Norm = StrEnum("Norm", "LAYER RMS")
Positions = StrEnum("Positions", "LEARNED ROTARY")
QKNorm = StrEnum("QKNorm", "NONE HEAD FULL")
RotaryScaling = StrEnum("RotaryScaling", "NONE LINEAR NTK YARN LLAMA3")
Compiler = StrEnum("Compiler", "NONE INDUCTOR AOT_EAGER")
Dedup = StrEnum("Dedup", "NONE RANK NODE GROUP")
Granularity = StrEnum("Granularity", "NONE BLOCK")
ExpertKernel = StrEnum("ExpertKernel", "AUTO TORCH TRITON")
DropPolicy = StrEnum("DropPolicy", "PROBS POSITION")
Scoring = StrEnum("Scoring", "SOFTMAX SIGMOID")
Gates = StrEnum("Gates", "RAW NORMALIZED SOFTMAX")
GroupScore = StrEnum("GroupScore", "MAX TOP2")
SharedCombine = StrEnum("SharedCombine", "ADD CG1 CG2")
Shortcut = StrEnum("Shortcut", "NONE POS1 POS2 POS3 DGMOE")
Noise = StrEnum("Noise", "NONE GUMBEL NORMAL")
BiasUpdate = StrEnum("BiasUpdate", "NONE SIGN PROPORTIONAL")
BalanceScope = StrEnum("BalanceScope", "MICRO_BATCH SEQUENCE GLOBAL_BATCH")
BalanceChoices = StrEnum("BalanceChoices", "ALL FIRST")
LendPolicy = StrEnum("LendPolicy", "NONE LLEP EVEN")
Order = StrEnum("Order", "EXPERT EXPERT_DATA")
Slicing = StrEnum("Slicing", "NONE TOKENS")
Documents = StrEnum("Documents", "PACKED MASKED")
Packing = StrEnum("Packing", "CONCATENATE BEST_FIT")
Mixing = StrEnum("Mixing", "WEIGHTS TOKENS TEMPERATURE")
Backend = StrEnum("Backend", "NCCL GLOO")
ChartAxis = StrEnum("ChartAxis", "STEP TOKENS TIME")
PlannedPhase = StrEnum("PlannedPhase", "TRAIN GENERATE DISAGGREGATED")
EvalDocuments = StrEnum("EvalDocuments", "APART PACKED")
EvalPrecision = StrEnum("EvalPrecision", {"SINGLE": "32-true", "DOUBLE": "64-true", "BF16": "bf16-true"})
CertificatePrecision = StrEnum("CertificatePrecision", {"DOUBLE": "64-true", "BF16": "bf16-true"})


class Frozen:
    """A dataclass whose fields are set once; ``dataclasses.replace`` makes a copy with others.

    ``dataclass(frozen=True)`` would not do: OmegaConf lets no command line set the fields of such a class.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            raise FrozenInstanceError(f"{type(self).__name__}.{name} is set: make a copy, with dataclasses.replace")
        super().__setattr__(name, value)


@dataclass
class RecomputeConfig(Frozen):
    """Activation checkpointing: what the backward pass recomputes instead of keeping it in memory."""

    granularity: str = word(Granularity.NONE)  # none | block (each block as a whole)
    early_stop: bool = True  # stop where the backward pass needs no more; false: recompute all, as the paper's baseline


@dataclass
class LatentConfig(Frozen):
    """Multi-head latent attention (DeepSeek-V2): keys and values are made of a few features that all heads share."""

    kv_rank: int | None = whole(None, least=1, most=_WIDEST)  # these features; None: ordinary attention
    q_rank: int | None = whole(None, least=1, most=_WIDEST)  # the same for queries; None: they are not compressed
    # Features of a head: of queries and keys without a position, of those that turn with it, and of values.
    nope_dim: int = whole(128, least=1, most=_WIDEST)
    rope_dim: int = whole(64, least=2, most=_WIDEST)
    v_dim: int = whole(128, least=1, most=_WIDEST)


@dataclass
class AttentionConfig(Frozen):
    """What a token attends to, beside what ``model`` says of heads."""

    qkv_bias: bool | None = None  # the projections to queries, keys and values have biases; None: as model.bias
    out_bias: bool | None = None  # the output projection has a bias; None: as model.bias
    # The number of tokens that a token attends to, itself and those before it; None: all. Blocks full_every-1,
    # 2·full_every-1, … attend to all anyway (gpt-oss: 2); None: no block does (Mixtral).
    window: int | None = whole(None, least=1, most=_WIDEST)
    full_every: int | None = whole(None, least=2)
    sinks: bool = False  # each head's softmax has one more entry, a learned logit without a value (gpt-oss)
    latent: LatentConfig = field(default_factory=LatentConfig)

    def window_of(self, block: int) -> int | None:
        """The window of a block, by its index; None: a token attends to all before it."""
        full = self.full_every is not None and (block + 1) % self.full_every == 0
        return None if full else self.window


@dataclass
class RotaryConfig(Frozen):
    """How rotary positions are stretched over longer texts than those a model was first trained on."""

    # none | linear (all angles) | ntk (the base, at lengths above original_length) | yarn (slow pairs, after a ramp) |
    # llama3 (slow pairs, smoothly)
    scaling: str = word(RotaryScaling.NONE)
    factor: float = real(1.0, least=1)  # how many times longer
    original_length: int | None = whole(None, least=1, most=_WIDEST)  # ntk, yarn, llama3: of those first texts
    # yarn: pairs that turn more than beta_fast times over original_length stay as they are, those that turn less than
    # beta_slow times are divided by the factor; truncate rounds the ramp between them outwards to whole pairs.
    beta_fast: float = real(32.0, above=0)
    beta_slow: float = real(1.0, above=0)
    truncate: bool = True
    # yarn multiplies queries and keys by attention_factor; None: 0.1·ln(factor) + 1, or with both of the next two the
    # ratio of 0.1·mscale·ln(factor) + 1 and the same of mscale_all_dim. Latent attention multiplies its scores by the
    # square of the latter (DeepSeek).
    attention_factor: float | None = real(None, above=0)
    mscale: float | None = real(None, least=0)
    mscale_all_dim: float | None = real(None, least=0)
    # llama3: pairs that turn more than high_freq_factor times stay, those below low_freq_factor are divided.
    low_freq_factor: float = real(1.0, above=0)
    high_freq_factor: float = real(4.0, above=0)


@dataclass
class ModelConfig(Frozen):
    """A pre-norm decoder: GPT-3 by default; the options below make it one like OLMoE or Mixtral."""

    layers: int = whole(least=1, most=10_000)  # blocks, each of attention and a feed-forward layer
    hidden: int = whole(least=1, most=_WIDEST)  # features of a token between layers
    heads: int = whole(least=1, most=_WIDEST)  # of attention, in each block
    ffn: int = whole(least=1, most=_WIDEST)  # width of dense feed-forward layers; and of experts without moe.ffn
    sequence_length: int = whole(least=1, most=_WIDEST)  # tokens of one sample; also the size of the position table
    activation: str = word(Activation.GELU)  # gelu | swiglu | clamped_swiglu (gpt-oss)
    bias: bool = True  # linear layers and experts have biases
    norm: str = word(Norm.LAYER)  # layer (LayerNorm) | rms (RMSNorm, which has no bias)
    positions: str = word(Positions.LEARNED)  # learned (a table) | rotary (queries and keys are rotated)
    # The base of rotary positions: feature pair i of d turns by base^(-2i/d) at each position.
    rotary_base: float = real(10_000.0, above=1)
    # None: the tokenizer's size, rounded up to a multiple of 128.
    vocab_size: int | None = whole(None, least=1, most=_WIDEST)
    tie_embeddings: bool = True  # the output projection is the token embedding
    # Standard deviation of initial weights; residual outputs are scaled by 1/sqrt(2·layers).
    init_std: float = real(0.02, above=0)
    # The number of tokens whose logits exist at a time, with their gradient; None: all logits exist at once.
    loss_chunk: int | None = whole(None, least=1)
    # torch.compile of each block (all but dropless experts) and of the loss in chunks: none | inductor | aot_eager
    # (no code generation).
    compile: str = word(Compiler.NONE)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    architecture: str = "gpt"  # gpt | a model that a package registers, see docs/guests.md
    # Heads of keys and values, each of which belongs to several heads of queries; None: as many as heads.
    kv_heads: int | None = whole(None, least=1, most=_WIDEST)
    head_dim: int | None = whole(None, least=1, most=_WIDEST)  # features of a head; None: hidden / heads
    # RMSNorm of queries and keys: none | head (of each head, Qwen3) | full (of all heads together, OLMoE).
    qk_norm: str = word(QKNorm.NONE)
    norm_eps: float = real(1e-5, above=0)  # added to the variance, or to the mean square
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    rotary: RotaryConfig = field(default_factory=RotaryConfig)
    # clamped_swiglu: gates are at most this, linear parts between plus and minus this.
    swiglu_limit: float = real(7.0, above=0)
    # How initial weights and learning rates follow the width, see docs/mup.md: standard (not at all) | mup | spectral |
    # a registered name. init_std and optim.lr are those of the same model with hidden=base_hidden and all other widths
    # narrower in proportion; None: standard.
    parametrization: str = "standard"
    base_hidden: int | None = whole(None, least=1, most=_WIDEST)


@dataclass
class RouterConfig(Frozen):
    """How the default router scores experts, chooses among them, and weights what it chose."""

    # softmax over all experts | sigmoid of each expert's logit by itself (DeepSeek-V3)
    scoring: str = word(Scoring.SOFTMAX)
    # The weight of a choice: its score (raw) | its share of its token's chosen scores (normalized) | the softmax over
    # its token's chosen logits (softmax: top-k before softmax, gpt-oss). null: normalized, but raw for top_k=1, where
    # the router would get no gradient.
    gates: str | None = word(None, Gates)
    gate_scale: float = real(1.0, above=0)  # factor on all weights (DeepSeek's routed_scaling_factor)
    # Experts form this many groups of neighbours, of which a token chooses from the best chosen_groups (DeepSeek).
    expert_groups: int = whole(1, least=1, most=_WIDEST)
    chosen_groups: int = whole(1, least=1, most=_WIDEST)
    # A group's score: its best expert's (max, DeepSeek-V2) | the sum of its best two (top2, DeepSeek-V3).
    group_score: str = word(GroupScore.MAX)
    # Added to logits in training, for the choice alone: none | gumbel (experts are sampled by their softmax) | normal.
    noise: str = word(Noise.NONE)
    noise_std: float = real(1.0, above=0)  # factor on the noise
    jitter: float = real(0.0, least=0, below=1)  # in training, factors from 1-jitter to 1+jitter on the input (Switch)
    # Balancing without a loss (DeepSeek-V3): each expert has a bias that counts in the choice alone. After each step,
    # sign adds bias_rate if the expert got less than the mean, and takes it away if it got more; proportional adds
    # bias_rate × (1 - load / mean load).
    bias_update: str = word(BiasUpdate.NONE)
    bias_rate: float = real(0.001, above=0)
    bias: bool = False  # logits have a learned bias (gpt-oss), which counts in weights and losses, too


@dataclass
class BalanceConfig(Frozen):
    """What the load-balancing loss counts."""

    # Load and probabilities are those of each micro-batch of a data rank | each sequence | the whole global batch, over
    # all data ranks and accumulated micro-batches, which takes one more forward pass per step with accumulation.
    scope: str = word(BalanceScope.MICRO_BATCH)
    choices: str = word(BalanceChoices.ALL)  # all of a token's choices | first alone (GShard, Switch)
    dropped: bool = True  # counts choices whose expert was full


@dataclass
class SharedConfig(Frozen):
    """Experts that every token goes to, beside those that a router chooses (DeepSeek, Qwen2-MoE)."""

    experts: int = whole(0, least=0, most=_WIDEST)  # computed as one that is as wide as all together
    ffn: int | None = whole(None, least=1, most=_WIDEST)  # width of each; null: that of a routed expert
    # How their result joins that of routed experts (ScMoE): added (add) | added after it was weighted by the sigmoid of
    # a product of the token (cg1, Qwen2-MoE) | both are weighted, by the softmax of two products of the token (cg2).
    combine: str = word(SharedCombine.ADD)


@dataclass
class LendConfig(Frozen):
    """Whether processes with more rows than others lend them experts, see docs/llep.md. It changes no result."""

    # none | llep (overloaded homes of experts lend to those with the fewest rows) | even (all get equally many rows, up
    # to one, and borrow from at most one home; it obeys none of the values below)
    policy: str = word(LendPolicy.NONE)
    threshold: float = real(1.3, least=1)  # lend if the busiest process has so many times the mean of rows, or more
    alpha: float = real(1.0, least=1)  # the rows that a process may have after that, as a multiple of the mean
    # The fewest rows that are worth a loan: a number | [inside a node, between nodes] | auto (as many as save the time
    # that the weights and their gradients take on these links).
    minimum: Any = "auto"
    keep_small: bool = True  # rows for which nobody has room enough stay at home; false: as in the paper's Algorithm 3
    cluster: str = "dgx_h200"  # the cluster whose links auto assumes, unless one is emulated
    ranks_per_node: int | None = whole(None, least=1)  # None: as in that cluster


@dataclass
class MoEConfig(Frozen):
    """Experts in place of the feed-forward layer of some blocks: every n-th, all but the first, or those listed."""

    num_experts: int = whole(least=0, most=_WIDEST)  # 0: a dense model
    every: int = whole(2, least=1)  # experts in blocks every-1, 2·every-1, … (the paper: every second layer)
    top_k: int = whole(1, least=1)  # experts that each token chooses
    # capacity | packed (the same choices; only slots that are full are sent and computed) | dropless (experts take all
    # tokens routed to them; no capacity_… applies) | a registered name
    dispatch: str = "capacity"
    capacity_factor: float | None = real(1.25, above=0)  # None: unlimited, no token is dropped
    # Capacity is rounded up to a multiple of this in every layout.
    capacity_multiple: int = whole(8, least=1, most=_WIDEST)
    # The tokens of a micro-batch are divided into this many groups of neighbouring positions, each with its share of
    # the capacity. None: 1, or with parallel.sequence or slice=tokens the tensor degree: each tensor rank only sees its
    # own positions.
    capacity_groups: int | None = whole(None, least=1)
    # Kernels that gather, activate and weight rows of experts: auto (for rows of experts triton where it runs; for
    # slots torch, which model.compile fuses) | torch | triton (which leaves experts out of what is compiled)
    kernel: str = word(ExpertKernel.AUTO)
    aux_loss: float = real(0.01, least=0)  # coefficient of the load-balancing loss, summed over MoE layers
    z_loss: float = real(0.0, least=0)  # coefficient of the router z-loss, summed over MoE layers
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    # default (top-k) | expert_choice | random | hash | round_robin | deepspeed_top1 | deepspeed_top2 | deepspeed_topk
    gating: str = "default"
    router: RouterConfig = field(default_factory=RouterConfig)
    # The next three are for DeepSpeed's gatings; None: as in DeepSpeed.
    min_capacity: int | None = whole(None, least=0)  # all three: the lowest capacity; None: 4
    random_token_selection: bool | None = None  # top1: a full expert keeps a random selection; None: true
    second_expert_sampling: bool | None = None  # top2: the second expert is drawn at random; None: true
    # default, deepspeed_topk: a full expert keeps its most probable choices (probs) or its first ones (position). None:
    # position in the default router, probs in DeepSpeed's.
    drop_policy: str | None = word(None, DropPolicy)
    first_dense: int = whole(0, least=0)  # the first so many blocks have no experts, whatever every says
    # The blocks that have experts, counted from 0, in place of every and first_dense; null: as these say.
    blocks: list[int] | None = None
    ffn: int | None = whole(None, least=1, most=_WIDEST)  # width of an expert; null: model.ffn
    shared: SharedConfig = field(default_factory=SharedConfig)
    # What routers and routed experts read (ScMoE, arXiv 2404.05019): what the shared experts of their block read (none)
    # | what an earlier sub-layer reads: their block's attention (pos1) | the feed-forward layer (pos2) or the attention
    # (pos3) of the dense block before it, which then runs as one with theirs | both what pos2 and what none reads, each
    # for an expert of its own, in place of shared experts (dgmoe, the paper's double-gated mixture).
    shortcut: str = word(Shortcut.NONE)
    lend: LendConfig = field(default_factory=LendConfig)
    # Which tokens each tensor rank routes and exchanges: all (none) | those of its own positions, as with
    # parallel.sequence, but in blocks' routed experts alone (tokens; X-MoE's SSMB, arXiv 2508.13337).
    slice: str = word(Slicing.NONE)

    def routed(self, layers: int) -> tuple[int, ...]:
        """Returns the indices of the blocks that have experts, in a model of so many."""
        if not self.num_experts:
            return ()
        if self.blocks is not None:
            return tuple(sorted(self.blocks))
        return tuple(n for n in range(self.every - 1, layers, self.every) if n >= self.first_dense)

    @property
    def sliced(self) -> bool:
        """Whether each tensor rank routes and exchanges tokens of its own positions in any layout."""
        return self.slice == Slicing.TOKENS

    @property
    def paired(self) -> bool:
        """Whether each block with experts runs as one with the dense block before it."""
        return self.shortcut in (Shortcut.POS2, Shortcut.POS3, Shortcut.DGMOE)

    @property
    def inputs(self) -> int:
        """How many tensors of a token routers read; each is routed to ``top_k`` experts."""
        return 2 if self.shortcut == Shortcut.DGMOE else 1

    @property
    def unlimited(self) -> bool:
        """Whether experts take all tokens that choose them."""
        return mixtures[self.dispatch].unlimited

    @property
    def ragged(self) -> bool:
        """Whether experts get rows, as many as routers choose, rather than slots, so that shapes depend on choices."""
        return self.unlimited or mixtures[self.dispatch].packed


@dataclass
class ParallelConfig(Frozen):
    """Degrees of parallelism. ``world_size`` = tensor × data = expert_tensor × expert × expert_data."""

    world_size: int = whole(least=1, most=_MOST_PROCESSES)  # the number of processes on all nodes
    tensor: int = whole(1, least=1, most=_MOST_PROCESSES)  # processes that divide each dense layer by width
    expert: int = whole(1, least=1, most=_MOST_PROCESSES)  # processes that share out the experts of a layer
    sequence: bool = False  # shard activations between layers over the tensor group (Megatron's sequence parallelism)
    # Processes that divide each expert by width; None: as many as tensor. Any other number folds experts differently
    # from dense layers over the same processes.
    expert_tensor: int | None = whole(None, least=1, most=_MOST_PROCESSES)
    # Which processes are neighbours: those of an expert group (expert) | the replicas of an expert (expert_data).
    order: str = word(Order.EXPERT)


@dataclass
class LedgerConfig(Frozen):
    """The record of every collective."""

    every: int = whole(100, least=0)  # steps between logged averages, if they change; 0: never log
    time: bool = False  # also measure durations; this synchronises every collective


@dataclass(kw_only=True)
class CommOptions(Frozen):
    """What layers, strategy and closed form do about communication. No toggle changes what is computed."""

    dtd: bool = False  # duplicate token dropping: each tensor rank exchanges 1/T of what goes to experts (paper §5.1)
    fuse_reduce_scatter: bool = False  # with dtd: one reduce-scatter for the experts' all-reduce and the drop
    # Communication-aware checkpointing (paper §5.2): which results of collectives recomputation takes from memory.
    # false: none; true: all; shard: 1/T of each, gathered again inside the tensor group; a list of collectives (the
    # error about an unknown one lists all); auto: the best that fit in cac_budget_bytes.
    cac: Any = False
    skip_dead_gemm: bool = True  # with cac: do not recompute matrix products that only feed a result that was kept
    # Into how many chunks the slots or rows of each expert are divided: one is exchanged while another is computed.
    chunks: int = whole(1, least=1, most=64)
    # Backward passes of micro-batches run beside the forward pass of the next: one computes while the other exchanges.
    interleave: bool = False
    overlap_shared: bool = False  # shared experts compute while tokens are on their way to routed experts and back
    # With moe.shortcut: the sub-layers beside routed experts compute while tokens are on their way to these and back.
    overlap_shortcut: bool = False
    # With moe.shortcut: before which of the sub-layers beside their exchange routed experts compute, from 0 (the first)
    # to the number of these (after the last); None: where the FLOPs beside both exchanges are as equal as can be.
    shortcut_slot: int | None = whole(None, least=0)
    # Without a capacity: what a token sends if several of its choices are in one process. none: a row for each; rank:
    # one row, which is copied there, and one back, which is summed there; node: one to each node, and from there one to
    # each process, likewise; group: one to every process of the expert group, by an all-gather of known size, for which
    # no host waits, and sums come back by a reduce-scatter.
    dedup: str = word(Dedup.NONE)
    # Where experts are on several nodes, exchange with them in two steps: between nodes, to the process with the same
    # place in its node, and from there inside the node. As many bytes go between nodes, in fewer messages.
    hierarchical: bool = False
    # Consecutive ranks on a node, for hierarchical and dedup=node; None: those of this machine, of an emulated network,
    # or in predictions of the cluster.
    ranks_per_node: int | None = whole(None, least=1)

    @property
    def by_node(self) -> bool:
        """Whether processes of several nodes exchange with experts in two steps."""
        return self.hierarchical or self.dedup == Dedup.NODE


@dataclass
class CommConfig(CommOptions):
    """How processes communicate."""

    # nccl | gloo (processes may share a GPU) | None: nccl on GPUs, gloo on a CPU
    backend: str | None = word(None, Backend)
    timeout_s: int = whole(600, least=1, most=_YEAR_S)  # a collective that takes longer ends the run
    cac_budget_bytes: int | None = whole(None, least=0, most=1 << 50)  # per process, for cac=auto
    cac_cluster: str = "dgx_a100"  # the cluster for which cac=auto computes times, unless one is emulated
    emulate: str | None = None  # delay each collective as on this cluster: a name in conf/cluster
    # How many times slower than that network, to match a slower processor; 0: count only, never sleep.
    emulate_dilation: float = real(1.0, least=0, most=1e9)
    emulate_ranks_per_node: int | None = whole(None, least=1)  # None: as in the cluster
    ledger: LedgerConfig = field(default_factory=LedgerConfig)


@dataclass(kw_only=True)
class RampConfig(Frozen):
    """What the steps of a stage take, where that differs from the end of the run."""

    until: int = whole(least=1)  # the first step of the next stage; steps count from 0
    batch_size: int | None = whole(None, least=1)  # None: data.batch_size
    # Inputs of a row, of which a sample of model.sequence_length makes several; None: model.sequence_length.
    sequence_length: int | None = whole(None, least=1)


@dataclass
class StreamConfig(Frozen):
    """A data set that Hugging Face ``datasets`` streams into the cache, in place of files."""

    dataset: str | None = None  # its name at the Hub, a folder, or a format (json | csv | parquet | arrow | text)
    config: str | None = None  # which of its configurations; None: its default
    files: str | None = None  # a glob over its files; of a format: a glob or URL
    split: str = "train"  # the split to train on
    validation: str | None = None  # the split to validate on; None: documents of split are held out
    revision: str | None = None  # a commit, branch or tag at the Hub; None: the newest when reading begins
    tokens: int | None = whole(None, least=1)  # how many tokens to train on, up to the end of a document


@dataclass(kw_only=True)
class SourceConfig(Frozen):
    """One of several sources of text that are mixed."""

    path: str | None = ""  # as data.path: files of any format of docs/data.md; None: the standard library's source
    weight: float | None = real(None, above=0, most=1)  # its share of all samples, with data.mixing=weights
    field: str | None = None  # None: data.field
    epochs: float | None = real(None, above=0)  # read it at most so often; None: as often as its share asks for
    stream: StreamConfig = dataclasses.field(default_factory=StreamConfig)  # in place of path, as data.stream


@dataclass
class DataConfig(Frozen):
    """Text, how it becomes tokens, and how tokens become batches."""

    path: str | None = MISSING  # file, folder or glob of text, JSONL, tables, …; None: the standard library's source
    field: str = "text"  # the field of a JSONL line, or the column of a table, that holds the text
    tokenizer: str = "byte"  # byte | bpe (trained on the corpus on first use) | path of a tokenizers JSON file
    bpe_vocab_size: int = whole(4096, least=257, most=_WIDEST)  # 256 bytes, a separator of documents, and merges
    batch_size: int = whole(least=1)  # samples per optimizer step, over all data ranks and micro-batches
    micro_batch_size: int = whole(least=1)  # samples per forward pass of one data rank
    # Share of the files, or of the documents of a single file, held out for validation.
    validation_fraction: float = real(0.05, above=0, below=1)
    validation_samples: int = whole(least=1)  # samples per validation pass, over all data ranks
    training_batches: int | None = whole(None, least=1)  # train on the first so many only, repeatedly; None: on all
    cache_dir: str = "~/.cache/tedlab"  # where token files and tokenizers are kept
    num_workers: int = whole(0, least=0, most=1024)  # processes that read samples; 0: the training process itself
    module: str = "tedlab.data.TextDataModule"  # the class that makes batches: this one or a subclass
    # packed: a token sees all of its sample before it | masked: of its own document alone, whose positions begin at 0.
    documents: str = word(Documents.PACKED)
    # concatenate: end to end, cut where a sample ends | best_fit: whole if they fit; the rest of a sample is padding.
    packing: str = word(Packing.CONCATENATE)
    # Stages before these sizes apply: [{until: 100, batch_size: 4, sequence_length: 256}, …]; see docs/training.md.
    ramp: list[RampConfig] = dataclasses.field(default_factory=list)
    # In place of path, several sources that are mixed, as name: {path, weight, field, epochs}.
    sources: dict[str, SourceConfig] = dataclasses.field(default_factory=dict)
    # weights: those of the sources | tokens: as large as they are | temperature: the power 1/temperature of that.
    mixing: str = word(Mixing.WEIGHTS)
    temperature: float = real(2.0, least=1)
    # In place of path, a data set that Hugging Face datasets streams: {dataset, split, tokens, …}.
    stream: StreamConfig = dataclasses.field(default_factory=StreamConfig)


@dataclass(kw_only=True)
class ShardingOptions(Frozen):
    """How optimizer state and gradients are sharded over data ranks, and how the optimizer steps."""

    zero: bool = True  # shard optimizer state over data-parallel groups (ZeRO-1)
    overlap: bool = False  # reduce gradients during the backward pass
    bucket_elements: int = whole(1 << 24, least=1, most=1 << 40)  # elements per process that one collective reduces
    # A number: elements updated at a time, as in the paper | None: all | fused: one pass without temporaries (AdamW,
    # Adam) | auto: fused on a GPU for these two, otherwise 1,800,000.
    tile: Any = "auto"


@dataclass(kw_only=True)
class GroupConfig(Frozen):
    """How the parameters whose names match a pattern are trained, where that differs from ``optim``'s own values."""

    # A glob over the names of the network's parameters, such as blocks.*.feed_forward.router.*; * also matches dots. A
    # parameter belongs to the first group that matches it.
    pattern: str
    lr: float | None = real(None, above=0)  # None: optim.lr
    lr_factor: float | None = real(None, above=0)  # factor on optim.lr, in place of lr
    weight_decay: float | None = real(None, least=0)  # None: the optimizer's. Biases and norms never decay
    frozen: bool = False  # not trained at all


@dataclass
class OptimConfig(ShardingOptions):
    """The optimizer and its learning-rate schedule."""

    optimizer: dict[str, Any] = MISSING  # a ``_target_`` and its arguments, without the learning rate
    lr: float = real(above=0)  # the largest learning rate of the schedule
    # cosine | constant | wsd (constant, then linear decay) | a registered name; each starts with a linear warm-up.
    schedule: str = "cosine"
    warmup_steps: int = whole(0, least=0)  # steps in which the learning rate rises to lr
    final_lr_fraction: float = real(0.1, least=0, most=1)  # the fraction of lr at which cosine and wsd end
    decay_fraction: float = real(0.2, least=0, most=1)  # the fraction of the run in which wsd decays
    # Initial dynamic loss scale; None: 65536 with fp16, otherwise no scaling.
    loss_scale: float | None = real(None, least=1, most=2.0**64)
    stop_on_nonfinite: bool = True  # end the run before a loss or gradient that is inf or NaN reaches a weight
    groups: list[GroupConfig] = field(default_factory=list)  # parameters that are frozen or have rates of their own
    # How many steps wsd decays in, the last of the run, in place of a fraction; None: decay_fraction.
    decay_steps: int | None = whole(None, least=1)


@dataclass(kw_only=True)
class CheckpointOptions(Frozen):
    """How checkpoints are written."""

    async_save: bool = False  # write while training continues


@dataclass
class CheckpointConfig(CheckpointOptions):
    """When to save and what to keep, below ``output_dir/checkpoints``; ``last.ckpt`` is always there."""

    every: int | None = whole(None, least=1)  # steps between checkpoints; None: only at the end
    monitor: str | None = None  # a metric such as val/loss: save after each validation, keep those with the lowest
    keep: int = whole(1, least=1, also=(-1,))  # how many to keep, the newest or the best; -1: all


@dataclass
class RoutingConfig(Frozen):
    """A record of which experts tokens go to, see tedlab/record.py."""

    record: bool = False  # write the choices of every token and step to routing/ in the run directory
    replay: str | None = None  # the routing/ of a run, or that run's directory, whose choices are made instead of own


@dataclass
class InTrainingConfig(Frozen):
    """Sets of texts that are evaluated at each validation, see docs/evaluation.md."""

    sets: dict[str, str] = field(default_factory=dict)  # a path by the name of each: +eval.sets.NAME=PATH
    samples: int | None = whole(None, least=1)  # of each set, its first; null: all


@dataclass
class AverageConfig(Frozen):
    """An average of the weights of a run's steps, which validation and the model in checkpoints are."""

    kind: str | None = word(None, AverageKind)  # ema | mean; None: no average
    decay: float = real(0.999, least=0, below=1)  # of ema, each time that weights count
    every: int = whole(1, least=1)  # steps between weights that count
    start: int = whole(0, least=0)  # the first step, from 0, after which weights count


@dataclass
class TrainConfig(Frozen):
    """The whole configuration of ``tedlab train``."""

    model: ModelConfig = MISSING
    moe: MoEConfig = MISSING
    parallel: ParallelConfig = MISSING
    comm: CommConfig = MISSING
    data: DataConfig = MISSING
    optim: OptimConfig = MISSING
    trainer: dict[str, Any] = MISSING  # arguments of lightning.Trainer, as they are
    logger: dict[str, Any] = field(default_factory=dict)  # additional loggers, each with a ``_target_``
    callbacks: dict[str, Any] = field(default_factory=dict)  # additional callbacks, each with a ``_target_``
    experiment_name: str = MISSING  # the folder of its runs, below runs/
    seed: int = whole(least=0, most=2**32 - 1)  # of initial weights, data order and random draws
    output_dir: str = MISSING  # the run directory, which hydra.run.dir or hydra.sweep.dir sets
    # A checkpoint to resume from, or a run directory (or its checkpoints folder) with a last checkpoint.
    ckpt_path: str | None = None
    # auto: resume the run in output_dir, in the same W&B run; if there is no checkpoint, start a new run.
    resume: str | None = None
    # Start from these weights, with a new optimizer: an imported model, a run directory, or a checkpoint. They decide
    # what the model is (model, moe) and which tokenizer it has, unless the command line names these values.
    weights: str | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validate_every: int = whole(100, least=1)  # steps between validations; there is always one at the end
    # Steps between checks that replicas are equal, bit by bit; there is also one at the end. None: never.
    check_replicas_every: int | None = whole(100, least=1)
    # Steps between pictures of the experts' load; None: only at the end.
    router_picture_every: int | None = whole(100, least=1)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    certificate: bool = False  # first prove that a scaled-down version of this run equals one process
    # The precision of the certificate: 64-true | bf16-true (equal within rounding).
    certificate_precision: str = word(CertificatePrecision.DOUBLE)
    objective: str = "val/loss"  # the metric that a sweeper minimises
    choices: dict[str, Any] = field(default_factory=dict)  # which file each config group came from
    eval: InTrainingConfig = field(default_factory=InTrainingConfig)
    average: AverageConfig = field(default_factory=AverageConfig)

    @property
    def compiles_experts(self) -> bool:
        """Whether exchanges with experts are inside what is compiled, where nothing can run beside them."""
        left_out = self.moe.ragged or self.moe.kernel == ExpertKernel.TRITON
        return self.model.compile != Compiler.NONE and not left_out


@dataclass
class AssumedRouting(Frozen):
    """What ``tedlab simulate`` and ``tedlab plan`` assume of routers."""

    routing: str | None = None  # how often dropless experts are chosen: balanced | zipf | trace; None: balanced
    zipf: float | None = real(None, least=0, most=100)  # the r-th expert is chosen in proportion to r^-zipf
    trace: str | None = None  # the router_trace.npz of a run


@dataclass
class SimulationConfig(AssumedRouting):
    """What ``tedlab simulate`` takes beside a job and a cluster."""

    rank: Any = None  # the rank to simulate; stages: one of each kind; all: same, but reports every rank; None: 0
    # fake: tensors have shapes but no values; real: compare all ranks (at most 128) of a scaled-down configuration with
    # one process, in float64.
    values: str = "fake"


@dataclass
class PlanConfig(Frozen):
    """What ``tedlab plan`` takes beside a job and a cluster."""

    reserve_gib: float = real(1.2, least=0)  # of each GPU, left for the CUDA context, NCCL and workspaces
    simulate: int = whole(4, least=1, most=1000)  # how many of the best are simulated
    largest: bool = False  # first find the largest base model that fits
    # Directories of runs on this cluster, whose measured steps correct its constants; plan.from=[…] for short.
    runs: list[str] = field(default_factory=list)
    # What is planned: train | generate | disaggregated (docs/inference-plans.md); phase=… for short.
    phase: str = word(PlannedPhase.TRAIN)


@dataclass
class ServeConfig(Frozen):
    """What ``tedlab plan`` takes with phase=generate or disaggregated. On the command line it needs no ``serve.``."""

    prompt: int | None = whole(None, least=1, most=1 << 24)  # tokens of each prompt; required
    output: int | None = whole(None, least=1, most=1 << 24)  # tokens that are added to each; required
    batch: int | None = whole(None, least=1, most=1 << 24)  # generate: texts at the same time, over all GPUs; required
    # Decoding may load experts in another layout from the host, where they wait in INT4: this changes weights, and so
    # what the model says.
    int4: bool = False
    upload: float = real(25e9, above=0)  # with int4: bytes/s from the host to each GPU at the same time; assumed
    experts_on: str | None = None  # disaggregated: the cluster of the expert pool, if it is another; a preset or a file
    latency: float = real(0.15, above=0)  # disaggregated: seconds that a new token may take at most
    price: float = real(1.0, above=0)  # disaggregated: of a GPU of the attention pool, in any unit
    expert_price: float = real(1.0, above=0)  # disaggregated: of a GPU of the expert pool, in the same unit
    # disaggregated: GPUs of each pool; None: any number, together no more than world_size.
    attention_gpus: int | None = whole(None, least=1, most=_MOST_PROCESSES)
    expert_gpus: int | None = whole(None, least=1, most=_MOST_PROCESSES)


@dataclass
class CalibrateConfig(Frozen):
    """What ``tedlab calibrate`` measures, and where that goes."""

    out: str = MISSING  # the cluster file (.yaml) to write; a picture of the fit goes beside it
    # The number of processes, which measure at the same time; torchrun and srun set it.
    processes: int = whole(1, least=1)
    device: str | None = None  # cpu | cuda; None: cuda where there is a GPU
    quick: bool = False  # get a rough idea in seconds

    @property
    def output_dir(self) -> str:
        """Where files go."""
        return str(Path(self.out).parent)


@dataclass
class GenerateConfig(Frozen):
    """What to continue, and how."""

    run: str  # directory of a finished run
    prompt: str = ""  # what the text begins with
    tokens: int = whole(200, least=0)  # how many to add
    temperature: float = real(0.8, least=1e-3, also=(0.0,))  # 0: always the most probable token
    seed: int = whole(0, least=0, most=2**63 - 1)  # of the random choice of tokens
    checkpoint: str = "last.ckpt"  # its name in checkpoints/
    top_k: int | None = whole(None, least=1)  # choose among so many of the most probable tokens; null: among all
    top_p: float = real(1.0, least=1e-6, most=1.0)  # choose among the most probable that together have this probability
    stop: list[str] = field(default_factory=list)  # texts that end a continuation, which does not contain them
    prompts: str | None = None  # a file with a prompt on each line, which are continued together; null: prompt
    cache: bool = True  # remember keys and values of earlier tokens; false: compute them again for each token
    # The number of processes, which torchrun and srun set: of tensor x data ranks, and expert of them share experts.
    processes: int = whole(1, least=1, most=_MOST_PROCESSES)
    tensor: int = whole(1, least=1, most=_MOST_PROCESSES)
    expert: int = whole(1, least=1, most=_MOST_PROCESSES)
    device: str | None = None  # cpu | cuda; null: cuda where there is a GPU for each process
    expert_tensor: int | None = whole(None, least=1, most=_MOST_PROCESSES)  # divide each expert; null: as tensor says

    @property
    def output_dir(self) -> str:
        """Nowhere: it writes no files, and there is nothing to resume."""
        return "/dev/null"


@dataclass
class EvalConfig(Frozen):
    """What to evaluate on, and how."""

    run: str  # a run directory, an imported model's, or a checkpoint in one
    # Named sets of texts: data.NAME=PATH, where PATH is a file, folder or glob of text, JSONL or tables.
    data: dict[str, str] = field(default_factory=dict)
    # Tasks of the lm-eval harness (needs the extra eval): names, or paths of YAML files.
    tasks: list[str] = field(default_factory=list)
    include: str | None = None  # a folder with further tasks
    fewshot: int | None = whole(None, least=0)  # examples before each document of a task; null: as the task says
    limit: int | None = whole(None, least=1)  # the first documents of each task; null: all
    field: str = "text"  # the field of a JSONL line, or the column of a table, that holds the text
    # apart: each document by itself, after a separator | packed: all of a set end to end, as in packed training
    documents: str = word(EvalDocuments.APART)
    context: int | None = whole(None, least=1, most=_WIDEST)  # tokens of a window; null: model.sequence_length
    # Tokens that each further window of a longer text predicts, with the others of its context before them; the fewer,
    # the lower the loss and the longer it takes. null: context, windows do not overlap.
    stride: int | None = whole(None, least=1, most=_WIDEST)
    batch_size: int = whole(8, least=1)  # windows that each data rank computes at a time
    precision: str = word(EvalPrecision.SINGLE)  # of weights and activations: 32-true | 64-true | bf16-true
    out: str | None = None  # the folder for results; null: eval/ in the run's directory
    # The number of processes, which torchrun and srun set: of tensor x data ranks, and expert of them share experts.
    processes: int = whole(1, least=1, most=_MOST_PROCESSES)
    tensor: int = whole(1, least=1, most=_MOST_PROCESSES)
    expert: int = whole(1, least=1, most=_MOST_PROCESSES)
    expert_tensor: int | None = whole(None, least=1, most=_MOST_PROCESSES)  # divide each expert; null: as tensor says
    device: str | None = None  # cpu | cuda; null: cuda where there is a GPU for each process
    wandb: bool = False  # also add the results to the summary of the training's W&B run
    # Files of tasks may name Python functions and scripts of metrics, and tasks may run what the model writes.
    tasks_execute_code: bool = False

    @property
    def output_dir(self) -> str:
        """Nowhere: there is nothing to resume."""
        return "/dev/null"


@dataclass
class CompareConfig(Frozen):
    """Which runs ``tedlab compare`` puts side by side, and how."""

    # Run directories (with config.yaml), or directories with runs directly below them, such as a sweep's. On the
    # command line they need no key: tedlab compare DIR DIR.
    runs: list[str] = field(default_factory=list)
    by: str | None = None  # the settings to show: KEY,KEY,…; None: all that differ
    # FILE.html: write a self-contained report; its charts go into FILE_charts/ beside it. FILE.csv: all numbers as they
    # were measured. FILE.tex: the table of results for LaTeX.
    out: str | None = None
    baseline: str | None = None  # the name of the run that others are compared with; None: the first one
    # Also compare runs of different models, data or numbers of steps (otherwise an error), with a note that their
    # losses are not comparable, and runs that are going on or broke, as far as they came.
    force: bool = False
    wandb: str | None = None  # ENTITY/PROJECT: read the runs from a W&B server, not from directories
    group: str | None = None  # the group of those runs; tedlab train names it after the directory of a sweep
    workspace: bool = False  # also save a view of the group with the same charts there (needs tedlab's extra 'wandb')
    x: str = word(ChartAxis.STEP)  # step | tokens | time: what the report draws losses over
    # How much of the earlier values each value of a training loss in the chart keeps: 0.9 averages over about ten.
    smoothing: float = real(0.0, least=0.0, below=1.0)
    # Average runs that differ in nothing but their seed: losses have standard deviations, the chart has bands.
    seeds: bool = False


def with_values(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """A copy with other values, each by its dotted name: ``{"optim.lr": 0.1, "trainer.max_steps": 5}``.

    Raises:
        TypeError: if a dataclass has no such field.
    """
    for name, value in values.items():
        config = _with_value(config, name.split("."), value)
    return config


def value_of(config: TrainConfig, name: str) -> Any:
    """The value of a dotted name; None where a dictionary has none."""
    place: Any = config
    for part in name.split("."):
        place = place.get(part) if isinstance(place, dict) else getattr(place, part)
    return place


def _with_value(place: Any, path: Sequence[str], value: Any) -> Any:
    name, *below = path
    if below:
        value = _with_value(place[name] if isinstance(place, dict) else getattr(place, name), below, value)
    return {**place, name: value} if isinstance(place, dict) else replace(place, **{name: value})
