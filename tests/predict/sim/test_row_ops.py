"""The stand-in for kernels on rows of experts counts what they move."""

import pytest
import torch
from torch import Tensor

from tedlab.config import Activation
from tedlab.moe.products import row_functions, standing_in
from tedlab.nn import Nonlinearity
from tedlab.predict.sim.row_ops import FusedRowOps

ROOM, TOKENS, HIDDEN, INNER = 12, 4, 8, 16


@pytest.mark.parametrize(("sizes", "rows"), [(None, ROOM), ((2, 0, 3), 5)])
def test_kernels_skip_the_room_behind_the_last_row(sizes: tuple[int, ...] | None, rows: int) -> None:
    moved: list[int] = []

    def count(name: str, *tensors: Tensor) -> None:
        moved.append(sum(tensor.numel() for tensor in tensors if tensor.is_floating_point()))

    with standing_in(FusedRowOps(count)):
        kernels = row_functions("auto", torch.empty(0), sizes)
    index, how = torch.zeros(ROOM, dtype=torch.int64), Nonlinearity(Activation.SWIGLU.value)
    x, z, h = torch.randn(TOKENS, HIDDEN), torch.randn(ROOM, 2 * INNER), torch.randn(ROOM, INNER)
    made = [kernels.take(x, index), kernels.hidden(z, None, index, how)]
    made += kernels.hidden_backward(h, z, None, index, torch.ones(ROOM), how)
    kernels.combine(made[0], torch.zeros(TOKENS, 3, dtype=torch.int64), None, None, index)
    assert [len(tensor) for tensor in made] == [ROOM] * len(made)  # it is allocated all the same
    # There and back; gate, linear part and product; of these with two gradients, weighted, and of weights; rows, sums.
    each = [2 * HIDDEN, 3 * INNER, 6 * INNER + 2, HIDDEN]
    assert moved == [rows * numbers for numbers in each[:3]] + [rows * each[3] + TOKENS * HIDDEN]
