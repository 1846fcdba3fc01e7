"""Every layout trains exactly as one process does: losses, every gradient, every new weight, in float64.

Other kinds of routing, optimizers and options are in ``certify/test_matrix.py``.

The reference is one process that accumulates the same micro-batches of each step.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from tedlab.certify.compare import relative_error
from tedlab.config import MoEConfig
from tests.pool import WorkerPool
from tests.selection import asked_of
from tests.training import Job, Layout, Record, train

LAYOUTS = [
    Layout(8),
    Layout(2, tensor=2),
    Layout(4, tensor=4),
    Layout(2, expert=2),
    Layout(4, expert=4),
    Layout(4, tensor=2, expert=2),
    Layout(8, tensor=2, expert=2),
    Layout(8, tensor=4, expert=2),
    Layout(8, tensor=2, expert=4),
]
JOBS = {
    "4_experts": Job(),
    "8_experts_clipped": Job(moe=MoEConfig(num_experts=8, z_loss=0.01, aux_loss=0.1), clip=0.05),
    "top2_untied_many_dropped": Job(
        moe=MoEConfig(num_experts=4, top_k=2, capacity_factor=0.6, capacity_multiple=4), tie_embeddings=False
    ),
    "no_token_dropped": Job(moe=MoEConfig(num_experts=4, capacity_factor=None, every=1)),
    "dense": Job(moe=MoEConfig(num_experts=0)),
}
JOBS = {name: replace(job, micro_batches=8) for name, job in JOBS.items()}  # one of each of as many data ranks
EVERY_DAY = [
    *((layout, name) for layout in (LAYOUTS[1], LAYOUTS[4], LAYOUTS[5]) for name in ("4_experts", "8_experts_clipped")),
    (LAYOUTS[2], "8_experts_clipped"),
]
SAMPLE = [  # CI's besides: every layout, and every job
    *((layout, "8_experts_clipped") for layout in (LAYOUTS[0], *LAYOUTS[6:])),
    *((LAYOUTS[3], "4_experts"), (LAYOUTS[2], "dense")),
    *((LAYOUTS[5], name) for name in ("top2_untied_many_dropped", "no_token_dropped")),
]
TOLERANCE = 1e-10


def cells() -> list[Any]:
    """CI leaves most out: matrix and oracle have more of these."""

    def mark(cell: tuple[Layout, str]) -> list[Any]:
        return [] if cell in EVERY_DAY else [pytest.mark.slow if cell in SAMPLE else pytest.mark.exhaustive]

    return [
        pytest.param(layout, name, marks=mark((layout, name)))
        for layout in LAYOUTS
        for name, job in JOBS.items()
        if _fits(layout, job)
    ]


def _fits(layout: Layout, job: Job) -> bool:
    return layout.expert == 1 or (job.moe.num_experts % layout.expert == 0 and job.moe.num_experts > 0)


_references: dict[str, Record] = {}


def reference(pool: WorkerPool, job: Job) -> Record:
    """What one process does, computed once per job, and for ``JOBS`` in one world."""
    if repr(job) not in _references:
        jobs = [*JOBS.values()] if job in JOBS.values() else [job]
        for its, (record,) in zip(jobs, pool.run_each(1, train, [(Layout(), its) for its in jobs]), strict=True):
            _references[repr(its)] = record
    return _references[repr(job)]


def loss_error(record: Record, expected: Record) -> float:
    return relative_error(*(torch.tensor(r.losses, dtype=torch.float64) for r in (record, expected)))


def compare(record: Record, expected: Record) -> dict[str, float]:
    """Relative error of everything recorded."""
    assert record.gradients.keys() == expected.gradients.keys()
    assert record.weights.keys() == expected.weights.keys()
    errors = {"loss": loss_error(record, expected)}
    errors |= {f"gradient of {n}": relative_error(g, expected.gradients[n]) for n, g in record.gradients.items()}
    errors |= {f"new {n}": relative_error(w, expected.weights[n]) for n, w in record.weights.items()}
    return errors


@pytest.fixture(scope="module")
def records(pool: WorkerPool, request: pytest.FixtureRequest) -> Callable[[Layout], dict[str, Record]]:
    """Of the jobs of a layout that this session runs, in one world."""
    cells = asked_of(request)

    @cache
    def of(layout: Layout) -> dict[str, Record]:
        names = [cell["job_name"] for cell in cells if cell["layout"] == layout]
        made = pool.run_each(layout.world_size, train, [(layout, JOBS[name]) for name in names])
        return {name: ranks[0] for name, ranks in zip(names, made, strict=True)}

    return of


@pytest.mark.parametrize(("layout", "job_name"), cells(), ids=str)
def test_one_step_equals_one_process(
    pool: WorkerPool, records: Callable[[Layout], dict[str, Record]], layout: Layout, job_name: str
) -> None:
    errors = compare(records(layout)[job_name], reference(pool, JOBS[job_name]))
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
    assert not wrong, wrong


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=() if layout in (LAYOUTS[3], LAYOUTS[5]) else pytest.mark.exhaustive)
        for layout in LAYOUTS
    ],
    ids=str,
)
def test_twenty_steps_equal_one_process(pool: WorkerPool, layout: Layout) -> None:
    job = Job(steps=20, lr=3e-3, micro_batches=layout.data)
    record = pool.run(layout.world_size, train, layout, job)[0]
    assert len(record.losses) == 20
    assert record.losses[-1] != record.losses[0]
    assert loss_error(record, reference(pool, job)) < TOLERANCE


def test_ci_runs_every_layout_and_every_job() -> None:
    ran = [*EVERY_DAY, *SAMPLE]
    assert ({layout for layout, _ in ran}, {name for _, name in ran}) == ({*LAYOUTS}, JOBS.keys())


def test_reference_gradients_are_not_trivial(pool: WorkerPool) -> None:
    """Parity of zeros would prove nothing: every parameter of every job has a gradient of noticeable size."""
    for name, job in JOBS.items():
        for parameter, gradient in reference(pool, job).gradients.items():
            assert gradient.abs().max() > 1e-6, f"{name}: {parameter}"


def test_parity_can_fail(pool: WorkerPool) -> None:
    """Another seed is another model: the comparison notices."""
    other = pool.run(1, train, Layout(), replace(JOBS["4_experts"], seed=1))[0]
    assert max(compare(other, reference(pool, JOBS["4_experts"])).values()) > 1e-3
