"""Gradients as the user's code sees them in ``.grad``."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from tedlab._compat.torch import (
    AsyncCollectiveTensor,
    local_tensor,
    operator_name,
    shape_and_offset_of_shard,
    spec_of,
    tree_map,
)
from tedlab.optim.bucket import Bucket, local


class ShownGradient(DTensor):
    """A DTensor whose norms, sums and maxima are the whole parameter's, as plain numbers.

    A DTensor leaves such a result as a pending sum over processes, of which ``item()`` returns this process's part,
    and refuses to mix those of two meshes. torch's ``clip_grad_norm_``, Lightning's ``grad_norm`` and
    ``p.grad.norm().item()`` would fail or be silently wrong. Each such result costs a small all-reduce, in which all
    processes that hold the parameter take part.
    """

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = operator_name(func).removeprefix("aten::")
        if name.startswith("_foreach_"):  # runs one by one, since tensors may be on different meshes or on none
            name = {"_foreach_norm": "linalg_vector_norm"}.get(name, name.removeprefix("_foreach_"))
            single = getattr(torch.ops.aten, name)
            results = [
                single(*(arg[i] if isinstance(arg, list | tuple) else arg for arg in args), **(kwargs or {}))
                for i in range(len(args[0]))
            ]
            return None if name.endswith("_") else results
        return tree_map(_completed, super().__torch_dispatch__(func, types, args, kwargs))


def _completed(result: Any) -> Any:
    if not isinstance(result, DTensor):
        return result
    if any(placement.is_partial() for placement in result.placements):
        result = result.redistribute(placements=[Replicate() if p.is_partial() else p for p in result.placements])
    if result.dim() > 0:
        return ShownGradient(local_tensor(result), spec_of(result), requires_grad=False)
    number = result.to_local()
    # The all-reduce may still be running (torch 2.11), and such a tensor has no memory that others could read.
    return number.wait() if isinstance(number, AsyncCollectiveTensor) else number


class Shown:
    """A bucket's gathered gradient, shown as ``.grad`` of its parameters, and what the user does to it.

    Args:
        bucket: Bucket whose gradient is there and reduced.
        scale: Loss scale, which is divided out of what is shown.
    """

    def __init__(self, bucket: Bucket, scale: float) -> None:
        self.bucket, self.scale = bucket, scale
        assert bucket.gradient is not None
        self._flat = bucket.gather(bucket.gradient, tag="gradients.gather", phase="metrics").div_(scale)
        # Tells which elements the user leaves alone; these keep the precision that unscaling may have cost.
        self._before = self._flat[bucket.own].clone()
        self._given: dict[nn.Parameter, Tensor] = {}
        self.give()

    def give(self) -> None:
        """Sets ``.grad`` of the parameters that have a gradient."""
        for p, part in zip(self.bucket.parameters, self.bucket.parts(self._flat), strict=True):
            if p in self.bucket.present:
                values = part.view(local(p).shape)
                p.grad = ShownGradient(values, spec_of(p), requires_grad=False) if isinstance(p, DTensor) else values
                self._given[p] = p.grad

    def take(self) -> None:
        """Takes ``.grad`` away, with the user's changes; a parameter whose ``.grad`` is None has no gradient."""
        bucket = self.bucket
        assert bucket.gradient is not None
        for p, part in zip(bucket.parameters, bucket.parts(self._flat), strict=True):
            grad, p.grad = p.grad, None
            if grad is None:
                bucket.present.discard(p)
                continue
            bucket.present.add(p)
            if grad is not self._given.get(p) or local(grad).data_ptr() != part.data_ptr():
                part.copy_(local_part(grad, p).flatten())
        self._given.clear()
        own = self._flat[bucket.own]
        bucket.gradient = torch.where(own == self._before, bucket.gradient, own * self.scale)
        self._before = own.clone()

    def scale_by(self, factor: float) -> None:
        """Multiplies the gradient, and what is shown of it, by ``factor``."""
        assert self.bucket.gradient is not None
        for tensor in (self.bucket.gradient, self._flat, self._before):
            tensor.mul_(factor)

    def clamp(self, limit: float) -> None:
        """Clamps each element of what is shown to ±limit, and the gradient to the same times the scale."""
        assert self.bucket.gradient is not None
        bound = min(limit * self.scale, torch.finfo(self.bucket.gradient.dtype).max)
        self.bucket.gradient.clamp_(-bound, bound)
        for tensor in (self._flat, self._before):
            tensor.clamp_(-limit, limit)


def local_part(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """Returns this process's part of a tensor of the parameter's global shape, in new memory."""
    if not isinstance(parameter, DTensor):
        return tensor.detach().clone()
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return local(tensor.redistribute(parameter.device_mesh, parameter.placements)).clone()
    shape, offset = shape_and_offset_of_shard(parameter.shape, parameter.device_mesh, parameter.placements)
    return tensor.detach()[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))].clone()
