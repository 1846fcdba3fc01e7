"""Folded layouts, and routed experts that slice tokens, in float64: one optimizer step of each is that of one process.

A step compares losses, what was dropped, the norm of the gradient before it is clipped, and all new weights, and its
ledger with the closed form. ``python -m tests.moe.test_folding`` runs every layout of up to eight processes in every
mode and prints the largest errors.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from tedlab import Topology
from tedlab.comm import Ledger, Recomputation, differentiable, recompute
from tedlab.comm.ledger import differences
from tedlab.config import CommOptions, ParallelConfig, TrainConfig, with_values
from tedlab.degrees import ParallelDegrees, parallel_degrees
from tedlab.models import GPT
from tedlab.moe import grouped, mixtures, routes_own_tokens
from tedlab.nn import decay_groups, partial_parameters
from tedlab.optim import ShardedOptimizer
from tedlab.predict.volumes import predict, with_rows
from tedlab.spec import Layout
from tedlab.validate.experts import check_experts
from tests.certify.runs import composed
from tests.comm.test_ledger import poisoned
from tests.pool import WorkerPool

MICRO_BATCH = 2
BASE = composed(
    *("model.layers=2", "model.init_std=0.3", "moe.capacity_factor=0.7", "moe.top_k=2", "moe.capacity_multiple=1"),
    *("moe.aux_loss=0.1", "moe.z_loss=0.01", "trainer.precision=64-true", "trainer.gradient_clip_val=0.05"),
    *(f"data.micro_batch_size={MICRO_BATCH}", "optim.bucket_elements=2000"),
)
Overrides = dict[str, Any]
AGAIN: Overrides = {"model.recompute.granularity": "block"}
FUSED: Overrides = {"comm.dtd": True, "comm.fuse_reduce_scatter": True}
DROPLESS: Overrides = {"moe.dispatch": "dropless"}
SLICE: Overrides = {"moe.slice": "tokens", "moe.capacity_groups": "tensor"}
IN_SEQUENCE: Overrides = {"parallel.sequence": True, "moe.capacity_groups": "tensor"}
MODES: dict[str, Overrides] = {
    "slots": {},
    "slots_dtd_kept": {**AGAIN, "comm.dtd": True, "comm.cac": True, "trainer.accumulate_grad_batches": 2},
    "slots_fused": {**FUSED, **AGAIN, "comm.cac": "shard", "comm.chunks": 2, "optim.overlap": True},
    "rows": {**DROPLESS, **AGAIN, "comm.cac": "shard"},
    "rows_fused_kept": {
        **{**DROPLESS, **FUSED, **AGAIN, "comm.cac": True, "comm.chunks": 2, "trainer.accumulate_grad_batches": 2}
    },
    "packed": {**AGAIN, "moe.dispatch": "packed", "comm.dtd": True, "optim.zero": False},
    "sequence_slots": {**IN_SEQUENCE, **AGAIN, "comm.cac": True},
    "sequence_rows": {**IN_SEQUENCE, **DROPLESS, **AGAIN, "trainer.accumulate_grad_batches": 2},
    "slice_slots": {**SLICE, **AGAIN, "comm.cac": "shard", "trainer.accumulate_grad_batches": 2},
    "slice_rows": {
        **{**SLICE, **DROPLESS, **AGAIN, "comm.cac": True, "moe.router.bias": True},
        **{"moe.shared.experts": 1, "moe.shared.combine": "cg2"},
    },
    "slice_packed": {**SLICE, "moe.dispatch": "packed", "moe.balance.scope": "sequence"},
    "slice_pilots": {**SLICE, **DROPLESS, **AGAIN, "comm.dedup": "rank", "comm.cac": True, "moe.shared.experts": 1},
    "slots_by_node": {**AGAIN, "comm.hierarchical": True, "comm.cac": True, "trainer.accumulate_grad_batches": 2},
    "rows_by_node": {**DROPLESS, **FUSED, **AGAIN, "comm.hierarchical": True, "comm.cac": "shard", "comm.chunks": 2},
    "pilots": {**DROPLESS, **AGAIN, "comm.dedup": "rank", "comm.cac": "shard", "trainer.accumulate_grad_batches": 2},
    "pilots_fused": {**DROPLESS, **FUSED, **AGAIN, "comm.dedup": "rank", "comm.cac": True, "optim.overlap": True},
    "pilots_fused_by_node": {**DROPLESS, **FUSED, **AGAIN, "comm.dedup": "node", "comm.cac": "shard"},
    "gathered": {**DROPLESS, **AGAIN, "comm.dedup": "group", "comm.cac": "shard", "trainer.accumulate_grad_batches": 2},
    "gathered_fused": {**DROPLESS, **FUSED, **AGAIN, "comm.dedup": "group", "comm.cac": True, "optim.overlap": True},
    "slice_gathered": {**SLICE, **DROPLESS, **AGAIN, "comm.dedup": "group", "comm.cac": True, "moe.shared.experts": 1},
    "slice_pilots_by_node": {
        **{**SLICE, **DROPLESS, **AGAIN, "comm.dedup": "node", "comm.cac": True, "trainer.accumulate_grad_batches": 2},
        **{"moe.shared.experts": 1, "comm.overlap_shared": True},
    },
    "sequence_pilots_by_node": {**IN_SEQUENCE, **DROPLESS, **AGAIN, "comm.dedup": "node", "comm.cac": "shard"},
    "slice_slots_by_node": {**SLICE, **AGAIN, "comm.hierarchical": True, "comm.cac": True},
    "slice_rows_by_node": {**SLICE, **DROPLESS, **AGAIN, "comm.hierarchical": True, "comm.chunks": 2},
    "sequence_slots_by_node": {**IN_SEQUENCE, **AGAIN, "comm.hierarchical": True, "comm.cac": "shard"},
    "sequence_rows_by_node": {
        **{**IN_SEQUENCE, **DROPLESS, **AGAIN, "comm.hierarchical": True, "trainer.accumulate_grad_batches": 2}
    },
    "slice_lent": {**SLICE, **DROPLESS, **AGAIN, "moe.lend.policy": "llep", "moe.lend.minimum": 1},
}
TENSOR_ONLY = {mode for mode in MODES if mode.startswith(("sequence", "slice"))}
BY_NODE = {mode for mode in MODES if mode.endswith("by_node")}
UNFOLDED_ONLY = {"slice_lent"}
Degrees = tuple[int, int, int, int, str]  # processes, tensor, expert, expert_tensor, order


def size(processes: int) -> int:
    """The number of heads, experts and positions, so that any degree divides them."""
    return 6 if processes == 6 else 8


def layouts(processes: int, folded: bool = True) -> Iterator[Degrees]:
    """All that are folded, or all that are not; those with replicas in both orders."""
    divisors = [n for n in range(1, processes + 1) if processes % n == 0]
    for tensor in divisors:
        for expert_tensor in divisors:
            for expert in divisors:
                if (
                    (expert_tensor == tensor) == folded
                    or processes % (expert * expert_tensor)
                    or size(processes) % expert
                ):
                    continue
                yield processes, tensor, expert, expert_tensor, "expert"
                if expert > 1 and expert * expert_tensor < processes:
                    yield processes, tensor, expert, expert_tensor, "expert_data"


@dataclass
class Step:
    """What a step did; weights are whole."""

    losses: list[float]
    dropped: int
    norm: float
    weights: dict[str, np.ndarray]
    complaints: list[str]


def configuration(degrees: Degrees, mode: str, micro_batches: int | None = None) -> TrainConfig:
    """With ``micro_batches``, that of one process which accumulates so many."""
    processes, tensor, expert, expert_tensor, order = degrees
    config = replace(BASE, parallel=ParallelConfig(processes, tensor, expert, False, expert_tensor, order))
    n = size(processes)
    settings = {"model.hidden": 2 * n, "model.heads": n, "model.ffn": 2 * n, "model.sequence_length": n}
    settings |= {"model.vocab_size": 4 * n, "moe.num_experts": n, **MODES[mode]}
    if settings.get("moe.capacity_groups") == "tensor":
        settings["moe.capacity_groups"] = None if settings.get("moe.dispatch") == "dropless" else tensor
    if micro_batches is not None:
        config = replace(config, parallel=ParallelConfig(1))
        settings |= {"trainer.accumulate_grad_batches": micro_batches, "parallel.sequence": False}
        settings = {name: value for name, value in settings.items() if not name.startswith("comm.")}
    else:
        settings.setdefault("trainer.accumulate_grad_batches", 1)
    config = with_values(config, settings)
    if config.comm.by_node:  # two nodes: the halves of an expert group
        group = parallel_degrees(config.parallel).groups(0)["expert"]
        config = with_values(config, {"comm.ranks_per_node": group[len(group) // 2]})
    layout = Layout(parallel_degrees(config.parallel), config.comm, config.moe.sliced)
    most = mixtures[config.moe.dispatch].dispatch(2 * n, config.moe).most_chunks(layout, MICRO_BATCH * n)
    return with_values(config, {"comm.chunks": min(config.comm.chunks, most)})


def fits(degrees: Degrees, mode: str) -> bool:
    """Whether the mode does anything in the layout, and may be asked for."""
    _, tensor, expert, expert_tensor, _ = degrees
    if (mode in TENSOR_ONLY and tensor == 1) or (mode in UNFOLDED_ONLY and expert_tensor != tensor):
        return False
    if mode in BY_NODE:  # two places or more on two nodes
        return expert >= 4 and expert % 2 == 0
    if mode in ("pilots", "gathered") and tensor > 1 < expert_tensor:  # sums of rows, in the paper's order
        return False
    several = any(word in mode for word in ("pilots", "gathered", "lent"))  # processes, and experts in each
    return 1 < expert < size(degrees[0]) or not several


def train(config: TrainConfig) -> Step:
    """One step of plain SGD, in this process's part of the layout."""
    recompute.unused = differentiable.unused = grouped.unused = poisoned
    degrees = parallel_degrees(config.parallel)
    check_experts(config, degrees)
    topology, ledger = _topology(degrees, config.comm.ranks_per_node), Ledger()
    topology.options, topology.recomputation = config.comm, Recomputation()
    torch.set_default_dtype(torch.float64)
    try:
        model = GPT(config.model, config.moe, topology, 0)
    finally:
        torch.set_default_dtype(torch.float32)
    optimizer = ShardedOptimizer(
        torch.optim.SGD([{"params": group} for group in decay_groups(model)], lr=1.0),
        topology.comm,
        {p: n for n, p in model.named_parameters()},
        partial=partial_parameters(model),
        zero=config.optim.zero,
        tile=None,
        bucket_elements=config.optim.bucket_elements,
        overlap=config.optim.overlap,
    )
    handle = topology.comm.register_hook(ledger)
    accumulated, losses, dropped = int(config.trainer["accumulate_grad_batches"]), [], 0
    for number in range(accumulated):
        draw = torch.Generator().manual_seed(accumulated * topology.comm.rank("data") + number)
        ids = torch.randint(config.model.vocab_size, (MICRO_BATCH, config.model.sequence_length + 1), generator=draw)
        loss, reports = model.loss(ids[:, :-1], ids[:, 1:])
        total = loss + sum(0.1 * r.balance_loss + 0.01 * r.z_loss for r in reports)
        (total / accumulated).backward()
        losses.append(float(total.detach()))
        dropped += sum(int(report.dropped) for report in reports)
    optimizer.reduce_gradients()
    norm = optimizer.global_norm()
    optimizer.clip(float(config.trainer["gradient_clip_val"]))
    optimizer.optimizer.step()
    handle.remove()
    wrong = [
        f"{entry}: {ours} instead of {theirs}"
        for entry, (ours, theirs) in differences(ledger.totals, with_rows(predict(config), config, model.moved)).items()
    ]
    if topology.recomputation.flips or topology.recomputation.kept_bytes:
        wrong.append("flips, or kept memory was not freed")
    if not routes_own_tokens(model):
        dropped = dropped if topology.comm.rank("tensor") == 0 else 0
    weights = {name: _whole(p).numpy() for name, p in model.named_parameters()}
    return Step(losses, dropped, norm, weights, wrong)


@cache
def _topology(degrees: ParallelDegrees, ranks_per_node: int | None) -> Topology:
    by_node = CommOptions(hierarchical=ranks_per_node is not None, ranks_per_node=ranks_per_node)
    return Topology(degrees, options=by_node)


def _whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    values = parameter.detach()
    return values.full_tensor() if isinstance(values, DTensor) else values


def steps(cells: Sequence[tuple[Degrees, str]]) -> list[Step]:
    return [train(configuration(degrees, mode)) for degrees, mode in cells]


def references(cells: Sequence[tuple[Degrees, str]]) -> list[Step]:
    """Those of one process; cells with equal data share one."""
    found: dict[tuple[int, int, str], Step] = {}
    for (processes, tensor, *_), mode in cells:
        key = processes // tensor, tensor if MODES[mode].get("moe.capacity_groups") else 1, mode
        if key not in found:
            accumulated = int(MODES[mode].get("trainer.accumulate_grad_batches", 1))
            found[key] = train(configuration((processes, tensor, 1, tensor, "expert"), mode, key[0] * accumulated))
    keys = [
        (processes // tensor, tensor if MODES[mode].get("moe.capacity_groups") else 1, mode)
        for (processes, tensor, *_), mode in cells
    ]
    return [found[key] for key in keys]


def faults(pool: WorkerPool, cells: Sequence[tuple[Degrees, str]], timeout: float = 120) -> tuple[list[str], float]:
    """What is wrong in cells of equally many processes, and their largest error relative to the largest weight."""
    (ones,) = pool.run(1, references, cells, timeout=timeout)
    by_rank = pool.run(cells[0][0][0], steps, cells, timeout=timeout)
    wrong, largest = [], 0.0
    for number, (cell, one) in enumerate(zip(cells, ones, strict=True)):
        of_ranks = [results[number] for results in by_rank]
        tensor = cell[0][1]
        losses = [loss for step in of_ranks[::tensor] for loss in step.losses]
        errors = {"losses": np.abs(np.array(losses) - one.losses).max()}
        errors["dropped"] = float(abs(sum(step.dropped for step in of_ranks) - one.dropped))
        for rank, step in enumerate(of_ranks):
            errors[f"norm in process {rank}"] = abs(step.norm - one.norm) / one.norm
            for name, weight in step.weights.items():
                scale = np.abs(one.weights[name]).max()
                errors[f"{name} in process {rank}"] = np.abs(weight - one.weights[name]).max() / max(scale, 1e-3)
            wrong += [f"{cell} in process {rank}: {complaint}" for complaint in step.complaints]
        wrong += [f"{cell}: {name} is off by {error:.1e}" for name, error in errors.items() if not error < 1e-11]
        largest = max(largest, *errors.values())
    return wrong, largest


def cells(processes: int) -> list[tuple[Degrees, str]]:
    """Every folded layout in every mode, and every other that divides layers in the modes that slice."""
    found = [(degrees, mode) for degrees in layouts(processes) for mode in MODES if fits(degrees, mode)]
    for degrees in layouts(processes, folded=False):
        modes = [mode for mode in MODES if mode.startswith("slice") and not mode.endswith("by_node")]
        modes = [mode for mode in modes if fits(degrees, mode)]
        modes += ["slots_fused", "rows"] if degrees[-1] == "expert_data" else []
        found += [(degrees, mode) for mode in modes]
    return sorted(found)


# X-MoE's SSMB; slots dealt by four tensor ranks and gathered by two processes; the rows of two data ranks gathered.
QUICK = [
    ((4, 2, 4, 1, "expert"), "slice_rows"),
    ((4, 4, 2, 2, "expert"), "slots_fused"),
    ((4, 1, 2, 2, "expert"), "rows"),
]
EVERY = {processes: cells(processes) for processes in (2, 4, 6, 8)}
SAMPLE = [  # CI's: without folding; of six processes, where no degree need divide another; and of eight
    ((4, 2, 2, 2, "expert"), "slice_slots"),
    ((6, 3, 2, 1, "expert"), "sequence_slots"),
    ((6, 2, 3, 2, "expert"), "slice_pilots"),
    ((6, 2, 3, 2, "expert"), "slice_lent"),
    ((6, 2, 2, 3, "expert"), "slots_dtd_kept"),
    ((6, 2, 1, 3, "expert"), "packed"),
    ((6, 6, 1, 2, "expert"), "slice_packed"),
    ((6, 1, 2, 3, "expert"), "slots"),
    ((4, 2, 2, 1, "expert_data"), "sequence_rows"),
    ((4, 4, 2, 2, "expert"), "rows_fused_kept"),
    ((8, 4, 4, 1, "expert"), "slots_by_node"),
    ((8, 4, 4, 2, "expert"), "rows_by_node"),
    ((4, 2, 2, 1, "expert_data"), "pilots"),
    ((4, 1, 2, 2, "expert"), "pilots_fused"),
    ((4, 2, 2, 1, "expert_data"), "gathered"),
    ((4, 4, 2, 2, "expert"), "gathered_fused"),
    ((6, 2, 3, 2, "expert"), "slice_gathered"),
    ((4, 2, 4, 1, "expert"), "slice_pilots_by_node"),
    ((4, 2, 4, 1, "expert"), "sequence_pilots_by_node"),
    ((4, 2, 4, 1, "expert"), "slice_slots_by_node"),
    ((4, 2, 4, 1, "expert"), "slice_rows_by_node"),
    ((4, 2, 4, 1, "expert"), "sequence_slots_by_node"),
    ((4, 2, 4, 1, "expert"), "sequence_rows_by_node"),
    ((8, 4, 4, 2, "expert"), "pilots_fused_by_node"),
]


def assert_right(pool: WorkerPool, chosen: Sequence[tuple[Degrees, str]]) -> None:
    wrong, _ = faults(pool, chosen, timeout=300)
    assert not wrong, "\n".join(wrong[:20])


def test_one_step_of_a_folded_layout_is_that_of_one_process(pool: WorkerPool) -> None:
    assert_right(pool, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [4, 6, 8])
def test_so_is_that_of_others(pool: WorkerPool, processes: int) -> None:
    assert_right(pool, [cell for cell in SAMPLE if cell[0][0] == processes])


_AT_ONCE = 40  # cells of a world


@pytest.mark.exhaustive
@pytest.mark.timeout(700)
@pytest.mark.parametrize(
    ("processes", "first"), [(n, first) for n, found in EVERY.items() for first in range(0, len(found), _AT_ONCE)]
)
def test_so_is_that_of_every_folded_layout_of_up_to_eight_processes(
    pool: WorkerPool, processes: int, first: int
) -> None:
    assert_right(pool, EVERY[processes][first : first + _AT_ONCE])


def test_every_layout_of_up_to_eight_processes_is_there() -> None:
    assert {processes: len(list(layouts(processes))) for processes in EVERY} == {2: 3, 4: 14, 6: 33, 8: 39}
    assert sum(map(len, EVERY.values())) > 900
    assert {mode for _, mode in [*QUICK, *SAMPLE]} == set(MODES)
    assert all(cell in EVERY[cell[0][0]] for cell in [*QUICK, *SAMPLE])
    for degrees, mode in (cell for cells in EVERY.values() for cell in cells if cell[1] in BY_NODE):
        config = configuration(degrees, mode)
        assert Layout(parallel_degrees(config.parallel), config.comm).nodes == 2


def test_slices_are_gathered_once_where_dealt_slots_are_four_times_or_three() -> None:
    """Forward bytes between tensor ranks around routed experts: (T-1)/T · S against 4 and 3 times (T-1)/T · S_c."""
    tensor, expert = 4, 2
    found = {}
    for how, mode, degrees in (
        ("dealt", "slots_dtd_kept", (8, tensor, expert, tensor, "expert")),
        ("fused", "slots_fused", (8, tensor, expert, tensor, "expert")),
        ("sliced", "slice_slots", (8, tensor, tensor * expert, 1, "expert")),
    ):
        config = with_values(configuration(degrees, mode), {"comm.chunks": 1, "trainer.accumulate_grad_batches": 1})
        found[how] = sum(
            count.wire_bytes
            for entry, count in predict(config).items()
            if entry.phase == "forward" and entry.kind in ("tensor", "expert_tensor")
            if entry.tag.startswith(("dispatch.", "experts.", "combine.", "slice."))
        )
    tokens, hidden = MICRO_BATCH * config.model.sequence_length, config.model.hidden
    capacity = math.ceil(2 * tokens / 8 * 0.7)  # of each of eight experts, for two choices of each token
    slots = 8 * math.ceil(capacity / tensor) * tensor  # as many for each tensor rank
    row = (tensor - 1) / tensor * hidden * torch.float64.itemsize
    assert found == {"dealt": 4 * slots * row, "fused": 3 * slots * row, "sliced": tokens * row}


if __name__ == "__main__":
    import sys

    shared = WorkerPool()
    for world in map(int, sys.argv[1:] or ("2", "4", "6", "8")):
        every = cells(world)
        for start in range(0, len(every), 60):
            said, error = faults(shared, every[start : start + 60], timeout=600)
            print(
                f"{world} processes, cells {start} to {start + len(every[start : start + 60])}: {error:.1e}", flush=True
            )
            print("\n".join(said[:10]), flush=True)
