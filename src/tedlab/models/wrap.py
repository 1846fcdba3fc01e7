"""Runs a block recomputed in the backward pass, compiled, both or neither; the block itself knows of none of this.

Layers that cannot be compiled (``compilable`` is False, as where shapes depend on routers' choices) are left out: the
compiler sees the parts of the block before and after them, and the experts that all tokens share.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tedlab._compat.torch import reproducible_choices
from tedlab.comm import RecomputePlan, evaluating, recomputed
from tedlab.config import Compiler
from tedlab.moe import MoELayer
from tedlab.nn import localised
from tedlab.topology import Topology


def wrap(
    block: nn.Module, topology: Topology, plan: RecomputePlan | None, backend: str, early_stop: bool = True
) -> None:
    """Replaces a block's ``forward`` by one that does the same, recomputed or compiled.

    Args:
        block: Its forward takes activations, the rotation of positions or None, and a padding mask or None.
        topology: The process's place in the meshes.
        plan: What a recomputation does at each collective; None: the block is not recomputed.
        backend: Backend of ``torch.compile``; ``none``: the block is not compiled.
        early_stop: Whether recomputation stops early, see :func:`tedlab.comm.recomputed`.
    """
    run = block.forward if plan is None else _Recomputed(block, topology, plan, early_stop)
    if backend != "none":
        run = (_stand_in or _Compiled)(block, topology, run, backend)
    if run is not block.forward:
        block.forward = run


_stand_in: Callable[[nn.Module, Topology, Any, str], Any] | None = None


@contextmanager
def compiling(with_: Callable[[nn.Module, Topology, Any, str], Any]) -> Iterator[None]:
    """Lets ``with_`` take the place of the compiler: it gets the block, its topology, what runs it, and the backend."""
    global _stand_in
    _stand_in = with_
    try:
        yield
    finally:
        _stand_in = None


class _Recomputed:
    """Runs a block's own forward without keeping its activations."""

    def __init__(self, block: nn.Module, topology: Topology, plan: RecomputePlan, early_stop: bool) -> None:
        self.block, self.topology, self.plan, self.early_stop = block, topology, plan, early_stop

    def _forward(self, x: Tensor, rotation: Tensor | None, padding_mask: Tensor | None) -> Any:
        return type(self.block).forward(self.block, x, rotation, padding_mask)

    def __call__(self, x: Tensor, rotation: Tensor | None = None, padding_mask: Tensor | None = None) -> Any:
        if evaluating() or not x.requires_grad:  # without a gradient nothing is computed again
            return self._forward(x, rotation, padding_mask)
        return recomputed(
            self._forward,
            x,
            rotation,
            padding_mask,
            counters=self.topology.recomputation,
            plan=self.plan,
            skip_dead_gemm=self.topology.options.skip_dead_gemm,
            early_stop=self.early_stop,
        )


class _Compiled:
    """Compiles the function that runs a block, and first does what the compiler could not."""

    def __init__(self, block: nn.Module, topology: Topology, run: Any, backend: str) -> None:
        self.block, self.topology, self.eager = block, topology, run
        self.mixtures = [layer for layer in block.modules() if isinstance(layer, MoELayer)]
        left_out = [layer for layer in self.mixtures if not layer.experts.compilable]
        # Tensor ranks compute gradients of replicated parameters each by itself: with other kernels they would drift.
        alike = topology.degrees.tensor > 1 and backend == Compiler.INDUCTOR
        options: Any = reproducible_choices() if alike else None
        for layer in left_out:
            layer.forward = _LeftOut(layer)  # type: ignore[method-assign]
            if layer.shared is not None:
                for name in ("beside", "first", "finish"):
                    part = getattr(layer.shared, name)
                    setattr(layer.shared, name, torch.compile(part, backend=backend, fullgraph=True, options=options))
        self.compiled = torch.compile(run, backend=backend, fullgraph=not left_out, options=options)

    def __call__(self, x: Tensor, rotation: Tensor | None = None, padding_mask: Tensor | None = None) -> Any:
        for layer in self.mixtures:
            layer.expect(x)
        if self.mixtures and self.topology.slots.uneven:  # the host must ask others for numbers each time
            return self.eager(x, rotation, padding_mask)
        with localised(self.block):
            return self.compiled(x, rotation, padding_mask)


class _LeftOut:
    """Runs a layer's own forward, hidden from the compiler."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    @torch.compiler.disable
    def __call__(self, *arguments: Any) -> Any:
        return type(self.layer).forward(self.layer, *arguments)
