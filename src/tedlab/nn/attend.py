"""Attention itself: each query's weighted sum of the values that it sees, by the fastest way that can.

Causal attention without more is torch's fused kernel. Windows and sinks are torch's flex attention on GPUs, and
elsewhere an operation defined here, which computes what is visible and little else, a few queries at a time, and keeps
no more than a fused kernel does. Documents are flex attention on GPUs, which leaves out blocks of keys that nobody
sees, and elsewhere a mask. Shapes: B samples, H heads of queries, K heads of keys and values, S positions.
"""

import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.utils.flop_counter import register_flop_formula

from tedlab._compat.torch import compile_for_shapes
from tedlab.nn.documents import SampleDocuments

AttentionPath = Literal["sdpa", "flex", "blocks", "mask"]
_ROWS = 256  # queries at a time
_SHAPES = 256  # of batches, windows and so on that flex attention is compiled for; uncompiled it keeps all scores
_NARROWEST = 16  # features of a head that the tensor cores of flex attention's kernels take; nor do they take float64


def attention_path(
    device: str,
    dtype: torch.dtype,
    widths: tuple[int, int],
    window: bool = False,
    sinks: bool = False,
    documents: bool = False,
) -> AttentionPath:
    """Chooses the way that attention is computed, which changes no result.

    Args:
        device: Type of the device.
        dtype: Dtype of queries, keys and values.
        widths: Features of a head of keys, and of values.
        window: Whether queries see only so many keys before them.
        sinks: Whether the softmax has one more entry.
        documents: Whether samples consist of documents that do not see each other.

    Returns:
        ``sdpa``: ``F.scaled_dot_product_attention``; ``flex``: ``flex_attention``, compiled; ``blocks``: the operation
        of this module; ``mask``: with a mask of all pairs.
    """
    if not (window or sinks or documents) and (widths[0] == widths[1] or device == "cuda"):
        return "sdpa"
    if device == "cuda" and dtype != torch.float64 and min(widths) >= _NARROWEST:
        return "flex"
    return "mask" if documents else "blocks"


def visible_pairs(length: int, window: int | None) -> float:
    """Returns the number of pairs of a query and a key that it sees, half a pair for itself as is usual."""
    seen = length if window is None else min(window, length)
    return seen * (2 * length - seen) / 2


def new_pairs(past: int, length: int, window: int | None) -> float:
    """Returns the number of such pairs of the last ``length`` of ``past + length`` queries."""
    return visible_pairs(past + length, window) - visible_pairs(past, window)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    documents: SampleDocuments | None = None,
) -> Tensor:
    """Returns (B, H, S, e), each query's sum of values, weighted by the softmax of its products with the keys it sees.

    Args:
        q: Queries (B, H, S, d).
        k: Keys (B, K, S, d); H / K neighbouring heads of queries have the same.
        v: Values (B, K, S, e).
        window: How many keys a query sees, the last of which is at its own position; None: all up to that.
        sinks: (H,), a logit of each head's softmax that belongs to no value; None: there is none.
        scale: Factor on the products; None: d^(-1/2).
        documents: The documents of the samples, which do not see each other; None: all is one.
    """
    if documents is not None:
        mask = documents.masks[window]
        if isinstance(mask, Tensor):
            return attend_visible(q, k, v, mask, sinks, scale)
        return _by_flex(q.to(v.dtype), k.to(v.dtype), v, mask, sinks, q.shape[-1] ** -0.5 if scale is None else scale)
    window = None if window is None or window >= q.shape[2] else window
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    widths = k.shape[-1], v.shape[-1]
    path = attention_path(q.device.type, q.dtype, widths, window is not None, sinks is not None)
    if path == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] > k.shape[1], scale=scale)
    q, k = (
        q.to(v.dtype),
        k.to(v.dtype),
    )  # torch's own would be cast so by autocast
    if path == "flex":
        mask = (_mask if torch.compiler.is_compiling() else _cached_mask)(q.shape[2], window, q.device)
        return _by_flex(q, k, v, mask, sinks, scale)
    result: Tensor = torch.ops.tedlab.attention(q, k, v, sinks, scale, window)[0]
    return result


def attend_visible(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, sinks: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Does what :func:`attend` does for any pairs of a query and a key.

    Args:
        q: Queries (B, H, S, d).
        k: Keys (B, K, M, d).
        v: Values (B, K, M, e).
        visible: (B, 1, S, M) bool, whether a query sees a key; None: each sees all.
        sinks, scale: As of :func:`attend`.
    """
    grouped = q.shape[1] > k.shape[1]
    if sinks is None and grouped and q.shape[2] == 1:  # otherwise torch would copy keys for each head
        y = F.scaled_dot_product_attention(q.unflatten(1, (k.shape[1], -1)).squeeze(3), k, v, visible, scale=scale)
        return y.flatten(1, 2).unsqueeze(2)
    if sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped, scale=scale)
    precise = torch.promote_types(q.dtype, torch.float32)
    q_groups = q.unflatten(1, (k.shape[1], -1))  # (B, K, H/K, S, d)
    scores = (q_groups @ k.unsqueeze(2).mT).to(precise) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if visible is not None:
        scores = scores.masked_fill(~visible.unsqueeze(1), -torch.inf)
    sink = sinks.to(precise).view(1, k.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1].to(v.dtype)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)


# ---- flex attention ----------------------------------------------------------------------------------------------


def _by_flex(q: Tensor, k: Tensor, v: Tensor, mask: Any, sinks: Tensor | None, scale: float) -> Tensor:
    run = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    options = {"block_mask": mask, "scale": scale, "enable_gqa": q.shape[1] > k.shape[1]}
    if sinks is None:
        return run(q, k, v, **options)
    y, further = run(q, k, v, **options, return_aux=AuxRequest(lse=True))
    # The softmax with one more entry is the one without, times the share that the others have of the sum.
    share = torch.sigmoid(further.lse - sinks.to(further.lse.dtype).unsqueeze(-1))
    return y * share.unsqueeze(-1).to(y.dtype)


@functools.cache
def _compiled_flex() -> Any:
    compile_for_shapes(_SHAPES)
    return torch.compile(flex_attention, dynamic=False)


def _mask(length: int, window: int | None, device: torch.device) -> Any:
    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        causal = key <= query
        return causal if window is None else causal & (query - key < window)

    return create_block_mask(visible, None, None, length, length, device=str(device))


_cached_mask = functools.lru_cache(maxsize=16)(_mask)


# ---- in blocks of queries ----------------------------------------------------------------------------------------


@torch.library.custom_op("tedlab::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Returns the sums (B, H, S, e) and the logarithm of each softmax's denominator (B, H, S)."""
    precise = torch.promote_types(q.dtype, torch.float32)
    y, log_sums = _results(q, v)
    for rows, columns, hidden in _blocks(q.shape[2], window, q.device):
        scores = _scores(q[:, :, rows], k[:, :, columns], scale, hidden)  # (B, K, H/K, n, m)
        log_sum = scores.logsumexp(-1)
        if sinks is not None:
            log_sum = torch.logaddexp(log_sum, sinks.to(precise).view(*log_sum.shape[1:3], 1))
        weights = (scores - log_sum.unsqueeze(-1)).exp().to(v.dtype)
        y[:, :, rows] = (weights @ v[:, :, None, columns]).flatten(1, 2)
        log_sums[:, :, rows] = log_sum.flatten(1, 2)
    return y, log_sums


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    return _results(q, v)


@torch.library.custom_op("tedlab::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    y: Tensor,
    log_sums: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k, v and sinks, the last (0,) if there are none (Dao et al., 2022, appendix B.2)."""
    precise, heads = log_sums.dtype, (k.shape[1], q.shape[1] // k.shape[1])
    of_q, of_k, of_v = torch.empty_like(q), k.new_zeros(k.shape, dtype=precise), v.new_zeros(v.shape, dtype=precise)
    inner = (grad.to(precise) * y).sum(-1)  # (B, H, S)
    for rows, columns, hidden in _blocks(q.shape[2], window, q.device):
        own_q, own_grad = (x[:, :, rows].unflatten(1, heads) for x in (q, grad))
        scores = _scores(q[:, :, rows], k[:, :, columns], scale, hidden)
        weights = (scores - log_sums[:, :, rows].unflatten(1, heads).unsqueeze(-1)).exp()
        of_v[:, :, columns] += (weights.to(grad.dtype).mT @ own_grad).sum(2)
        of_weights = (own_grad @ v[:, :, None, columns].mT).to(precise)
        of_scores = weights * (of_weights - inner[:, :, rows].unflatten(1, heads).unsqueeze(-1)) * scale
        of_scores = of_scores.to(q.dtype)
        of_q[:, :, rows] = (of_scores @ k[:, :, None, columns]).flatten(1, 2)
        of_k[:, :, columns] += (of_scores.mT @ own_q).sum(2)
    if sinks is None:
        of_sinks = q.new_empty(0)
    else:
        share = (sinks.to(precise).unsqueeze(-1) - log_sums).exp()  # that the sink takes
        of_sinks = -(share * inner).sum((0, 2)).to(sinks.dtype)
    return of_q, of_k.to(k.dtype), of_v.to(v.dtype), of_sinks


@_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    y: Tensor,
    log_sums: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_sinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape), of_sinks


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, sinks, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q, k, v, sinks, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, sinks, y, log_sums = ctx.saved_tensors
    of_q, of_k, of_v, of_sinks = torch.ops.tedlab.attention_backward(
        grad, q, k, v, sinks, y, log_sums, ctx.scale, ctx.window
    )
    return of_q, of_k, of_v, None if sinks is None else of_sinks, None, None


_attention.register_autograd(_differentiate, setup_context=_remember)


OPERATIONS = torch.ops.tedlab.attention, torch.ops.tedlab.attention_backward


@register_flop_formula(torch.ops.tedlab.attention)
def _flops(q: Any, k: Any, v: Any, sinks: Any, scale: float, window: int | None, **_: Any) -> int:
    batch, heads, length, width = q
    return round(2 * batch * heads * visible_pairs(length, window) * (width + v[-1]))


@register_flop_formula(torch.ops.tedlab.attention_backward)
def _flops_backward(grad: Any, q: Any, k: Any, v: Any, *others: Any, **_: Any) -> int:
    batch, heads, length, width = q
    return round(2 * batch * heads * visible_pairs(length, others[-1]) * (3 * width + 2 * v[-1]))


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Allocates the results: sums whose heads lie side by side, as the output projection reads them."""
    batch, heads, length = q.shape[:3]
    precise = torch.promote_types(q.dtype, torch.float32)
    y = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
    return y, q.new_empty(batch, heads, length, dtype=precise)


def _blocks(length: int, window: int | None, device: torch.device) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields queries, the keys that some of them see, and (n, m) bool: which of these each of them does not see."""
    for start in range(0, length, _ROWS):
        end = min(start + _ROWS, length)
        first = 0 if window is None else max(0, start - window + 1)
        distance = torch.arange(start, end, device=device).unsqueeze(-1) - torch.arange(first, end, device=device)
        hidden = distance < 0
        yield slice(start, end), slice(first, end), hidden if window is None else hidden | (distance >= window)


def _scores(q: Tensor, k: Tensor, scale: float, hidden: Tensor) -> Tensor:
    """Returns products (B, K, H/K, n, m) in fp32 or better, -inf where a key is not seen."""
    products = q.unflatten(1, (k.shape[1], -1)) @ k.unsqueeze(2).mT
    precise = torch.promote_types(q.dtype, torch.float32)
    return (products.to(precise) * scale).masked_fill(hidden, -torch.inf)
