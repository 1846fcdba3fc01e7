"""A few steps of real training through Lightning and TEDStrategy, with everything recorded that parity compares."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from tedlab import TEDStrategy
from tedlab.config import ModelConfig, MoEConfig, OptimConfig, ShardingOptions
from tedlab.data import MicroBatchSampler
from tedlab.module import LanguageModel

MICRO_BATCH = 2
SEQUENCE = 12


@dataclass(frozen=True)
class Layout:
    """Degrees as in the configuration."""

    world_size: int = 1
    tensor: int = 1
    expert: int = 1
    expert_tensor: int | None = None

    @property
    def data(self) -> int:
        return self.world_size // self.tensor

    def __str__(self) -> str:
        folded = "" if self.expert_tensor is None else f"_Te{self.expert_tensor}"
        return f"G{self.world_size}_T{self.tensor}_E{self.expert}{folded}"


@dataclass(frozen=True)
class Job:
    """What to train; small enough that eight processes on two cores take a second."""

    moe: MoEConfig = field(default_factory=lambda: MoEConfig(num_experts=4))
    tie_embeddings: bool = True
    steps: int = 1
    micro_batches: int = 4  # of every step: one process accumulates them all, 4 data ranks take one each
    lr: float = 1e-2
    clip: float | None = None
    zero: bool = True
    tile: int | str | None = 1_800_000
    overlap: bool = False
    bucket_elements: int = 1 << 24
    precision: str = "64-true"
    seed: int = 0

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            layers=2,
            hidden=16,
            heads=4,
            ffn=32,
            sequence_length=SEQUENCE,
            vocab_size=64,
            tie_embeddings=self.tie_embeddings,
            init_std=0.2,  # large enough that every path matters
        )


@dataclass
class Record:
    """What one run did: the mean loss of each step, and of the last step gradients and new weights, unsharded."""

    losses: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


class Tokens(Dataset):
    """Reproducible random samples."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        return torch.randint(64, (SEQUENCE + 1,), generator=torch.Generator().manual_seed(index))


class Recorder(Callback):
    """Collects a :class:`Record`. Gradients are taken reduced and not yet clipped."""

    reads_grad = False

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.gradients: dict[str, Tensor] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(trainer.strategy.reduce(outputs["train/loss"]))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        (sharded,) = trainer.strategy.sharded_optimizers
        self.gradients = {name: full(gradient) for name, gradient in sharded.gradients().items()}


def full(tensor: Tensor) -> Tensor:
    """The global tensor, on every process."""
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.clone()


def trainer(layout: Layout, job: Job | None = None, **options: Any) -> Trainer:
    """A silent float64 Trainer on CPU."""
    job = job or Job()
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": layout.world_size,
        "precision": job.precision,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "strategy": TEDStrategy(
            layout.tensor,
            layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
            sharding=ShardingOptions(
                zero=job.zero, tile=job.tile, overlap=job.overlap, bucket_elements=job.bucket_elements
            ),
        ),
    }
    warnings.filterwarnings("ignore")
    return Trainer(**(settings | options))


def language_model(job: Job) -> LanguageModel:
    # The gradient of a key bias is zero in theory and rounding noise in practice, which Adam divides by eps.
    optimizer: dict[str, Any] = {"_target_": "torch.optim.AdamW", "eps": 1e-5}
    optim = OptimConfig(optimizer=optimizer, lr=job.lr, schedule="constant")
    return LanguageModel(job.model, job.moe, optim, job.seed)


def loader(layout: Layout, job: Job, rank: int) -> DataLoader:
    sampler = MicroBatchSampler(
        Tokens(),
        num_replicas=layout.data,
        rank=rank // layout.tensor,
        micro_batch_size=MICRO_BATCH,
        batch_size=job.micro_batches * MICRO_BATCH,
        seed=0,
    )
    return DataLoader(Tokens(), batch_size=MICRO_BATCH, sampler=sampler)


def train(layout: Layout, job: Job) -> Record | None:
    """Runs in every process of the layout; the first returns the record."""
    recorder = Recorder()
    module = language_model(job)
    fit = trainer(
        layout,
        job,
        max_steps=job.steps,
        callbacks=[recorder],
        gradient_clip_val=job.clip,
        accumulate_grad_batches=job.micro_batches // layout.data,
    )
    fit.fit(module, loader(layout, job, fit.global_rank))
    weights = {name: full(p) for name, p in module.named_parameters()}
    if fit.global_rank != 0:
        return None
    per_step = torch.stack(recorder.losses).view(job.steps, -1).mean(1)
    return Record(per_step.tolist(), recorder.gradients, weights)


def silent_trainer(strategy: Any, devices: int, **options: Any) -> Trainer:
    """A Trainer that prints and writes nothing, on CPU in float64, for one epoch; ``options`` may say otherwise."""
    warnings.filterwarnings("ignore")
    settings: dict[str, Any] = {
        "strategy": strategy,
        "devices": devices,
        "accelerator": "cpu",
        "precision": "64-true",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**(settings | options))
