"""One short run, inside one of its processes, with everything written down that two runs can differ in."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from tedlab.config import TrainConfig
from tedlab.module import LanguageModel
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

    def __init__(self) -> None:
        self.record: Record = {}
        self._scalars: list[Tensor] = []
        self._quantities: dict[str, dict[str, Tensor]] = {}

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._scalars:  # the first micro-batch of a step
            assert isinstance(pl_module, LanguageModel)
            self._quantities["outputs"] = {"logits": _probe(pl_module, len(batch))}

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        (sharded,) = _strategy(trainer).sharded_optimizers
        self._quantities["gradients"] = {name: whole(g) for name, g in sharded.gradients().items()}
        self._quantities["gradient norm"] = {"all parameters": torch.tensor(sharded.global_norm(), dtype=torch.float64)}

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        names = [name for name in outputs if name != "loss"]
        self._scalars.append(torch.stack([outputs[name].double() for name in names]))
        if len(self._scalars) < trainer.accumulate_grad_batches:
            return
        strategy = _strategy(trainer)
        means = strategy.reduce(torch.stack(self._scalars).mean(0))
        self._quantities["losses and drops"] = dict(zip(names, means, strict=True))
        (sharded,) = strategy.sharded_optimizers
        self._quantities["clip factor"] = {
            "all parameters": torch.tensor(sharded.applied_clip_factor, dtype=torch.float64)
        }
        state = sharded.state_dict()["state"]
        self._quantities["optimizer state"] = {
            f"{name} ({key})": whole(value) for name, entries in state.items() for key, value in entries.items()
        }
        self._quantities["next weights"] = {name: whole(p) for name, p in pl_module.named_parameters()}
        self.record[trainer.global_step] = {quantity: self._quantities[quantity] for quantity in QUANTITIES}
        self._scalars, self._quantities = [], {}


def whole(tensor: Tensor) -> Tensor:
    """The global tensor, on every process."""
    tensor = torch.as_tensor(tensor).detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


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
    return out


def _strategy(trainer: Trainer) -> TEDStrategy:
    assert isinstance(trainer.strategy, TEDStrategy)
    return trainer.strategy
