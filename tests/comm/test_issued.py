"""Exchanges in two parts: the same values, gradients and bytes as in one; backward mirrors forward; nobody is early."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from tedlab import ParallelDegrees, Topology
from tedlab.comm import (
    Collective,
    Collectives,
    Issued,
    Ledger,
    Recomputation,
    Second,
    Splits,
    all_to_all,
    issue_all_to_all,
    raw,
    recomputed,
)
from tests.pool import WorkerPool

Found = dict[str, Any]
SENT = ((3, 1), (2, 4))  # rows from each of two processes to each
LATE = 0.1  # seconds after which the slower process joins an exchange


class Between(Function):
    """What runs while an exchange is under way: it doubles, and notes when."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heard: list[str]) -> Tensor:
        heard.append("between")
        ctx.heard = heard
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.heard.append("between, backward")
        return grads[0] * 2, None


def hear(comm: Collectives) -> list[str]:
    heard: list[str] = []
    comm.register_hook(lambda call, event: heard.append(f"{event} {call.tag} ({call.phase})"))
    return heard


def values(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(rows, 3, dtype=torch.float64, generator=generator).requires_grad_()


def layer(x: Tensor, comm: Collectives, heard: list[str], splits: Splits | None) -> Tensor:
    """As in a layer with experts: there, something beside it, back, something beside that."""
    there = issue_all_to_all(x.exp(), comm, "expert", "there", splits)
    beside = Between.apply(x, heard)
    back = issue_all_to_all(there.wait().tanh(), comm, "expert", "back", None if splits is None else splits.reverse)
    beside = Between.apply(beside, heard)
    return back.wait().sin() + beside


def blocking(x: Tensor, comm: Collectives, splits: Splits | None) -> Tensor:
    there = all_to_all(x.exp(), comm, "expert", "there", splits)
    back = all_to_all(there.tanh(), comm, "expert", "back", None if splits is None else splits.reverse)
    return back.sin() + x * 4


def both(comm: Collectives, heard: list[str]) -> Found:
    own = dist.get_rank()
    uneven = Splits(SENT[own], tuple(row[own] for row in SENT))
    found: Found = {}
    for name, splits in (("even", None), ("uneven", uneven)):
        x = values(sum(uneven.sent) if splits else 4)
        heard.clear()
        ledgers = Ledger(), Ledger()
        results = []
        for ledger, function in zip(ledgers, (blocking, lambda *a: layer(a[0], a[1], heard, a[2])), strict=True):
            handle = comm.register_hook(ledger)
            heard.clear()
            y = function(x, comm, splits)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
            handle.remove()
        found[name] = [torch.equal(*pair) for pair in zip(*results, strict=True)]
        found[f"{name} ledger"] = ledgers[0].totals == ledgers[1].totals
    found["order"] = list(heard)
    return found


def second_passes(comm: Collectives, heard: list[str]) -> Found:
    found: Found = {}
    x = values(4)
    plans = {
        "again": {},
        "whole": {"there": Second.WHOLE, "back": Second.WHOLE},
        "one": {"back": Second.WHOLE},
        "slice": {"there": Second.SLICE, "back": Second.SLICE},
        "nothing": {"there": Second.WHOLE, "back": Second.NOTHING},
    }
    for name, plan in plans.items():
        counters = Recomputation()

        def function(x: Tensor) -> Tensor:
            return no_reader(x, comm) if name == "nothing" else layer(x, comm, heard, None)  # noqa: B023

        y = recomputed(function, x, counters=counters, plan=plan, early_stop=False)
        heard.clear()
        gradients = torch.autograd.grad(y.sum(), x), torch.autograd.grad(function(x).sum(), x)
        found[name] = [line for line in heard if "recompute" in line], torch.equal(gradients[0][0], gradients[1][0])
        found[f"{name} kept"] = counters.peak_kept_bytes
    return found


def no_reader(x: Tensor, comm: Collectives) -> Tensor:
    """Its backward pass reads nothing of what came back."""
    there = issue_all_to_all(x.exp(), comm, "expert", "there")
    return issue_all_to_all(there.wait().tanh(), comm, "expert", "back").wait()


def ended_early(comm: Collectives, heard: list[str]) -> Found:
    """A second pass that has everything before its exchange arrives awaits it all the same: the others join in it."""

    def function(x: Tensor) -> Tensor:
        there = issue_all_to_all(x.exp(), comm, "expert", "there")
        return Between.apply(x.sin(), heard) + there.wait()

    x = values(4)
    y = recomputed(function, x, counters=Recomputation(), plan={})
    heard.clear()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    lines = [line for line in heard if "recompute" in line]
    return {"early": lines, "early gradient": torch.equal(gradient, torch.autograd.grad(function(x).sum(), x)[0])}


def refusals(comm: Collectives, heard: list[str]) -> Found:
    found: Found = {}
    issued = issue_all_to_all(values(4), comm, "expert", "there")
    issued.wait()
    left: list[Issued[Tensor]] = []

    def leaves(x: Tensor) -> Tensor:
        left.append(issue_all_to_all(x, comm, "expert", "there"))
        return x * 2

    def region() -> None:
        recomputed(leaves, values(4), counters=Recomputation(), plan={})

    for name, wrong in (("twice", issued.wait), ("left", region)):
        try:
            wrong()
        except RuntimeError as error:
            found[name] = str(error)
    left[0].wait()
    return found


def never_early(comm: Collectives, heard: list[str]) -> Found:
    """One process is late: what the other has before the wait is nothing, and afterwards what was sent."""

    def late(call: Collective, event: str) -> None:
        if event == "start" and dist.get_rank() == 1:
            time.sleep(LATE)

    handle = comm.register_hook(late)
    found: Found = {}
    for name, first in (("right", 1.0), ("racing", 7.0)):  # memory may still hold what arrived before
        x = torch.full((4, 3), first + dist.get_rank())
        with pytest.MonkeyPatch.context() as patch:
            if name == "racing":  # the mistake
                patch.setattr(raw, "_awaited", lambda result: lambda: result.elem.clone())
            issued = issue_all_to_all(x, comm, "expert", "there")
            tensors = [cell.cell_contents for cell in issued._arrive.__closure__ or ()]  # type: ignore[union-attr]
            found[f"{name} before"] = [t.numel() for t in tensors if isinstance(t, Tensor)]
            found[name] = issued.wait()
        dist.barrier()
    handle.remove()
    return found


def everything() -> Found:
    comm = Topology(ParallelDegrees(2, 1, 2)).comm
    heard = hear(comm)
    parts = both, second_passes, ended_early, refusals, never_early
    return {name: value for part in parts for name, value in part(comm, heard).items()}


@pytest.fixture(scope="module")
def found(pool: WorkerPool) -> list[Found]:
    return pool.run(2, everything)


@pytest.mark.parametrize("splits", ["even", "uneven"])
def test_values_gradients_and_bytes_are_those_of_one_blocking_exchange(found: list[Found], splits: str) -> None:
    for rank in found:
        assert rank[splits] == [True, True]
        assert rank[f"{splits} ledger"]


def test_what_runs_beside_an_exchange_has_its_backward_beside_that_of_the_gradient(found: list[Found]) -> None:
    forward = [
        *("start there (forward)", "between", "end there (forward)"),
        *("start back (forward)", "between", "end back (forward)"),
    ]
    backward = [
        *("start back (backward)", "between, backward", "end back (backward)"),
        *("start there (backward)", "between, backward", "end there (backward)"),
    ]
    assert [rank["order"] for rank in found] == [forward + backward] * 2


def test_a_second_pass_obeys_its_plan(found: list[Found]) -> None:
    """A shard is all of it here, where there are no tensor ranks to share it with."""
    there, back = ([f"start {tag} (recompute)", f"end {tag} (recompute)"] for tag in ("there", "back"))
    for rank in found:
        assert rank["again"] == ([*there, *back], True)
        assert rank["whole"] == ([], True)
        assert rank["one"] == (there, True)
        assert rank["slice"] == ([], True)
        assert rank["nothing"] == ([], True)
        assert [rank[f"{name} kept"] for name in ("again", "whole", "one")] == [0, 2 * 4 * 3 * 8, 4 * 3 * 8]


def test_a_second_pass_that_ends_early_awaits_what_it_has_issued(found: list[Found]) -> None:
    for rank in found:
        assert rank["early"] == ["start there (recompute)", "end there (recompute)"]
        assert rank["early gradient"]


def test_an_exchange_is_awaited_once_and_in_its_region(found: list[Found]) -> None:
    for rank in found:
        assert "'there' was awaited twice" in rank["twice"]
        assert "before it had awaited what it issued: there" in rank["left"]


def test_nothing_can_be_read_before_it_arrives(found: list[Found]) -> None:
    """And a wait that does not wait is noticed, since one process is late: the other reads memory nobody filled."""
    for rank in found:
        assert rank["right before"] == [0]
        assert rank["right"][:, 0].tolist() == [1.0, 1.0, 2.0, 2.0]
    assert found[0]["racing"][:, 0].tolist() != [7.0, 7.0, 8.0, 8.0]
