"""Where a certificate is made, on GPUs if they suffice, and in which precision: in bf16 if asked."""

from pathlib import Path

import pytest
import torch

from tedlab.certify import Row, certify
from tedlab.certify.compare import TOLERANCES, first_difference
from tedlab.certify.shrink import shrink
from tedlab.config import CertificatePrecision
from tedlab.errors import UsageError
from tedlab.strategy import gpus
from tedlab.validate import check
from tests.certify.bugs import expert_gradient_scaled_by_expert, input_gradient_not_summed_over_tensor
from tests.certify.runs import Case, Plant, certified, composed
from tests.pool import WorkerPool

BF16 = ("certificate_precision=bf16-true", "moe.top_k=2")
SOUND = {
    "capacity": Case(("parallel=tp2", "comm=dtd", *BF16), continuations=("in this layout",)),
    "dropless": Case(("parallel=ep2", "moe.dispatch=dropless", *BF16), continuations=("in this layout",)),
}
WRONG = {
    plant: Case(SOUND["capacity"].overrides, plant)
    for plant in (expert_gradient_scaled_by_expert, input_gradient_not_summed_over_tensor)
}


@pytest.fixture(scope="module")
def certificates(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, list[Row]]:
    return certified(pool, tmp_path_factory.mktemp("certificates"), [*SOUND.values(), *WRONG.values()])


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", SOUND)
def test_a_layout_in_bf16_equals_one_process_within_rounding(
    certificates: dict[Case, list[Row]], dispatch: str
) -> None:
    rows = certificates[SOUND[dispatch]]
    assert all(row.ok for row in rows), rows
    assert max(row.error for row in rows) > 1e-4  # it was no float64


@pytest.mark.slow
@pytest.mark.parametrize("plant", WRONG, ids=lambda plant: plant.__name__)
def test_what_is_wrong_everywhere_shows_in_bf16(certificates: dict[Case, list[Row]], plant: Plant) -> None:
    culprit = first_difference(certificates[WRONG[plant]])
    assert culprit is not None
    assert culprit.quantity == "gradients"


def test_no_other_precision_is_certified() -> None:
    assert tuple(TOLERANCES) == tuple(CertificatePrecision)
    for run in (certify, check):
        with pytest.raises(UsageError, match="certificate_precision=16-true is unknown; valid: 64-true, bf16-true"):
            run(composed("certificate_precision=16-true"))


@pytest.mark.parametrize(
    ("overrides", "available", "expected"),
    [
        (["trainer=gpu"], 0, ("cpu", None)),
        (["trainer=gpu"], 4, ("gpu", None)),
        (["trainer=gpu"], 1, ("cpu", None)),  # NCCL would want four
        (["trainer=gpu", "comm.backend=nccl"], 1, ("cpu", None)),
        (["trainer=gpu", "comm.backend=gloo"], 1, ("gpu", "gloo")),
        (["comm.backend=gloo"], 4, ("cpu", None)),
    ],
)
def test_a_certificate_is_made_where_the_run_would_be_if_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    overrides: list[str],
    available: int,
    expected: tuple[str, str | None],
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: available)
    small = shrink(composed("parallel=tp2_ep2", *overrides), tmp_path)
    assert (small.trainer["accelerator"], small.comm.backend) == expected
    assert small.optim.tile == ("fused" if "trainer=gpu" in overrides else 100)  # the run's, wherever this one is made


def test_processes_take_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert gpus(3) == [torch.device("cuda", index) for index in (0, 1, 0)]
