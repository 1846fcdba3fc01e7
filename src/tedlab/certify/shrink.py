"""Scales a training configuration down so that a laptop can run it, and derives its one-process reference.

It keeps the layout (up to 16 processes), whether exchanges go by way of nodes, whether a process has one expert or
several (then 3, or 6 if experts form groups), routing, clipping, optimizer and schedule, ZeRO, tiles, overlap and every
toggle; for fp16, loss scaling with a first step that overflows. Biases that balance experts move in steps as large as
differences between scores.
It reduces layers, widths, sequence, batch, the number of steps, and the sizes of the pieces that a computation is
divided into, so that there are several pieces and the last is smaller. Sizes are odd where the layout allows, so that
whatever needs padding is padded here, too. It replaces the precision, and the text with one that contains tokens of
every tensor rank. GPU configurations run on GPUs if this machine has enough of them, and on the CPU otherwise.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tedlab.capacity import group_capacity
from tedlab.config import (
    AttentionConfig,
    Backend,
    BiasUpdate,
    CertificatePrecision,
    CommConfig,
    DataConfig,
    Documents,
    ExpertKernel,
    GroupConfig,
    LatentConfig,
    LendConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    Packing,
    ParallelConfig,
    Positions,
    RampConfig,
    RecomputeConfig,
    RotaryConfig,
    RouterConfig,
    TrainConfig,
)
from tedlab.degrees import ParallelDegrees, parallel_degrees
from tedlab.models import models
from tedlab.nn import with_heads
from tedlab.optim import Grouping
from tedlab.predict.volumes import tile_of
from tedlab.registry import mixtures
from tedlab.spec import Layout
from tedlab.strategy import HALF_PRECISIONS
from tedlab.validate.comm import ranks_per_node

STEPS, SAVED = 4, 2  # the steps of a run, and the step after which it saves
STEPS_PER_EPOCH = 3  # a run that continues after step 2 starts in the middle of an epoch and reaches the next
MOST_PROCESSES = 16  # on this machine
_SEQUENCE, _MICRO_BATCH, _ACCUMULATED, _EXPERTS_PER_RANK = 13, 3, 2, 3
_ENDS, _ROWS = (1, 3), 3  # a run continues in the middle of a ramp's second stage; rows of a sample while it lasts
_EXPERTS_OF_GROUPS = 6  # per rank, where experts form groups
_BIAS_RATES = {BiasUpdate.SIGN: 1 / 16, BiasUpdate.PROPORTIONAL: 1 / 2}  # at least: they matter within a few steps
_TILE, _BUCKET = 100, 50  # elements
_BYTES = 256  # the number of values of a byte
_LAST_BYTE = 0xF4  # the largest byte in UTF-8


@dataclass(frozen=True)
class _Widths:
    """Widths of a scaled-down model: odd, or in bf16 multiples of 8, as the kernel for all experts at once requires."""

    head: int
    ffn: int  # on each tensor rank
    # On each tensor rank, where routed or shared experts have a width of their own:
    expert: int
    shared: int

    @staticmethod
    def of(config: TrainConfig) -> "_Widths":
        if config.certificate_precision == CertificatePrecision.BF16:
            return _Widths(8, 16, 8, 24)
        rotary = config.model.positions == Positions.ROTARY  # which turns pairs of features
        return _Widths(4 if rotary else 3, 11, 7, 5)


def shrink(config: TrainConfig, directory: Path, most_processes: int = MOST_PROCESSES) -> TrainConfig:
    """Returns the scaled-down configuration by which ``config`` is certified.

    Args:
        config: Any training configuration, which need not fit this machine.
        directory: The folder for text, cache and runs.
        most_processes: The most processes that the layout may have.

    Raises:
        ValueError: If the degrees do not fit the world size, or no smaller layout is like them.
    """
    given = parallel_degrees(config.parallel)
    degrees = largest_alike(given, most_processes, _places_on_nodes(config, given))
    unlimited = config.moe.unlimited
    # Sharded sequences, or sliced tokens, divide the capacity into groups; the one process must use the same groups.
    in_slices = given.sequence or config.moe.sliced
    groups = degrees.tensor if in_slices and not unlimited else config.moe.capacity_groups
    widths = _Widths.of(config)
    heads = degrees.tensor * min(3, max(1, config.model.heads // given.tensor))
    micro_batch = _MICRO_BATCH if config.data.micro_batch_size > 1 else 1
    parts = degrees.tensor if in_slices else groups or 1
    by_length = any(stage.sequence_length is not None for stage in config.data.ramp)
    length = _length(config.model.sequence_length, parts * (_ROWS if by_length else 1))
    model = replace(
        with_heads(config.model, heads, widths.head, degrees.tensor),
        layers=2,
        ffn=math.lcm(degrees.tensor, degrees.expert_tensor) * widths.ffn,
        sequence_length=length,
        vocab_size=_vocabulary(degrees.tensor),
        init_std=0.2,  # large enough for every path to matter
    )
    if config.model.base_hidden is not None:  # twice as wide, since not every width can be half
        model = replace(model, base_hidden=2 * model.hidden)
    if config.model.kv_heads is not None and config.model.kv_heads < given.tensor:  # ranks go on sharing keys
        sharers = given.tensor // config.model.kv_heads
        model = replace(model, kv_heads=1 if degrees.tensor % sharers else degrees.tensor // sharers)
    model = replace(model, attention=_attention(model.attention, widths.head, length), rotary=_rotary(model, length))
    if config.model.loss_chunk is not None:
        model = replace(model, loss_chunk=min(config.model.loss_chunk, max(1, (micro_batch * length - 1) // 2)))
    # The second block has experts; so has the first, if the model has no dense block.
    shared = config.moe.shared
    listed = config.moe.first_dense > 0 or config.moe.blocks is not None
    dense_first = listed and len(config.moe.routed(config.model.layers)) < config.model.layers
    per_rank = config.moe.num_experts // given.expert
    several = _EXPERTS_PER_RANK if config.moe.router.expert_groups == 1 else _EXPERTS_OF_GROUPS
    experts = degrees.expert * (per_rank if per_rank <= 1 else several)
    top_k, router = _choices(config.moe, experts)
    moe = replace(
        config.moe,
        num_experts=experts,
        top_k=top_k,
        every=1 if listed else min(2, config.moe.every),
        first_dense=int(dense_first),
        blocks=None,
        ffn=None if config.moe.ffn is None else degrees.expert_tensor * widths.expert,
        shared=replace(
            shared,
            experts=min(2, shared.experts),
            ffn=None if shared.ffn is None else degrees.tensor * widths.shared,
        ),
        capacity_groups=groups,
        router=router,
        lend=replace(config.moe.lend, threshold=min(1.1, config.moe.lend.threshold), minimum=1),
    )
    if experts:
        moe = replace(moe, capacity_multiple=_capacity_multiple(moe, micro_batch * length, degrees.tensor))
    accumulated = min(_ACCUMULATED, config.data.batch_size // (config.data.micro_batch_size * given.data) or 1)
    steps = [micro_batch * degrees.data * n for n in _accumulations(config, accumulated)]
    ramp = [
        RampConfig(until=until, batch_size=size, sequence_length=stage.sequence_length and length // _ROWS)
        for stage, size, until in zip(config.data.ramp[-len(_ENDS) :], steps, _ENDS, strict=False)
    ]
    batch = steps[-1]
    several = config.data.documents == Documents.MASKED or config.data.packing == Packing.BEST_FIT
    write = _write_documents if several else _write_samples
    write(directory / "text", max(steps), length, config.seed)
    data = DataConfig(
        path=str(directory / "text"),
        batch_size=batch,
        micro_batch_size=micro_batch,
        validation_samples=batch,
        validation_fraction=0.5,
        cache_dir=str(directory / "cache"),
        documents=config.data.documents,
        packing=config.data.packing,
        ramp=ramp,
    )
    optimizer, tile = dict(config.optim.optimizer), tile_of(config)
    if any(kind in str(optimizer.get("_target_")) for kind in ("Adam", "Muon")):
        # A key bias has a gradient of zero in theory and of rounding noise in practice, which Adam divides by eps.
        optimizer["eps"] = max(1e-5, optimizer.get("eps", 0.0))
    optim = replace(
        config.optim,
        optimizer=optimizer,
        tile=min(_TILE, tile) if isinstance(tile, int) else tile,
        bucket_elements=min(_BUCKET, config.optim.bucket_elements),
        warmup_steps=min(2, config.optim.warmup_steps),
        decay_fraction=max(0.5, config.optim.decay_fraction),  # two of the four steps
        decay_steps=None if config.optim.decay_steps is None else STEPS // 2,
        groups=_groups_of(config.optim.groups, model, moe),
        stop_on_nonfinite=False,  # a certificate compares all steps, non-finite ones included
    )
    if config.trainer.get("precision") in HALF_PRECISIONS:  # tests the logic of fp16, though not its arithmetic
        optim = replace(optim, loss_scale=config.optim.loss_scale or 2.0**16)
    accelerator = _accelerator(config, degrees.world_size)
    trainer: dict[str, Any] = {
        "accelerator": accelerator,
        "devices": degrees.world_size,
        "num_nodes": 1,
        "precision": config.certificate_precision,
        "deterministic": "warn",  # a run continued in its own layout must be bitwise equal
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
        parallel=replace(
            config.parallel,
            world_size=degrees.world_size,
            tensor=degrees.tensor,
            expert=degrees.expert,
            expert_tensor=degrees.expert_tensor if degrees.folded else None,
        ),
        comm=replace(
            config.comm,
            backend=None if accelerator == "cpu" else config.comm.backend,
            emulate=None,
            ranks_per_node=_ranks_per_node(config, given, degrees),
            chunks=_chunks(config.comm, moe, replace(degrees, sequence=given.sequence), micro_batch * length),
        ),
        data=data,
        optim=optim,
        average=replace(
            config.average,
            decay=min(0.5, config.average.decay),
            every=min(2, config.average.every),
            start=min(1, config.average.start),
        ),
        trainer=trainer,
        logger={},
        checkpoint=replace(config.checkpoint, every=SAVED, monitor=None, keep=-1),
        check_replicas_every=None,  # the record compares them; a difference should be reported, not end the run
        ckpt_path=None,
        weights=None,
        output_dir=str(directory / "layout"),
    )


def _groups_of(groups: Sequence[GroupConfig], model: ModelConfig, moe: MoEConfig) -> list[GroupConfig]:
    """Returns the groups of parameters that the smaller model has; patterns may name blocks that it lacks."""
    spec = models[model.architecture].spec(replace(model, vocab_size=model.vocab_size or 1), moe)
    grouping = Grouping(groups)
    used = [grouping.of(parameter.name) for parameter in spec.parameters()]
    return [group for group in groups if any(group is other for other in used)]


def reference(config: TrainConfig, directory: Path) -> TrainConfig:
    """Returns the configuration of the same training in one process, in the plainest way there is.

    It accumulates micro-batches; it shards, tiles, overlaps, recomputes, compiles and scales nothing.
    """
    kernel = ExpertKernel.TORCH.value if config.moe.kernel == ExpertKernel.TRITON else config.moe.kernel
    return replace(
        config,
        model=replace(config.model, recompute=RecomputeConfig(), loss_chunk=None, compile="none"),
        moe=replace(config.moe, kernel=kernel, lend=LendConfig()),
        parallel=ParallelConfig(1),
        comm=CommConfig(backend=config.comm.backend, timeout_s=config.comm.timeout_s),
        optim=replace(
            config.optim,
            zero=False,
            tile=None,
            overlap=False,
            loss_scale=None,
            bucket_elements=OptimConfig.bucket_elements,
        ),
        trainer={**config.trainer, "devices": 1, "accumulate_grad_batches": None},
        checkpoint=replace(config.checkpoint, async_save=False),
        output_dir=str(directory / "reference"),
    )


def _attention(attention: AttentionConfig, width: int, length: int) -> AttentionConfig:
    """Returns attention whose windows are shorter than the text, and whose latents and heads are about this wide."""
    window = None if attention.window is None else min(attention.window, max(1, length // 3))
    latent = attention.latent
    if latent.kv_rank is not None:
        step = 1 if width % 8 else width  # what widths are multiples of
        q_rank = None if latent.q_rank is None else width + 3 * step
        latent = LatentConfig(width + step, q_rank, max(step, width - step), width, width + 2 * step)
    return replace(attention, window=window, latent=latent)


def _rotary(model: ModelConfig, length: int) -> RotaryConfig:
    """Returns a stretch of rotary positions from less than the text's length, so that it matters."""
    original = model.rotary.original_length
    return replace(model.rotary, original_length=None if original is None else min(original, max(1, length // 2)))


def _places_on_nodes(config: TrainConfig, given: ParallelDegrees) -> tuple[int, int] | None:
    """Returns over how many nodes an expert group is divided and its processes on each; None if nothing depends on it.

    Raises:
        ValueError: If a group's nodes have unequal parts of it.
    """
    per_node = ranks_per_node(config)
    if per_node is None or not config.comm.by_node:
        return None
    nodes = given.nodes(per_node)
    return nodes, given.expert // nodes


def _ranks_per_node(config: TrainConfig, given: ParallelDegrees, smaller: ParallelDegrees) -> int | None:
    """Returns the ranks of a node, for an expert group of the smaller layout to be on nodes as one of the given is."""
    on_nodes = _places_on_nodes(config, given)
    if on_nodes is None:
        return config.comm.ranks_per_node
    nodes, places = on_nodes
    if nodes == 1:
        return smaller.world_size
    group = smaller.groups(0)["expert"]
    per_node = group.step * (1 if places == 1 else smaller.expert // _divisors(smaller.expert)[1])
    alike = smaller.nodes(per_node)
    assert alike > 1
    assert (alike == smaller.expert) == (places == 1)
    return per_node


def largest_alike(
    degrees: ParallelDegrees, most_processes: int, on_nodes: tuple[int, int] | None = None
) -> ParallelDegrees:
    """Returns the largest layout of at most ``most_processes`` in which every degree divides the given one.

    A degree is 1 only if the given one is. A folded layout stays one: of tensor and expert_tensor the larger stays the
    larger, and where it can be, an expert group holds a tensor group or is inside one if it did or was before. Expert
    groups that exchange by way of several nodes, with several processes on each, can do so afterwards: ``expert`` is
    then no prime, and may be 4 whatever it was.

    Args:
        degrees: The given layout.
        most_processes: The most processes that the layout may have.
        on_nodes: The number of nodes that an expert group is on and of its processes on each, if it matters.

    Raises:
        ValueError: If there is no such layout, as for three large prime degrees.
    """
    by_node = on_nodes is not None and min(on_nodes) > 1
    experts = [n for n in {*_divisors(degrees.expert), 4} if len(_divisors(n)) > 2] if by_node else None
    wanted = _divisors(degrees.tensor), experts or _divisors(degrees.expert), _divisors(degrees.expert_data)
    widths = _divisors(degrees.expert_tensor) if degrees.folded else [None]
    fitting = []
    for (tensor, expert, replicas), width in product(product(*wanted), widths):
        width = width or tensor
        world = width * expert * replicas
        if world <= most_processes and world % tensor == 0:
            layout = ParallelDegrees(world, tensor, expert, degrees.sequence, width, degrees.order)
            if _traits(layout) == _traits(degrees):
                fitting.append(layout)
    if not fitting:
        sending = ""
        if by_node:
            sending = (
                ", whose expert groups exchange by way of nodes with several processes on each, which takes an expert "
                "degree of 4 or more; certify it without comm.hierarchical and comm.dedup=node"
            )
        raise ValueError(f"no layout of at most {most_processes} processes is like {degrees}{sending}")

    def size(layout: ParallelDegrees) -> tuple[object, ...]:
        sizes = layout.tensor, layout.expert, layout.expert_data, layout.expert_tensor
        return layout.folded and _inside(layout) == _inside(degrees), layout.world_size, sizes

    return max(fitting, key=size)


def _inside(degrees: ParallelDegrees) -> int:
    """Returns 1 if the processes that hold all experts together are fewer than a tensor group, -1 if more, else 0."""
    return int(np.sign(degrees.tensor - degrees.expert * degrees.expert_tensor))


def _traits(degrees: ParallelDegrees) -> tuple[object, ...]:
    """Returns which degrees are 1, and which of tensor and expert_tensor is the larger."""
    sizes = degrees.tensor, degrees.expert, degrees.expert_data, degrees.expert_tensor, degrees.data
    return *(size == 1 for size in sizes), np.sign(degrees.tensor - degrees.expert_tensor)


def _accelerator(config: TrainConfig, processes: int) -> str:
    """Returns the configuration's accelerator, or ``cpu`` if this machine cannot run so many processes on it."""
    wanted = str(config.trainer["accelerator"])
    available = torch.cuda.device_count()
    enough = processes <= available or (available > 0 and config.comm.backend == Backend.GLOO)
    return wanted if wanted == "cpu" or enough else "cpu"


def _choices(moe: MoEConfig, experts: int) -> tuple[int, RouterConfig]:
    """Returns ``top_k`` and the router for fewer experts.

    Wherever that can be, groups have two experts or more, a token leaves some groups out if it did before, and chooses
    among the experts of the others.
    """
    router = moe.router
    if router.bias_update != BiasUpdate.NONE:
        router = replace(router, bias_rate=max(_BIAS_RATES[BiasUpdate(router.bias_update)], router.bias_rate))
    top_k = min(moe.top_k, max(2, experts - 1), max(experts, 1))
    if router.expert_groups == 1:
        return top_k, router
    groups = max((n for n in _divisors(experts) if 2 * n <= experts and n > 1), default=experts)
    size = experts // groups
    most = groups - (router.chosen_groups < router.expert_groups)
    chosen = min(max(top_k // size + 1, router.chosen_groups), most)
    return min(top_k, max(1, chosen * size - 1)), replace(router, expert_groups=groups, chosen_groups=chosen)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _accumulations(config: TrainConfig, last: int) -> list[int]:
    """Returns how many micro-batches a step has in each stage of the smaller run, whose last has so many.

    Stages that take more or fewer samples than the last do so there, too.
    """
    final = config.data.batch_size
    sizes = [stage.batch_size or final for stage in config.data.ramp[-len(_ENDS) :]]
    fewer = sorted({size for size in sizes if size < final})
    least = 2 if config.comm.interleave else 1
    last = max(last, least + len(fewer)) if fewer else last
    more = sorted({size for size in sizes if size > final})
    number = {size: least + n for n, size in enumerate(fewer)} | {size: last + 1 + n for n, size in enumerate(more)}
    return [*(number.get(size, last) for size in sizes), last]


def _length(most: int, parts: int) -> int:
    """Returns the length of sequences: an odd multiple of ``parts``, as large as allowed."""
    multiple = max(1, min(most, _SEQUENCE) // parts)
    return parts * (multiple - 1 + multiple % 2 or 1)


def _capacity_multiple(moe: MoEConfig, tokens: int, tensor: int) -> int:
    """Returns a multiple that lets tokens be dropped and, if possible, a capacity not divisible by ``tensor``."""
    groups = moe.capacity_groups or 1
    multiples = [groups * multiple for multiple in (3, 5, 7, 2, 1) if groups * multiple <= moe.capacity_multiple]
    for multiple in multiples:
        if group_capacity(replace(moe, capacity_multiple=multiple), tokens // groups, groups) % tensor:
            return multiple
    return multiples[0] if multiples else moe.capacity_multiple


def _chunks(comm: CommConfig, moe: MoEConfig, degrees: ParallelDegrees, tokens: int) -> int:
    """Returns into how many chunks slots or rows are divided: as many as before, if there are so many of these."""
    if comm.chunks == 1:
        return 1
    layout = Layout(degrees, comm, moe.sliced)
    return min(comm.chunks, max(1, mixtures[moe.dispatch].dispatch(1, moe).most_chunks(layout, tokens)))


def _vocabulary(tensor: int) -> int:
    """Returns a padded vocabulary, larger than the bytes, if text can still contain tokens of the last rank's part."""
    smallest, padded = (-(-tokens // tensor) * tensor for tokens in (_BYTES, _BYTES + 1))
    return padded if padded // tensor * (tensor - 1) <= _LAST_BYTE else smallest


def _write_samples(folder: Path, batch: int, length: int, seed: int) -> None:
    """Writes two files of random characters, one of which becomes the validation split.

    Each has the samples of an epoch and, if a batch has several, one more, so that epochs leave out different ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    size = (STEPS_PER_EPOCH * batch + min(1, batch - 1)) * length
    # Characters of one to four bytes contain all byte values but the 13 that never occur in UTF-8.
    firsts, ends = np.array([0x01, 0x80, 0x800, 0x10000]), np.array([0x80, 0x800, 0xD800, 0x110000])
    for name in ("one", "two"):
        kind = draw.choice(4, size, p=[0.64, 0.16, 0.1, 0.1])
        text = "".join(map(chr, draw.integers(firsts[kind], ends[kind]))).encode()[:size]
        whole = text.decode(errors="ignore").encode()
        (folder / f"{name}.txt").write_bytes(whole + b"." * (size - len(whole)))


def _write_documents(folder: Path, batch: int, length: int, seed: int) -> None:
    """Does the same in JSON lines, of which every sample holds two or more, and one of each file is too long for it."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    samples = STEPS_PER_EPOCH * batch + min(1, batch - 1)
    for name in ("one", "two"):
        sizes = [2 * length]
        for _ in range(samples):
            first = int(draw.integers((length + 1) // 2 + 1, length)) if length > 3 else 2
            sizes += [first, max(1, length - first - 1)]
        texts = ("".join(map(chr, draw.integers(0x20, 0x7F, size))) for size in sizes)
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines))
