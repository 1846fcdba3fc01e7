"""Certification inside the shared worker pool, with or without a bug planted into the processes of the layout."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from benchmarks.steps import incomplete
from tedlab.certify import Row
from tedlab.certify.certificate import Execute, Recorded, Runs, runs_for
from tedlab.certify.record import record
from tedlab.certify.shrink import MOST_PROCESSES
from tedlab.config import TrainConfig, with_values
from tests.pool import WorkerPool

Plant = Callable[[pytest.MonkeyPatch], None]
_RUNS_OF_A_WORLD = 16  # the first of them costs most; a hang costs no more than these
_SECONDS = 15  # that a run may take beside other tests, before it counts as a hang


def composed(*overrides: str) -> TrainConfig:
    """What ``tedlab certify <overrides>`` would certify."""
    return incomplete([*overrides])


def in_pool(pool: WorkerPool, plant: Plant | None = None) -> Execute:
    """Runs in the pool; ``plant`` changes the code of layouts, not of one process."""

    def execute(run: Recorded, config: TrainConfig) -> None:
        pool.run(config.parallel.world_size, _in_turn, [(run, config, plant)])

    return execute


@dataclass(frozen=True)
class Case:
    """One certificate.

    Attributes:
        overrides: of the configuration.
        plant: the bug in the processes of its layout; None: none.
        continuations: see :func:`tedlab.certify.certify`.
        steps: of its runs, if nothing continues them.
    """

    overrides: tuple[str, ...]
    plant: Plant | None = None
    continuations: tuple[str, ...] = ()
    steps: int = 2


def certified(pool: WorkerPool, directory: Path, cases: Sequence[Case]) -> dict[Case, list[Row]]:
    """Rows of many certificates, as of :func:`tedlab.certify.certify`, in few worlds.

    Cases with the same overrides and steps share a reference; all runs of as many processes share worlds, one after the
    other.
    """
    runs: dict[Case, Runs] = {}
    continued: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for case in cases:
        continued[case.overrides].update(case.continuations)
    shared: dict[tuple[tuple[str, ...], int | None], Runs] = {}
    for number, case in enumerate(cases):
        key = case.overrides, None if case.continuations else case.steps
        if key not in shared:
            names = tuple(continued[case.overrides]) if case.continuations else ()
            shared[key] = runs_for(composed(*case.overrides), directory / str(number), names, MOST_PROCESSES)
            if not case.continuations:
                shorter = {"trainer.max_steps": case.steps}
                layout, one = with_values(shared[key].layout, shorter), with_values(shared[key].one, shorter)
                shared[key] = replace(shared[key], layout=layout, one=one, steps=case.steps)
        layout = replace(shared[key].layout, output_dir=f"{shared[key].layout.output_dir}_{number}")
        runs[case] = replace(shared[key], layout=layout, continuations=case.continuations)
    stages: list[dict[int, list[_Task]]] = [defaultdict(list) for _ in range(3)]
    for case, its in runs.items():
        for run, config in ((run, config) for _, run, config in its.planned()):
            if run is record:
                stages[1][config.parallel.world_size].append((run, config, case.plant))
            elif config.ckpt_path is not None:
                stages[2][1].append((run, config, None))
            elif (run, config, None) not in stages[0][1]:
                stages[0][1].append((run, config, None))
    for stage in stages:
        for processes, tasks in stage.items():
            for start in range(0, len(tasks), _RUNS_OF_A_WORLD):
                some = tasks[start : start + _RUNS_OF_A_WORLD]
                pool.run(processes, _in_turn, some, timeout=max(120, _SECONDS * len(some)))
    return {case: list(its.compared()) for case, its in runs.items()}


_Task = tuple[Recorded, TrainConfig, Plant | None]


def _in_turn(tasks: Sequence[_Task]) -> None:
    for run, config, plant in tasks:
        with planted(plant if run is record else None):
            run(config)


@contextmanager
def planted(plant: Plant | None) -> Iterator[None]:
    """Within, this process has the bug."""
    with pytest.MonkeyPatch.context() as patch:
        if plant is not None:
            plant(patch)
        yield
