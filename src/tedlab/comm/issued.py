"""Exchanges that are issued and awaited separately, so that what stands between the two runs beside them.

Each is two autograd nodes. Backward is the mirror image: the node of the wait *issues* the exchange of the gradient,
and the node of the issue *awaits* it. Autograd runs the nodes of later operations first, so what ran between issue and
wait in the forward pass has its backward between the two as well. Every process issues its exchanges in the order of
its program, which must be the same in all processes of a group; backward keeps it, in reverse.

Nobody can read a result before it has arrived: what the issue returns to autograd is a tensor without elements, and the
result exists for Python only once it has been awaited. What is sent stays referenced until then: its memory is not used
for anything else, and autograd does not add another gradient to it in place.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from tedlab.comm.collectives import Collectives, Pending, Phase, Splits
from tedlab.comm.differentiable import all_to_all, gather_to, scatter_from
from tedlab.comm.raw import Wait
from tedlab.comm.recompute import begin
from tedlab.degrees import GroupKind

T = TypeVar("T")
U = TypeVar("U")


class Issued(Generic[T]):
    """Something that was issued and arrives later. Call :meth:`wait` or :meth:`then`, exactly once.

    Args:
        arrive: Waits and returns the value.
        tag: The call site, for errors.
    """

    def __init__(self, arrive: Callable[[], T], tag: str = "") -> None:
        self._arrive: Callable[[], T] | None = arrive
        self._tag = tag

    @classmethod
    def arrived(cls, value: T) -> "Issued[T]":
        """Returns something that there is no need to wait for."""
        return cls(lambda: value)

    def wait(self) -> T:
        """Waits and returns the value.

        Raises:
            RuntimeError: If it was awaited before.
        """
        arrive, self._arrive = self._arrive, None
        if arrive is None:
            raise RuntimeError(f"'{self._tag or 'an exchange'}' was awaited twice: keep the value of the first wait")
        return arrive()

    def then(self, function: Callable[[T], U]) -> "Issued[U]":
        """Returns what arrives as ``function`` of this value, which is called after the wait."""
        return Issued(lambda: function(self.wait()), self._tag)


def issue_all_to_all(
    x: Tensor, comm: Collectives, kind: GroupKind, tag: str, splits: Splits | None = None
) -> Issued[Tensor]:
    """Issues an :func:`tedlab.comm.all_to_all`; its result arrives later.

    Inside ``torch.compile`` it has arrived when this returns: the compiler would be free to move a wait.
    """
    if comm.size(kind) == 1 or torch.compiler.is_compiling():
        return Issued.arrived(all_to_all(x, comm, kind, tag, splits))
    return _issued(x, _Exchange(comm, kind, tag, splits))


def issue_gather_to(x: Tensor, comm: Collectives, kind: GroupKind, tag: str) -> Issued[Tensor]:
    """Issues a :func:`tedlab.comm.gather_to` along dimension 0; the whole arrives later.

    Inside ``torch.compile`` as :func:`issue_all_to_all`.
    """
    if comm.size(kind) == 1 or torch.compiler.is_compiling():
        return Issued.arrived(gather_to(x, comm, kind, tag, dim=0))
    return _issued(x, _Gathering(comm, kind, tag))


def issue_scatter_from(x: Tensor, comm: Collectives, kind: GroupKind, tag: str) -> Issued[Tensor]:
    """Issues a :func:`tedlab.comm.scatter_from` along dimension 0 without a bias; this process's slice arrives later.

    Inside ``torch.compile`` as :func:`issue_all_to_all`.
    """
    if comm.size(kind) == 1 or torch.compiler.is_compiling():
        return Issued.arrived(scatter_from(x, comm, kind, tag, dim=0))
    return _issued(x, _Scattering(comm, kind, tag))


def _issued(x: Tensor, flight: "_Flight") -> Issued[Tensor]:
    token = _Issue.apply(x, flight)
    return Issued(lambda: _Wait.apply(token, flight), flight.tag)


class _Flight(ABC):
    """A collective on its way, or that of its gradient."""

    def __init__(self, comm: Collectives, kind: GroupKind, tag: str) -> None:
        self.comm, self.kind, self.tag = comm, kind, tag
        self._on_its_way: tuple[Wait, Tensor] | None = None

    def there(self, x: Tensor, phase: Phase) -> Wait:
        """Starts it in a phase of the forward pass, and returns what waits for it."""
        return self._waiting(self.start(x, phase))

    def back(self, gradient: Tensor) -> Wait:
        """Starts that of the gradient, and returns what waits for it."""
        return self._waiting(self.start_adjoint(gradient))

    def _waiting(self, pending: Pending) -> Wait:
        def wait() -> Tensor:
            self.comm.turns.give()
            return pending.wait()

        return wait

    @abstractmethod
    def start(self, x: Tensor, phase: Phase) -> Pending:
        """Starts the collective."""

    @abstractmethod
    def start_adjoint(self, gradient: Tensor) -> Pending:
        """Starts the collective of the gradient."""

    @abstractmethod
    def shape(self, x: Tensor) -> torch.Size:
        """Returns the shape of the result."""

    def depart(self, wait: Wait, sent: Tensor) -> None:
        """Keeps what to wait for, and what is sent, until :meth:`land`."""
        self._on_its_way = wait, sent

    def land(self) -> Tensor:
        """Waits for the result and returns it."""
        assert self._on_its_way is not None
        (wait, _), self._on_its_way = self._on_its_way, None
        return wait()


class _Exchange(_Flight):
    """An all-to-all, of equal slices unless there are splits."""

    def __init__(self, comm: Collectives, kind: GroupKind, tag: str, splits: Splits | None) -> None:
        super().__init__(comm, kind, tag)
        self.splits = splits

    def start(self, x: Tensor, phase: Phase) -> Pending:
        return self.comm.start_all_to_all(x, self.kind, tag=self.tag, phase=phase, splits=self.splits)

    def start_adjoint(self, gradient: Tensor) -> Pending:
        splits = None if self.splits is None else self.splits.reverse
        return self.comm.start_all_to_all(gradient, self.kind, tag=self.tag, phase="backward", splits=splits)

    def shape(self, x: Tensor) -> torch.Size:
        return x.shape if self.splits is None else torch.Size((sum(self.splits.received), *x.shape[1:]))


class _Gathering(_Flight):
    """An all-gather of what each process uses for its part of a joint result."""

    def start(self, x: Tensor, phase: Phase) -> Pending:
        return self.comm.start_all_gather(x, self.kind, tag=self.tag, phase=phase)

    def start_adjoint(self, gradient: Tensor) -> Pending:
        return self.comm.start_reduce_scatter(gradient, self.kind, tag=self.tag, phase="backward")

    def shape(self, x: Tensor) -> torch.Size:
        return torch.Size((self.comm.size(self.kind) * len(x), *x.shape[1:]))


class _Scattering(_Flight):
    """A reduce-scatter of a joint result, of which each process gets its slice."""

    def start(self, x: Tensor, phase: Phase) -> Pending:
        return self.comm.start_reduce_scatter(x, self.kind, tag=self.tag, phase=phase)

    def start_adjoint(self, gradient: Tensor) -> Pending:
        return self.comm.start_all_gather(gradient, self.kind, tag=self.tag, phase="backward")

    def shape(self, x: Tensor) -> torch.Size:
        return torch.Size((len(x) // self.comm.size(self.kind), *x.shape[1:]))


class _Issue(Function):
    """Starts an exchange, and in backward awaits that of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.depart(begin(flight.comm, flight.tag, lambda phase: flight.there(x, phase), flight.shape(x), x), x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.land(), None


class _Wait(Function):
    """Awaits an exchange, and in backward starts that of the gradient."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.land()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        flight, gradient = ctx.flight, grads[0]
        flight.depart(flight.back(gradient), gradient)
        return gradient.new_empty(0), None
