"""What routers and their balance communicate in whole training steps: the closed form, to the byte.

Unlike in ``test_ledger.py`` the strategy trains here, which counts choices over the step.
"""

from pathlib import Path
from typing import Any

import pytest

from tedlab.callbacks import CommunicationLedger
from tedlab.certify.shrink import shrink
from tedlab.comm.ledger import Count, Entry
from tedlab.config import TrainConfig, with_values
from tedlab.run import build
from tedlab.validate import complete
from tests.certify.runs import composed
from tests.certify.test_matrix import ROUTERS, overrides
from tests.pool import WorkerPool

LAYOUT, STEPS = (4, 2, 2), 2
Found = tuple[dict[Entry, Count], dict[Entry, Any]]
DAILY = ("global_balance_in_slices",)


def ledgers(configs: dict[str, TrainConfig]) -> dict[str, Found]:
    """The totals of each run, and where they differ from the closed form."""
    return {job: _ledger(config) for job, config in configs.items()}


def _ledger(config: TrainConfig) -> Found:
    callback = CommunicationLedger(config)
    trainer, module, data = build(config, [callback], logged=False)
    trainer.fit(module, data)
    assert callback.steps(trainer) == STEPS
    return dict(callback.ledger.totals), dict(callback.differences(trainer))


def configuration(job: str, directory: Path) -> TrainConfig:
    small = shrink(composed(*overrides(LAYOUT, job)), directory / job)
    return complete(with_values(small, {"trainer.max_steps": STEPS, "checkpoint.every": STEPS + 1}))


_found: dict[str, list[Found]] = {}


def found(pool: WorkerPool, directory: Path, job: str) -> list[Found]:
    """Of each process; those that are tried together are found together."""
    if job not in _found:
        together = [other for other in ROUTERS if (other in DAILY) == (job in DAILY)]
        answers = pool.run(4, ledgers, {each: configuration(each, directory) for each in together}, timeout=250)
        _found.update({each: [answer[each] for answer in answers] for each in together})
    return _found[job]


@pytest.mark.parametrize("job", [pytest.param(job, marks=[pytest.mark.slow] * (job not in DAILY)) for job in ROUTERS])
def test_a_step_with_any_router_communicates_what_the_closed_form_says(
    pool: WorkerPool, tmp_path: Path, job: str
) -> None:
    config = configuration(job, tmp_path)
    moe, model = config.moe, config.model
    layers, micro_batches = len(moe.routed(model.layers)), int(config.trainer["accumulate_grad_batches"])
    double, index = 8, 8  # bytes
    for totals, wrong in found(pool, tmp_path, job):
        assert not wrong
        # Worked by hand: what counts the choices of a step, in one collective of all layers.
        if moe.balance.scope == "global_batch":
            count = totals[Entry("forward", "data", "all_reduce", "router.totals")]
            assert (count.calls, count.payload_bytes) == (STEPS, STEPS * layers * (moe.num_experts + 1) * double)
        if moe.router.bias_update != "none":
            group = "world" if config.parallel.sequence else "data"
            count = totals[Entry("optimizer", group, "all_reduce", "router.bias")]
            assert (count.calls, count.payload_bytes) == (STEPS, STEPS * layers * moe.num_experts * index)
        if config.parallel.sequence:
            counting = moe.balance.scope == "global_batch" and micro_batches > 1
            calls = STEPS * micro_batches * layers * (2 if counting else 1)
            groups = config.data.micro_batch_size if moe.balance.scope == "sequence" else 1
            count = totals[Entry("forward", "tensor", "all_reduce", "router.statistics")]
            assert (count.calls, count.payload_bytes) == (calls, calls * groups * (2 * moe.num_experts + 1) * double)
