"""``tedlab doctor`` finds what is wrong, and says what to do; where nothing is, it says so."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tedlab import Topology, certify, doctor
from tedlab.commands.doctor import findings
from tedlab.degrees import ParallelDegrees
from tedlab.doctor import Finding, Verdict, judge_world, machine, world
from tedlab.launch import launcher
from tests.commands import run_forked
from tests.pool import WorkerPool
from tests.test_conf import compose

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


def test_other_machines_are_named_with_what_is_wrong_there_and_the_first_is_not_told_twice() -> None:
    full = [Finding("versions", "as here"), Finding("disk", "no space", Verdict.WRONG, "free some")]
    found = judged(
        process(machine=full),
        process(machine=[]),
        process(host="two", machine=full),
        process(host="three", machine=full[:1]),
    )
    assert [name for name in found if "disk" in name or "machine" in name] == ["disk on two", "machine three"]
    assert found["disk on two"].verdict is Verdict.WRONG
    assert found["machine three"].verdict is Verdict.OK


OUTSIDE = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize("local", [0, 1])
def test_processes_that_exist_all_reach_each_other_and_one_on_each_machine_looks_at_it(
    local: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**OUTSIDE, "LOCAL_RANK": str(local)}.items():
        monkeypatch.setenv(name, value)
    wrong, given = Finding("disk", "no space", Verdict.WRONG), []
    monkeypatch.setattr(doctor, "examine_machine", lambda *_: iter([wrong]))
    monkeypatch.setattr(doctor, "examine_world", lambda _, machine: given.append(machine) or judgeable())
    found = [*findings(compose(name="doctor"))]
    assert given == [[wrong] if local == 0 else []]
    assert (wrong in found) == (local == 0)
    assert (found[-1].verdict, found[-1].said.partition(":")[0]) == (Verdict.SKIPPED, "not tested here")


def judgeable() -> dict[str, Any]:
    return {"backend": "gloo", "processes": [process()], "sizes": {}}


def test_a_number_of_processes_that_is_none_is_a_finding() -> None:
    (found,) = findings(compose("trainer.devices=auto", name="doctor"))
    assert (found.name, found.verdict) == ("configuration", Verdict.WRONG)
    assert "trainer.devices=auto" in found.said


@pytest.mark.parametrize("message", ["", "first\n\nlast"])
def test_what_fails_on_the_way_is_a_finding_also_if_it_says_nothing(
    monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(doctor, "examine_machine", lambda *_: iter(()))
    monkeypatch.setattr(launcher, "launch", fail)
    (found,) = findings(compose(name="doctor"))
    assert (found.name, found.said, found.verdict) == ("processes", said(message), Verdict.WRONG)
    monkeypatch.setattr(launcher, "launch", lambda *_: {})
    monkeypatch.setattr(certify, "certify", fail)
    (found,) = findings(compose(name="doctor"))
    assert (found.name, found.said, found.verdict) == ("a step against one process", said(message), Verdict.WRONG)


def said(message: str) -> str:
    return " ".join(message.split()) or "RuntimeError"


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
