"""``tedlab doctor`` finds what is wrong, and says what to do; where nothing is, it says so."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tedlab import Topology
from tedlab.degrees import ParallelDegrees
from tedlab.doctor import Verdict, judge_world, machine, world
from tests.commands import run_forked
from tests.pool import WorkerPool

GIB = 2**30


def process(**values: Any) -> dict[str, Any]:
    return {"host": "one", "clock": 100.0, "product": 4e9, "tensor": (1e-4, 1e9, True)} | values


def judged(*processes: dict[str, Any]) -> dict[str, Any]:
    measured = {"backend": "gloo", "processes": processes, "sizes": {"tensor": 2, "expert": 1}}
    return {finding.name: finding for finding in judge_world(measured)}


def test_a_sound_world_has_no_remedy_and_groups_of_one_are_not_judged() -> None:
    found = judged(process(), process())
    assert [*found] == ["processes", "clocks", "speed", "groups: tensor"]
    assert all(finding.verdict is Verdict.OK and not finding.remedy for finding in found.values())


def test_clocks_that_are_apart_are_a_warning() -> None:
    finding = judged(process(), process(clock=103.5, host="two"))["clocks"]
    assert finding.verdict is Verdict.WARNING
    assert "3,500 ms" in finding.said


def test_a_slow_process_is_named_with_its_host() -> None:
    finding = judged(process(), process(), process(product=1e9, host="two"))["speed"]
    assert finding.verdict is Verdict.WARNING
    assert "rank 2 on two" in finding.remedy


def test_a_wrong_sum_is_wrong_in_its_group() -> None:
    finding = judged(process(), process(tensor=(1e-4, 1e9, False)))["groups: tensor"]
    assert finding.verdict is Verdict.WRONG
    assert "ranks 1 " in finding.said


def test_a_package_that_is_too_old_or_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["torch<1", "rich>=1", "no_such_package_at_all>=2", "pytest<1; extra == 'dev'"]
    monkeypatch.setattr(machine, "requires", lambda _: needed)
    old, missing = machine.unmet()
    assert old.startswith("torch is ")
    assert missing == "no_such_package_at_all is missing"


def test_a_place_that_cannot_be_written_to_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert machine._disk(tmp_path / "file" / "runs").verdict is Verdict.WRONG
    assert machine._disk(tmp_path / "new" / "runs").verdict is not Verdict.WRONG
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_too_little_memory_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 2.0 * GIB)
    assert machine._memory(2).verdict is Verdict.OK
    assert machine._memory(8).verdict is Verdict.WRONG


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpus_that_are_not_there_are_wrong() -> None:
    assert machine._processors(2, "gpu", share_gpus=True).verdict is Verdict.WRONG


def measured_and_spoilt() -> tuple[bool, bool, bool]:
    topology = Topology(ParallelDegrees(4, tensor=2, expert=2))
    device = torch.device("cpu")
    right = all(world._collectives(topology, kind, device)[2] for kind in ("tensor", "data", "expert", "world"))
    reduce, exchange = dist.all_reduce, dist.all_to_all_single
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda x, group: (reduce(x, group=group), x.add_(1)))
        sums = world._collectives(topology, "tensor", device)[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", lambda y, x, group: (exchange(y, x, group=group), y.copy_(y.flip(0))))
        rows = world._collectives(topology, "expert", device)[2]
    return right, sums, rows


def test_wrong_sums_and_rows_in_a_wrong_order_are_noticed_in_every_process(pool: WorkerPool) -> None:
    assert pool.run(4, measured_and_spoilt) == [(True, False, False)] * 4


@pytest.mark.slow
@pytest.mark.usefixtures("pool")
def test_it_passes_here_and_names_every_kind_of_group(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = run_forked("tedlab", ["doctor"], tmp_path, environment, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in (
        "versions",
        "disk",
        "clocks",
        "groups: tensor",
        "groups: expert",
        "groups: data",
        "a step against one process",
    ):
        assert name in done.stdout
    assert not [*tmp_path.iterdir()], "it leaves nothing behind"


@pytest.mark.usefixtures("pool")
def test_a_layout_that_cannot_be_is_refused_before_anything_is_launched(tmp_path: Path) -> None:
    done = run_forked("tedlab", ["doctor", "parallel.tensor=3"], tmp_path, {**os.environ}, timeout=60)
    assert done.returncode == 1
    assert "✗ configuration" in done.stdout
    assert "processes" not in done.stdout.partition("✗ configuration")[2].partition("found each other")[1]
