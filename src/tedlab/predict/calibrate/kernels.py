"""The kernels that a calibration times by size, for ``kernels.tables`` of a cluster file.

What a call moves is counted as simulations count it. Legend as in ``row_ops.py``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tedlab.moe.grouped import Groups, times, transposed_times
from tedlab.moe.products import row_functions, unfit
from tedlab.nn import Nonlinearity
from tedlab.optim.fused import fused_adam_step
from tedlab.predict.sim.row_ops import FusedRowOps

_HEADS = (64, 128)  # features of a head
_NARROW, _WIDE = (32, 2048, 1024), (8, 4096, 14336)  # experts and the two sides of their matrices
_WIDTH, _INNER, _CHOICES, _EXPERTS = 2048, 1024, 8, 64  # of rows
_ADAM = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "decoupled_weight_decay": True}


@dataclass(frozen=True)
class KernelSizes:
    """The sizes to measure.

    Attributes:
        keys: Tokens of a sample, in attention; there are as many tokens in all as the last of these has.
        features: Features of all heads together.
        columns: Features of a row that is normed.
        elements: Elements that norms, copies and the optimizer's step read; multiples of the columns.
        group_rows: Rows of an expert, in grouped products.
        rows: Rows of all experts together, multiples of a token's choices.
    """

    keys: Sequence[int]
    features: int
    columns: int
    elements: Sequence[int]
    group_rows: Sequence[int] = ()
    rows: Sequence[int] = ()

    def shortened(self) -> "KernelSizes":
        """Returns only the first and last of all sizes."""
        ends = (sizes[:: max(1, len(sizes) - 1)] for sizes in (self.keys, self.elements, self.group_rows, self.rows))
        keys, elements, group_rows, rows = ends
        return KernelSizes(keys, self.features, self.columns, elements, group_rows, rows)


KERNEL_SIZES = {
    # Smaller ones would show the host's time for an operation, which kernels.dispatch has.
    "cpu": KernelSizes((128, 256, 512, 1024), 512, 512, (2**18, 2**20, 2**22)),
    "cuda": KernelSizes(
        (512, 1024, 2048, 4096, 8192),
        2048,
        2048,
        (2**20, 2**23, 2**26),
        (128, 512, 2048, 8192),
        (4096, 32768, 131072),
    ),
}


class Call(NamedTuple):
    """What to time at one size.

    Attributes:
        amount: FLOPs, or bytes that it moves.
        run: Does it once.
    """

    amount: float
    run: Callable[[], Any]


class Case(NamedTuple):
    """A kernel to time.

    Attributes:
        kernel, width, dtype: See :class:`tedlab.predict.cluster.KernelTable`.
        unit: FLOP or B.
        how: How it is measured.
        sizes: Sizes for ``prepare``.
        prepare: Makes operands of a size.
    """

    kernel: str
    unit: str
    how: str
    sizes: Sequence[int]
    prepare: Callable[[int], Call]
    width: int | None = None
    dtype: str | None = None


class Cases:
    """The kernels of a device.

    Args:
        device: The device.
        name: Name of the dtype that models are trained in on it.
        dtype: That dtype.
        sizes: The sizes to measure.
    """

    def __init__(self, device: torch.device, name: str, dtype: torch.dtype, sizes: KernelSizes) -> None:
        self.device, self.name, self.dtype, self.sizes = device, name, dtype, sizes

    def __iter__(self) -> Iterator[Case]:
        sizes, name = self.sizes, self.name
        for width in _HEADS:
            for backward in (False, True):
                kernel, way = ("attention_backward", "backward") if backward else ("attention", "forward")
                prepare = partial(self._attention, width, backward)
                yield Case(kernel, "FLOP", f"causal, {way} pass", sizes.keys, prepare, width, name)
        for backward in (False, True):
            kernel = "norm_backward" if backward else "norm"
            how = f"rows of {sizes.columns}, {name}"
            yield Case(kernel, "B", how, sizes.elements, partial(self._norm, backward))
        half = "bf16" if name == "fp32" else name
        yield Case("narrowing", "B", f"copies of fp32 to {half}", sizes.elements, partial(self._copy, False))
        yield Case("widening", "B", f"copies of {half} to fp32", sizes.elements, partial(self._copy, True))
        if unfit(self.dtype, self.device) is None:
            yield from self.of_gpus()

    def of_gpus(self) -> Iterator[Case]:
        """Yields the kernels that only GPUs have."""
        sizes, name = self.sizes, self.name
        for experts, inputs, outputs in (_NARROW, _WIDE):
            width = min(inputs, outputs)
            for weights in (False, True):
                kernel, what = (
                    ("grouped_weights", "gradients of") if weights else ("grouped", "rows, and their gradients, by")
                )
                how = f"{what} {experts} matrices ({inputs}, {outputs})"
                prepare = partial(self._grouped, experts, inputs, outputs, weights)
                yield Case(kernel, "FLOP", how, sizes.group_rows, prepare, width, name)
        for kernel in ("take", "hidden", "hidden_backward", "combine", "combine_backward"):
            how = f"SwiGLU, {_CHOICES} of {_EXPERTS} experts, {_WIDTH} features and {_INNER} in them, {name}"
            yield Case(kernel, "B", how, sizes.rows, partial(self._rows, kernel))
        for of, dtype in ((name, self.dtype), ("fp32", torch.float32)):
            how = f"copies of a third of a row's features, {of}"
            yield Case("strided", "B", how, sizes.elements, partial(self._strided, dtype), dtype=of)
        how = f"half of a head's features, {name}, times an fp32 number for each feature and position"
        yield Case("promoted", "B", how, sizes.elements, self._promoted)
        for kernel in ("topk", "scatter_add"):
            how = f"of {_CHOICES} of {_EXPERTS} experts" + ("" if kernel == "topk" else ", counted")
            yield Case(kernel, "B", how, sizes.rows, partial(self._choices, kernel))
        yield Case("adam", "B", f"the fused step, gradients in {name}", sizes.elements, self._adam)
        how = f"a sum and its norm as one kernel, {name}"
        yield Case(
            "compiled", "B", how, sizes.elements, partial(self._compiled, torch.compile(_sum_and_norm, dynamic=False))
        )

    def _random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def _attention(self, width: int, backward: bool, keys: int) -> Call:
        tokens, features = self.sizes.keys[-1], self.sizes.features
        shape = tokens // keys, keys, features // width, width
        q, k, v, g = (self._random(*shape).transpose(1, 2) for _ in range(4))  # as a projection makes them
        inputs = [x.requires_grad_() for x in (q, k, v)]

        def forward() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        flops = tokens * features * keys / 2  # half of all pairs, for a factor each
        if not backward:
            return Call(4 * flops, forward)
        return Call(10 * flops, partial(torch.autograd.grad, forward(), inputs, g, retain_graph=True))

    def _grouped(self, experts: int, inputs: int, outputs: int, weights: bool, rows: int) -> Call:
        total = experts * rows
        each = torch.arange(experts, device=self.device)
        groups = Groups(each.repeat_interleave(rows), ((each + 1) * rows).int(), (rows,) * experts)
        x, grad = self._random(total, inputs), self._random(total, outputs)
        flops = 2.0 * total * inputs * outputs
        if weights:
            return Call(flops, lambda: transposed_times(x, grad, groups))
        matrices = self._random(experts, inputs, outputs)

        def both_ways() -> None:
            times(x, matrices, groups)
            times(grad, matrices.mT, groups)

        return Call(2 * flops, both_ways)

    def _rows(self, kernel: str, rows: int) -> Call:
        expert_TK = torch.randint(_EXPERTS, (rows // _CHOICES, _CHOICES), device=self.device)
        expert_N, choice_N = expert_TK.flatten().sort(stable=True)
        place_TK = torch.empty_like(choice_N).scatter_(0, choice_N, torch.arange(rows, device=self.device))
        place_TK, how = place_TK.view_as(expert_TK), Nonlinearity("swiglu")
        gate_TK = self._random(*expert_TK.shape, dtype=torch.float32)

        def of(*shape: int) -> Tensor:
            return self._random(*shape)

        tokens = len(expert_TK)
        make: dict[str, Callable[[], tuple[Any, ...]]] = {
            "take": lambda: (of(tokens, _WIDTH), choice_N // _CHOICES),
            "hidden": lambda: (of(rows, 2 * _INNER), None, expert_N, how),
            "hidden_backward": lambda: (
                *(of(rows, _INNER), of(rows, 2 * _INNER), None, expert_N),
                *(gate_TK.flatten(), how),
            ),
            "combine": lambda: (of(rows, _WIDTH), place_TK, gate_TK, None, expert_TK),
            "combine_backward": lambda: (of(tokens, _WIDTH), of(rows, _WIDTH), gate_TK, choice_N),
        }
        operands, moved = make[kernel](), [0.0]

        def count(name: str, *tensors: Tensor) -> None:
            moved[0] += sum(tensor.nbytes for tensor in tensors)

        getattr(FusedRowOps(count), kernel)(*operands)
        return Call(moved[0], partial(getattr(row_functions("auto", operands[0]), kernel), *operands))

    def _norm(self, backward: bool, elements: int) -> Call:
        columns, gpu = self.sizes.columns, self.device.type == "cuda"
        x, grad = (self._random(elements // columns, columns) for _ in range(2))
        weight, bias = (self._random(columns).requires_grad_() for _ in range(2))
        trained = [x.requires_grad_(), weight] if gpu else [x.requires_grad_(), weight, bias]

        def forward() -> Tensor:  # of GPUs that which has no bias; elsewhere torch composes it of other kernels
            if gpu:
                return F.rms_norm(x, (columns,), weight, 1e-5)
            return F.layer_norm(x, (columns,), weight, bias)

        if not backward:
            return Call(2 * x.nbytes, forward)
        passes = 5 if gpu else 3  # a GPU reads both for the weight again, see tedlab.predict.sim.norm
        return Call(passes * x.nbytes, partial(torch.autograd.grad, forward(), trained, grad, retain_graph=True))

    def _copy(self, widening: bool, elements: int) -> Call:
        half = torch.bfloat16 if self.dtype is torch.float32 else self.dtype
        source, target = (half, torch.float32) if widening else (torch.float32, half)
        x = self._random(elements, dtype=source)
        return Call(elements * (source.itemsize + target.itemsize), partial(x.to, target))

    def _strided(self, dtype: torch.dtype, elements: int) -> Call:
        x = self._random(elements // self.sizes.columns, 3, self.sizes.columns, dtype=dtype)[:, 0]
        return Call(2 * elements * x.itemsize, partial(x.clone, memory_format=torch.contiguous_format))

    def _promoted(self, elements: int) -> Call:
        heads, width = self.sizes.features // _HEADS[-1], _HEADS[-1] // 2
        positions = elements // (heads * width)
        x = self._random(positions, heads, 2 * width)[..., :width]
        by = self._random(positions, 1, width, dtype=torch.float32)
        return Call(elements * (x.itemsize + by.itemsize) + by.nbytes, lambda: x * by)

    def _choices(self, kernel: str, rows: int) -> Call:
        scores_TE = self._random(rows // _CHOICES, _EXPERTS, dtype=torch.float32)
        if kernel == "topk":
            chosen = scores_TE.topk(_CHOICES, dim=-1)
            made = sum(each.nbytes for each in chosen)
            return Call(scores_TE.nbytes + made, lambda: scores_TE.topk(_CHOICES, dim=-1))
        load_E, expert_N = scores_TE.new_zeros(_EXPERTS, dtype=torch.int64), scores_TE.topk(_CHOICES)[1].flatten()
        ones_N = torch.ones_like(expert_N)
        return Call(3 * (expert_N.nbytes + ones_N.nbytes), lambda: load_E.scatter_add_(0, expert_N, ones_N))

    def _adam(self, elements: int) -> Call:
        master, gradient = self._random(elements, dtype=torch.float32), self._random(elements)
        state: dict[str, Any] = {}
        step = partial(fused_adam_step, master, gradient, state, _ADAM, rounded=torch.empty_like(gradient))
        step()  # makes the state
        both_ways = master.nbytes + sum(state[name].nbytes for name in ("exp_avg", "exp_avg_sq"))
        return Call(2 * both_ways + 2 * gradient.nbytes, step)

    def _compiled(self, run: Callable[..., Any], elements: int) -> Call:
        columns = self.sizes.columns
        x, y = (self._random(elements // columns, columns) for _ in range(2))
        return Call(4 * x.nbytes, partial(run, x, y, self._random(columns)))


def _sum_and_norm(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + y
    return total, F.rms_norm(total, weight.shape, weight, 1e-5)
