"""What experts that are all in one process compute on a CPU if nothing is differentiated: some experts at a time.

Experts that nobody chose cost nothing, and what a few make between their two products stays in the processor's cache.
Legend as in ``row_ops.py``.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tedlab.comm import evaluating
from tedlab.moe import row_ops
from tedlab.moe.products import row_functions
from tedlab.nn import Nonlinearity
from tedlab.nn.activation import activate_widely

_ROWS = 512  # of the experts of a piece, if one alone has not more


def evaluates(x_TH: Tensor, kernel: str) -> bool:
    """Tells whether :func:`weighted_sums` computes such tokens: on a CPU without gradients, by plain torch."""
    return evaluating() and x_TH.device.type == "cpu" and row_functions(kernel, x_TH) is row_ops


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
        weights: Both projections, each with its biases (e, ·) if there are any.
        how: The experts' activation.
    """
    up, up_bias, down, down_bias = weights
    x_NH = x_TH.index_select(0, choice_N.div(place_TK.shape[1], rounding_mode="floor"))
    if up_bias is not None:
        expert_N = torch.arange(len(up)).repeat_interleave(torch.tensor(sizes), output_size=len(choice_N))
    y_NH = torch.empty_like(x_NH)
    start = 0
    for experts, rows in _pieces(sizes):
        end = start + sum(rows)
        z_NZ = x_TH.new_empty(end - start, up.shape[-1])
        _multiply(x_NH[start:end].split(rows), up, experts, z_NZ.split(rows))
        if up_bias is not None:
            z_NZ += up_bias.index_select(0, expert_N[start:end])
        _multiply(activate_widely(z_NZ, how).split(rows), down, experts, y_NH[start:end].split(rows))
        start = end
    # Biases are added to what is rounded, and the second ones precisely, as in training.
    precise = torch.promote_types(x_TH.dtype, torch.float32)
    y_TKH = y_NH.index_select(0, place_TK.flatten()).to(precise).unflatten(0, place_TK.shape)
    if down_bias is not None:
        y_TKH = y_TKH + down_bias.to(precise)[expert_N[place_TK]]
    # No product of matrices, which autocast would round.
    return (y_TKH * gate_TK.to(precise).unsqueeze(-1)).sum(1).to(x_TH.dtype)


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


def _multiply(inputs: Sequence[Tensor], weight: Tensor, experts: Sequence[int], results: Sequence[Tensor]) -> None:
    # One by one a matrix costs more than among all, of which one text needs few.
    matrices: Sequence[Tensor] | Tensor = weight.unbind() if 4 * len(experts) > len(weight) else weight
    for x, expert, out in zip(inputs, experts, results, strict=True):
        torch.mm(x, matrices[expert], out=out)
