"""Normalisation layers: of features that every tensor rank holds, or of features divided over the tensor group."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from tedlab.comm import Collectives, copy_to, evaluating, reduce_from
from tedlab.nn.sharded import ShardedModule
from tedlab.spec import Init, MicroBatch, ParameterSpec, Site, Sites, Spec, Work
from tedlab.topology import Topology


@dataclass(frozen=True)
class NormSpec(Spec):
    """Describes the layer that ``kind`` names, ``layer`` or ``rms``, which adds ``eps`` to the mean square."""

    hidden: int
    kind: str = "layer"
    eps: float = 1e-5

    def own(self) -> Iterator[ParameterSpec]:
        yield ParameterSpec("weight", (self.hidden,), Init(mean=1.0), own_tokens=True, decayed=False)
        if self.kind == "layer":
            yield ParameterSpec("bias", (self.hidden,), own_tokens=True, decayed=False)

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        elements, dtype = self.given(b)
        if b.compiled:
            yield b.moved(elements, dtype, b.compute)
            return
        if self.kind == "layer" or (b.gpu and not self._composed(b)):
            yield b.moved(2 * elements, dtype, kernel="norm")
            return
        for passes in (2, 1, 2, 2):  # square, mean, quotient, product with the weight
            yield b.moved(passes * elements, b.precise)
        for _ in range(2 if dtype != b.precise else 0):
            yield b.moved(elements, dtype, b.precise)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        elements, dtype = self.given(b)
        if b.compiled:
            yield b.moved(elements, b.compute, dtype, dtype)
            yield b.moved(elements, b.compute, dtype)  # for the weight, a sum over tokens
            return
        if dtype != b.compute:
            yield b.moved(elements, dtype, b.compute)
        if self._composed(b):
            for passes in (3, 2, 1, 3, 2, 1, 1, 2, 2, 3, 3):  # of the weight, then of the input
                yield b.moved(passes * elements, b.precise)
            for _ in range(2):
                yield b.moved(elements, dtype, b.precise)
            return
        if self.kind == "layer" or b.gpu:
            yield b.moved(3 * elements, dtype, kernel="norm_backward")
            if b.gpu:  # a second kernel for the weight, see tedlab.predict.sim.norm
                yield b.moved(2 * elements, dtype, kernel="norm_backward")
            return
        yield b.moved(elements, dtype, b.precise)
        for passes in (2, 3, 1, 2, 3, 2, 3, 1):  # of the input, then of the weight
            yield b.moved(passes * elements, b.precise)
        for _ in range(2 if dtype != b.precise else 0):
            yield b.moved(elements, dtype, b.precise)

    def forward_of_sum(self, b: MicroBatch) -> Iterator[Work]:
        """Yields the kernels of a sum of activations and a product, which is kept, and of its norm."""
        elements, dtype = self.given(b)
        if b.compiled:
            yield b.moved(elements, dtype, b.compute, dtype, b.compute)
            return
        yield b.moved(elements, dtype, dtype, b.compute)
        yield from self.forward(b)

    def backward_beside(self, b: MicroBatch) -> Iterator[Work]:
        """Yields the kernels of the backward pass, and of adding the gradient of what also went past the norm."""
        elements, dtype = self.given(b)
        if b.compiled:
            yield b.moved(elements, b.compute, dtype, dtype, dtype)
            yield b.moved(elements, b.compute, dtype)
            return
        yield from self.backward(b)
        yield b.moved(3 * elements, dtype)

    def saved(self, b: MicroBatch) -> int:
        elements, dtype = self.given(b)
        return 2 * elements * b.precise.itemsize if self._composed(b) else elements * dtype.itemsize

    def _composed(self, b: MicroBatch) -> bool:
        """Whether torch composes it of several kernels on a GPU, as of inputs in another dtype than the weight."""
        return self.kind == "rms" and b.gpu and not b.compiled and self.given(b)[1] != b.parameter

    def given(self, b: MicroBatch) -> tuple[int, torch.dtype]:
        """Returns the number of its input's elements, and their dtype."""
        return b.outside * self.hidden, b.parameter


class _Norm(ShardedModule):
    """Normalises over the last dimension, with statistics in fp32 or better."""

    def __init__(self, spec: NormSpec, topology: Topology) -> None:
        super().__init__()
        self.hidden, self.eps = spec.hidden, spec.eps
        self.build(spec, topology)


class LayerNorm(_Norm):
    """Layer normalisation (Ba et al., 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (…, H) to (…, H)."""
        weight, bias = self.local("weight"), self.local("bias")
        if _stand_in is not None:
            return _stand_in(x, weight, self.eps, bias)
        return F.layer_norm(x, (self.hidden,), weight, bias, self.eps)


class RMSNorm(_Norm):
    """Divides by the root mean square (Zhang & Sennrich, 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (…, H) to (…, H)."""
        weight = self.local("weight")
        if x.is_cuda:
            return F.rms_norm(x, (self.hidden,), weight, self.eps)
        if _stand_in is not None:
            return _stand_in(x, weight, self.eps)
        if evaluating():
            return F.rms_norm(x, (self.hidden,), weight, self.eps)
        return _RMSNorm.apply(x, weight, self.eps)


_stand_in: Callable[..., Tensor] | None = None


@contextmanager
def gpu_norms(norm: Callable[..., Tensor]) -> Iterator[None]:
    """Lets ``norm`` take the place of torch's kernels for GPUs, for tensors that are elsewhere.

    It gets an input, the weight, what is added to the mean square or variance, and for LayerNorm the bias.
    """
    global _stand_in
    _stand_in = norm
    try:
        yield
    finally:
        _stand_in = None


class _RMSNorm(Function):
    """``F.rms_norm`` that keeps only its input and one number per row.

    torch's keeps no more than that on GPUs, but several fp32 tensors elsewhere.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (precise.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (precise * scale * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad = grads[0].to(scale.dtype)
        normal = x * scale
        of_normal = grad * weight
        of_x = scale * (of_normal - normal * (of_normal * normal).mean(-1, keepdim=True))
        of_weight = (grad * normal).flatten(0, -2).sum(0)
        return of_x.to(x.dtype), of_weight.to(weight.dtype), None


@dataclass(frozen=True)
class FullNormSpec(NormSpec):
    """Describes an :class:`RMSNorm` of so many heads' features, ``hidden`` in all: see :func:`normalise_together`."""

    kind: str = "rms"
    heads: int = 1

    def own(self) -> Iterator[ParameterSpec]:
        yield ParameterSpec("weight", (self.hidden,), Init(mean=1.0), {"tensor": 0}, decayed=False, units=self.heads)

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        elements, dtype = self.given(b)
        if b.compiled:
            yield b.moved(elements, dtype)
            return
        if b.tensor == 1:
            yield from super().forward(b)
            return
        if dtype != b.precise:
            yield b.moved(elements, dtype, b.precise)
        for passes in (2, 1):  # square, mean
            yield b.moved(passes * elements, b.precise)
        yield b.moved(elements, dtype, b.precise)  # quotient
        yield b.moved(2 * elements, b.precise)
        if dtype != b.precise:
            yield b.moved(elements, dtype, b.precise)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        elements, dtype = self.given(b)
        if b.compiled:
            yield from backward_before_rotation(b, elements, dtype)
            return
        if b.tensor == 1:
            yield from super().backward(b)
            return
        if dtype != b.precise:
            yield b.moved(elements, dtype, b.precise)
        yield b.moved(elements, dtype, b.precise)
        for passes in (2, 2, 3, 1, 3, 1):  # of the input, of the mean square, of the weight
            yield b.moved(passes * elements, b.precise)
        for _ in range(2):
            yield b.moved(elements, dtype, b.precise)
        yield b.moved(3 * elements, dtype)  # adds what came through the mean square

    def saved(self, b: MicroBatch) -> int:
        elements, dtype = self.given(b)
        return super().saved(b) if b.tensor == 1 else elements * dtype.itemsize

    def given(self, b: MicroBatch) -> tuple[int, torch.dtype]:
        return b.tokens * self.hidden // self.heads * max(self.heads, b.tensor) // b.tensor, b.compute


def backward_before_rotation(b: MicroBatch, elements: int, dtype: torch.dtype) -> Iterator[Work]:
    """Yields the compiled kernels of a norm of queries or keys, for the input and for the weight.

    The forward pass has one kernel, which reads the input for its statistics; another, which rotates, reads it again.
    """
    yield b.moved(elements, b.precise, dtype, dtype)
    yield b.moved(elements, b.precise, dtype)


def normalise_together(
    layers: Sequence[RMSNorm], inputs: Sequence[Tensor], comm: Collectives, tag: str
) -> list[Tensor]:
    """Normalises each input over all its features, of which each tensor rank holds as many as every other.

    One all-reduce sums the squares of all inputs. If ranks hold copies of the same features, all of them equally often,
    these count as often in the mean, which stays the same; gradients of copies are the parts that each rank's use of
    them causes.

    Args:
        layers: The layer of each input.
        inputs: (B, S, features of this rank).
        comm: The process's collectives.
        tag: Begins the tags of the collectives.
    """
    ranks = comm.size("tensor")
    if ranks == 1:
        return [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    own = torch.cat([_MeanSquare.apply(x) for x in inputs], -1)
    summed = copy_to(reduce_from(own, comm, "tensor", f"{tag}.reduce"), comm, "tensor", f"{tag}.copy")
    means = (summed / ranks).split(1, -1)
    return [
        _ScaledRMS.apply(x, mean, layer.local("weight"), layer.eps)
        for layer, x, mean in zip(layers, inputs, means, strict=True)
    ]


def normalise_together_sites(inputs: int, tag: str) -> Sites:
    """Returns the collectives of :func:`normalise_together`.

    Their result is one number for each token and input, of which tensor ranks need not be able to keep equal shares.
    """
    forward = Site(f"{tag}.reduce", "all_reduce", "tensor", inputs, dtype="precise")
    return Sites((forward,), (Site(f"{tag}.copy", "all_reduce", "tensor", inputs, dtype="precise"),))


class _MeanSquare(Function):
    """The mean of the squares over the last dimension, in fp32 or better, which keeps only its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.to(torch.promote_types(x.dtype, torch.float32)).square().mean(-1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (x * (grads[0] * (2 / x.shape[-1]))).to(x.dtype)


class _ScaledRMS(Function):
    """Divides by the root of a given mean square; keeps only its input and that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean_square: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (mean_square + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad = grads[0].to(scale.dtype)
        product = grad * x
        of_scale = (product * weight).sum(-1, keepdim=True)
        of_weight = (product * scale).flatten(0, -2).sum(0)
        of_x = grad * weight * scale
        return of_x.to(x.dtype), of_scale * scale**3 / -2, of_weight.to(weight.dtype), None


def norm_layer(spec: NormSpec, topology: Topology) -> LayerNorm | RMSNorm:
    """Builds the layer that a specification describes."""
    return (RMSNorm if spec.kind == "rms" else LayerNorm)(spec, topology)
