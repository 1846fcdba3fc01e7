"""Simulates a compiler, which makes one kernel of all operations between two products, attentions or collectives."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from tedlab._compat.torch import storage_address
from tedlab.moe import MoELayer
from tedlab.predict.sim.roofline import touched_bytes
from tedlab.spec import Kernel, Work
from tedlab.topology import Topology


class Fusion:
    """What the kernel under way has read and made.

    It reads once what it has not made itself, and writes only what something still holds when it ends: the operands of
    what comes next, and what the backward pass or a later kernel will read. In reality a backward pass may compute
    again what is cheap; and a sum over tokens (of a weight's gradient) is a kernel of its own, as here.

    Attributes:
        on: Whether what is computed now is compiled.
    """

    def __init__(self) -> None:
        self.on = False
        self._read: dict[int, int] = {}  # bytes, by address
        self._made: dict[int, weakref.ref] = {}
        self._dtype = torch.float32

    def takes(self, operands: Iterable[Tensor], results: Iterable[Tensor]) -> None:
        """Adds an operation."""
        for tensor in operands:
            address = storage_address(tensor)
            if not self._has_made(address):
                self._read[address] = max(touched_bytes(tensor), self._read.get(address, 0))
        for tensor in results:
            address = storage_address(tensor)
            if not self._has_made(address):
                self._made[address] = weakref.ref(tensor.untyped_storage())

    def _has_made(self, address: int) -> bool:
        """Tells whether what is at an address is of this kernel: where something has ended, others may begin."""
        return address in self._made and self._made[address]() is not None

    def ends(self) -> tuple[Work, list[torch.UntypedStorage]] | None:
        """Returns the kernel, if there is one, with what it leaves, and begins another."""
        read, made = self._read, self._made
        self._read, self._made = {}, {}
        kept = [storage for reference in made.values() if (storage := reference()) is not None]
        if not kept:
            return None
        moved = sum(read.values()) + sum(s.nbytes() for s in kept)
        return Work(0.0, moved, self._dtype, "arithmetic", kernel=Kernel("compiled")), kept


def compiled(switch: Callable[[bool], None], run: Callable[..., Any]) -> Callable[..., Any]:
    """Stands in for the function that compiles what has no backward pass, see :func:`tedlab.nn.loss.compiling_loss`.

    Args:
        switch: Called with whether what follows is compiled.
        run: What is compiled.
    """

    def between(*arguments: Any) -> Any:
        switch(True)
        results = run(*arguments)
        switch(False)
        return results

    return between


class CompiledBlock:
    """Stands in for the function that compiles a block, see ``tedlab.models.wrap``: mixtures inside are not compiled.

    Args:
        switch: Called with whether what follows is compiled.
        block, topology, run, backend: See :func:`tedlab.models.wrap.wrap`.
    """

    def __init__(
        self, switch: Callable[[bool], None], block: nn.Module, topology: Topology, run: Any, backend: str
    ) -> None:
        self.switch, self.run = switch, run
        for layer in block.modules():
            if isinstance(layer, MoELayer):
                layer.forward = _Between(layer.forward, switch, False)  # type: ignore[method-assign, assignment]

    def __call__(self, *arguments: Any) -> Any:
        return _Between(self.run, self.switch, True)(*arguments)


class _Between:
    """Runs a function between two switches, which in the backward pass are thrown in the opposite order."""

    def __init__(self, run: Callable[..., Any], switch: Callable[[bool], None], on: bool) -> None:
        self.run, self.switch, self.on = run, switch, on

    def __call__(self, x: Tensor, *others: Any) -> Any:
        y, *reports = self.run(_Switched.apply(x, self.switch, self.on), *others)
        return (_Switched.apply(y, self.switch, not self.on), *reports)


class _Switched(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, switch: Callable[[bool], None], on: bool) -> Tensor:
        ctx.switch, ctx.on = switch, on
        switch(on)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.switch(not ctx.on)
        return grads[0], None, None
