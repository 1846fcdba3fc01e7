"""The typed configuration: one dataclass per config group.

Every value of a YAML file in ``conf/`` lands in one field here, and these objects themselves are what constructors
take. Hydra uses the same classes as its schema, so a misspelt key or an ill-typed value never gets past composition.
Nothing here imports torch. What fields must satisfy *together* is checked in ``validate.py``.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class ModelConfig:
    """A pre-norm decoder: GPT-3 by default, and with the choices below one like OLMoE or Mixtral."""

    layers: int = MISSING
    hidden: int = MISSING
    heads: int = MISSING
    ffn: int = MISSING  # width of the feed-forward layer, and of each expert
    sequence_length: int = MISSING  # tokens of one sample; also the size of the position table
    activation: str = "gelu"  # gelu | swiglu
    bias: bool = True  # linear layers and experts have biases
    norm: str = "layer"  # layer (LayerNorm) | rms (RMSNorm, which has no bias)
    positions: str = "learned"  # learned (a table) | rotary (queries and keys are rotated)
    rotary_base: float = 10_000.0  # of rotary positions: feature pair i of d turns by base^(-2i/d) at each position
    vocab_size: int | None = None  # None: the tokenizer's, rounded up to a multiple of 128
    tie_embeddings: bool = True  # the output projection is the token embedding
    init_std: float = 0.02  # standard deviation of initial weights; residual outputs are scaled by 1/sqrt(2·layers)
    loss_chunk: int | None = None  # tokens whose logits exist at a time; None: all, and their gradient after them
    # torch.compile of each block (without dropless experts) and of the loss in chunks: none | inductor | aot_eager
    # (without code generation).
    compile: str = "none"
    checkpoint: str = "none"  # activation checkpointing: none | block (recompute each block in the backward pass)


@dataclass
class MoEConfig:
    """Experts in place of the feed-forward layer of every ``every``-th block."""

    num_experts: int = MISSING  # 0: a dense model
    every: int = 2  # experts in blocks every-1, 2·every-1, … (the paper: every second layer)
    top_k: int = 1
    dispatch: str = "capacity"  # capacity | dropless (experts take all that choose them; none of the capacity… applies)
    capacity_factor: float | None = 1.25  # None: no token is ever dropped
    capacity_multiple: int = 8  # capacity is rounded up to a multiple of this in every layout
    # A micro-batch's tokens queue in this many groups of neighbouring positions, each with its share of the capacity.
    # None: 1, or with parallel.sequence the tensor degree, since each tensor rank then sees its own positions only.
    capacity_groups: int | None = None
    kernel: str = (
        "auto"  # of dropless experts that are all in one process: auto (triton where it runs) | torch | triton
    )
    aux_loss: float = 0.01  # coefficient of the load-balancing loss, summed over MoE layers
    z_loss: float = 0.0  # coefficient of the router z-loss, summed over MoE layers
    gating: str = "default"  # default | deepspeed_top1 | deepspeed_top2 | deepspeed_topk: see moe/deepspeed_gating.py
    # Of DeepSpeed's gatings alone; None: as in DeepSpeed.
    min_capacity: int | None = None  # all three: least capacity; None: 4
    random_token_selection: bool | None = None  # top1: a full expert keeps a random selection; None: true
    second_expert_sampling: bool | None = None  # top2: the second expert is drawn at random; None: true
    drop_policy: str | None = None  # topk: a full expert keeps the most probable (probs; None) or first (position)

    def blocks(self, layers: int) -> range:
        """Indices of the blocks that have experts, in a model of so many."""
        return range(self.every - 1, layers, self.every) if self.num_experts else range(0)


@dataclass
class ParallelConfig:
    """Degrees of parallelism. ``world_size`` = tensor × data; ``data`` = expert × expert_data."""

    world_size: int = MISSING  # processes in all, over all nodes
    tensor: int = 1
    expert: int = 1
    sequence: bool = False  # shard activations between layers over the tensor group (Megatron's sequence parallelism)


@dataclass
class LedgerConfig:
    """The record of every collective."""

    every: int = 100  # steps between totals in the log; 0: only at the end
    time: bool = False  # also measure durations, which synchronises every collective


@dataclass
class CommConfig:
    """How processes talk. No toggle changes what is computed."""

    backend: str | None = None  # nccl | gloo (processes may share a GPU) | None: nccl on GPUs, gloo on a CPU
    timeout_s: int = 600  # a collective that takes longer ends the run
    dtd: bool = False  # duplicate token dropping: each tensor rank exchanges 1/T of what goes to experts (paper §5.1)
    fuse_reduce_scatter: bool = False  # with dtd: the experts' all-reduce and the drop after it as one reduce-scatter
    # Communication-aware checkpointing (paper §5.2): collectives' results that recomputation takes from memory. false;
    # true: all; shard: 1/T of each, gathered again inside the tensor group; a list of collectives, see comm/sites.py;
    # auto: the best within cac_budget_bytes.
    cac: Any = False
    cac_budget_bytes: int | None = None  # of each process, for cac=auto
    cac_cluster: str = "dgx_a100"  # whose links cac=auto reckons with, unless another is emulated
    skip_dead_gemm: bool = True  # with cac: do not recompute matrix products that only feed a result that was kept
    emulate: str | None = None  # delay each collective as on this cluster: a name in conf/cluster
    emulate_dilation: float = 1.0  # times slower than that network, in proportion to a slower processor
    emulate_ranks_per_node: int | None = None  # None: the cluster's
    ledger: LedgerConfig = field(default_factory=LedgerConfig)


@dataclass
class DataConfig:
    """Text, how it becomes tokens, and how tokens become batches."""

    path: str | None = MISSING  # file, folder or glob of text or JSONL; None: the Python standard library's source
    field: str = "text"  # the field of a JSONL line that holds the text
    tokenizer: str = "byte"  # byte | bpe (trained on the corpus on first use) | path of a tokenizers JSON file
    bpe_vocab_size: int = 4096
    batch_size: int = MISSING  # samples of one optimizer step, over all data ranks and accumulated micro-batches
    micro_batch_size: int = MISSING  # samples of one forward pass of one data rank
    validation_fraction: float = 0.05  # share of the files (of the documents, for a single file) held out
    validation_samples: int = MISSING  # samples of one validation pass, over all data ranks
    cache_dir: str = "~/.cache/tedlab"
    num_workers: int = 0


@dataclass
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    optimizer: dict[str, Any] = MISSING  # a ``_target_`` of torch.optim and its arguments except the learning rate
    lr: float = MISSING
    schedule: str = "cosine"  # cosine | constant | wsd (constant, then linear decay), each after a linear warm-up
    warmup_steps: int = 0
    final_lr_fraction: float = 0.1  # of the learning rate, where cosine and wsd end
    decay_fraction: float = 0.2  # of the run, in which wsd decays
    zero: bool = True  # shard optimizer state over data-parallel groups (ZeRO-1)
    overlap: bool = False  # reduce gradients while the backward pass goes on
    loss_scale: float | None = None  # initial dynamic loss scale; None: 65536 with fp16, otherwise none at all
    bucket_elements: int = 1 << 24  # of each process, reduced in one collective
    tile: Any = 1_800_000  # int: elements updated at a time (the paper's tiled step); None: all; "fused": one pass


@dataclass
class CheckpointConfig:
    """When to save and what to keep, below ``output_dir/checkpoints``; ``last.ckpt`` is always there.

    And, for want of another place by that name, ``early_stop`` of *activation* checkpointing (``model.checkpoint``).
    """

    every: int | None = None  # steps between checkpoints; None: only at the end
    monitor: str | None = None  # a metric such as val/loss: save after each validation, keep those with the lowest
    keep: int = 1  # how many to keep, the newest or the best; -1: all
    async_save: bool = False  # write while training goes on
    early_stop: bool = True  # recompute a block only as far as backward needs; false: all of it, the paper's baseline


@dataclass
class TrainConfig:
    """The whole configuration of ``python -m tedlab.train``."""

    model: ModelConfig = MISSING
    moe: MoEConfig = MISSING
    parallel: ParallelConfig = MISSING
    comm: CommConfig = MISSING
    data: DataConfig = MISSING
    optim: OptimConfig = MISSING
    trainer: dict[str, Any] = MISSING  # arguments of lightning.Trainer, as they are
    logger: dict[str, Any] = field(default_factory=dict)  # further loggers, each a ``_target_``
    experiment_name: str = MISSING
    seed: int = MISSING
    output_dir: str = MISSING
    ckpt_path: str | None = None  # a checkpoint directory to resume from
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validate_every: int = 100  # steps between validations; there is always one at the end
    router_picture_every: int | None = 100  # steps between pictures of the experts' load; None: only at the end
    certificate: bool = False  # first prove that a small likeness of this run equals one process
    certificate_precision: str = "64-true"  # of its runs: 64-true | bf16-true (as equal as rounding allows)
    objective: str = "val/loss"  # the metric that a sweeper minimises
    choices: dict[str, Any] = field(default_factory=dict)  # which file each config group came from
