"""The GPU kernel of the fused Adam step. It needs Triton and is imported only where it runs."""

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

_BLOCK = 1024  # elements that one program updates


def launch(
    master: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rounded: Tensor | None, **scalars: float
) -> None:
    """Updates flat fp32 tensors, and their half-precision copy if there is one, in place.

    Args:
        master: Parameters.
        gradient: Gradient in any floating dtype up to fp32.
        exp_avg: First moment.
        exp_avg_sq: Second moment.
        rounded: Half-precision copy of ``master``.
        scalars: Scalars of the kernel, by name.
    """
    tensors = (master, gradient, exp_avg, exp_avg_sq, rounded)
    whole = master.numel() // _BLOCK * _BLOCK
    # A separate launch takes the rest: only if the size is a multiple of 16 are a mask's 16-byte pieces all in or out,
    # so that memory can be accessed in such pieces.
    for part in (slice(0, whole), slice(whole, master.numel())):
        size = part.stop - part.start
        if size:
            pieces = [None if t is None else t[part] for t in tensors]
            _adam[(triton.cdiv(size, _BLOCK),)](*pieces, size, **scalars, BLOCK=_BLOCK)


@triton.jit
def _adam(  # type: ignore[no-untyped-def]  # Triton would evaluate annotations
    master, gradient, exp_avg, exp_avg_sq, rounded, size,
    factor, l2, keep, beta1, rest1, beta2, rest2, rate, unbias, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    p = tl.load(master + at, inside)
    m = tl.load(exp_avg + at, inside)
    v = tl.load(exp_avg_sq + at, inside)
    g = tl.load(gradient + at, inside).to(tl.float32) * factor + l2 * p
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    p = keep * p - rate * tl.div_rn(m, unbias * tl.sqrt_rn(v) + eps)
    tl.store(master + at, p, inside)
    tl.store(exp_avg + at, m, inside)
    tl.store(exp_avg_sq + at, v, inside)
    if rounded is not None:
        tl.store(rounded + at, p.to(rounded.dtype.element_ty), inside)
