from dataclasses import replace

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from tedlab.config import OptimConfig
from tedlab.optim import learning_rate_schedule, schedule_of


@pytest.mark.parametrize(
    ("name", "warmup", "total", "final", "values"),
    [
        ("constant", 0, 10, 0.1, {0: 1, 5: 1, 10: 1, 99: 1}),
        ("constant", 4, 10, 0.1, {0: 0.25, 1: 0.5, 3: 1, 4: 1, 10: 1}),
        ("cosine", 0, 10, 0.1, {0: 1, 5: 0.55, 10: 0.1, 11: 0.1, 99: 0.1}),
        ("cosine", 2, 10, 0.0, {0: 0.5, 1: 1, 2: 1, 4: 0.5 + 0.5**1.5, 6: 0.5, 8: 0.5 - 0.5**1.5, 10: 0}),
        ("cosine", 4, 4, 0.2, {0: 0.25, 3: 1, 4: 1, 5: 0.2}),
        ("cosine", 8, 4, 0.2, {0: 0.125, 3: 0.5, 7: 1}),  # stops before the warm-up is over
        ("cosine", 0, -1, 0.2, {0: 1, 1: 0.2}),  # Lightning's max_steps=-1
    ],
)
def test_factor_by_step(name: str, warmup: int, total: int, final: float, values: dict[int, float]) -> None:
    factor = learning_rate_schedule(name, warmup, total, final)
    assert {step: factor(step) for step in values} == pytest.approx(values)


def test_wsd_decays_in_the_last_steps_or_share_of_the_run() -> None:
    by_steps = OptimConfig({}, 1.0, "wsd", warmup_steps=2, final_lr_fraction=0.1, decay_steps=4)
    factor = schedule_of(by_steps, 12)
    assert [factor(step) for step in (0, 1, 7, 8, 9, 10, 11, 12)] == pytest.approx(
        [0.5, 1, 1, 1, 0.775, 0.55, 0.325, 0.1]
    )
    by_share = schedule_of(replace(by_steps, decay_steps=None, decay_fraction=0.25), 16)
    assert [by_share(step) for step in (12, 13, 14)] == pytest.approx([1, 0.775, 0.55])


def test_the_first_step_already_moves_and_the_peak_is_reached_once_warm() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = LambdaLR(optimizer, learning_rate_schedule("cosine", 2, 6, 0.0))
    rates = []
    for _ in range(7):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[0] == 0.25
    assert max(rates) == rates[1] == rates[2] == 0.5
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == 0
