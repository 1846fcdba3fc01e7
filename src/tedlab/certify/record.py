"""One short run, inside one of its processes, with everything written down that two runs can differ in."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from typing_extensions import override

from tedlab.config import TrainConfig
from tedlab.module import NOT_SCALARS, LanguageModel
from tedlab.run import build
from tedlab.strategy import TEDStrategy

Record = dict[int, dict[str, dict[str, Tensor]]]  # step (from 1) → quantity → name → global value
QUANTITIES = (  # in the order in which a step computes them
    "outputs",
    "losses and drops",
    "gradients",
    "gradient norm",
    "clip factor",
    "optimizer state",
    "next weights",
)
FILE = "record.pt"
_REPLICAS = 1e-12  # relative difference of values that several processes hold


def record(config: TrainConfig) -> dict[str, Any]:
    """Trains as configured; the first process leaves a :data:`Record` in ``output_dir``."""
    recorder = Recorder()
    trainer, module, data = build(config, [recorder], logged=False)
    trainer.fit(module, data, ckpt_path=config.ckpt_path)
    if trainer.is_global_zero:
        torch.save(recorder.record, Path(config.output_dir, FILE))
    return {}


class Recorder(Callback):
    """Collects, of every step, what :func:`tedlab.certify.compare` compares. Gradients are reduced, not yet clipped."""

    reads_grad = False

    def __init__(self) -> None:
        self.record: Record = {}
        self._scalars: list[Tensor] = []
        self._scale: float | None = None  # the true one, while an overflow is being provoked
        self._quantities: dict[str, dict[str, Tensor]] = {}

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._scalars:  # the first micro-batch of a step
            assert isinstance(pl_module, LanguageModel)
            self._quantities["outputs"] = {"logits": _probe(pl_module, len(batch))}
            self._provoke_overflow(trainer)

    def _provoke_overflow(self, trainer: Trainer) -> None:
        """With a loss scale, the first micro-batch of the run overflows in one process, and all must skip its step."""
        scaler = _strategy(trainer).loss_scaler
        if scaler is not None and trainer.global_step == 0 and trainer.global_rank == trainer.world_size - 1:
            self._scale, scaler.scale = scaler.scale, math.inf

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scaler = _strategy(trainer).loss_scaler
        if scaler is not None and self._scale is not None:
            scaler.scale = self._scale
            self._scale = None

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        (sharded,) = _strategy(trainer).sharded_optimizers
        norm = sharded.global_norm()
        usable = math.isfinite(norm)  # after an overflow there is nothing to compare, but that the step was skipped
        self._quantities["gradients"] = assembled(sharded.gradients()) if usable else {}
        self._quantities["gradient norm"] = {"all parameters": torch.tensor(norm if usable else 0.0).double()}

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        names = [name for name in outputs if name not in NOT_SCALARS]
        self._scalars.append(torch.stack([outputs[name].double() for name in names]))
        if len(self._scalars) < trainer.accumulate_grad_batches:
            return
        strategy = _strategy(trainer)
        means = strategy.reduce(torch.stack(self._scalars).mean(0)).cpu()
        self._quantities["losses and drops"] = dict(zip(names, means, strict=True))
        (sharded,) = strategy.sharded_optimizers
        self._quantities["clip factor"] = {
            "all parameters": torch.tensor(sharded.applied_clip_factor, dtype=torch.float64)
        }
        state = sharded.state_dict()["state"]
        self._quantities["optimizer state"] = assembled(
            {f"{name} ({key})": value for name, entries in state.items() for key, value in entries.items()}
        )
        self._quantities["next weights"] = assembled(dict(pl_module.named_parameters()))
        self.record[trainer.global_step] = {quantity: self._quantities[quantity] for quantity in QUANTITIES}
        self._scalars, self._quantities = [], {}


def assembled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Global tensors in the first process, from the parts that all hold; empty in the others. Collective.

    Where processes that hold the same elements disagree, the result is NaN: drifting replicas must not go unnoticed.
    """
    own = {name: _part(torch.as_tensor(tensor).detach()) for name, tensor in tensors.items()}
    everybody: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, everybody)
    if everybody is None:
        return {}
    result = {}
    for name, tensor in tensors.items():
        shape = torch.as_tensor(tensor).shape
        whole = torch.full(shape, math.nan, dtype=own[name][1].dtype)
        filled = torch.zeros(shape, dtype=torch.bool)
        for parts in everybody:
            offset, values = parts[name]
            place = tuple(slice(start, start + size) for start, size in zip(offset, values.shape, strict=True))
            agreed = torch.isclose(whole[place], values, rtol=_REPLICAS, atol=0.0) | ~filled[place]
            whole[place] = torch.where(agreed, values, math.nan)
            filled[place] = True
        result[name] = whole
    return result


def _part(tensor: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """Where this process's part of a tensor begins, and its values, on the CPU."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim(), tensor.cpu()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offset), tensor.to_local().cpu()


@torch.no_grad()
def _probe(module: LanguageModel, samples: int) -> Tensor:
    """(V, B, S): the model's logits for fixed random tokens."""
    network, comm = module.network, module.topology.comm
    config = module.model_config
    assert config.vocab_size is not None
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (samples, config.sequence_length), generator=draw).to(module.device)
    shard = network(ids)[0].movedim(-1, 0).contiguous()
    out = shard.new_empty(shard.shape[0] * comm.size("tensor"), *shard.shape[1:])
    comm.all_gather_into(out, shard, "tensor", tag="certify.outputs", phase="forward")
    return out.cpu()


def _strategy(trainer: Trainer) -> TEDStrategy:
    assert isinstance(trainer.strategy, TEDStrategy)
    return trainer.strategy
