"""The closed form of micro-batches between two pools is what a simulation of every event gives."""

import random
from itertools import pairwise

import pytest

from tedlab.predict.serve.pingpong import PLACES, Stages, simulate


def cases(number: int) -> list[tuple[Stages, int, int]]:
    draw = random.Random(0)
    return [
        (Stages(*(10 ** draw.uniform(-2, 1) for _ in range(3))), draw.randint(1, 7), draw.randint(1, 12))
        for _ in range(number)
    ]


def test_the_closed_form_is_the_end_of_a_simulation() -> None:
    full = idle = on_the_way = 0
    for stages, micro_batches, layers in cases(2000):
        visits = simulate(stages, micro_batches, layers)
        end = max(visit.end for visit in visits)
        assert stages.seconds(micro_batches, layers) == pytest.approx(end, rel=1e-12)
        paper = stages.around + stages.slowest * (micro_batches * layers - 1)
        assert paper <= end * (1 + 1e-12)
        if stages.full(micro_batches):
            full += 1
            assert paper == pytest.approx(end, rel=1e-12)
        elif layers > 1:
            idle += 1
            assert paper < end * (1 - 1e-12)  # the paper's formula is too small
        on_the_way += stages.transfer == stages.slowest
    assert min(full, idle, on_the_way) > 300


def test_a_simulation_serves_one_at_a_time_in_order_and_leaves_nothing_out() -> None:
    for stages, micro_batches, layers in cases(50):
        visits = simulate(stages, micro_batches, layers)
        assert len({visit[:3] for visit in visits}) == len(visits) == 4 * micro_batches * layers
        for place in PLACES:
            there = [visit for visit in visits if visit.place == place]
            assert all(one.end <= other.start + 1e-9 for one, other in pairwise(there))
        for m in range(micro_batches):
            own = sorted((visit for visit in visits if visit.micro_batch == m), key=lambda visit: visit.start)
            assert [(visit.layer, visit.place) for visit in own] == [(n, p) for n in range(layers) for p in PLACES]
            assert all(one.end <= other.start + 1e-9 for one, other in pairwise(own))


def test_cases_worked_out_by_hand() -> None:
    # Two micro-batches, T_a = T_e = 2, T_c = 1: around 6, so that 2 · 2 < 6; 3 layers take 3 · 6 + 2.
    assert Stages(2.0, 2.0, 1.0).seconds(2, 3) == 20.0
    assert not Stages(2.0, 2.0, 1.0).full(2)
    # Three keep both pools busy: 6 + 2 · (3 · 3 - 1).
    assert Stages(2.0, 2.0, 1.0).full(3)
    assert Stages(2.0, 2.0, 1.0).seconds(3, 3) == 22.0
    assert Stages(2.0, 2.0, 1.0).seconds(1, 3) == 18.0
