"""A training configuration made small enough to be run on a laptop, and its one-process reference.

Kept: the layout (up to 16 processes), experts per rank (up to 4), routing, clipping, optimizer and schedule, ZeRO,
tiles, overlap, every toggle; of fp16 the loss scale, and a first step that overflows.
Reduced: layers, widths, sequence, batch, the number of steps. Replaced: the text, and the precision. What would run on
GPUs does so if this machine has enough of them, and else on the CPU.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tedlab.config import CommConfig, DataConfig, ParallelConfig, TrainConfig
from tedlab.degrees import ParallelDegrees, parallel_degrees
from tedlab.strategy import HALF_PRECISIONS

STEPS, SAVED = 3, 2  # steps of a run, and after which it saves
MOST_PROCESSES = 16  # of this machine
_HEAD = 4  # width of an attention head
_SEQUENCE, _MICRO_BATCH, _ACCUMULATED, _EXPERTS_PER_RANK = 16, 2, 2, 4
_STEPS_PER_EPOCH = 4  # so that a run is continued in the middle of one


def shrink(config: TrainConfig, directory: Path, most_processes: int = MOST_PROCESSES) -> TrainConfig:
    """The configuration to certify ``config`` by.

    Args:
        config: any training configuration; need not fit this machine.
        directory: for its text, cache and runs.
        most_processes: that the layout may have.

    Raises:
        ValueError: if the degrees do not fit the world size.
    """
    given = parallel_degrees(config.parallel)
    degrees = largest_alike(given, most_processes)
    per_head_group = min(2, max(1, config.model.heads // given.tensor))
    heads = degrees.tensor * per_head_group
    model = replace(
        config.model,
        layers=2,
        heads=heads,
        hidden=heads * _HEAD,
        ffn=2 * heads * _HEAD,
        sequence_length=min(_SEQUENCE, config.model.sequence_length),
        vocab_size=None,
        init_std=0.2,  # large enough for every path to matter
    )
    dropless = config.moe.dispatch == "dropless"
    experts = degrees.expert * min(_EXPERTS_PER_RANK, config.moe.num_experts // given.expert)
    moe = replace(
        config.moe,
        num_experts=experts,
        top_k=min(config.moe.top_k, max(experts, 1)),
        every=min(2, config.moe.every),
        capacity_multiple=min(config.moe.capacity_multiple, degrees.tensor),  # else nothing would ever be dropped
        # What sharded sequences do to capacity is asked of the one process, too.
        capacity_groups=degrees.tensor if given.sequence and not dropless else config.moe.capacity_groups,
    )
    micro_batch = min(_MICRO_BATCH, config.data.micro_batch_size)
    accumulated = min(_ACCUMULATED, config.data.batch_size // (config.data.micro_batch_size * given.data) or 1)
    batch = micro_batch * accumulated * degrees.data
    _write_samples(directory / "text", batch * _STEPS_PER_EPOCH * model.sequence_length, config.seed)
    data = DataConfig(
        path=str(directory / "text"),
        batch_size=batch,
        micro_batch_size=micro_batch,
        validation_samples=batch,
        validation_fraction=0.5,
        cache_dir=str(directory / "cache"),
    )
    optimizer = dict(config.optim.optimizer)
    if "Adam" in str(optimizer.get("_target_")):
        # The gradient of a key bias is zero in theory and rounding noise in practice, which Adam divides by eps.
        optimizer["eps"] = max(1e-5, optimizer.get("eps", 0.0))
    tile = min(100, config.optim.tile) if isinstance(config.optim.tile, int) else config.optim.tile
    optim = replace(config.optim, optimizer=optimizer, tile=tile, warmup_steps=min(2, config.optim.warmup_steps))
    optim.stop_on_nonfinite = False  # a certificate compares what comes of it, to the end
    if config.trainer.get("precision") in HALF_PRECISIONS:  # fp16's logic, if not its numbers
        optim.loss_scale = config.optim.loss_scale or 2.0**16
    accelerator = _accelerator(config, degrees.world_size)
    trainer: dict[str, Any] = {
        "accelerator": accelerator,
        "devices": degrees.world_size,
        "num_nodes": 1,
        "precision": config.certificate_precision,
        "deterministic": "warn",  # a run that is continued in its own layout must give equal bits
        "max_steps": STEPS,
        "max_epochs": -1,
        **{key: config.trainer.get(key) for key in ("gradient_clip_val", "gradient_clip_algorithm")},
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    return replace(
        config,
        model=model,
        moe=moe,
        parallel=ParallelConfig(degrees.world_size, degrees.tensor, degrees.expert, given.sequence),
        comm=replace(config.comm, backend=None if accelerator == "cpu" else config.comm.backend, emulate=None),
        data=data,
        optim=optim,
        trainer=trainer,
        logger={},
        checkpoint=replace(config.checkpoint, every=SAVED, monitor=None, keep=-1),
        check_replicas_every=None,  # the record compares them, and a difference is to be named, not to end the run
        ckpt_path=None,
        output_dir=str(directory / "layout"),
    )


def reference(config: TrainConfig, directory: Path) -> TrainConfig:
    """The same training in one process: micro-batches accumulated, nothing sharded, tiled, overlapped, recomputed."""
    return replace(
        config,
        model=replace(config.model, checkpoint="none"),
        parallel=ParallelConfig(1),
        comm=CommConfig(backend=config.comm.backend, timeout_s=config.comm.timeout_s),
        optim=replace(config.optim, zero=False, tile=None, overlap=False),
        trainer={**config.trainer, "devices": 1, "accumulate_grad_batches": None},
        output_dir=str(directory / "reference"),
    )


def largest_alike(degrees: ParallelDegrees, most_processes: int) -> ParallelDegrees:
    """The largest layout of so many processes at most in which every degree divides the given one.

    A degree is 1 only if the given one is.

    Raises:
        ValueError: if there is none: three prime degrees, all large.
    """
    wanted = (degrees.tensor, degrees.expert, degrees.expert_data)
    fitting = [
        sizes
        for sizes in product(*(_divisors(degree) for degree in wanted))
        if np.prod(sizes) <= most_processes and all(s > 1 or w == 1 for s, w in zip(sizes, wanted, strict=True))
    ]
    if not fitting:
        raise ValueError(f"no layout of at most {most_processes} processes is like {degrees}")
    tensor, expert, expert_data = max(fitting, key=lambda sizes: (np.prod(sizes), sizes))
    return ParallelDegrees(tensor * expert * expert_data, tensor, expert, degrees.sequence)


def _accelerator(config: TrainConfig, processes: int) -> str:
    """The configuration's own, unless this machine cannot run so many processes on it."""
    wanted = str(config.trainer["accelerator"])
    available = torch.cuda.device_count()
    enough = processes <= available or (available > 0 and config.comm.backend == "gloo")
    return wanted if wanted == "cpu" or enough else "cpu"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _write_samples(folder: Path, characters: int, seed: int) -> None:
    """Two files of random letters, one of which becomes the validation split."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    for name in ("one", "two"):
        letters = draw.integers(ord("a"), ord("z") + 1, characters + _SEQUENCE, dtype=np.uint8)
        (folder / f"{name}.txt").write_bytes(letters.tobytes())
