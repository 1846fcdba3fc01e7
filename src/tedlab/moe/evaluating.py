"""What experts that are all in one process compute on a CPU if nothing is differentiated: some experts at a time.

Experts that nobody chose cost nothing, and what a few make between their two products stays in the processor's cache.
Legend as in ``row_ops.py``.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tedlab.moe import row_ops
from tedlab.moe.products import row_functions
from tedlab.nn import Nonlinearity

_ROWS = 512  # of the experts of a piece, if one alone has not more


def evaluates(x_TH: Tensor, kernel: str) -> bool:
    """Tells whether :func:`weighted_sums` computes such tokens: on a CPU without gradients, by plain torch."""
    here = not torch.is_grad_enabled() and x_TH.device.type == "cpu"
    return here and row_functions(kernel, x_TH) is row_ops


def weighted_sums(
    x_TH: Tensor,
    gate_TK: Tensor,
    place_TK: Tensor,
    choice_N: Tensor,
    sizes: Sequence[int],
    weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    how: Nonlinearity,
) -> Tensor:
    """Returns each token's gate-weighted sum of its experts' results (T, H).

    Args:
        x_TH: Tokens.
        gate_TK: Weights of their choices.
        place_TK: (T, K) int64, the row of each choice.
        choice_N: (N,) int64, the choice t·K + k of each row; rows are sorted by expert.
        sizes: Number of rows of each expert.
        weights: Both projections, each with its biases (e, 1, ·) if there are any.
        how: The experts' activation.
    """
    up, up_bias, down, down_bias = weights
    x_NH = x_TH.index_select(0, choice_N.div(place_TK.shape[1], rounding_mode="floor"))
    y_NH = torch.empty_like(x_NH)
    start = 0
    for experts, rows in _pieces(sizes):
        end = start + sum(rows)
        z_NZ = x_TH.new_empty(end - start, up.shape[-1])
        _multiply(x_NH[start:end].split(rows), up, up_bias, experts, z_NZ.split(rows))
        h_NF = row_ops.hidden(z_NZ, None, choice_N, how)
        _multiply(h_NF.split(rows), down, down_bias, experts, y_NH[start:end].split(rows))
        start = end
    precise = torch.promote_types(x_TH.dtype, torch.float32)
    y_TKH = y_NH.index_select(0, place_TK.flatten()).to(precise).unflatten(0, place_TK.shape)
    return torch.bmm(gate_TK.to(precise).unsqueeze(1), y_TKH).squeeze(1).to(x_TH.dtype)


def _pieces(sizes: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the experts of each piece and their numbers of rows, without those that have none."""
    experts: list[int] = []
    rows: list[int] = []
    for expert, size in enumerate(sizes):
        if rows and sum(rows) + size > _ROWS:
            yield experts, rows
            experts, rows = [], []
        if size:
            experts.append(expert)
            rows.append(size)
    if rows:
        yield experts, rows


def _multiply(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, experts: Sequence[int], results: Sequence[Tensor]
) -> None:
    # One by one a matrix costs more than among all, of which one text needs few.
    matrices: Sequence[Tensor] | Tensor = weight.unbind() if 4 * len(experts) > len(weight) else weight
    for x, expert, out in zip(inputs, experts, results, strict=True):
        if bias is None:
            torch.mm(x, matrices[expert], out=out)
        else:
            torch.addmm(bias[expert], x, matrices[expert], out=out)
