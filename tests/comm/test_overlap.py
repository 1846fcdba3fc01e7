"""What overlaps changes no result, no byte and no number of calls beyond what is stated: each toggle beside itself off.

The steps are those of ``test_ledger.py``.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tedlab.comm import TRAINING_PHASES, Collective, Ledger, differentiable, recompute
from tedlab.comm.ledger import Totals, differences
from tedlab.moe import grouped
from tedlab.predict.volumes import ClosedForm, predict, with_rows
from tests.comm.test_ledger import DEEPSEEK, MODES, configuration, one_step, poisoned, topology_of
from tests.pool import WorkerPool
from tests.selection import asked_of

Overrides = dict[str, Any]
WEIGHTED = {**DEEPSEEK, "moe.shared.combine": "cg1"}
CAC: Overrides = {"comm.cac": True}
SHARED_ONE: Overrides = {"moe.shared.experts": 1, "moe.ffn": 8}
PAIR: Overrides = {**SHARED_ONE, "moe.shortcut": "pos2"}
BESIDE: dict[str, Overrides] = {  # model.recompute.granularity is block unless stated
    "stored": {**DEEPSEEK, "model.recompute.granularity": "none"},
    "recomputed": DEEPSEEK,
    "all_recomputed": {**DEEPSEEK, "model.recompute.early_stop": False, **MODES["dtd"]},
    "dtd_cac": {**DEEPSEEK, **MODES["dtd"], **CAC},
    "fused_shard": {**WEIGHTED, **MODES["fused"], "comm.cac": "shard"},
    "sequence": {**WEIGHTED, **MODES["sequence"]},
    "sequence_cac": {**DEEPSEEK, **MODES["sequence"], **CAC},
    "dropless": {**WEIGHTED, **MODES["dropless_plain"], "accumulated": 2},
    "dropless_dtd_some": {**DEEPSEEK, **MODES["dropless_dtd"], "comm.cac": ["combine.all_to_all"]},
    "dropless_sequence": {**DEEPSEEK, **MODES["dropless_sequence"], **CAC},
}
CHUNKED: dict[str, Overrides] = {
    "stored": {"model.recompute.granularity": "none", "comm.chunks": 2},
    "recomputed": {**MODES["dtd"], "comm.chunks": 2, "accumulated": 2},  # three slots each: chunks of one and of two
    "cac": {**MODES["dtd"], **CAC, "comm.chunks": 3},
    "fused_shard": {**MODES["fused"], "comm.cac": "shard", "comm.chunks": 2},
    "sequence_some": {**MODES["sequence"], "comm.cac": ["1/dispatch.all_to_all"], "comm.chunks": 2},
    "beside_shared": {**WEIGHTED, **CAC, "comm.chunks": 2, "comm.overlap_shared": True},
    "dropless_stored": {
        **MODES["dropless_dtd"],
        **{"model.recompute.granularity": "none", "comm.chunks": 2},
    },
    "dropless_many": {**MODES["dropless_plain"], **CAC, "comm.chunks": 16, "accumulated": 2},  # some have no rows
    "dropless_dtd": {**MODES["dropless_dtd"], "comm.chunks": 3, "accumulated": 2, "model.recompute.early_stop": False},
    "dropless_fused_shard": {**MODES["dropless_fused"], "comm.cac": "shard", "comm.chunks": 2},
    "packed_dtd": {**MODES["dropless_dtd"], **CAC, "moe.dispatch": "packed", "comm.chunks": 2},
    "dropless_sequence": {
        **{**WEIGHTED, **MODES["dropless_sequence"], "comm.cac": ["dispatch.all_to_all"]},
        **{"comm.chunks": 2, "comm.overlap_shared": True},
    },
}
OFF = {"comm.chunks": 1, "comm.overlap_shared": False}
CHUNKED_TAGS = {f"dispatch.{op}" for op in ("all_to_all", "gather")} | {
    f"combine.{op}" for op in ("all_to_all", "drop")
}
CHUNKED_TAGS |= {"experts.reduce", "experts.copy"}
OF_TOKENS = {"experts.reduce", "experts.copy"}  # of which each has one sum where rows come back as partial results
SHORTCUTS: dict[str, Overrides] = {
    f"pos1_slot{slot}": {
        **SHARED_ONE,
        **MODES["dtd"],
        "moe.shortcut": "pos1",
        "comm.shortcut_slot": slot,
        "moe.every": 1,
    }
    for slot in (0, 2)
}
SHORTCUTS |= {
    "pos2_slot0_cac": {**PAIR, **CAC, "comm.shortcut_slot": 0, "moe.shared.combine": "cg1"},
    "pos2_stored": {**PAIR, "comm.shortcut_slot": 1, "model.recompute.granularity": "none"},
    "pos2_slot2_sequence": {**PAIR, **MODES["dropless_sequence"], "comm.shortcut_slot": 2, "moe.shared.combine": "cg2"},
    "pos1_plain_rows": {  # of which tokens' sums are reduced
        **{**SHARED_ONE, **MODES["dropless_plain"], "moe.shortcut": "pos1", "moe.every": 1},
        "moe.shared.combine": "cg2",
    },
    "pos2_plain_rows_cac": {**PAIR, **MODES["dropless_plain"], **CAC, "moe.shared.combine": "cg1"},
    "pos2_slot3_all_recomputed": {**PAIR, "comm.shortcut_slot": 3, "model.recompute.early_stop": False},
    "pos3_shard": {**PAIR, **MODES["fused"], "moe.shortcut": "pos3", "comm.cac": "shard", "accumulated": 2},
    "pos3_slot4_dropless": {**PAIR, **MODES["dropless_dtd"], "moe.shortcut": "pos3", "comm.shortcut_slot": 4},
}
LAYOUT = (4, 2, 2)
OFTEN = {  # the others are tried with CI's slow tests
    *("stored", "dtd_cac", "dropless_stored", "dropless_sequence", "pos2_stored", "pos2_plain_rows_cac"),
}
SELDOM = {  # of which CI tries others that are alike
    *("dropless_dtd", "dropless_fused_shard", "pos1_slot2", "pos1_plain_rows"),
    *("pos2_slot0_cac", "pos2_slot3_all_recomputed"),
}


def marked(cases: dict[str, Overrides]) -> list[Any]:
    def marks(name: str) -> list[Any]:
        if name in OFTEN:
            return []
        return [pytest.mark.exhaustive if name in SELDOM else pytest.mark.slow]

    return [pytest.param(name, marks=marks(name)) for name in cases]


def asked(cases: dict[str, Overrides], request: pytest.FixtureRequest, fixture: str) -> dict[str, Overrides]:
    """Those whose tests this session runs, and those in which other tests look at the order of calls."""
    names = {cell["name"] for cell in asked_of(request, fixture)} | {"stored", "dropless_stored", "pos2_stored"}
    return {name: overrides for name, overrides in cases.items() if name in names}


class Step(NamedTuple):
    """Results, what is not as the closed form says, the collectives as they start and end, and their totals."""

    results: list[Tensor]
    wrong: list[str]
    heard: list[str]
    totals: Totals


def step(layout: tuple[int, int, int], overrides: Overrides) -> Step:
    recompute.unused = differentiable.unused = grouped.unused = poisoned
    config = configuration(layout, overrides)
    topology, ledger, heard = topology_of(config), Ledger(), []

    def hear(call: Collective, event: str) -> None:
        heard.append(f"{event} {call.tag} ({call.phase})")

    handle = topology.comm.register_hook(hear)
    results, kept, moved = one_step(config, topology, ledger)
    handle.remove()
    found = differences(ledger.totals, with_rows(predict(config), config, moved))
    wrong = [f"{entry}: {ours} instead of {theirs}" for entry, (ours, theirs) in found.items()]
    form = ClosedForm(config, moved or None)
    expected = sum(form.kept_bytes(block, config.comm.cac) for block in range(config.model.layers))
    if config.trainer["accumulate_grad_batches"] == 1 and config.comm.cac and kept != expected:
        wrong.append(f"kept {kept} bytes, not {expected}")
    if not all(torch.isfinite(x).all() for x in results):
        wrong.append("not finite")
    return Step(results, wrong, heard, ledger.totals)


def beside(layout: tuple[int, int, int], cases: dict[str, Overrides], toggle: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, overrides in cases.items():
        off, on = (step(layout, {**overrides, toggle: o}) for o in (False, True))
        if not all(torch.equal(a, b) for a, b in zip(on.results, off.results, strict=True)):
            on.wrong.append("other results than without overlap")
        if differences(on.totals, off.totals):
            on.wrong.append("another ledger than without overlap")
        found[name] = on.wrong, on.heard
    return found


def in_chunks(layout: tuple[int, int, int], cases: dict[str, Overrides]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, overrides in cases.items():
        chunks, precision = overrides["comm.chunks"], {"trainer.precision": "64-true"}
        off, on = (step(layout, {**overrides, **precision, **toggles}) for toggles in (OFF, {}))
        wrong = list(on.wrong)
        for ours, theirs in zip(on.results, off.results, strict=True):
            error = (ours - theirs).abs().max() / theirs.abs().max()
            if error > 8 * torch.finfo(theirs.dtype).eps:
                wrong.append(f"{tuple(theirs.shape)} differs by {error:.1e}")
        for entry, count in off.totals.items():
            if entry.phase not in TRAINING_PHASES:  # the first step of a topology also compares numbers of slots
                continue
            partial = name == "dropless_many" and entry.tag in OF_TOKENS
            times = chunks if entry.tag in CHUNKED_TAGS and not partial else 1
            more = on.totals[entry].payload_bytes / count.payload_bytes - 1
            # Tensor ranks gather as many rows as the one that received most: of each chunk there may be another.
            padded = "moe.dispatch" in overrides and entry.kind == "expert_tensor"
            if on.totals[entry].calls != times * count.calls or not 0 <= more <= (0.2 if padded else 0):
                wrong.append(f"{entry}: {on.totals[entry]} instead of {times} × {count.calls} calls")
        found[name] = wrong, on.heard
    return found


Found = list[dict[str, Any]]  # of each process


def of_each_kind(layout: tuple[int, int, int], cases: dict[str, dict[str, Overrides]]) -> dict[str, dict[str, Any]]:
    return {
        "shared": beside(layout, cases["shared"], "comm.overlap_shared"),
        "shortcuts": beside(layout, cases["shortcuts"], "comm.overlap_shortcut"),
        "chunked": in_chunks(layout, cases["chunked"]),
    }


@pytest.fixture(scope="module")
def found(pool: WorkerPool, request: pytest.FixtureRequest) -> dict[str, Found]:
    """All that this session looks at, in one world: the first step there costs most."""
    kinds = {"shared": BESIDE, "shortcuts": SHORTCUTS, "chunked": CHUNKED}
    cases = {kind: asked(its, request, kind) for kind, its in kinds.items()}
    ranks = pool.run(LAYOUT[0], of_each_kind, LAYOUT, cases, timeout=250)
    return {kind: [rank[kind] for rank in ranks] for kind in kinds}


@pytest.fixture(scope="module")
def shared(found: dict[str, Found]) -> Found:
    return found["shared"]


@pytest.fixture(scope="module")
def shortcuts(found: dict[str, Found]) -> Found:
    return found["shortcuts"]


@pytest.fixture(scope="module")
def chunked(found: dict[str, Found]) -> Found:
    return found["chunked"]


@pytest.mark.parametrize("name", marked(SHORTCUTS))
def test_sublayers_beside_the_exchange_of_a_shortcut_change_no_bit_and_no_byte(
    shortcuts: list[dict[str, Any]], name: str
) -> None:
    for rank in shortcuts:
        assert not rank[name][0]


def test_experts_compute_in_their_slot_and_backward_is_the_mirror_image(shortcuts: list[dict[str, Any]]) -> None:
    """Of a pair, with the slot after its dense layer: all-reduces tell where sub-layers and experts compute."""
    names = ("all_to_all", "shared", "attention", "feed_forward", "experts")
    order = [line for line in shortcuts[0]["pos2_stored"][1] if any(name in line for name in names)]
    there, back = "dispatch.all_to_all", "combine.all_to_all"

    def whole(*tags: str, phase: str) -> list[str]:
        return [f"{event} {tag} ({phase})" for tag in tags for event in ("start", "end")]

    forward = [
        *whole("attention.reduce", phase="forward"),
        f"start {there} (forward)",
        *whole("feed_forward.reduce", phase="forward"),
        f"end {there} (forward)",
        *whole("experts.reduce", phase="forward"),
        f"start {back} (forward)",
        *whole("attention.reduce", "shared.reduce", phase="forward"),
        f"end {back} (forward)",
    ]
    backward = [
        f"start {back} (backward)",
        *whole("shared.copy", "attention.copy", phase="backward"),
        f"end {back} (backward)",
        *whole("experts.copy", phase="backward"),
        f"start {there} (backward)",
        *whole("feed_forward.copy", phase="backward"),
        f"end {there} (backward)",
        *whole("attention.copy", phase="backward"),
    ]
    first, last = order.index(forward[2]) - 2, len(order) - order[::-1].index(backward[-3]) + 2
    assert order[first : first + len(forward)] == forward
    assert order[last - len(backward) : last] == backward


@pytest.mark.parametrize("name", marked(BESIDE))
def test_shared_experts_beside_an_exchange_change_no_bit_and_no_byte(shared: list[dict[str, Any]], name: str) -> None:
    for rank in shared:
        assert not rank[name][0]


def test_shared_experts_compute_while_tokens_are_on_their_way_in_both_passes(shared: list[dict[str, Any]]) -> None:
    """Their all-reduces tell where: of results while those of routed experts return, of gradients the mirror image."""
    order = [line for line in shared[0]["stored"][1] if "shared" in line or "all_to_all" in line]
    there, back = "dispatch.all_to_all", "combine.all_to_all"
    forward = [
        *(f"start {there} (forward)", f"end {there} (forward)", f"start {back} (forward)"),
        *("start shared.reduce (forward)", "end shared.reduce (forward)", f"end {back} (forward)"),
    ]
    backward = [
        *(f"start {back} (backward)", f"end {back} (backward)", f"start {there} (backward)"),
        *("start shared.copy (backward)", "end shared.copy (backward)", f"end {there} (backward)"),
    ]
    assert order == [*forward, *forward, *backward, *backward]


@pytest.mark.parametrize("name", marked(CHUNKED))
def test_chunks_send_the_same_bytes_in_more_calls_and_change_results_by_the_order_of_sums(
    chunked: list[dict[str, Any]], name: str
) -> None:
    """Of weights' gradients, which are sums over chunks; in float64, eight units in the last place of the largest."""
    for rank in chunked:
        assert not rank[name][0]


@pytest.mark.parametrize("name", ["stored", "dropless_stored"])
def test_a_chunk_is_computed_while_others_are_on_their_way(chunked: list[dict[str, Any]], name: str) -> None:
    """What enters and leaves the experts' tensor-parallel region tells when each is computed."""
    order = [line for line in chunked[0][name][1] if "all_to_all" in line or "start experts" in line]
    there, back = "dispatch.all_to_all", "combine.all_to_all"
    pipeline = [
        *("start A", "start A", "end A", "start experts", "start B", "end A", "start experts", "start B"),
        *("end B", "end B"),
    ]
    forward, backward = (
        [
            line.replace("A", first).replace("B", second).replace("experts", f"experts.{tag}") + f" ({phase})"
            for line in pipeline
        ]
        for phase, first, second, tag in (("forward", there, back, "reduce"), ("backward", back, there, "copy"))
    )
    assert order == [*forward, *backward]
