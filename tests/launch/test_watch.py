"""No collective waits for ever, in whatever group, and who gives up says who waited for whom."""

import gc
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tedlab.checkpoint import Writer
from tedlab.comm import Whereabouts
from tedlab.degrees import ParallelDegrees
from tedlab.launch import failures, watch
from tedlab.topology import Topology
from tests.pool import WorkerPool

TIMEOUT_S = 1.6
HUNG = 3  # the rank that does not come; its tensor peer is 2, its data peer 1


def started() -> tuple[Topology, watch.Watch]:
    place = Whereabouts()
    limit = timedelta(seconds=TIMEOUT_S)
    watching = watch.watch(place, limit)
    assert watching is not None
    world_size = dist.get_world_size()
    topology = Topology(ParallelDegrees(world_size, 2, world_size // 2), timeout=limit, place=place)
    watching.groups = topology.comm.ranks
    return topology, watching


def hung(stopped: bool) -> dict[str, Any]:
    """Rank 3 sleeps, or is stopped; the others go on as in training until they need it. Each says what it saw."""
    rank = dist.get_rank()
    topology, _ = started()
    comm, x = topology.comm, torch.ones(4)
    writer = Writer(background=True, timeout=timedelta(seconds=TIMEOUT_S))
    comm.place.step = 12
    comm.all_reduce(x, "world", tag="warm.up", phase="forward")
    pids: list[Any] = [None] * 4
    dist.all_gather_object(pids, os.getpid())
    began = time.monotonic()
    if rank == HUNG:
        if stopped:
            time.sleep(0.3)  # for a report or two
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            time.sleep(2 * TIMEOUT_S)
        return {}
    try:
        comm.all_reduce(x, "tensor", tag="attention.reduce", phase="forward")
        comm.start_reduce_scatter(x, "data", tag="gradients.reduce", phase="optimizer").wait()
    except RuntimeError as error:
        seen = {"took": time.monotonic() - began, "message": "\n".join(error.__notes__)}
    if rank == 0:
        try:
            dist.barrier(writer._group)
        except RuntimeError:
            seen["writer"] = time.monotonic() - began
        os.kill(pids[HUNG], signal.SIGCONT)
    else:
        time.sleep(2 * TIMEOUT_S)
    return seen


def in_the_end(function: Any, *args: Any) -> Any:
    """Its result, without the barrier at a world's end, which cannot work any more."""
    answer = function(*args)
    dist.barrier = lambda *_, **__: None
    return answer


@pytest.fixture(scope="module", params=[False, True], ids=["sleeps", "is_stopped"])
def told(request: pytest.FixtureRequest, pool: WorkerPool) -> tuple[bool, list[dict[str, Any]]]:
    return request.param, pool.run(4, in_the_end, hung, request.param, timeout=60)


def test_every_group_has_the_timeout_that_was_asked_for(told: tuple[bool, list[dict[str, Any]]]) -> None:
    """Those of meshes, which torch makes with one of 30 minutes, and that of the checkpoint's writer."""
    _, seen = told
    for rank in range(3):
        assert seen[rank]["took"] < 5 * TIMEOUT_S
    assert seen[2]["took"] > 0.9 * TIMEOUT_S
    assert seen[0]["writer"] < 5 * TIMEOUT_S


def test_who_waits_says_for_whom_and_in_which_collective(told: tuple[bool, list[dict[str, Any]]]) -> None:
    stopped, seen = told
    message = seen[2]["message"]
    assert "comm.timeout_s=1.6" in message
    assert "process 2: waits for process 3 in all_reduce attention.reduce (forward) (group tensor: 2, 3, number 1)" in (
        message
    )
    assert "process 0: waits for process 2 in reduce_scatter gradients.reduce (optimizer) (group data: 0, 2" in message
    if stopped:
        assert "process 3: no sign of life for " in message
        assert "in no collective, after all_reduce warm.up (forward), at step 12" in message
    else:
        assert "process 3: in no collective for " in message
        assert "after all_reduce warm.up (forward), at step 12; it is at launch/test_watch.py:" in message
        assert "in hung" in message


def never_waits(folder: Path) -> None:
    """Rank 0 starts a collective and, as with NCCL, is stuck elsewhere; its peer does not come."""
    watch.TORCH_FIRST_S = 0.3
    failures.keep_in(folder)
    place = Whereabouts()
    watching = watch.watch(place, timedelta(seconds=1))
    topology = Topology(ParallelDegrees(2, 2), place=place)
    assert watching is not None
    watching.groups = topology.comm.ranks
    if dist.get_rank() == 0:
        topology.comm.start_all_reduce(torch.ones(1), "tensor", tag="attention.reduce", phase="forward")
    time.sleep(4)


def test_a_process_whose_last_words_reach_nobody_ends_all_the_same(pool: WorkerPool, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 0 of 2 failed:\nleft with exit code 1"):
        pool.run(2, never_waits, tmp_path / "is_gone", timeout=20)


def test_a_collective_that_nobody_waits_for_in_the_program_ends_the_process_too(
    pool: WorkerPool, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="rank 0 of 2 failed:\nleft with exit code 1"):
        pool.run(2, never_waits, tmp_path, timeout=20)
    (failure,) = failures.recorded(tmp_path)
    assert failures.rank_of(failure) == 0
    message = failure.read_text()
    assert "process 1: in no collective" in message
    began = "process 0: started all_reduce attention.reduce (forward) (group tensor: 0, 1, number 1) "
    assert began in message
    assert " s ago, without process 1, at step 0" in message


def does_not_end() -> dict[str, Any]:
    """Rank 1 is done and leaves; rank 0 goes on long after. Both had another watch before, and were ahead in it."""
    watch.TORCH_FIRST_S = 0.3
    x, rank = torch.ones(1), dist.get_rank()
    earlier, before = started()
    for _ in range(5):
        earlier.comm.all_reduce(x, "tensor", tag="attention.reduce", phase="forward")
    later, watching = started()
    dist.barrier()
    time.sleep(0.2)  # a report
    dist.barrier()
    later.comm.all_reduce(x, "tensor", tag="head.reduce", phase="forward")
    if rank == 1:  # without another report: the next is due in 0.1 s
        watching.stop()
        time.sleep(TIMEOUT_S + 1)
        return {}
    time.sleep(TIMEOUT_S + 1)
    return {
        "threads": [thread.is_alive() for watching_ in (before, watching) for thread in watching_._threads],
        "told": watching.explain(),
    }


@pytest.fixture(scope="module")
def survivor(pool: WorkerPool) -> dict[str, Any]:
    return pool.run(2, does_not_end, timeout=30)[0]


def test_a_process_goes_on_when_its_peers_have_left_in_good_order(survivor: dict[str, Any]) -> None:
    assert "process 1: it has ended, after all_reduce head.reduce (forward), at step 0" in survivor["told"]


def test_a_process_has_one_watch_and_that_of_an_earlier_strategy_ends_nothing(survivor: dict[str, Any]) -> None:
    assert survivor["threads"] == [False, False, True, True]


def kept() -> bool:
    store = dist.distributed_c10d._get_default_store()
    store.set("kept", "")
    watches = [watch.watch(Whereabouts(), timedelta(minutes=1)) for _ in range(3)]
    watches[-1].stop()
    if not (child := os.fork()):  # a worker of a data loader, which collects what earlier trainers have left
        watches.clear()
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    watches.clear()
    gc.collect()
    dist.barrier()
    return store.check(["kept"])


def test_the_file_of_a_file_store_outlives_watches_and_forked_workers(pool: WorkerPool) -> None:
    assert all(pool.run(2, kept, timeout=30))


def test_nobody_waits_for_a_process_that_has_ended_or_for_word_that_no_longer_comes() -> None:
    place = Whereabouts()
    place.launch("all_reduce", "world")
    watching = watch.Watch(place, 600, 0, 2, dist.HashStore())
    try:
        watching._heard[1] = watch.Report(1), time.monotonic()
        assert watching._is_ahead()
        watching._heard[1] = watch.Report(2, ended=True), time.monotonic()
        assert not watching._is_ahead()
        watching._heard[1] = watch.Report(1), time.monotonic()
        watching._board_is_gone = True
        assert not watching._is_ahead()
    finally:
        watching.stop()


def test_who_waits_for_whom_is_told_for_processes_that_were_never_heard_of() -> None:
    own = watch.Report(9, "barrier", "world", 0, [0, 1, 2], 10.0, step=3)
    message = watch.explain(0, 10, {0: own, 1: own}, {})
    assert "process 0: waits for process 2 in barrier (group world: 0, 1, 2) for 10 s, at step 3" in message
    assert "process 1: waits for process 2 in barrier" in message
    assert "process 2: nothing was heard of it" in message
