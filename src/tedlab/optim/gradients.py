"""Lets a user read and change the gradient of the current step: ``trainer.strategy.gradients``."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tedlab.comm import Collectives
from tedlab.optim.bucket import Bucket
from tedlab.optim.sharded import ShardedOptimizer
from tedlab.optim.shown import local_part


class Gradients:
    """The gradient between a step's last backward pass and the step: reduced, not clipped yet, without the loss scale.

    It is there in ``on_after_backward`` of a step's last micro-batch, in ``on_before_optimizer_step``, in
    ``configure_gradient_clipping``, and between ``manual_backward`` and ``optimizer.step()``. Names are those of
    ``named_parameters()``; a parameter that got no gradient in any process has none here.

    All methods are collective: every process must call them with the same arguments, and each number that they return
    is the same in all processes.
    """

    def __init__(self, optimizers: Sequence[ShardedOptimizer], comm: Collectives) -> None:
        self._optimizers = optimizers
        self._comm = comm

    def norm(self) -> float:
        """Returns the Euclidean norm of the whole gradient of all optimizers; each element of the model counts once."""
        return math.hypot(*(optimizer.global_norm() for optimizer in self._reduced()))

    def norms(self) -> dict[str, float]:
        """Returns the Euclidean norm of each whole parameter's gradient, by name, with one all-reduce."""
        names: list[str] = []
        squares: list[Tensor] = []
        for optimizer in self._reduced():
            for bucket, p in optimizer.with_gradient():
                assert bucket.gradient is not None
                parts = [bucket.gradient[where].double() for where in bucket.ranges({p})]
                total = torch.stack([part.square().sum() for part in parts]).sum()
                squares.append(total / bucket.holders / optimizer.scale**2)
                names.append(optimizer.names[p])
        if not names:
            return {}
        whole = self._comm.all_reduce(torch.stack(squares), "world", tag="gradients.norms", phase="metrics")
        return dict(zip(names, whole.sqrt().tolist(), strict=True))

    def sharded(self) -> dict[str, Tensor]:
        """Returns gradients by name, each sharded like its parameter (a DTensor for one). One all-gather per bucket."""
        return {name: tensor for optimizer in self._reduced() for name, tensor in optimizer.gradients().items()}

    def full(self, name: str) -> Tensor:
        """Returns the whole gradient of one parameter on every process.

        Raises:
            KeyError: If the parameter has no gradient.
        """
        tensor = self.sharded()[name]
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def scale(self, pattern: str, factor: float | Tensor) -> None:
        """Multiplies the gradients of parameters with matching names, before the norm is taken and clipped.

        Args:
            pattern: A name, or one with ``*`` in it: ``"*.router.*"``.
            factor: A number, where 0 also removes non-finite values; or a tensor that can be expanded to the
                parameter's global shape, such as a mask.

        Raises:
            KeyError: If no parameter with a gradient has such a name.
        """
        found = False
        for optimizer in self._reduced():
            matching = [(b, p) for b, p in optimizer.with_gradient() if fnmatchcase(optimizer.names[p], pattern)]
            if matching:
                found = True
                with optimizer.changing():
                    for bucket, p in matching:
                        _multiply(bucket, p, factor)
        if not found:
            raise KeyError(f"no parameter that has a gradient is called {pattern}")

    def _reduced(self) -> Sequence[ShardedOptimizer]:
        ready = [optimizer for optimizer in self._optimizers if optimizer.reduced]
        if not ready:
            raise RuntimeError(
                "There is no reduced gradient now: strategy.gradients is for on_after_backward of a step's last "
                "micro-batch, on_before_optimizer_step, and between manual_backward and the step."
            )
        return ready


@torch.no_grad()
def _multiply(bucket: Bucket, parameter: nn.Parameter, factor: float | Tensor) -> None:
    assert bucket.gradient is not None
    ranges = bucket.ranges({parameter})
    if not isinstance(factor, Tensor):
        for where in ranges:
            part = bucket.gradient[where]
            part.zero_() if factor == 0 else part.mul_(factor)
        return
    whole = torch.ones_like(bucket.flat)
    position = next(i for i, p in enumerate(bucket.parameters) if p is parameter)
    expanded = factor.to(whole).expand(parameter.shape)
    bucket.parts(whole)[position].copy_(local_part(expanded, parameter).flatten())
    bucket.gradient.mul_(whole[bucket.own])
