"""Checks a whole configuration before any process is launched, and fills in what follows from it.

Types and names are Hydra's concern; here it is what the fields must satisfy together and what they need from outside:
files, devices, a checkpoint. Every complaint says what is wrong, the values, and what would be valid.
"""

import inspect
import os
from dataclasses import MISSING, asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import torch
from lightning.pytorch import Trainer

from tedlab.checkpoint import read_meta
from tedlab.cli import UsageError
from tedlab.cluster import load_cluster
from tedlab.comm.budget import within_budget
from tedlab.comm.emulate import Emulation
from tedlab.comm.sites import kept_tags
from tedlab.comm.volumes import ClosedForm
from tedlab.config import ModelConfig, MoEConfig, TrainConfig
from tedlab.cost import collective_seconds
from tedlab.data import TextDataModule
from tedlab.degrees import ParallelDegrees, parallel_degrees
from tedlab.moe.deepspeed_gating import DROP_POLICIES, GATINGS
from tedlab.optim.elementwise import check_elementwise
from tedlab.optim.fused import check_tile
from tedlab.optim.schedule import SCHEDULES
from tedlab.strategy import PRECISIONS

_VALIDATION_METRICS = ("val/loss", "val/bits_per_byte")
CERTIFIED_PRECISIONS = ("64-true", "bf16-true")
OBJECTIVES = (*_VALIDATION_METRICS, "train/loss", "perf/step_time_s", "memory/peak_bytes")
_GATING_OPTIONS = {  # options that are null unless one of these gatings is chosen
    "min_capacity": GATINGS,
    "random_token_selection": ("deepspeed_top1",),
    "second_expert_sampling": ("deepspeed_top2",),
    "drop_policy": ("deepspeed_topk",),
}
_DEFAULTS = {  # what a checkpoint means that is older than a field
    section: {f.name: f.default for f in fields(kind) if f.default is not MISSING}
    for section, kind in (("model", ModelConfig), ("moe", MoEConfig))
}
_ARCHITECTURE = {
    "activation": ("gelu", "swiglu"),
    "norm": ("layer", "rms"),
    "positions": ("learned", "rotary"),
}
_GPT2_TOKENS = 50_257
_VOCAB_MULTIPLE = 128  # a power of two, so that usual tensor degrees divide the rounded vocabulary


def check(config: TrainConfig, most_processes: int | None = None) -> ParallelDegrees:
    """Validates ``config`` and completes it in place.

    Completed: ``model.vocab_size`` from the tokenizer, ``trainer.accumulate_grad_batches`` from the batch sizes,
    ``comm.cac=auto`` by what it chooses, and
    the corpus itself, which is tokenised into the cache if it is not there yet.

    Args:
        config: as composed.
        most_processes: allowed on this machine's CPU; None: as many as make sense for training.

    Returns:
        The parallel degrees.

    Raises:
        UsageError: with a message of less than a screen.
    """
    try:
        degrees = _check_settings(config)
        _check_processes(config, most_processes)
        data = TextDataModule(config.data, config.model.sequence_length, config.seed)
        _complete(config, degrees, data.corpus.tokenizer.vocab_size)
        _ = data.validation_samples  # raises if there is not one batch of them
        if config.ckpt_path is not None:
            _check_checkpoint(config, Path(config.ckpt_path))
        return degrees
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None


def check_simulated(config: TrainConfig) -> ParallelDegrees:
    """:func:`check` of what depends neither on this machine nor on data, and completes ``config`` likewise.

    Without a tokenizer, ``model.vocab_size=null`` is that of GPT-2's, rounded up: 50,304.

    Raises:
        UsageError: as there.
    """
    try:
        degrees = _check_settings(config)
        _complete(config, degrees, config.model.vocab_size or _GPT2_TOKENS)
        return degrees
    except ValueError as error:
        raise UsageError(str(error)) from None


def _check_settings(config: TrainConfig) -> ParallelDegrees:
    """What fields must satisfy together, wherever the job runs and on whatever data."""
    degrees = parallel_degrees(config.parallel)
    _check_comm(config, degrees)
    _check_model(config, degrees)
    _check_trainer(config)
    _check_batches(config, degrees)
    _check_optim(config)
    return degrees


def _complete(config: TrainConfig, degrees: ParallelDegrees, tokens: int) -> None:
    _complete_vocabulary(config, tokens)
    if config.comm.cac == "auto":
        _choose_what_to_keep(config, degrees)


def notes(config: TrainConfig) -> list[str]:
    """What is not wrong, but has no effect."""
    found = []
    if config.parallel.tensor == 1:
        for name, on in (("comm.dtd", config.comm.dtd), ("parallel.sequence", config.parallel.sequence)):
            if on:
                found.append(f"{name}=true does nothing here: with parallel.tensor=1 there are no duplicates.")
    return found


def _check_model(config: TrainConfig, degrees: ParallelDegrees) -> None:
    model, moe = config.model, config.moe
    for section, name, least in (
        (model, "layers", 1),
        (model, "hidden", 1),
        (model, "heads", 1),
        (model, "ffn", 1),
        (model, "sequence_length", 1),
        (moe, "num_experts", 0),
        (moe, "every", 1),
        (moe, "top_k", 1),
        (moe, "capacity_multiple", 1),
    ):
        if getattr(section, name) < least:
            raise ValueError(f"{name} is {getattr(section, name)}; it must be at least {least}")
    for name, valid in _ARCHITECTURE.items():
        if getattr(model, name) not in valid:
            raise ValueError(f"model.{name}={getattr(model, name)} is unknown; valid: {', '.join(valid)}")
    if model.hidden % model.heads:
        raise ValueError(f"model.hidden ({model.hidden}) is not a multiple of model.heads ({model.heads})")
    if model.positions == "rotary" and model.hidden // model.heads % 2:
        raise ValueError(
            f"model.positions=rotary turns pairs of features, but model.hidden / model.heads = {model.hidden} / "
            f"{model.heads} is odd; choose heads of even width, or model.positions=learned"
        )
    if model.loss_chunk is not None and model.loss_chunk < 1:
        raise ValueError(f"model.loss_chunk is {model.loss_chunk}; it counts tokens: at least 1, or null for all")
    if model.rotary_base <= 1:
        raise ValueError(f"model.rotary_base is {model.rotary_base}; it must be larger than 1")
    for name in ("heads", "ffn"):
        _check_divides(f"model.{name}", getattr(model, name), "parallel.tensor", degrees.tensor)
    if moe.num_experts == 0:
        if degrees.expert > 1:
            raise ValueError(
                f"parallel.expert is {degrees.expert}, but moe.num_experts is 0: a dense model has no experts"
            )
        return
    _check_divides("moe.num_experts", moe.num_experts, "parallel.expert", degrees.expert)
    if moe.every > model.layers:
        raise ValueError(
            f"moe.every ({moe.every}) is larger than model.layers ({model.layers}): no block would have experts. "
            f"Choose 1 to {model.layers}, or moe=dense"
        )
    if moe.top_k > moe.num_experts:
        raise ValueError(f"moe.top_k ({moe.top_k}) is larger than moe.num_experts ({moe.num_experts})")
    if moe.dispatch not in ("capacity", "dropless"):
        raise ValueError(f"moe.dispatch={moe.dispatch} is unknown; valid: capacity, dropless")
    _check_kernel(config, degrees)
    if moe.dispatch == "dropless":
        _check_dropless(config)
    else:
        _check_capacity_groups(config, degrees)
    if moe.capacity_factor is not None and moe.capacity_factor <= 0:
        raise ValueError(f"moe.capacity_factor is {moe.capacity_factor}; it must be positive, or null to drop no token")
    _check_gating(moe)


def _check_kernel(config: TrainConfig, degrees: ParallelDegrees) -> None:
    kernel = config.moe.kernel
    if kernel not in ("auto", "torch", "triton"):
        raise ValueError(f"moe.kernel={kernel} is unknown; valid: auto, torch, triton")
    if kernel != "triton":
        return
    if config.moe.dispatch != "dropless" or degrees.tensor * degrees.expert > 1:
        raise ValueError(
            f"moe.kernel=triton is for dropless experts that are all in one process, not for "
            f"moe.dispatch={config.moe.dispatch}, parallel.tensor={degrees.tensor}, parallel.expert={degrees.expert}; "
            "use moe.kernel=auto"
        )
    if config.trainer.get("accelerator") == "cpu":
        raise ValueError(
            "moe.kernel=triton needs a GPU, not trainer.accelerator=cpu; use trainer=gpu or moe.kernel=auto"
        )


def _check_dropless(config: TrainConfig) -> None:
    moe = config.moe
    if moe.gating != "default":
        raise ValueError(
            f"moe.gating={moe.gating} decides who gets an expert's slots, of which moe.dispatch=dropless has none; use "
            "moe.gating=default, or moe.dispatch=capacity"
        )
    if moe.capacity_groups not in (None, 1):
        raise ValueError(
            f"moe.capacity_groups={moe.capacity_groups} divides a capacity, of which moe.dispatch=dropless has none; "
            "leave it null, or use moe.dispatch=capacity"
        )
    if config.model.compile != "none" and config.model.checkpoint != "none":
        raise ValueError(
            f"model.compile={config.model.compile} with moe.dispatch=dropless leaves the experts out, and a block of "
            f"which parts are compiled cannot be recomputed (model.checkpoint={config.model.checkpoint}); use "
            "model.checkpoint=none, model.compile=none, or moe.dispatch=capacity"
        )


def _check_capacity_groups(config: TrainConfig, degrees: ParallelDegrees) -> None:
    shards = degrees.tensor if degrees.sequence else 1
    if config.moe.capacity_groups is None and shards > 1:
        config.moe.capacity_groups = shards  # so that the run's configuration tells
    groups, length = config.moe.capacity_groups or 1, config.model.sequence_length
    if groups < 1 or length % groups or groups % shards:
        fitting = ", ".join(str(n) for n in range(1, length + 1) if length % n == 0 and n % shards == 0 and n <= 64)
        raise ValueError(
            f"moe.capacity_groups is {groups}; it must divide model.sequence_length ({length})"
            + (f" and be a multiple of parallel.tensor ({shards}) with parallel.sequence" if shards > 1 else "")
            + f": {fitting or 'impossible here'}"
        )
    if groups > 1 and config.moe.gating != "default":
        raise ValueError(f"moe.capacity_groups={groups} needs moe.gating=default; moe.gating is {config.moe.gating}")


def _check_comm(config: TrainConfig, degrees: ParallelDegrees) -> None:
    comm, model = config.comm, config.model
    if comm.backend not in (None, "nccl", "gloo"):
        raise ValueError(f"comm.backend={comm.backend} is unknown; valid: nccl, gloo, or null (by device)")
    if model.checkpoint not in ("none", "block"):
        raise ValueError(f"model.checkpoint={model.checkpoint} is unknown; valid: none, block")
    if comm.cac != "auto":
        kept_tags(comm.cac)
    if (comm.cac == "auto") != (comm.cac_budget_bytes is not None):
        raise ValueError(
            f"comm.cac={comm.cac} and comm.cac_budget_bytes={comm.cac_budget_bytes} do not belong together: auto keeps "
            "what a budget of bytes allows, and nothing else has one"
        )
    if comm.cac not in (False, None) and model.checkpoint == "none":
        raise ValueError(
            f"comm.cac={comm.cac} keeps collectives' results for recomputation, but with model.checkpoint=none nothing "
            "is recomputed; use model.checkpoint=block, or comm.cac=false"
        )
    if model.compile not in ("none", "inductor", "aot_eager"):
        raise ValueError(f"model.compile={model.compile} is unknown; valid: none, inductor, aot_eager")
    if model.compile != "none":
        _check_compiled(config)
    if comm.fuse_reduce_scatter and not comm.dtd:
        raise ValueError(
            "comm.fuse_reduce_scatter=true makes one reduce-scatter of the experts' all-reduce and DTD's drop, "
            "but comm.dtd is false; use comm.dtd=true, or comm.fuse_reduce_scatter=false"
        )
    if degrees.sequence:
        _check_sequence(config, degrees)
    _check_emulation(config, degrees)
    if comm.ledger.every < 0:
        raise ValueError(f"comm.ledger.every is {comm.ledger.every}; it counts steps: 0 (only the end) or more")


def _check_compiled(config: TrainConfig) -> None:
    if config.comm.cac in ("shard", "auto") or ":shard" in str(config.comm.cac):
        raise ValueError(
            f"comm.cac={config.comm.cac} keeps shards, which the compiler cannot; with model.compile="
            f"{config.model.compile} use true, false or a list of collectives"
        )
    if not config.checkpoint.early_stop:
        raise ValueError(
            f"checkpoint.early_stop=false recomputes what nobody needs, which model.compile={config.model.compile} "
            "leaves out; use one of the two"
        )
    if config.moe.num_experts and config.moe.gating != "default":
        raise ValueError(f"model.compile={config.model.compile} needs moe.gating=default, not {config.moe.gating}")


def _choose_what_to_keep(config: TrainConfig, degrees: ParallelDegrees) -> None:
    """Puts the entries that fit the budget in the place of ``auto``."""
    cluster = load_cluster(config.comm.emulate or config.comm.cac_cluster)
    tensor, expert = range(degrees.tensor), range(0, degrees.expert * degrees.tensor, degrees.tensor)
    members = {"tensor": tensor, "expert_tensor": tensor, "expert": expert}
    assert config.comm.cac_budget_bytes is not None
    config.comm.cac = within_budget(
        ClosedForm(config),
        config.comm.cac_budget_bytes,
        lambda call: collective_seconds(call.op, call.payload_bytes, members[call.kind], cluster),
    )


def _check_emulation(config: TrainConfig, degrees: ParallelDegrees) -> None:
    comm = config.comm
    if comm.emulate is None:
        return
    everybody = {"world": range(degrees.world_size)}
    Emulation(load_cluster(comm.emulate), everybody, comm.emulate_dilation, comm.emulate_ranks_per_node)  # type: ignore[arg-type]
    comm.ledger.time = True  # without it nothing would show of the delays


def _check_sequence(config: TrainConfig, degrees: ParallelDegrees) -> None:
    moe = config.moe
    if config.comm.dtd:
        raise ValueError(
            "comm.dtd=true drops duplicate tokens, but with parallel.sequence=true there are none: each tensor rank "
            "has its own; use one of the two"
        )
    _check_divides("model.sequence_length", config.model.sequence_length, "parallel.tensor", degrees.tensor)
    if moe.num_experts and moe.gating != "default":
        raise ValueError(f"parallel.sequence=true needs moe.gating=default; moe.gating is {moe.gating}")


def _check_gating(moe: MoEConfig) -> None:
    gatings = ("default", *GATINGS)
    if moe.gating not in gatings:
        raise ValueError(f"moe.gating={moe.gating} is unknown; valid: {', '.join(gatings)}")
    needed = {"deepspeed_top1": 1, "deepspeed_top2": 2}.get(moe.gating, moe.top_k)
    if moe.top_k != needed:
        raise ValueError(
            f"moe.gating={moe.gating} needs moe.top_k={needed}, but moe.top_k is {moe.top_k}; "
            "deepspeed_topk takes any top_k"
        )
    for name, users in _GATING_OPTIONS.items():
        if getattr(moe, name) is not None and moe.gating not in users:
            raise ValueError(
                f"moe.{name}={getattr(moe, name)} would have no effect with moe.gating={moe.gating}; leave it null, "
                f"or choose moe.gating={' or '.join(users)}"
            )
    if moe.min_capacity is not None and moe.min_capacity < 0:
        raise ValueError(f"moe.min_capacity is {moe.min_capacity}; it counts slots: at least 0")
    if moe.drop_policy is not None and moe.drop_policy not in DROP_POLICIES:
        raise ValueError(f"moe.drop_policy={moe.drop_policy} is unknown; valid: {', '.join(DROP_POLICIES)}")


def _check_divides(name: str, value: int, by: str, degree: int) -> None:
    if value % degree:
        fitting = ", ".join(str(n) for n in range(1, value + 1) if value % n == 0 and n <= 64)
        raise ValueError(
            f"{name} ({value}) is not divisible by {by} ({degree}). With this {name}, {by} can be {fitting}"
        )


def _check_trainer(config: TrainConfig) -> None:
    trainer = config.trainer
    for name in ("devices", "num_nodes", "max_steps", "precision", "accelerator"):
        if name not in trainer:
            raise ValueError(f"trainer.{name} is missing; the presets trainer=cpu and trainer=gpu have it")
    for name in ("devices", "num_nodes", "max_steps"):
        if not isinstance(trainer[name], int):
            raise ValueError(f"trainer.{name}={trainer[name]} is not a whole number")
    known = _trainer_arguments()
    unknown = sorted(set(trainer) - known)
    if unknown:
        raise ValueError(
            f"trainer.{unknown[0]} is not an argument of lightning.Trainer. Valid: {', '.join(sorted(known))}"
        )
    for name in ("limit_train_batches", "overfit_batches"):
        if trainer.get(name):
            raise ValueError(
                f"trainer.{name} would make Lightning's epochs differ from the data's, and a resumed run go wrong; "
                "use trainer.max_steps, or data.path with less text"
            )
    if trainer["precision"] not in PRECISIONS:
        raise ValueError(f"trainer.precision={trainer['precision']} is not supported; valid: {', '.join(PRECISIONS)}")
    if trainer["precision"] == "16-mixed" and trainer["accelerator"] == "cpu":
        raise ValueError("trainer.precision=16-mixed needs a GPU (Lightning would run bf16 instead); use bf16-mixed")
    if trainer.get("gradient_clip_algorithm") not in (None, "norm"):
        raise ValueError(
            f"trainer.gradient_clip_algorithm={trainer['gradient_clip_algorithm']} is not supported: gradients are "
            "sharded and clipped by their global norm; use norm"
        )
    if trainer["max_steps"] < 1:
        raise ValueError(f"trainer.max_steps is {trainer['max_steps']}; a run has at least 1 step")
    if config.seed < 0:
        raise ValueError(f"seed is {config.seed}; it must be at least 0")
    if config.objective not in OBJECTIVES:
        raise ValueError(f"objective={config.objective} is not a metric of a run; valid: {', '.join(OBJECTIVES)}")
    if config.certificate_precision not in CERTIFIED_PRECISIONS:
        raise ValueError(
            f"certificate_precision={config.certificate_precision} is unknown; valid: {', '.join(CERTIFIED_PRECISIONS)}"
        )
    if config.validate_every < 1:
        raise ValueError(f"validate_every is {config.validate_every}; it counts steps: at least 1")
    if config.router_picture_every is not None and config.router_picture_every < 1:
        raise ValueError(
            f"router_picture_every is {config.router_picture_every}; it counts steps: at least 1, "
            "or null for the end only"
        )
    _check_checkpointing(config)


@cache  # a plan validates thousands of configurations
def _trainer_arguments() -> frozenset[str]:
    return frozenset(inspect.signature(Trainer).parameters)


def _check_checkpointing(config: TrainConfig) -> None:
    every, keep, monitor = config.checkpoint.every, config.checkpoint.keep, config.checkpoint.monitor
    if every is not None and every < 1:
        raise ValueError(f"checkpoint.every is {every}; it counts steps: at least 1, or null for the end only")
    if keep < 1 and keep != -1:
        raise ValueError(f"checkpoint.keep is {keep}; it must be at least 1, or -1 to keep all")
    if monitor not in (None, *_VALIDATION_METRICS):
        raise ValueError(f"checkpoint.monitor={monitor} is not a validation metric: {', '.join(_VALIDATION_METRICS)}")


def _check_processes(config: TrainConfig, most: int | None) -> None:
    devices, nodes = config.trainer["devices"], config.trainer["num_nodes"]
    world = config.parallel.world_size
    if devices * nodes != world:
        raise ValueError(
            f"trainer.devices × trainer.num_nodes = {devices}×{nodes} is not parallel.world_size ({world}). "
            f"On one machine set parallel.world_size alone; on {nodes} nodes also trainer.devices={world // nodes or 1}"
        )
    if config.trainer["accelerator"] == "cpu":
        cores = os.cpu_count() or 1
        most = most or max(8, 4 * cores)
        if devices > most:
            raise ValueError(
                f"{devices} processes on a machine of {cores} cores would hardly move; at most {most} make sense here. "
                "Use a smaller parallel=… preset, or more nodes (trainer.num_nodes)"
            )
        if config.comm.backend == "nccl":
            raise ValueError("comm.backend=nccl works on GPUs only; with trainer=cpu use gloo, or null")
        return
    gpus = torch.cuda.device_count()
    if not gpus:
        raise ValueError(
            f"trainer.accelerator={config.trainer['accelerator']}, but this machine has no GPU that torch can use; "
            "trainer=cpu needs none"
        )
    if devices > gpus and config.comm.backend != "gloo":
        raise ValueError(
            f"trainer.devices is {devices}, but this machine has {gpus} GPU{'s' if gpus > 1 else ''}: two processes on "
            f"one GPU NCCL refuses; use comm.backend=gloo or fewer processes (at most {gpus}), or trainer=cpu"
        )


def _check_batches(config: TrainConfig, degrees: ParallelDegrees) -> None:
    batch, micro = config.data.batch_size, config.data.micro_batch_size
    if batch < 1 or micro < 1:
        raise ValueError(f"data.batch_size ({batch}) and data.micro_batch_size ({micro}) must be at least 1")
    if batch % (micro * degrees.data):
        fitting = (
            ", ".join(str(m) for m in range(1, batch + 1) if batch % (m * degrees.data) == 0)
            or f"none: make data.batch_size a multiple of {degrees.data}"
        )
        raise ValueError(
            f"data.batch_size ({batch}) is not a multiple of data.micro_batch_size × data ranks = "
            f"{micro}×{degrees.data}. With this batch and {degrees.data} data ranks the micro-batch can be {fitting}"
        )
    accumulate = batch // (micro * degrees.data)
    given = config.trainer.setdefault("accumulate_grad_batches", None)
    if given not in (None, accumulate):
        raise ValueError(
            f"trainer.accumulate_grad_batches={given}, but data.batch_size / (data.micro_batch_size × data ranks) = "
            f"{batch} / ({micro}×{degrees.data}) = {accumulate}. Leave it null, or change the batch sizes"
        )
    config.trainer["accumulate_grad_batches"] = accumulate


def _check_optim(config: TrainConfig) -> None:
    if config.optim.schedule not in SCHEDULES:
        raise ValueError(f"optim.schedule={config.optim.schedule} is unknown; valid: {', '.join(SCHEDULES)}")
    target = config.optim.optimizer.get("_target_")
    try:
        optimizer = hydra.utils.get_class(str(target))
    except Exception as error:  # whatever importing it raises
        raise ValueError(f"optim.optimizer._target_={target} cannot be imported: {error}") from None
    check_elementwise(optimizer, config.optim.optimizer)
    check_tile(config.optim.tile, optimizer, config.optim.optimizer)
    if config.optim.loss_scale is not None and config.optim.loss_scale < 1:
        raise ValueError(f"optim.loss_scale is {config.optim.loss_scale}; it must be at least 1, or null")
    if config.optim.lr <= 0:
        raise ValueError(f"optim.lr is {config.optim.lr}; a learning rate is positive")


def _complete_vocabulary(config: TrainConfig, tokens: int) -> None:
    if config.model.vocab_size is None:
        config.model.vocab_size = -(-tokens // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    if config.model.vocab_size < tokens:
        raise ValueError(f"model.vocab_size ({config.model.vocab_size}) is smaller than the tokenizer's {tokens}")
    _check_divides("model.vocab_size", config.model.vocab_size, "parallel.tensor", config.parallel.tensor)


def _check_checkpoint(config: TrainConfig, path: Path) -> None:
    meta = read_meta(path)
    if "hyper_parameters" not in meta:
        raise ValueError(f"{path} is not a checkpoint of this command: it says nothing of the model")
    if meta["global_step"] >= config.trainer["max_steps"]:
        raise ValueError(
            f"{path} is of step {meta['global_step']}, so with trainer.max_steps ({config.trainer['max_steps']}) "
            "nothing is left to train; raise trainer.max_steps"
        )
    stored = meta["hyper_parameters"]
    ours: dict[str, Any] = {"model": asdict(config.model), "moe": asdict(config.moe)}
    shape_free = {"init_std", "checkpoint", "compile", "loss_chunk", "aux_loss", "z_loss", "top_k", "gating"}
    shape_free |= {*_GATING_OPTIONS, "dispatch", "capacity_factor", "capacity_multiple", "capacity_groups"}
    differences = [
        f"{section}.{name}: {stored[section].get(name)} in the checkpoint, {value} here"
        for section, values in ours.items()
        for name, value in values.items()
        if name not in shape_free and stored[section].get(name, _DEFAULTS[section].get(name)) != value
    ]
    if differences:
        raise ValueError(f"{path} is a checkpoint of another model:\n  " + "\n  ".join(differences))
