"""The typed configuration: one dataclass per config group.

Every value of a YAML file in ``conf/`` lands in one field here, and these objects themselves are what constructors
take: the options of communication, sharding and checkpoints are one object each from the command line to the line that
obeys them. None of them changes once it is made. Hydra uses the same classes as its schema, so a misspelt key or an
ill-typed value never gets past composition.
Nothing here imports torch. A number declares its range beside its default, with ``whole`` or ``real``; a
word that is one of few its enumeration, with ``word``. What fields must
satisfy *together* is checked in ``validate``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from tedlab.ranges import real, whole, word

# Bounds of numbers that nothing but a slip of the hand exceeds.
_WIDEST = 1 << 24  # of a dimension of the model
_MOST_PROCESSES = 1 << 20
_YEAR_S = 365 * 24 * 3600


# Words that are one of few. Members have the words' names in capitals.
Activation = StrEnum("Activation", "GELU SWIGLU")
Norm = StrEnum("Norm", "LAYER RMS")
Positions = StrEnum("Positions", "LEARNED ROTARY")
Compiler = StrEnum("Compiler", "NONE INDUCTOR AOT_EAGER")
Granularity = StrEnum("Granularity", "NONE BLOCK")
ExpertKernel = StrEnum("ExpertKernel", "AUTO TORCH TRITON")
DropPolicy = StrEnum("DropPolicy", "PROBS POSITION")
Backend = StrEnum("Backend", "NCCL GLOO")
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
    """Activation checkpointing: what the backward pass computes again, so that it need not be kept."""

    granularity: str = word(Granularity.NONE)  # none | block (each block as a whole)
    early_stop: bool = True  # only as far as backward needs; false: all of it, the paper's baseline


@dataclass
class ModelConfig(Frozen):
    """A pre-norm decoder: GPT-3 by default, and with the choices below one like OLMoE or Mixtral."""

    layers: int = whole(least=1, most=10_000)
    hidden: int = whole(least=1, most=_WIDEST)
    heads: int = whole(least=1, most=_WIDEST)
    ffn: int = whole(least=1, most=_WIDEST)  # width of the feed-forward layer, and of each expert
    sequence_length: int = whole(least=1, most=_WIDEST)  # tokens of one sample; also the size of the position table
    activation: str = word(Activation.GELU)  # gelu | swiglu
    bias: bool = True  # linear layers and experts have biases
    norm: str = word(Norm.LAYER)  # layer (LayerNorm) | rms (RMSNorm, which has no bias)
    norm_eps: float = real(1e-5, above=0)  # added to the variance, or to the mean square
    positions: str = word(Positions.LEARNED)  # learned (a table) | rotary (queries and keys are rotated)
    rotary_base: float = real(
        10_000.0, above=1
    )  # of rotary positions: feature pair i of d turns by base^(-2i/d) at each position
    vocab_size: int | None = whole(
        None, least=1, most=_WIDEST
    )  # None: the tokenizer's, rounded up to a multiple of 128
    tie_embeddings: bool = True  # the output projection is the token embedding
    # Standard deviation of initial weights; residual outputs are scaled by 1/sqrt(2·layers).
    init_std: float = real(0.02, above=0)
    loss_chunk: int | None = whole(
        None, least=1
    )  # tokens whose logits exist at a time; None: all, and their gradient after them
    # torch.compile of each block (without dropless experts) and of the loss in chunks: none | inductor | aot_eager
    # (without code generation).
    compile: str = word(Compiler.NONE)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    architecture: str = "gpt"  # gpt | a model that a package registers, see docs/guests.md


@dataclass
class MoEConfig(Frozen):
    """Experts in place of the feed-forward layer of every ``every``-th block."""

    num_experts: int = whole(least=0, most=_WIDEST)  # 0: a dense model
    every: int = whole(2, least=1)  # experts in blocks every-1, 2·every-1, … (the paper: every second layer)
    top_k: int = whole(1, least=1)
    # capacity | dropless (experts take all that choose them; none of the capacity… applies) | one of a package
    dispatch: str = "capacity"
    capacity_factor: float | None = real(1.25, above=0)  # None: no token is ever dropped
    capacity_multiple: int = whole(
        8, least=1, most=_WIDEST
    )  # capacity is rounded up to a multiple of this in every layout
    # A micro-batch's tokens queue in this many groups of neighbouring positions, each with its share of the capacity.
    # None: 1, or with parallel.sequence the tensor degree, since each tensor rank then sees its own positions only.
    capacity_groups: int | None = whole(None, least=1)
    # Of dropless experts that are all in one process: auto (triton where it runs) | torch | triton.
    kernel: str = word(ExpertKernel.AUTO)
    aux_loss: float = real(0.01, least=0)  # coefficient of the load-balancing loss, summed over MoE layers
    z_loss: float = real(0.0, least=0)  # coefficient of the router z-loss, summed over MoE layers
    gating: str = "default"  # default | deepspeed_top1 | deepspeed_top2 | deepspeed_topk: see moe/deepspeed_gating.py
    # Of DeepSpeed's gatings alone; None: as in DeepSpeed.
    min_capacity: int | None = whole(None, least=0)  # all three: least capacity; None: 4
    random_token_selection: bool | None = None  # top1: a full expert keeps a random selection; None: true
    second_expert_sampling: bool | None = None  # top2: the second expert is drawn at random; None: true
    # topk: a full expert keeps the most probable (probs; None) or first (position)
    drop_policy: str | None = word(None, DropPolicy)

    def blocks(self, layers: int) -> range:
        """Indices of the blocks that have experts, in a model of so many."""
        return range(self.every - 1, layers, self.every) if self.num_experts else range(0)

    @property
    def unlimited(self) -> bool:
        """Whether experts take all tokens that choose them, so that shapes depend on what routers choose."""
        return self.dispatch == "dropless"


@dataclass
class ParallelConfig(Frozen):
    """Degrees of parallelism. ``world_size`` = tensor × data; ``data`` = expert × expert_data."""

    world_size: int = whole(least=1, most=_MOST_PROCESSES)  # processes in all, over all nodes
    tensor: int = whole(1, least=1, most=_MOST_PROCESSES)
    expert: int = whole(1, least=1, most=_MOST_PROCESSES)
    sequence: bool = False  # shard activations between layers over the tensor group (Megatron's sequence parallelism)


@dataclass
class LedgerConfig(Frozen):
    """The record of every collective."""

    every: int = whole(100, least=0)  # steps between averages in the log, where they change; 0: none
    time: bool = False  # also measure durations, which synchronises every collective


@dataclass(kw_only=True)
class CommOptions(Frozen):
    """What layers, strategy and closed form do about communication. No toggle changes what is computed."""

    dtd: bool = False  # duplicate token dropping: each tensor rank exchanges 1/T of what goes to experts (paper §5.1)
    fuse_reduce_scatter: bool = False  # with dtd: the experts' all-reduce and the drop after it as one reduce-scatter
    # Communication-aware checkpointing (paper §5.2): collectives' results that recomputation takes from memory. false;
    # true: all; shard: 1/T of each, gathered again inside the tensor group; a list of collectives (if one is wrong, all
    # are listed); auto: the best within cac_budget_bytes.
    cac: Any = False
    skip_dead_gemm: bool = True  # with cac: do not recompute matrix products that only feed a result that was kept


@dataclass
class CommConfig(CommOptions):
    """How processes talk."""

    # nccl | gloo (processes may share a GPU) | None: nccl on GPUs, gloo on a CPU
    backend: str | None = word(None, Backend)
    timeout_s: int = whole(600, least=1, most=_YEAR_S)  # a collective that takes longer ends the run
    cac_budget_bytes: int | None = whole(None, least=0, most=1 << 50)  # of each process, for cac=auto
    cac_cluster: str = "dgx_a100"  # whose links cac=auto reckons with, unless another is emulated
    emulate: str | None = None  # delay each collective as on this cluster: a name in conf/cluster
    # Times slower than that network, in proportion to a slower processor; 0: count only, sleep never.
    emulate_dilation: float = real(1.0, least=0, most=1e9)
    emulate_ranks_per_node: int | None = whole(None, least=1)  # None: the cluster's
    ledger: LedgerConfig = field(default_factory=LedgerConfig)


@dataclass
class DataConfig(Frozen):
    """Text, how it becomes tokens, and how tokens become batches."""

    path: str | None = MISSING  # file, folder or glob of text or JSONL; None: the Python standard library's source
    field: str = "text"  # the field of a JSONL line that holds the text
    tokenizer: str = "byte"  # byte | bpe (trained on the corpus on first use) | path of a tokenizers JSON file
    bpe_vocab_size: int = whole(4096, least=257, most=_WIDEST)  # 256 bytes, and what separates documents
    batch_size: int = whole(least=1)  # samples of one optimizer step, over all data ranks and accumulated micro-batches
    micro_batch_size: int = whole(least=1)  # samples of one forward pass of one data rank
    # Share of the files (of the documents, for a single file) held out.
    validation_fraction: float = real(0.05, above=0, below=1)
    validation_samples: int = whole(least=1)  # samples of one validation pass, over all data ranks
    training_batches: int | None = whole(None, least=1)  # the first so many, again and again; None: all there are
    cache_dir: str = "~/.cache/tedlab"
    num_workers: int = whole(0, least=0, most=1024)
    module: str = "tedlab.data.TextDataModule"  # the class that makes batches of all this; a subclass of this one


@dataclass(kw_only=True)
class ShardingOptions(Frozen):
    """How optimizer state and gradients are divided over data ranks, and stepped."""

    zero: bool = True  # shard optimizer state over data-parallel groups (ZeRO-1)
    overlap: bool = False  # reduce gradients while the backward pass goes on
    bucket_elements: int = whole(1 << 24, least=1, most=1 << 40)  # of each process, reduced in one collective
    tile: Any = 1_800_000  # int: elements updated at a time (the paper's tiled step); None: all; "fused": one pass


@dataclass
class OptimConfig(ShardingOptions):
    """The optimizer and its learning-rate schedule."""

    optimizer: dict[str, Any] = MISSING  # a ``_target_`` of torch.optim and its arguments except the learning rate
    lr: float = real(above=0)
    # cosine | constant | wsd (constant, then linear decay) | one of a package; each after a linear warm-up
    schedule: str = "cosine"
    warmup_steps: int = whole(0, least=0)
    final_lr_fraction: float = real(0.1, least=0, most=1)  # of the learning rate, where cosine and wsd end
    decay_fraction: float = real(0.2, least=0, most=1)  # of the run, in which wsd decays
    # Initial dynamic loss scale; None: 65536 with fp16, otherwise none at all.
    loss_scale: float | None = real(None, least=1, most=2.0**64)
    stop_on_nonfinite: bool = True  # end the run before a loss or gradient that is inf or NaN reaches a weight


@dataclass(kw_only=True)
class CheckpointOptions(Frozen):
    """How checkpoints are written."""

    async_save: bool = False  # write while training goes on


@dataclass
class CheckpointConfig(CheckpointOptions):
    """When to save and what to keep, below ``output_dir/checkpoints``; ``last.ckpt`` is always there."""

    every: int | None = whole(None, least=1)  # steps between checkpoints; None: only at the end
    monitor: str | None = None  # a metric such as val/loss: save after each validation, keep those with the lowest
    keep: int = whole(1, least=1, also=(-1,))  # how many to keep, the newest or the best; -1: all


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
    logger: dict[str, Any] = field(default_factory=dict)  # further loggers, each a ``_target_``
    callbacks: dict[str, Any] = field(default_factory=dict)  # of Lightning, beside a run's own, each a ``_target_``
    experiment_name: str = MISSING
    seed: int = whole(least=0, most=2**32 - 1)  # what numpy takes
    output_dir: str = MISSING
    ckpt_path: str | None = (
        None  # a checkpoint to resume from; or a run directory or its checkpoints: the last one there
    )
    # auto: continue where this output_dir ends, in the same W&B run; without a checkpoint there as if it were null.
    resume: str | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validate_every: int = whole(100, least=1)  # steps between validations; there is always one at the end
    # Steps between checks that replicas are equal, bit by bit, also at the end; None: never.
    check_replicas_every: int | None = whole(100, least=1)
    # Steps between pictures of the experts' load; None: only at the end.
    router_picture_every: int | None = whole(100, least=1)
    certificate: bool = False  # first prove that a small likeness of this run equals one process
    # of its runs: 64-true | bf16-true (as equal as rounding allows)
    certificate_precision: str = word(CertificatePrecision.DOUBLE)
    objective: str = "val/loss"  # the metric that a sweeper minimises
    choices: dict[str, Any] = field(default_factory=dict)  # which file each config group came from


@dataclass
class SimulationConfig(Frozen):
    """What ``tedlab simulate`` takes beside a job and a cluster."""

    rank: Any = None  # which to simulate; stages: one of each kind that differs; all: every one reported; None: 0
    routing: str | None = None  # how often dropless experts are chosen: balanced | zipf | trace; None: balanced
    zipf: float | None = real(None, least=0, most=100)  # its exponent: the r-th expert in proportion to r^-zipf
    trace: str | None = None  # router_trace.npz of a run
    # fake: tensors that have shapes only; real: instead, all ranks (128 at most) with real numbers, small and in
    # float64, against one process.
    values: str = "fake"


@dataclass
class PlanConfig(Frozen):
    """What ``tedlab plan`` takes beside a job and a cluster."""

    reserve_gib: float = real(1.2, least=0)  # of a GPU, left for the CUDA context, NCCL and kernels' workspaces
    simulate: int = whole(4, least=1, most=1000)  # how many of the best are simulated
    largest: bool = False  # first find the largest base model that fits


@dataclass
class CalibrateConfig(Frozen):
    """What ``tedlab calibrate`` measures, and where that goes."""

    out: str = MISSING  # the cluster file (.yaml) to write; a picture of the fit goes beside it
    # How many measure at the same time and communicate; under torchrun or srun: those that it started.
    processes: int = whole(1, least=1)
    device: str | None = None  # cpu | cuda; None: cuda where there is a GPU
    quick: bool = False  # a rough idea in seconds

    @property
    def output_dir(self) -> str:
        """Where files go."""
        return str(Path(self.out).parent)


@dataclass
class GenerateConfig(Frozen):
    """What to continue, and how."""

    run: str  # directory of a finished run
    prompt: str = ""
    tokens: int = whole(200, least=0)  # to add
    temperature: float = real(0.8, least=1e-3, also=(0.0,))  # 0: always the most probable token
    seed: int = whole(0, least=0, most=2**63 - 1)
    checkpoint: str = "last.ckpt"  # name below checkpoints/


@dataclass
class CompareConfig(Frozen):
    """Which runs ``tedlab compare`` puts side by side, and how."""

    # Run directories (with config.yaml), or directories with runs directly below them, such as a sweep's. On the
    # command line they need no key: tedlab compare DIR DIR.
    runs: list[str] = field(default_factory=list)
    by: str | None = None  # show these settings: KEY,KEY,…; None: all that differ
    out: str | None = None  # FILE.html: write a self-contained report; its charts go into FILE_charts/ beside it
    # Compare runs of different models, data or numbers of steps, with a note that their losses do not mean the same
    # (an error otherwise), and also runs that failed or were interrupted, as far as they came.
    force: bool = False
    wandb: str | None = None  # ENTITY/PROJECT: read the runs from a W&B server, not from directories
    group: str | None = None  # of those runs; tedlab train calls it as the directory of a sweep
    workspace: bool = False  # also save a view of the group with the same charts there (needs tedlab's extra 'wandb')


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
