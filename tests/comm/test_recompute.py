"""What a second pass repeats, what it takes from the first, what it refuses. With groups: in ``test_ledger.py``."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from tedlab import Topology
from tedlab.comm import Recomputation, Second, pin, recompute, recomputed
from tedlab.comm.recompute import collective


@pytest.fixture
def single() -> Iterator[Topology]:
    yield Topology.single()
    dist.destroy_process_group()


@pytest.fixture
def calls() -> list[str]:
    Doubled.calls = []
    return Doubled.calls


class Doubled(Function):
    """Stands for a collective: doubles, and says in which phase."""

    calls: list[str] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Any, tag: str) -> Tensor:
        def launch(phase: str) -> Tensor:
            Doubled.calls.append(f"{tag} {phase}")
            return x * 2

        return collective(comm, tag, launch, x.shape, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * 2, None, None


def gradient(function: Callable[[Tensor], Tensor], plan: dict[str, Second], counters: Recomputation) -> Tensor:
    x = torch.linspace(-1, 1, 5).requires_grad_()
    y = recomputed(function, x, counters=counters, plan=plan, early_stop=False)
    y.square().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("second", [Second.AGAIN, Second.WHOLE, Second.SLICE])
def test_a_second_pass_communicates_or_takes_what_was_kept(single: Topology, calls: list[str], second: Second) -> None:
    counters = Recomputation()

    def function(x: Tensor) -> Tensor:
        return Doubled.apply(x.exp(), single.comm, "a").tanh()

    found = gradient(function, {"a": second}, counters)
    assert calls == ["a forward", "a recompute"][: 2 if second is Second.AGAIN else 1]
    assert torch.equal(found, gradient(function, {}, counters))
    assert counters.peak_kept_bytes == (0 if second is Second.AGAIN else 5 * 4)
    assert counters.kept_bytes == 0  # freed


def test_what_nobody_needs_is_neither_kept_nor_communicated(
    single: Topology, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recompute, "unused", lambda shape, like: like.new_full(shape, torch.nan))
    counters = Recomputation()

    def function(x: Tensor) -> Tensor:
        return Doubled.apply(Doubled.apply(x.exp(), single.comm, "dead"), single.comm, "kept").tanh()

    found = gradient(function, {"dead": Second.NOTHING, "kept": Second.WHOLE}, counters)
    assert calls == ["dead forward", "kept forward"]
    assert torch.equal(found, gradient(function, {}, counters))


def test_the_graph_may_be_kept_and_used_again(single: Topology, calls: list[str]) -> None:
    x = torch.linspace(-1, 1, 5).requires_grad_()
    y = recomputed(
        lambda x: Doubled.apply(x.exp(), single.comm, "a").tanh(),
        x,
        counters=Recomputation(),
        plan={"a": Second.WHOLE},
    )
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(first, second)


def test_other_collectives_in_the_second_pass_are_refused(single: Topology, calls: list[str]) -> None:
    tags = iter(("first", "second"))
    plan = {"first": Second.WHOLE, "second": Second.WHOLE}
    with pytest.raises(RuntimeError, match="came to 'second' where its first pass had first"):
        gradient(lambda x: Doubled.apply(x.exp(), single.comm, next(tags)).tanh(), plan, Recomputation())


def test_a_kept_result_that_was_changed_in_place_is_refused(single: Topology, calls: list[str]) -> None:
    with pytest.raises(RuntimeError, match="'a', kept for recomputation, was changed in place"):
        gradient(
            lambda x: Doubled.apply(x.exp(), single.comm, "a").mul_(3).tanh(), {"a": Second.WHOLE}, Recomputation()
        )


def test_decisions_stay_those_of_the_first_pass_and_flips_are_counted() -> None:
    """Whatever the plan: recomputed arithmetic that comes out differently must not send a token to another expert."""
    counters, passes = Recomputation(), iter((0, 2))

    def function(x: Tensor) -> Tensor:
        best = torch.stack((x, -x)).argmax(0)
        changed = best.clone()
        count = next(passes)
        changed[:count] = 1 - best[:count]
        return torch.stack((x, x * 10)).gather(0, pin(changed).unsqueeze(0)).square()

    found = gradient(function, {}, counters)
    assert counters.flips == 2
    expected = torch.linspace(-1, 1, 5).requires_grad_()
    function_of = torch.where(expected > 0, expected, torch.where(expected == 0, expected, expected * 10)).square()
    function_of.square().sum().backward()
    assert expected.grad is not None
    torch.testing.assert_close(found, expected.grad)


def test_outside_a_region_nothing_is_kept_and_decisions_are_as_they_are(single: Topology, calls: list[str]) -> None:
    decision = torch.tensor([1, 2])
    assert pin(decision) is decision
    Doubled.apply(torch.ones(2), single.comm, "a")
    assert calls == ["a forward"]
