"""ZeRO-1 for any element-wise torch optimizer, with the paper's tiled step.

The user's optimizer stays the user's: the same object, with its schedulers and parameter groups. Only the tensors in
its groups are replaced, by tiles of this process's shards, and its ``step`` by one that feeds it tile after tile.
"""

import functools
import math
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tedlab.comm import Collectives
from tedlab.optim.bucket import Bucket, holders, local, reduction_group
from tedlab.optim.elementwise import check_elementwise
from tedlab.optim.fused import check_tile, fused_adam_step
from tedlab.optim.loss_scale import LossScaler

_PIECE = 1 << 21  # elements: on a CPU torch takes a norm in fp64 of a copy in fp64, here of 16 MiB at most


class ShardedOptimizer:
    """Shards the state of an optimizer over each parameter's own data-parallel group (paper §4).

    Dense parameters' state is divided over ``data``, experts' over ``expert_data``. After the backward pass
    :meth:`reduce_gradients` leaves each process the gradient of its shard; ``optimizer.step()`` then updates the shard
    tile by tile and gathers the parameters. Half-precision gradients are upcast one tile at a time, so the temporary
    takes 4 bytes × ``tile`` whatever the size of the model (paper §4.2).

    Tensors in the optimizer's groups have no shape but a length, so the optimizer must be element-wise. Parameters that
    got no gradient in a step in which others of their bucket did count as having a gradient of zero.

    Args:
        optimizer: what ``configure_optimizers`` returned; modified in place.
        comm: the collectives of this process.
        names: name of each parameter, for checkpoints.
        partial: parameters whose gradients are partial sums over the tensor group, too.
        zero: shard, or keep everything everywhere (gradients are then all-reduced).
        tile: elements updated at a time; None: each bucket's shard in one go; ``fused``: that in one pass over memory,
            for AdamW and Adam (see ``fused.py``).
        bucket_elements: local elements reduced in one collective; a larger tensor has a bucket to itself.
        overlap: reduce each bucket's gradients while the backward pass computes the others'.
        scaler: of the loss, for fp16; a step in which any process overflowed is skipped by all.

    Raises:
        ValueError: if the optimizer is not element-wise, or cannot be stepped with this ``tile``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        comm: Collectives,
        names: dict[nn.Parameter, str],
        *,
        zero: bool,
        tile: int | str | None,
        partial: Collection[nn.Parameter] = (),
        bucket_elements: int = 1 << 24,
        overlap: bool = False,
        scaler: LossScaler | None = None,
    ) -> None:
        for group in optimizer.param_groups:
            check_elementwise(type(optimizer), group)
            check_tile(tile, type(optimizer), group)
        self.optimizer = optimizer
        self.overlap = overlap
        self.scaler = scaler
        self.comm = comm
        self.names = names
        self.buckets = list(self._fill_buckets(zero, partial, bucket_elements))
        self._fused = tile == "fused"
        length = tile if isinstance(tile, int) else None
        self._tiles = {
            bucket: [nn.Parameter(part) for part in bucket.master.split(length or max(1, bucket.shard_size))]
            for bucket in self.buckets
        }
        for index, group in enumerate(optimizer.param_groups):
            group["params"] = [t for b in self.buckets if b.group == index for t in self._tiles[b]]
        position = {parameter: n for n, parameter in enumerate(names)}
        self._in_order_of_backward = sorted(self.buckets, key=lambda b: -min(position[p] for p in b.parameters))
        self._incomplete: dict[Bucket, set[Tensor]] = {}  # buckets to launch, and whose gradients they wait for
        self._hooks = [
            p.register_post_accumulate_grad_hook(functools.partial(self._on_gradient, bucket))
            for bucket in self.buckets
            for p in bucket.parameters
        ]
        self._norm: float | None = None  # of the gradient that waits for the step, once known
        self._clip_factor = 1.0  # applied to gradients while they are fed to the optimizer
        self.applied_clip_factor = 1.0  # in the last step
        self.last_norm: float | None = None  # of the last step's gradient, if anything asked for it
        self._inner_step: Callable[[], Any] = optimizer.step

        @functools.wraps(self._inner_step)  # keeps the marks that learning-rate schedulers left on it
        def step(_: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            return self.step(closure)

        # A method, as the one that it replaces: schedulers made later wrap its ``__func__``.
        optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
        optimizer.zero_grad = self.zero_grad  # type: ignore[method-assign]

    def _fill_buckets(self, zero: bool, partial: Collection[nn.Parameter], elements: int) -> Iterator[Bucket]:
        """The same buckets in the same order on every process."""
        waiting: dict[tuple[Any, ...], list[nn.Parameter]] = {}
        for index, group in enumerate(self.optimizer.param_groups):
            for p in group["params"]:
                if p.requires_grad:
                    key = index, reduction_group(p), str(p.dtype), holders(p, self.comm), p in partial
                    waiting.setdefault(key, []).append(p)
        for index, *rest in sorted(waiting):
            for parameters in _chunks(waiting[index, *rest], elements):
                yield Bucket(parameters, index, self.comm, zero, partial=rest[-1])

    # ---- one step ------------------------------------------------------------------------------------------------

    def reduce_gradients(self) -> None:
        """Adds what the backward pass left in the parameters to the reduced gradient of this process's shards."""
        self._norm = None
        self._incomplete = {}
        for bucket in self._in_order_of_backward:
            bucket.start_reduction()
            if not self.overlap:
                bucket.finish_reduction()  # so that there is one bucket's worth of temporary memory, not all
        for bucket in self.buckets:
            bucket.finish_reduction()
        self._sum_partial_gradients()

    def _sum_partial_gradients(self) -> None:
        """Over the tensor group: after the reduction, when of each there is only a shard left, and all in one call."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for bucket in self.buckets:
            if bucket.partial and bucket.gradient is not None:
                by_dtype.setdefault(bucket.gradient.dtype, []).append(bucket.gradient)
        for gradients in by_dtype.values():
            summed = self.comm.all_reduce(
                torch.cat(gradients), "tensor", tag="gradients.partial", phase="optimizer"
            ).split([len(g) for g in gradients])
            for gradient, whole in zip(gradients, summed, strict=True):
                gradient.copy_(whole)

    def expect_backward(self) -> None:
        """Says that the backward pass to come is the last of the step, so that its reductions may be overlapped."""
        if self.overlap:
            self._incomplete = {bucket: set(bucket.parameters) for bucket in self._in_order_of_backward}

    def release(self) -> None:
        """Leaves gradients to the parameters from now on, so that another optimizer may take them."""
        for hook in self._hooks:
            hook.remove()

    def _on_gradient(self, bucket: Bucket, parameter: nn.Parameter) -> None:
        """Collects it, and launches reductions of complete buckets, in the same order on every process."""
        bucket.collect_gradient(parameter)
        if bucket not in self._incomplete:
            return
        self._incomplete[bucket].discard(parameter)
        for first, missing in list(self._incomplete.items()):
            if missing:
                return
            del self._incomplete[first]
            first.start_reduction()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """In place of the optimizer's own: forgets gradients, reduced or not."""
        for bucket in self.buckets:
            bucket.clear_gradients()
        self._norm, self._clip_factor = None, 1.0

    def clip(self, max_norm: float) -> None:
        """Makes the next step use the gradient scaled to at most this norm, the whole model's, on every process."""
        self._clip_factor = min(1.0, max_norm / (self.global_norm() + 1e-6))  # torch's clip_grad_norm_ does the same

    def global_norm(self) -> float:
        """Euclidean norm of the whole gradient, the same on every process; needs one all-reduce of a number.

        Each element counts once: a process contributes its squares divided by the number of their holders.
        """
        if self._norm is None:
            squares = self.comm.all_reduce(self._squares(), "world", tag="gradients.norm", phase="optimizer")
            self._norm = math.sqrt(squares.item()) / (self.scaler.scale if self.scaler else 1.0)
        return self._norm

    def _squares(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.buckets[0].flat.device)
        for bucket in self.buckets:
            if bucket.gradient is not None:
                # Half precision in one pass, which torch has in fp32 only; anything else is first copied into float64:
                # all of a bucket, were it not taken in pieces.
                gradient, half = bucket.gradient, bucket.gradient.itemsize == 2
                precise = torch.float32 if half else torch.float64
                pieces = (gradient,) if half else gradient.split(_PIECE)
                norms = [torch.linalg.vector_norm(piece, dtype=precise).double() for piece in pieces]
                total += torch.stack(norms).square().sum() / bucket.holders
        return total

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """In place of the optimizer's own: closure, tile by tile update, parameter gather."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        overflow = self.scaler is not None and not math.isfinite(self.global_norm())
        factor = self._clip_factor / (self.scaler.scale if self.scaler else 1.0)
        with self._parameters_apart():
            for bucket in [] if overflow else self.buckets:
                if bucket.gradient is not None:
                    self._step_bucket(bucket, factor)
            if overflow:
                self._inner_step()  # of no parameters; by this call schedulers know that there was a step
        self.applied_clip_factor, self.last_norm = self._clip_factor, self._norm
        if self.scaler is not None:
            self.scaler.update(overflow)
        for bucket in self.buckets:
            bucket.gradient = None
        self._norm, self._clip_factor = None, 1.0
        return result

    @contextmanager
    def _parameters_apart(self) -> Iterator[None]:
        """The optimizer's groups are empty meanwhile, so that it sees just the tile that it is given."""
        groups = self.optimizer.param_groups
        everything = [group["params"] for group in groups]
        for group in groups:
            group["params"] = []
        try:
            yield
        finally:
            for group, params in zip(groups, everything, strict=True):
                group["params"] = params

    def _step_bucket(self, bucket: Bucket, factor: float) -> None:
        if self._fused:
            self._step_fused(bucket, factor)
        else:
            self._step_tiles(bucket, factor)
        bucket.gather_parameters()

    def _step_fused(self, bucket: Bucket, factor: float) -> None:
        assert bucket.gradient is not None
        (master,) = self._tiles[bucket]
        state, group = self.optimizer.state[master], self.optimizer.param_groups[bucket.group]
        rounded = None if bucket.master is bucket.shard else bucket.shard
        fused_adam_step(master, bucket.gradient, state, group, factor=factor, rounded=rounded)
        self._inner_step()  # of no parameters; by this call schedulers know that there was a step

    def _step_tiles(self, bucket: Bucket, factor: float) -> None:
        assert bucket.gradient is not None
        tiles = self._tiles[bucket]
        parts = bucket.gradient.split([t.numel() for t in tiles])
        for tile, part in zip(tiles, parts, strict=True):
            gradient = part.to(tile.dtype)  # a copy where the gradient is half-precision, else the gradient itself
            self._step_tile(bucket, tile, gradient.mul_(factor) if factor != 1.0 else gradient)
        self.optimizer.param_groups[bucket.group]["params"] = []
        if bucket.master is not bucket.shard:
            bucket.shard.copy_(bucket.master)

    def _step_tile(self, bucket: Bucket, tile: nn.Parameter, gradient: Tensor) -> None:
        self.optimizer.param_groups[bucket.group]["params"] = [tile]
        tile.grad = gradient
        self._inner_step()
        tile.grad = None

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def gradients(self) -> dict[str, Tensor]:
        """Reduced gradients by parameter name, sharded like the parameters. Collective."""
        return {
            self.names[p]: g
            for bucket in self.buckets
            if bucket.gradient is not None
            for p, g in zip(bucket.parameters, bucket.unshard(bucket.gradient), strict=True)
        }

    def state_dict(self, masters: bool = True) -> dict[str, Any]:
        """State by parameter name, each tensor sharded like its parameter, so that any layout can load it. Collective.

        Tensors of one element (Adam's step count) are stored as they are; half-precision parameters also store their
        fp32 master copy, unless ``masters`` is False.
        """
        state: dict[str, dict[str, Any]] = {self.names[p]: {} for b in self.buckets for p in b.parameters}
        for bucket in self.buckets:
            joined = self._bucket_state(bucket)
            if masters and bucket.master is not bucket.shard:
                joined["master"] = bucket.master
            for key, value in joined.items():
                whole = isinstance(value, Tensor) and value.numel() == bucket.shard_size and value.dim() == 1
                values = bucket.unshard(value) if whole else [value] * len(bucket.parameters)
                for p, v in zip(bucket.parameters, values, strict=True):
                    state[self.names[p]][key] = v
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` returned, here or in another layout.

        A parameter of which it has no state is left as before its first step, or with zeros where the parameters that
        it shares a bucket with have state.
        """
        for group, values in zip(self.optimizer.param_groups, state_dict["param_groups"], strict=True):
            for key in group.keys() - values.keys() - self.optimizer.defaults.keys() - {"params"}:
                del group[key]  # what a scheduler left that was not there yet
            group.update(values)
        for bucket in self.buckets:
            states = [state_dict["state"].get(self.names[p], {}) for p in bucket.parameters]
            tiles = self._tiles[bucket]
            for tile in tiles:
                self.optimizer.state.pop(tile, None)
            for key, first in next((state for state in states if state), {}).items():
                if isinstance(first, Tensor) and first.dim() > 0:
                    pairs = zip(states, bucket.parameters, strict=True)
                    shard = bucket.shard_of([s[key] if s else _without_state(p, key, first.dtype) for s, p in pairs])
                    parts: Sequence[Any] = shard.split([t.numel() for t in tiles])
                else:
                    parts = [first] * len(tiles)
                if key == "master":
                    bucket.master.copy_(shard)
                    continue
                for tile, part in zip(tiles, parts, strict=True):
                    value = part.clone() if isinstance(part, Tensor) else part
                    self.optimizer.state[tile][key] = value

    def refresh_masters(self) -> None:
        """Takes over weights that were changed from outside into the fp32 master copies; the others keep theirs."""
        for bucket in self.buckets:
            if bucket.master is not bucket.shard:
                for master, weight in zip(bucket.master.split(_PIECE), bucket.shard.split(_PIECE), strict=True):
                    torch.where(master.to(weight.dtype) == weight, master, weight.float(), out=master)

    def initialize_state(self, names: Collection[str] | None = None) -> None:
        """Creates the state of these parameters (None: of all), without changing anything else, to load into."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        with self._parameters_apart():
            for bucket, tiles in self._tiles.items():
                if names is None or any(self.names[p] in names for p in bucket.parameters):
                    for tile in tiles:
                        self._step_tile(bucket, tile, torch.zeros_like(tile))
                self.optimizer.param_groups[bucket.group]["params"] = []
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _bucket_state(self, bucket: Bucket) -> dict[str, Any]:
        tiles = self._tiles[bucket]
        joined: dict[str, Any] = {}
        for key, first in self.optimizer.state[tiles[0]].items():
            if isinstance(first, Tensor) and first.shape == tiles[0].shape:
                joined[key] = torch.cat([self.optimizer.state[t][key] for t in tiles])
            else:
                joined[key] = first
        return joined


def _without_state(parameter: nn.Parameter, key: str, dtype: torch.dtype) -> Tensor:
    """What a parameter begins with that a checkpoint has no state of."""
    if key == "master":
        return parameter.detach().to(dtype)
    return torch.zeros_like(parameter, dtype=dtype)


def _chunks(parameters: list[nn.Parameter], most: int) -> Iterator[list[nn.Parameter]]:
    chunk: list[nn.Parameter] = []
    elements = 0
    for p in parameters:
        size = local(p).numel()
        if chunk and elements + size > most:
            yield chunk
            chunk, elements = [], 0
        chunk.append(p)
        elements += size
    yield chunk
