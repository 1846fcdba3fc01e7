"""Every toggle, in many layouts: what it communicates, to the byte, and that it changes nothing else.

Each cell trains one optimizer step. Ledger, closed form, and an independent recorder below autograd and our own
wrappers must agree; results must equal those of the same layout without recomputation, bit for bit.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tedlab import Topology
from tedlab.comm import Collective, Ledger, Recomputation, differentiable, recompute
from tedlab.comm.ledger import Count, Entry, counted, differences, summed
from tedlab.comm.rows import Rows
from tedlab.config import (
    AttentionConfig,
    GroupConfig,
    LatentConfig,
    ParallelConfig,
    SharedConfig,
    TrainConfig,
    with_values,
)
from tedlab.degrees import ParallelDegrees, parallel_degrees
from tedlab.models import GPT
from tedlab.moe import Router, grouped
from tedlab.moe.balance import update_biases
from tedlab.nn import fused_parameters, partial_parameters
from tedlab.optim import Grouping, Muon, ShardedOptimizer
from tedlab.predict.volumes import ClosedForm, predict, with_rows
from tedlab.spec import Layout
from tests.certify.runs import composed
from tests.pool import WorkerPool
from tests.selection import asked_of

LAYOUTS = [(4, 1, 4), (4, 2, 2), (4, 4, 1), (2, 2, 1), (8, 2, 2), (8, 4, 2)]  # processes, tensor, expert
Overrides = dict[str, Any]
MODES: dict[str, Overrides] = {
    "plain": {},
    "dtd": {"comm.dtd": True},
    "fused": {"comm.dtd": True, "comm.fuse_reduce_scatter": True},
    "sequence": {"parallel.sequence": True},
}
ALL = list(MODES)
MODES |= {f"dropless_{name}": {**mode, "moe.dispatch": "dropless"} for name, mode in MODES.items()}
DROPLESS = list(MODES)[len(ALL) :]
MODES |= {f"dedup_{name}": {**MODES[f"dropless_{name}"], "comm.dedup": "rank"} for name in ALL if name != "dtd"}
DEDUP = list(MODES)[-3:]
MODES |= {name.replace("dedup", "gathered"): {**MODES[name], "comm.dedup": "group"} for name in DEDUP}
GATHERED = list(MODES)[-3:]
DEEPSEEK = {"moe.every": 1, "moe.first_dense": 1, "moe.ffn": 8, "moe.shared.experts": 2}
MODES |= {
    "shared": {**DEEPSEEK, "comm.dtd": True},
    "shared_weighted": {**DEEPSEEK, "moe.shared.combine": "cg1", "moe.dispatch": "dropless"},
    "shared_sequence": {**DEEPSEEK, "parallel.sequence": True, "moe.router.bias": True},
    "shared_weighted_sequence": {**DEEPSEEK, "moe.shared.combine": "cg1", "parallel.sequence": True},
}
SHARED = list(MODES)[-4:]
BESIDE: Overrides = {"moe.shared.experts": 1, "moe.ffn": 8}
MODES |= {
    "pos1_fused": {**BESIDE, **MODES["fused"], "moe.shortcut": "pos1", "moe.shared.combine": "cg2", "moe.every": 1},
    "pos2_sequence": {
        **BESIDE,
        **MODES["sequence"],
        "comm.overlap_shortcut": True,
        "moe.shortcut": "pos2",
        "moe.shared.combine": "cg1",
    },
    "pos3_dropless_dtd": {**BESIDE, **MODES["dropless_dtd"], "moe.shortcut": "pos3"},
    "dgmoe_dropless": {**MODES["dropless_plain"], "moe.shortcut": "dgmoe", "moe.top_k": 1},
    "dgmoe_sequence": {**MODES["sequence"], "moe.shortcut": "dgmoe", "moe.top_k": 1},
}
SHORTCUTS = list(MODES)[-5:]
LEND: Overrides = {"moe.dispatch": "dropless", "moe.lend.policy": "llep", "moe.lend.minimum": 1, "moe.every": 1}
MODES |= {
    "lent": {**LEND, "moe.lend.threshold": 1.2},
    "lent_dtd": {**LEND, "comm.dtd": True},
    "lent_fused": {**LEND, "comm.dtd": True, "comm.fuse_reduce_scatter": True, "moe.lend.policy": "even"},
    "lent_sequence": {**LEND, "parallel.sequence": True},
}
LENT = list(MODES)[-4:]
MODES |= {f"packed_{name}": {**MODES[name], "moe.dispatch": "packed"} for name in ALL}
PACKED = list(MODES)[-4:]
RECOMPUTED: dict[str, Overrides] = {
    "stored": {"model.recompute.granularity": "none"},
    "recomputed": {},
    "paper_baseline": {"model.recompute.early_stop": False},
    "cac": {"comm.cac": True, "model.recompute.early_stop": False},
    "cac_with_gemms": {"comm.cac": True, "comm.skip_dead_gemm": False},
    "shard": {"comm.cac": "shard"},
    "some": {"comm.cac": ["combine.all_to_all", "1/dispatch.all_to_all", "attention.reduce:shard"]},
}
BRIEFLY = ("stored", "recomputed", "cac", "shard", "some")
STEPS: dict[str, Overrides] = {  # ZeRO × accumulation, some with the loss of a few of 16 tokens at a time
    "zero": {},
    "zero_accumulated": {"accumulated": 2, "trainer.gradient_clip_val": None, "model.loss_chunk": 5},
    "replicated": {"optim.zero": False, "optim.bucket_elements": 500, "model.loss_chunk": 8},
    "replicated_accumulated": {"optim.zero": False, "accumulated": 2},
}
OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
MICRO_BATCH, SEQUENCE, VOCABULARY = 2, 8, 64


class Recorder(TorchDispatchMode):
    """Calls and bytes by operation and group, as torch's dispatcher sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace != "_c10d_functional":
            return out
        name = func._schema.name.partition("::")[2]
        op = next((o for o in OPERATIONS if name.startswith(o)), None)
        if op is not None:
            buffer = out if op == "all_gather" else args[0]
            group = next(a for a in reversed(args) if isinstance(a, str))
            self.seen[op, group, "calls"] += 1
            self.seen[op, group, "bytes"] += buffer.nbytes
        return out


BASE = composed(
    *("model.layers=3", "model.hidden=16", "model.heads=4", "model.ffn=24", f"model.sequence_length={SEQUENCE}"),
    *(
        f"model.vocab_size={VOCABULARY}",
        "model.init_std=0.2",
        "model.recompute.granularity=block",
        "moe.capacity_factor=0.7",
    ),
    *("moe.top_k=2", "moe.capacity_multiple=1", f"data.micro_batch_size={MICRO_BATCH}"),
)


def configuration(layout: tuple[int, int, int], overrides: Overrides) -> TrainConfig:
    """Hydra would take longer to compose a cell than the cell to run."""
    config = replace(BASE, parallel=ParallelConfig(*layout))
    named = {key: value for key, value in overrides.items() if "." in key}
    return with_values(config, {"trainer.accumulate_grad_batches": overrides.get("accumulated", 1), **named})


def optimizer_of(config: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Muon if that is configured; else SGD, which is quick: what it communicates is what any other does."""
    matrices = any("matrix" in group for group in groups)
    return Muon(groups, lr=0.1) if matrices else torch.optim.SGD(groups, lr=0.1)


def one_step(
    config: TrainConfig, topology: Topology, ledger: Ledger | None = None
) -> tuple[list[Tensor], int, dict[int, Rows]]:
    """Losses, gradients and new weights of one optimizer step, what CAC kept, and the rows of dropless layers."""
    precision = str(config.trainer["precision"])
    torch.set_default_dtype({"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32))
    try:
        model = GPT(config.model, config.moe, topology, 0)
    finally:
        torch.set_default_dtype(torch.float32)
    names = {p: n for n, p in model.named_parameters()}
    grouping = Grouping.under(config.optim)
    groups: list[dict[str, Any]] = [{"params": [], **options} for options in grouping.options(config.optim)]
    for p, name in names.items():
        if grouping.trains(name):
            groups[grouping.index(name, p.dim(), not ("bias" in name or "norm" in name))]["params"].append(p)
        else:
            p.requires_grad_(False)
    optimizer = ShardedOptimizer(
        optimizer_of(config, groups),
        topology.comm,
        names,
        partial=partial_parameters(model),
        fused=fused_parameters(model),
        zero=config.optim.zero,
        tile=None,
        bucket_elements=config.optim.bucket_elements,
    )
    results = []
    handle = topology.comm.register_hook(ledger) if ledger is not None else None
    accumulated = int(config.trainer["accumulate_grad_batches"])
    for number in range(accumulated):
        draw = torch.Generator().manual_seed(accumulated * topology.comm.rank("data") + number)
        batch = torch.randint(VOCABULARY, (MICRO_BATCH, SEQUENCE + 1), generator=draw)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss, reports = model.loss(batch[:, :-1], batch[:, 1:])
        results.append(loss.detach())
        (loss + sum(r.balance_loss + r.z_loss for r in reports)).backward()
    optimizer.reduce_gradients()
    results += [bucket.gradient.clone() for bucket in optimizer.buckets if bucket.gradient is not None]
    if config.trainer["gradient_clip_val"]:
        optimizer.clip(0.5)
    optimizer.optimizer.step()
    balanced = [module for module in model.modules() if isinstance(module, Router) and module.moves_biases]
    if balanced:
        update_biases(balanced, topology.comm)
    if handle is not None:
        handle.remove()
    results += [bucket.flat.clone() for bucket in optimizer.buckets]
    results += [router.bias.to_local() for router in balanced]
    return results, topology.recomputation.peak_kept_bytes, model.moved


_topologies: dict[tuple[ParallelDegrees, int], Topology] = {}  # groups take longer to make than a cell to run


def topology_of(config: TrainConfig) -> Topology:
    layout = Layout(parallel_degrees(config.parallel), config.comm)
    key = layout.degrees, layout.nodes
    if key not in _topologies:
        _topologies[key] = Topology(layout.degrees, options=config.comm)
    topology = _topologies[key]
    topology.options, topology.recomputation = config.comm, Recomputation()
    return topology


def poisoned(shape: torch.Size, like: Tensor) -> Tensor:
    """In place of memory that nobody reads: NaN, which whoever reads it spreads."""
    return like.new_full(shape, torch.nan)


def complaints(
    layout: tuple[int, int, int], modes: list[str], precision: str, every: int, brief: bool = False
) -> tuple[int, list[str]]:
    """How many cells were tried, and what was wrong. Each takes one kind of step of ``every``.

    ``brief`` leaves out every second kind of step, two kinds of recomputation, and the block after the experts.
    """
    recompute.unused = differentiable.unused = grouped.unused = poisoned
    wrong, cells = [], 0
    for mode in modes:
        expected: dict[str, list[Tensor]] = {}
        steps = [*STEPS][[*MODES].index(mode) % 2 :: 2] if brief else [*STEPS]
        model = {"trainer.precision": precision} | ({"model.layers": 2} if brief else {})
        for number, how in enumerate(BRIEFLY if brief else RECOMPUTED):
            for step in steps if how == "stored" else steps[number % every % len(steps) :: every]:
                cells += 1
                config = configuration(layout, {**MODES[mode], **RECOMPUTED[how], **STEPS[step], **model})
                topology, ledger, cell = topology_of(config), Ledger(), f"{mode} {how} {step}"
                with Recorder() as recorder:
                    results, kept, moved = one_step(config, topology, ledger)
                expected_totals = with_rows(predict(config), config, moved)
                for entry, (ours, theirs) in differences(ledger.totals, expected_totals).items():
                    wrong.append(f"{cell}: {entry}: {ours} instead of {theirs}")
                if seen_by(ledger, topology) != recorder.seen:
                    wrong.append(f"{cell}: the dispatcher saw {recorder.seen}")
                form = ClosedForm(config, moved or None)
                one_micro_batch = config.trainer["accumulate_grad_batches"] == 1 or not moved
                if one_micro_batch and kept != sum(
                    form.kept_bytes(block, config.comm.cac) for block in range(config.model.layers)
                ):
                    wrong.append(f"{cell}: kept {kept} bytes")
                again = {entry.tag for entry in ledger.totals if entry.phase == "recompute"} - {"experts.lend"}
                if how.startswith("cac") and again:
                    wrong.append(f"{cell}: communicates while recomputing")
                if topology.recomputation.flips or topology.recomputation.kept_bytes:
                    wrong.append(f"{cell}: flips, or kept memory was not freed")
                stored = expected.setdefault(step, results)
                if not all(torch.equal(a, b) for a, b in zip(results, stored, strict=True)):
                    wrong.append(f"{cell}: other results")
                if not all(torch.isfinite(x).all() for x in results):
                    wrong.append(f"{cell}: not finite")
    return cells, wrong


def seen_by(ledger: Ledger, topology: Topology) -> Counter[tuple[str, str, str]]:
    seen: Counter[tuple[str, str, str]] = Counter()
    for entry, count in ledger.totals.items():
        group = topology.comm.group(entry.kind).group_name
        seen[entry.op, group, "calls"] += count.calls
        seen[entry.op, group, "bytes"] += count.payload_bytes
    return seen


Cell = tuple[tuple[int, int, int], list[str], str]
CELLS: list[Cell] = [
    *(
        ((4, 2, 2), ["sequence"], "32-true"),
        ((4, 2, 2), ["dtd"], "32-true"),
        ((4, 2, 2), ["plain", "fused"], "32-true"),
    ),
    *(((4, 1, 4), ["plain"], "32-true"), ((4, 4, 1), ALL[:2], "32-true"), ((4, 4, 1), ALL[2:], "32-true")),
    *(((2, 2, 1), ALL[:2], "32-true"), ((2, 2, 1), ALL[2:], "32-true")),
    *(
        ((8, 2, 2), ["fused"], "32-true"),
        ((8, 2, 2), ["sequence"], "32-true"),
        ((8, 4, 2), ["dtd", "sequence"], "32-true"),
    ),
    *(((4, 2, 2), ["fused"], "bf16-true"), ((4, 2, 2), ["sequence"], "bf16-true")),
    ((4, 2, 2), ["fused", "sequence"], "bf16-mixed"),
    *(((4, 2, 2), DROPLESS[1::2], "32-true"), ((4, 1, 4), DROPLESS[:1], "32-true")),
    *(((4, 4, 1), DROPLESS[::2], "32-true"), ((2, 2, 1), DROPLESS, "bf16-true")),
    *(((8, 2, 2), DROPLESS[::2], "32-true"), ((8, 4, 2), DROPLESS[1::2], "bf16-mixed")),
    *(((4, 2, 2), SHARED[::2], "32-true"), ((4, 2, 2), SHARED[1::2], "bf16-mixed")),
    *(((4, 2, 2), SHORTCUTS[:2], "32-true"), ((4, 2, 2), SHORTCUTS[2:], "bf16-mixed")),
    *(((4, 2, 2), DEDUP, "bf16-mixed"), ((4, 1, 2), DEDUP[:1], "32-true"), ((8, 4, 2), DEDUP[1:], "32-true")),
    *(((4, 2, 2), GATHERED, "bf16-mixed"), ((4, 1, 2), GATHERED[:1], "32-true"), ((8, 4, 2), GATHERED[1:], "32-true")),
    *(((4, 2, 2), LENT[1::2], "32-true"), ((4, 1, 4), LENT[:1], "32-true"), ((4, 2, 2), LENT[2:3], "bf16-mixed")),
    *(((2, 2, 1), LENT[1:2], "32-true"), ((4, 2, 2), PACKED[::2], "32-true"), ((4, 2, 2), PACKED[1::2], "bf16-mixed")),
]


QUICK = ((4, 2, 2), ["sequence"], "32-true")
THOROUGH = (QUICK, ((4, 2, 2), ["dtd"], "32-true"), ((4, 2, 2), ["plain", "fused"], "32-true"))
EXHAUSTIVE = [  # what each of these has, other cells have as well: eight processes take longest
    *(((8, 4, 2), ["dtd", "sequence"], "32-true"), ((8, 4, 2), DROPLESS[1::2], "bf16-mixed")),
    *(((8, 2, 2), DROPLESS[::2], "32-true"), ((4, 2, 2), ["fused", "sequence"], "bf16-mixed")),
    *(((4, 4, 1), ALL[:2], "32-true"), ((2, 2, 1), ALL[:2], "32-true"), ((2, 2, 1), ALL[2:], "32-true")),
    *(((8, 2, 2), ["sequence"], "32-true"), ((4, 2, 2), ["fused"], "bf16-true"), ((4, 4, 1), DROPLESS[::2], "32-true")),
    *(((4, 1, 2), GATHERED[:1], "32-true"), ((8, 4, 2), GATHERED[1:], "32-true")),
    *(((4, 1, 2), DEDUP[:1], "32-true"), ((8, 4, 2), DEDUP[1:], "32-true"), ((2, 2, 1), LENT[1:2], "32-true")),
]


def marked(cell: Cell) -> object:
    marks = [] if cell == QUICK else [pytest.mark.exhaustive if cell in EXHAUSTIVE else pytest.mark.slow]
    return pytest.param(*cell, marks=marks)


def test_ci_runs_every_layout_and_mode_and_precision() -> None:
    """Degrees of 4 and 8 processes each by themselves."""
    assert all(cell in CELLS for cell in EXHAUSTIVE)
    everything, ours = ([cell for cell in CELLS if cell not in left_out] for left_out in ([], EXHAUSTIVE))
    for of_cell in (
        lambda cell: {("tensor", cell[0][1])},
        lambda cell: {("expert", cell[0][2])},
        lambda cell: {("processes", cell[0][0])},
        lambda cell: set(cell[1]),
        lambda cell: {(cell[2], MODES[mode].get("moe.dispatch")) for mode in cell[1]},
    ):
        assert set().union(*map(of_cell, ours)) == set().union(*map(of_cell, everything))


def is_brief(cell: Cell) -> bool:
    return cell not in (*THOROUGH, *EXHAUSTIVE)


Complaints = list[tuple[Cell, list[tuple[int, list[str]]]]]  # of cells, of every process


@pytest.fixture(scope="module")
def complaints_about(pool: WorkerPool, request: pytest.FixtureRequest) -> Callable[[int], Complaints]:
    """All cells of as many processes that this session runs, in one world, in which the first costs most."""
    asked = [(cell["layout"], cell["modes"], cell["precision"]) for cell in asked_of(request)]

    @cache
    def of(size: int) -> Complaints:
        cells = [cell for cell in asked if cell[0][0] == size]
        arguments = [(*cell, len(STEPS), is_brief(cell)) for cell in cells]
        return [*zip(cells, pool.run_each(size, complaints, arguments, timeout=100 + 50 * len(cells)), strict=True)]

    return of


@pytest.mark.timeout(900)  # the first cell of a size waits for all of them
@pytest.mark.parametrize(("layout", "modes", "precision"), [marked(cell) for cell in CELLS], ids=str)
def test_ledger_closed_form_and_dispatcher_agree_and_toggles_change_no_result(
    complaints_about: Callable[[int], Complaints],
    layout: tuple[int, int, int],
    modes: list[str],
    precision: str,
) -> None:
    """Kinds of step in turn; ``python -m tests.comm.test_ledger`` tries all combinations."""
    cell = layout, modes, precision
    each = len(STEPS) // 2 + len(BRIEFLY) - 1 if is_brief(cell) else len(STEPS) + len(RECOMPUTED) - 1
    (found,) = (its for other, its in complaints_about(layout[0]) if other == cell)
    for tried, wrong in found:
        assert not wrong, "\n".join(wrong[:20])
        assert tried == len(modes) * each


def rows_of_step(layout: tuple[int, int, int], mode: str) -> tuple[list[tuple[int, list[Tensor]]], dict[int, Rows]]:
    """Expert rank and loads of each router of the expert group's processes, and the rows that this process moved."""
    config = configuration(layout, {**MODES[mode], "model.recompute.granularity": "block"})
    topology, loads = topology_of(config), []
    decide = Router.decide

    def listening(router: Router, *args: Any) -> Any:
        decision = decide(router, *args)
        loads.append(decision.load)
        return decision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Router, "decide", listening)
        *_, moved = one_step(config, topology)
    own = loads[: len(moved)]  # recomputation routes again
    everybody: list[Any] = [None] * layout[2]
    torch.distributed.all_gather_object(everybody, own, topology.comm.group("expert"))
    return everybody, moved


def test_the_rows_that_the_closed_form_is_told_are_those_that_routers_chose(pool: WorkerPool) -> None:
    tokens, top_k, tensor, experts = MICRO_BATCH * SEQUENCE, BASE.moe.top_k, 2, BASE.moe.num_experts // 2
    modes = {"dropless_plain": 1, "dropless_dtd": tensor}  # with how many share the sending
    steps = pool.run_each(4, rows_of_step, [((4, 2, 2), mode) for mode in modes])
    for sharers, ranks in zip(modes.values(), steps, strict=True):
        different = set()
        for rank, (senders, moved) in enumerate(ranks):
            own = slice(rank // tensor * experts, (rank // tensor + 1) * experts)
            assert list(moved) == [1]
            for layer, rows in enumerate(moved.values()):
                assert rows.computed == sum(int(loads[layer][own].sum()) for loads in senders)
                assert rows.sent == tokens * top_k // sharers
                assert rows.gathered - rows.computed in range(2 * sharers)  # parts differ by one row of each sender
                different.add(rows.computed)
        assert len(different) > 1


def results_of(layout: tuple[int, int, int], mode: str) -> tuple[list[Tensor], dict[str, float]]:
    config = configuration(layout, {**MODES[mode], "moe.capacity_multiple": layout[1]})  # so that nothing is padded
    ledger = Ledger()
    results, *_ = one_step(config, topology_of(config), ledger)
    sent = {
        kind: c.wire_bytes for (phase, kind), c in summed(ledger.totals, "phase", "kind").items() if phase == "forward"
    }
    return results, sent


def test_dtd_sends_the_same_tokens_to_the_same_experts_in_the_same_order(pool: WorkerPool) -> None:
    """Bit for bit; fused, with more than two tensor ranks, the terms of a sum may come in another order.

    So they may where T does not divide the capacity, which is what ``test_matrix.py`` tries, in float64.
    """
    layouts = (4, 2, 2), (4, 4, 1)
    cells = [(layout, mode) for layout in layouts for mode in ("plain", "dtd", "fused")]
    runs = dict(zip(cells, pool.run_each(4, results_of, cells), strict=True))
    for layout, mode in [cell for cell in cells if cell[1] != "plain"]:
        for (ours, sent), (theirs, sent_plain) in zip(runs[layout, mode], runs[layout, "plain"], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                if mode == "fused" and layout[1] > 2:
                    torch.testing.assert_close(a, b, rtol=0, atol=4 * torch.finfo(b.dtype).eps * b.abs().max().item())
                else:
                    assert torch.equal(a, b)
            if layout[2] > 1:
                assert sent["expert"] == sent_plain["expert"] / layout[1]


Layouts = dict[tuple[int, int, int], list[Overrides]]
COMPILED: Layouts = {  # two processes, which have what a cell is about: each compiles by itself
    (2, 1, 2): [
        {"comm.cac": ["dispatch.all_to_all"], "accumulated": 2},
        {
            "model.recompute.granularity": "none",
            "moe.dispatch": "dropless",
            "model.positions": "rotary",
            "model.loss_chunk": 5,
        },
    ],
    (2, 2, 1): [
        {
            **{"moe.router.scoring": "sigmoid", "moe.router.gates": "raw", "moe.router.bias_update": "sign"},
            **{"moe.router.expert_groups": 2, "moe.router.group_score": "top2", "moe.balance.choices": "first"},
            **{"comm.dtd": True, "moe.dispatch": "dropless", "model.recompute.granularity": "none"},
        },
        {
            **{"comm.dtd": True, "comm.cac": True, "model.layers": 3},
            "optim.groups": [GroupConfig(pattern="blocks.[01].*", frozen=True)],
        },
        {
            "moe.router.noise": "gumbel",
            "moe.router.jitter": 0.1,
            "moe.drop_policy": "probs",
            "parallel.sequence": True,
            "moe.balance.scope": "sequence",
            "moe.balance.dropped": False,
        },
    ],
}
COMPILED_TOO: Layouts = {
    (4, 2, 2): [
        {"optim.groups": [GroupConfig(pattern="*.experts.*"), GroupConfig(pattern="*", frozen=True)]},
        {"comm.dtd": True, "comm.fuse_reduce_scatter": True, "comm.cac": True},
        {"comm.dtd": True, "model.recompute.granularity": "none"},
        {"parallel.sequence": True},
        {**BESIDE, "moe.shortcut": "pos2", "comm.overlap_shortcut": True, "moe.shared.combine": "cg2"},
    ]
}


def compiled_complaints(layouts: Layouts) -> list[str]:
    """Of models of two blocks, if a cell says no other number: each takes a second to compile."""
    wrong = []
    for layout, overrides in [(layout, overrides) for layout, cells in layouts.items() for overrides in cells]:
        torch.compiler.reset()
        eager = configuration(layout, {"model.layers": 2, **overrides})
        expected, *_ = one_step(eager, topology_of(eager))
        config = with_values(eager, {"model.compile": "aot_eager"})
        ledger = Ledger()
        results, _, moved = one_step(config, topology_of(config), ledger)
        if not all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)):
            wrong.append(f"{overrides}: other results")
        for entry, (ours, theirs) in differences(ledger.totals, with_rows(predict(config), config, moved)).items():
            wrong.append(f"{overrides}: {entry}: {ours} instead of {theirs}")
    return wrong


@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param(COMPILED, marks=pytest.mark.slow, id="sample"),
        pytest.param(COMPILED_TOO, marks=pytest.mark.exhaustive, id="others"),
    ],
)
def test_compiled_blocks_communicate_and_compute_the_same(pool: WorkerPool, layouts: Layouts) -> None:
    """Under ``torch.compile`` the ledger hears of every collective, and CAC is selective checkpointing."""
    for size in {layout[0] for layout in layouts}:  # the first that a process compiles takes longest
        ours = {layout: cells for layout, cells in layouts.items() if layout[0] == size}
        for wrong in pool.run(size, compiled_complaints, ours, timeout=250):
            assert not wrong, "\n".join(wrong)


# ---- frozen parameters -------------------------------------------------------------------------------------------

_REST = GroupConfig(pattern="*", frozen=True)
TRAINED: dict[str, list[GroupConfig]] = {  # three blocks, of which the second has experts
    "all but routers": [GroupConfig(pattern="*.router.*", frozen=True)],
    "all but experts": [GroupConfig(pattern="*.experts.*", frozen=True), GroupConfig(pattern="*.router.*", lr=0.2)],
    "experts": [GroupConfig(pattern="*.experts.*", lr_factor=0.5), _REST],
    "routers": [GroupConfig(pattern="*.router.*"), _REST],
    "the last block": [GroupConfig(pattern="blocks.2.*"), _REST],
    "norms": [GroupConfig(pattern="*norm*"), _REST],
    "the last norm": [GroupConfig(pattern="norm.*"), _REST],
    "positions": [GroupConfig(pattern="positions.*"), _REST],
    "the embedding": [GroupConfig(pattern="embedding.*"), _REST],
}
OF_FROZEN = [  # modes, in turn
    {**MODES["sequence"], "comm.cac": True, "optim.zero": False},
    {**MODES["fused"], "comm.cac": "shard", "moe.router.bias_update": "sign", "moe.shared": SharedConfig(1, 8, "cg1")},
    {
        **{**MODES["dropless_dtd"], "comm.cac": ["dispatch.all_to_all", "attention.reduce:shard"], "accumulated": 2},
        **{"model.attention": AttentionConfig(latent=LatentConfig(6, 4, 4, 2, 3)), "model.positions": "rotary"},
    },
    {
        **{**MODES["dropless_sequence"], "model.recompute.granularity": "none", "model.loss_chunk": 5},
        "moe.shared": SharedConfig(2, 4),
    },
]


def frozen_complaints(layout: tuple[int, int, int], first_mode: int) -> tuple[set[int], list[str]]:
    """The bytes of different cells, and what was wrong."""
    totals, wrong = set(), []
    for number, (what, groups) in enumerate(TRAINED.items(), first_mode):
        mode = OF_FROZEN[number % len(OF_FROZEN)]
        config = configuration(layout, {**mode, "optim.groups": groups})
        topology, ledger, cell = topology_of(config), Ledger(), f"{what} {mode}"
        with Recorder() as recorder:
            results, kept, moved = one_step(config, topology, ledger)
        for entry, (ours, theirs) in differences(ledger.totals, with_rows(predict(config), config, moved)).items():
            wrong.append(f"{cell}: {entry}: {ours} instead of {theirs}")
        if seen_by(ledger, topology) != recorder.seen:
            wrong.append(f"{cell}: the dispatcher saw {recorder.seen}")
        form = ClosedForm(config, moved or None)
        expected = sum(form.kept_bytes(block, config.comm.cac) for block in range(config.model.layers))
        recomputed = config.model.recompute.granularity == "block"
        if config.trainer["accumulate_grad_batches"] == 1 and kept != expected * recomputed:
            wrong.append(f"{cell}: kept {kept} bytes, not {expected}")
        if not all(torch.isfinite(x).all() for x in results):
            wrong.append(f"{cell}: not finite")
        totals.add(sum(count.payload_bytes for count in ledger.totals.values()))
    return totals, wrong


@pytest.mark.parametrize("first_mode", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_what_is_frozen_is_neither_reduced_nor_gathered_and_the_backward_pass_ends_where_training_does(
    pool: WorkerPool, first_mode: int
) -> None:
    for totals, wrong in pool.run(4, frozen_complaints, (4, 2, 2), first_mode):
        assert not wrong, "\n".join(wrong[:20])
        assert len(totals) == len(TRAINED)


# ---- the ledger itself -------------------------------------------------------------------------------------------


def call(phase: Any = "forward", tag: str = "a", elements: int = 6) -> Collective:
    return Collective("all_reduce", "tensor", 2, phase, tag, torch.Size([elements]), torch.float32)


def test_a_ledger_adds_up_calls_bytes_and_time() -> None:
    ledger = Ledger(timed=True)
    first, second = call(), call()
    for what, when in ((first, "start"), (second, "start"), (second, "end"), (first, "end")):  # overlapping
        ledger(what, when)
    ledger.standing_for = "validation"
    third = call()
    ledger(third, "start")
    ledger(third, "end")
    assert set(ledger.totals) == {Entry(phase, "tensor", "all_reduce", "a") for phase in ("forward", "validation")}
    forward = ledger.totals[Entry("forward", "tensor", "all_reduce", "a")]
    assert (forward.calls, forward.payload_bytes, forward.wire_bytes) == (2, 48, 48.0)
    assert forward.seconds > 0
    assert Ledger()(first, "start") is None


def test_differences_are_found_in_training_phases_only() -> None:
    here = counted([call(), call(tag="b", elements=1), call("metrics")])
    there = counted([call(), call(tag="b", elements=2), call("backward")])
    found = differences(here, there)
    assert {entry.tag + entry.phase for entry in found} == {"bforward", "abackward"}
    assert found[Entry("backward", "tensor", "all_reduce", "a")] == (Count(), Count(1, 24, 24.0))
    assert not differences(here, here)


def test_sums_come_in_the_order_of_phases() -> None:
    totals = counted([call("optimizer"), call("backward"), call("backward", "b"), call("forward")])
    assert [(key, count.calls) for key, count in summed(totals, "phase").items()] == [
        (("forward",), 1),
        (("backward",), 2),
        (("optimizer",), 1),
    ]


if __name__ == "__main__":
    shared = WorkerPool()
    for layout in sorted({cell[0] for cell in CELLS}):
        modes = ALL if layout[1] > 1 else ["plain"]
        tried, wrong = shared.run(layout[0], complaints, layout, modes, "32-true", 1, timeout=1000)[0]
        print(f"{layout}: {tried} cells, {len(wrong)} complaints", *wrong, sep="\n  ", flush=True)
