"""Runs one process of a short training run, and records everything in which two runs can differ."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from tedlab._compat.lightning import count_as_saved
from tedlab._compat.torch import shape_and_offset_of_shard
from tedlab.callbacks import AverageWeights
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
    "optimizer settings",
    "optimizer state",
    "next weights",
)
LOSS_SCALE = "loss scale"  # a further quantity, which the one-process run does not have
FILE = "record.pt"
_REPLICAS = 1e-12  # the largest difference between replicas, over the tensor's largest magnitude
_PIECE = 50  # elements whose norm is taken at a time, few enough to make several pieces


def record(config: TrainConfig) -> dict[str, Any]:
    """Trains as configured; the first process saves a :data:`Record` in ``output_dir``."""
    return _recorded(config, CertificateRecorder(piece=_PIECE))


def record_reference(config: TrainConfig) -> dict[str, Any]:
    """Does the same as :func:`record` for the reference, see :func:`tedlab.certify.shrink.reference`."""
    return _recorded(config, CertificateRecorder())


def record_reference_of_overflow(config: TrainConfig) -> dict[str, Any]:
    """Does the same as :func:`record_reference` but skips the first step, as when a loss scale overflows."""
    return _recorded(config, CertificateRecorder(first_step_skipped=True))


def _recorded(config: TrainConfig, recorder: "CertificateRecorder") -> dict[str, Any]:
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)  # callbacks write there, too
    trainer, module, data = build(config, [recorder], logged=False)
    trainer.fit(module, data, ckpt_path=config.ckpt_path)
    everybody: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
    dist.gather_object(packed(recorder.parts), everybody)
    if everybody is not None:
        write(assembled([unpacked(*each) for each in everybody]), Path(config.output_dir, FILE))
    return {}


def write(record: Record, path: Path) -> None:
    """Writes a record to a file."""
    torch.save(packed(_mapped(lambda values: Shard(values.shape, (), values), record)), path)


def read(path: Path) -> Record:
    """Returns the record that ``write`` has written."""
    return _mapped(lambda part: part.values, unpacked(*torch.load(path)))


def _mapped(function: Callable[[Any], Any], of_steps: dict[int, dict[str, dict[str, Any]]]) -> Any:
    return {
        step: {
            quantity: {name: function(value) for name, value in values.items()}
            for quantity, values in of_quantities.items()
        }
        for step, of_quantities in of_steps.items()
    }


class Shard(NamedTuple):
    """The part of a tensor that one process holds.

    Attributes:
        shape: The shape of the whole tensor.
        offset: The index of the part's first element in each dimension.
        values: The part, on the CPU.
    """

    shape: torch.Size
    offset: tuple[int, ...]
    values: Tensor


Parts = dict[int, dict[str, dict[str, Shard]]]  # step → quantity → name → part


Described = dict[int, dict[str, dict[str, tuple[torch.Size, tuple[int, ...], torch.Size, torch.dtype]]]]


def packed(parts: Parts) -> tuple[Described, Tensor]:
    """Returns what there is of each part but its values, and the bytes of all values, which ``unpacked`` takes.

    A record has thousands of small tensors. To pickle and to load each by itself takes as long as the training.
    """
    described: Described = {
        step: {
            quantity: {
                name: (shape, offset, values.shape, values.dtype) for name, (shape, offset, values) in tensors.items()
            }
            for quantity, tensors in quantities.items()
        }
        for step, quantities in parts.items()
    }
    every = [shard.values for of_step in parts.values() for tensors in of_step.values() for shard in tensors.values()]
    flat = [values.contiguous().flatten().view(torch.uint8) for values in every]
    return described, torch.cat([torch.empty(0, dtype=torch.uint8), *flat])


def unpacked(described: Described, data: Tensor) -> Parts:
    """Returns the parts that ``packed`` was given."""
    every = [of for of_step in described.values() for tensors in of_step.values() for of in tensors.values()]
    pieces = iter(data.split([size.numel() * dtype.itemsize for _, _, size, dtype in every]))
    return {
        step: {
            quantity: {
                name: Shard(shape, offset, next(pieces).clone().view(dtype).view(size))
                for name, (shape, offset, size, dtype) in tensors.items()
            }
            for quantity, tensors in quantities.items()
        }
        for step, quantities in described.items()
    }


class CertificateRecorder(Callback):
    """Collects this process's part of everything that :func:`tedlab.certify.compare.compare` compares, in every step.

    Gradients are recorded after reduction and unscaling, before clipping.

    Args:
        piece: ``piece`` of :class:`tedlab.optim.ShardedOptimizer`; None keeps its default.
        first_step_skipped: Whether the first step's gradients are dropped.
    """

    reads_grad = False

    def __init__(self, piece: int | None = None, first_step_skipped: bool = False) -> None:
        self.parts: Parts = {}
        self._piece, self._first_step_skipped = piece, first_step_skipped
        self._scalars: list[Tensor] = []
        self._scale: float | None = None  # the true scale while an overflow is being provoked
        self._quantities: dict[str, dict[str, Shard]] = {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._piece is not None:
            for sharded in _strategy(trainer).sharded_optimizers:
                sharded.piece = self._piece

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._scalars:  # the first micro-batch of a step
            assert isinstance(pl_module, LanguageModel)
            self._quantities["outputs"] = _parts({"logits": _probe(pl_module, len(batch))})
            self._provoke_overflow(trainer)

    def _provoke_overflow(self, trainer: Trainer) -> None:
        """Makes the run's first micro-batch overflow in one process if losses are scaled; all must skip that step."""
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
        strategy = _strategy(trainer)
        (sharded,) = strategy.sharded_optimizers
        if self._first_step_skipped and trainer.global_step == 0:
            sharded.zero_grad()
            norm = math.inf
        else:
            norm = sharded.global_norm()
        usable = math.isfinite(norm)  # an overflow leaves nothing to compare but the skipped step
        self._quantities["gradients"] = _parts(sharded.gradients() if usable else {})
        self._quantities["gradient norm"] = _parts({"all parameters": norm} if usable else {})
        self._quantities["optimizer settings"] = _parts(
            {
                f"{name} of group {index}": value
                for index, group in enumerate(sharded.optimizer.param_groups)
                for name, value in group.items()
                if name != "params" and isinstance(value, float | Sequence) and not isinstance(value, str)
            }
        )
        self._quantities[LOSS_SCALE] = _parts(
            {} if strategy.loss_scaler is None else {"all processes": sharded.loss_scale}
        )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        names = [name for name in outputs if name not in NOT_SCALARS]
        self._scalars.append(torch.stack([outputs[name].double() for name in names]))
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        strategy = _strategy(trainer)
        means = strategy.reduce(torch.stack(self._scalars).mean(0))
        self._quantities["losses and drops"] = _parts(dict(zip(names, means, strict=True)))
        (sharded,) = strategy.sharded_optimizers
        usable = bool(self._quantities["gradient norm"])
        self._quantities["clip factor"] = _parts({"all parameters": sharded.applied_clip_factor} if usable else {})
        state = sharded.state_dict()["state"]
        self._quantities["optimizer state"] = _parts(
            {f"{name} ({key})": value for name, entries in state.items() for key, value in entries.items()}
        )
        averages = {
            f"{name} (averaged)": average
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, AverageWeights)
            for name, average in callback.averages().items()
        }
        self._quantities["next weights"] = _parts(
            {**dict(pl_module.named_parameters()), **dict(pl_module.named_buffers()), **averages}
        )
        self.parts[trainer.global_step] = {name: self._quantities[name] for name in (*QUANTITIES, LOSS_SCALE)}
        self._scalars, self._quantities = [], {}
        saving = trainer.checkpoint_callback
        if trainer.global_step == trainer.max_steps and isinstance(saving, ModelCheckpoint):
            count_as_saved(saving, trainer.global_step)  # nothing goes on from there


def assembled(everybody: Sequence[Parts]) -> Record:
    """Assembles global tensors from the parts of all processes.

    Elements on which processes disagree become NaN, so that drifting replicas do not go unnoticed. So does all of a
    tensor that only some processes have.
    """
    return {
        step: {
            quantity: {name: _whole([tensors.get(name) for tensors in of_quantity]) for name in _in_order(of_quantity)}
            for quantity in _in_order(of_step)
            for of_quantity in [[quantities.get(quantity, {}) for quantities in of_step]]
        }
        for step in _in_order(everybody)
        for of_step in [[parts.get(step, {}) for parts in everybody]]
    }


def _in_order(mappings: Sequence[Mapping[Any, Any]]) -> list[Any]:
    """Returns the keys of all mappings, in the order of first appearance."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _whole(parts: Sequence[Shard | None]) -> Tensor:
    held = [part for part in parts if part is not None]
    whole = torch.full(held[0].shape, math.nan, dtype=held[0].values.dtype)
    if len(held) < len(parts):
        return whole
    filled = torch.zeros(whole.shape, dtype=torch.bool)
    # Not relative to each element: rounding leaves an error of the size of the sum's terms, even where they cancel.
    finite = [magnitudes[magnitudes.isfinite()] for part in held for magnitudes in [part.values.double().abs()]]
    tolerance = _REPLICAS * max((magnitudes.max().item() for magnitudes in finite if magnitudes.numel()), default=0.0)
    for _, offset, values in held:
        place = tuple(slice(start, start + size) for start, size in zip(offset, values.shape, strict=True))
        agreed = torch.isclose(whole[place], values, rtol=0.0, atol=tolerance) | ~filled[place]
        whole[place] = torch.where(agreed, values, math.nan)
        filled[place] = True
    return whole


def _parts(tensors: Mapping[str, Any]) -> dict[str, Shard]:
    """Copies this process's parts of tensors: its shard of a DTensor, and all of another tensor or of a number."""
    parts = {}
    for name, given in tensors.items():
        if isinstance(given, DTensor):
            _, offset = shape_and_offset_of_shard(given.shape, given.device_mesh, given.placements)
            values = given.to_local().detach()
        else:
            values = given.detach() if isinstance(given, Tensor) else torch.tensor(given, dtype=torch.float64)
            offset = (0,) * values.dim()
        shape = given.shape if isinstance(given, DTensor) else values.shape
        parts[name] = Shard(shape, tuple(offset), values.to("cpu", copy=True))
    return parts


@torch.no_grad()
def _probe(module: LanguageModel, samples: int) -> Tensor:
    """Returns the model's logits for fixed random tokens, (V, B, S)."""
    network, comm = module.network, module.topology.comm
    config = module.model_config
    assert config.vocab_size is not None
    module.topology.context.at(0, 0)  # all data ranks compute the same, whatever is drawn for tokens
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (samples, config.sequence_length), generator=draw).to(module.device)
    network.eval()
    shard = network(ids)[0].movedim(-1, 0).contiguous()
    network.train()
    out = shard.new_empty(shard.shape[0] * comm.size("tensor"), *shard.shape[1:])
    comm.all_gather_into(out, shard, "tensor", tag="certify.outputs", phase="forward")
    return out


def _strategy(trainer: Trainer) -> TEDStrategy:
    assert isinstance(trainer.strategy, TEDStrategy)
    return trainer.strategy
