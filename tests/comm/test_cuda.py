"""The toggles on a GPU, where backward passes, and so recomputation, run in a thread of autograd's.

Gloo communicates CUDA tensors, so that several ranks share one GPU, which NCCL refuses.
"""

import pytest
import torch

from tedlab.comm import Ledger
from tests.comm.test_ledger import ALL, MODES, STEPS, complaints, configuration, one_step, topology_of
from tests.pool import WorkerPool

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LAYOUT = (4, 2, 2)


def complaints_on_a_gpu(precision: str) -> tuple[int, list[str]]:
    torch.use_deterministic_algorithms(True)
    return complaints(LAYOUT, ALL, precision, len(STEPS), "cuda")


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_ledger_closed_form_and_dispatcher_agree_and_toggles_change_no_result(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for tried, wrong in pool.run(4, complaints_on_a_gpu, precision, timeout=250):
        assert not wrong, "\n".join(wrong[:20])
        assert tried > 4 * len(MODES)


def timed() -> dict[str, float]:
    config = configuration(LAYOUT, MODES["fused"])
    ledger = Ledger(timed=True)
    one_step(config, topology_of(config, "cuda"), ledger)
    return {entry.tag: count.seconds for entry, count in ledger.totals.items()}


def test_collectives_are_timed_by_events(pool: WorkerPool) -> None:
    for seconds in pool.run(4, timed, timeout=250):
        assert {"dispatch.all_to_all", "experts.reduce", "gradients.reduce"} <= seconds.keys()
        assert all(0 < value < 60 for value in seconds.values()), seconds
