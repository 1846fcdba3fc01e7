"""What overlaps changes no result, no byte and no number of calls beyond what is stated: each toggle beside itself off.

The steps are those of ``test_ledger.py``.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tedlab.comm import Collective, Ledger, differentiable, recompute
from tedlab.comm.ledger import differences
from tedlab.moe import grouped
from tedlab.predict.volumes import ClosedForm, predict, with_rows
from tests.comm.test_ledger import DEEPSEEK, MODES, configuration, one_step, poisoned, topology_of
from tests.pool import WorkerPool

Overrides = dict[str, Any]
WEIGHTED = {**DEEPSEEK, "moe.shared.gated": True}
CAC: Overrides = {"comm.cac": True}
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
LAYOUT = (4, 2, 2)


def step(layout: tuple[int, int, int], overrides: Overrides) -> tuple[list[Tensor], list[str], list[str]]:
    """Results, what is not as the closed form says, and the collectives in order, as they start and end."""
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
    return results, wrong, heard


def beside(layout: tuple[int, int, int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, overrides in BESIDE.items():
        off, *_ = step(layout, overrides)
        on, wrong, heard = step(layout, {**overrides, "comm.overlap_shared": True})
        if not all(torch.equal(a, b) for a, b in zip(on, off, strict=True)):
            wrong.append("other results than without overlap")
        found[name] = wrong, heard
    return found


@pytest.fixture(scope="module")
def shared(pool: WorkerPool) -> list[dict[str, Any]]:
    return pool.run(LAYOUT[0], beside, LAYOUT)


@pytest.mark.parametrize("name", BESIDE)
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
