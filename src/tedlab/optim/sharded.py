"""ZeRO-1 for any optimizer that is element-wise or needs whole matrices, with the paper's tiled step.

The user's optimizer stays the same object, with its schedulers and parameter groups, to which parameters may be added.
Only its ``step`` is replaced, by one that feeds it this process's shards tile by tile.
"""

import functools
import itertools
import math
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tedlab._compat.torch import step_hooks, without_step_hooks
from tedlab.comm import Collectives
from tedlab.optim.bucket import Bucket, holders, lay_out, local, reduction_group
from tedlab.optim.finite import FiniteGuard
from tedlab.optim.fused import Kernel, check_tile, chosen_tile, fresh_state, fused_adam_step, has_kernel
from tedlab.optim.kinds import MatrixOptimizer, check_kind, is_matrixwise
from tedlab.optim.loss_scale import SMALLEST, LossScaler
from tedlab.optim.matrices import Matrices
from tedlab.optim.narrow import NarrowAdamW
from tedlab.optim.segment import Segment
from tedlab.optim.shown import Shown
from tedlab.optim.squares import sum_of_squares
from tedlab.optim.state import ShardedState
from tedlab.spec import Fused


class ShardedOptimizer:
    """Shards the state of an optimizer over each parameter's own data-parallel group (paper §4).

    Dense parameters' state is divided over ``data``, experts' over ``expert_data``. After the backward pass
    :meth:`reduce_gradients` leaves each process the gradient of its shard; ``optimizer.step()`` then updates the shard
    tile by tile and gathers the parameters. Half-precision gradients are upcast one tile at a time, so the temporary
    takes 4 bytes × ``tile`` whatever the size of the model (paper §4.2).

    Tiles have only a length and no shape, so the optimizer must be element-wise, except for what it does to whole
    matrices (see ``matrices.py``), which is not done tile by tile. As in torch, a parameter that got no
    gradient is left alone, with its state and step count: one that is frozen, that no process used, or whose ``.grad``
    the user set to None. If some process used a parameter, it has a gradient in all, to which the others add zeros.

    Args:
        optimizer: What ``configure_optimizers`` returned; modified in place.
        comm: The collectives of this process.
        names: Name of each parameter, for checkpoints.
        partial: Parameters whose gradients are also partial sums over the tensor group.
        zero: Whether to shard; otherwise every process keeps everything, and gradients are all-reduced.
        tile: Number of elements updated at a time; None: a bucket's whole shard; ``fused``: the whole shard in one pass
            over memory, for AdamW and Adam; ``auto``: :func:`~tedlab.optim.fused.chosen_tile` (see ``fused.py``).
        bucket_elements: Local elements reduced in one collective; a larger tensor has a bucket to itself.
        overlap: Whether to reduce each bucket's gradients while the backward pass computes the others'.
        piece: Number of elements at a time for temporaries outside the step. On a CPU torch takes a norm in fp64 of a
            copy in fp64, which is then 16 MiB at most.
        scaler: Loss scaler, for fp16; all processes skip a step in which any overflowed.
        fused: How several matrices are fused in parameters, for an optimizer that needs them whole.
        guard: Stops a step whose loss or gradient is not finite; None: nothing does.

    Attributes:
        tile: The same as the argument; in place of ``auto`` what it stands for here.
        kernel: Computes a fused step, see ``fused.py``; None: the fastest that the device has.
        collects_early: Whether to take gradients from parameters as they come. False: those of micro-batches before a
            step's last stay in ``.grad``, where torch adds to them.

    Raises:
        ValueError: If the optimizer is neither element-wise nor one of matrices, or does not know this ``tile``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        comm: Collectives,
        names: Mapping[nn.Parameter, str],
        *,
        zero: bool,
        tile: int | str | None,
        partial: Collection[nn.Parameter] = (),
        bucket_elements: int = 1 << 24,
        overlap: bool = False,
        piece: int = 1 << 21,
        scaler: LossScaler | None = None,
        guard: FiniteGuard | None = None,
        fused: Mapping[nn.Parameter, Fused] | None = None,
    ) -> None:
        for group in optimizer.param_groups:
            check_kind(type(optimizer), group)
            check_tile(tile, type(optimizer), group)
        gpu = any(has_kernel(parameter.device) for parameter in names)
        self.tile = chosen_tile(tile, type(optimizer), optimizer.param_groups, gpu)
        self.optimizer = optimizer
        self.overlap = overlap
        self.piece = piece
        self.scaler = scaler
        self.guard = guard
        self.comm = comm
        self.names = names
        self.collects_early = True
        self.buckets: list[Bucket] = []
        self._zero, self._partial, self._bucket_elements = zero, partial, bucket_elements
        self._matrices: Matrices | None = None
        self._of_matrices: list[Bucket] = []  # of groups of matrices
        if is_matrixwise(type(optimizer)):
            self._matrices = Matrices(cast(MatrixOptimizer, optimizer), comm, fused or {}, names)
        self.kernel: Kernel | None = None
        self.state = ShardedState(optimizer, names, self.tile if isinstance(self.tile, int) else None)
        sizes = [p.numel() for p in names]
        self._first_number = dict(zip(names, itertools.accumulate(sizes, initial=0), strict=False))
        self._bucket_of: dict[nn.Parameter, Bucket] = {}
        self._hooks: dict[nn.Parameter, RemovableHandle] = {}
        self._in_order_of_backward: list[Bucket] = []
        self._incomplete: dict[Bucket, set[nn.Parameter]] = {}  # buckets to launch, and whose gradients they wait for
        self._last_backward = False  # the current pass is the last before the step
        self._reached = False  # a gradient has come since a loss was last noted
        self._shown: list[Shown] = []  # gradients that are in ``.grad`` now
        self._norm: float | None = None  # norm of the gradient that waits for the step, if known; before clipping
        self._first = True  # no norm was taken in this step yet
        self._finite = True  # that norm and all losses of the step are finite
        self._clamped = False  # values were clamped since the norm was taken
        self._finite_when_clamped = True
        self._clipped_since = 1.0  # product of clip factors since the norm was taken
        self._clip_factor = 1.0  # applied to gradients while they are fed to the optimizer
        self._stepped = False  # there was a step, and no zero_grad since
        self.stale = False  # a backward pass came after a step without zero_grad between them
        self.applied_clip_factor = 1.0  # the last step's
        self.last_norm: float | None = None  # norm of the last step's gradient before clipping
        self._inner_step: Callable[[], Any] = optimizer.step

        @functools.wraps(self._inner_step)  # keeps the marks that learning-rate schedulers left on it
        def step(_: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            return self.step(closure)

        # It must be a method like the one that it replaces: schedulers made later wrap its ``__func__``.
        optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
        optimizer.zero_grad = self.zero_grad  # type: ignore[method-assign]
        optimizer.state_dict = self.state_dict  # type: ignore[method-assign]
        optimizer.load_state_dict = self.load_state_dict  # type: ignore[method-assign]
        self.adopt()

    @property
    def loss_scale(self) -> float:
        """The loss scale; 1 without a scaler."""
        return self.scaler.scale if self.scaler else 1.0

    @property
    def scale(self) -> float:
        """How many times too large the buckets' gradients are: the loss scale, times the number of data ranks.

        They are sums over data ranks until they are used, since a division would pass over memory once more.
        """
        return self.loss_scale * self.comm.size("data")

    # ---- which parameters ----------------------------------------------------------------------------------------

    def adopt(self, names: Collection[str] = ()) -> None:
        """Takes in new parameters to be trained: those added to a group, or frozen until now.

        It is cheap if there are none. Every process must have the same.

        Args:
            names: Names of frozen parameters that are taken in as well, because they have state.

        Raises:
            ValueError: If a parameter has no name, or its group options that a fused step does not know.
        """
        group_of: dict[nn.Parameter, int] = {}
        for index, group in enumerate(self.optimizer.param_groups):
            check_tile(self.tile, type(self.optimizer), group)
            for p in group["params"]:
                if p.requires_grad and p in self._bucket_of and p not in self._hooks:
                    self._listen(p)
                elif p not in self._bucket_of and (p.requires_grad or self.names.get(p) in names):
                    if p not in self.names:
                        raise ValueError(
                            f"The optimizer's parameter group {index} has a parameter of shape {tuple(p.shape)} that "
                            "was not the LightningModule's when training started; make all parameters before that, "
                            "and add them to the optimizer when you like"
                        )
                    group_of[p] = index
        if not group_of:
            return

        def key(p: nn.Parameter) -> tuple[int, str, str, int, bool]:
            return group_of[p], reduction_group(p), str(p.dtype), holders(p, self.comm), p in self._partial

        for (index, *_, partial), parameters in lay_out(
            group_of, key, lambda p: local(p).numel(), self._bucket_elements
        ):
            bucket = self._fill_bucket(parameters, partial)
            if self._matrices is not None and self.optimizer.param_groups[index]["matrix"]:
                self._of_matrices.append(bucket)
        if self._matrices is not None:
            self._matrices.lay_out(self._of_matrices)
        position = {parameter: n for n, parameter in enumerate(self.names)}
        self._in_order_of_backward = sorted(self.buckets, key=lambda b: -min(position[p] for p in b.parameters))

    def _fill_bucket(self, parameters: list[nn.Parameter], partial: bool) -> Bucket:
        bucket = Bucket(parameters, self.comm, self._zero, partial=partial)
        self.buckets.append(bucket)
        self.state.add(bucket)
        for p in parameters:
            self._bucket_of[p] = bucket
            if p.requires_grad:
                self._listen(p)
        return bucket

    def _listen(self, parameter: nn.Parameter) -> None:
        on_gradient = functools.partial(self._on_gradient, self._bucket_of[parameter])
        self._hooks[parameter] = parameter.register_post_accumulate_grad_hook(on_gradient)

    # ---- one step ------------------------------------------------------------------------------------------------

    def reduce_gradients(self) -> None:
        """Adds what the backward pass left in the parameters to the reduced gradient of this process's shards."""
        self.adopt()
        self.hide_gradients()
        self._norm = None
        early = self.overlap and self._last_backward  # all but incomplete buckets have been launched
        waiting = list(self._incomplete) if early else self._in_order_of_backward
        self._incomplete, self._last_backward = {}, False
        self.stale = self._stepped
        for bucket in waiting:
            bucket.start_reduction()
            if not self.overlap:
                bucket.finish_reduction()  # limits temporary memory to one bucket
        for bucket in self.buckets:
            bucket.finish_reduction()
        self._sum_partial_gradients()
        for bucket in self.buckets:
            bucket.add_partial()

    def _sum_partial_gradients(self) -> None:
        """Sums partial gradients over the tensor group in one call, after the reduction, when only shards are left."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for bucket in self.buckets:
            if bucket.new_partial is not None:
                by_dtype.setdefault(bucket.new_partial.dtype, []).append(bucket.new_partial)
        for gradients in by_dtype.values():
            summed = self.comm.all_reduce(
                torch.cat(gradients), "tensor", tag="gradients.partial", phase="optimizer"
            ).split([len(g) for g in gradients])
            for gradient, whole in zip(gradients, summed, strict=True):
                gradient.copy_(whole)

    def note_loss(self, step: int, batch_idx: int, loss: Tensor) -> None:
        """Records the loss of a finished backward pass, if that has left a gradient to this optimizer.

        Each of several optimizers records the losses of its own gradients, for as long as it has these.

        Args:
            step: Number of steps finished before.
            batch_idx: Index of the batch, as Lightning counts.
            loss: Scalar, without the loss scale.
        """
        if self.guard is not None and self._reached:
            self.guard.note(step, batch_idx, loss)
        self._reached = False

    def expect_backward(self) -> None:
        """Announces the last backward pass of the step, so that its reductions may be overlapped."""
        self._last_backward = True
        if self.overlap:
            trained = {b: {p for p in b.parameters if p.requires_grad} for b in self._in_order_of_backward}
            self._incomplete = {bucket: parameters for bucket, parameters in trained.items() if parameters}

    def release(self) -> None:
        """Leaves gradients to the parameters from now on, so that another optimizer may take them."""
        for hook in self._hooks.values():
            hook.remove()

    def _on_gradient(self, bucket: Bucket, parameter: nn.Parameter) -> None:
        """Collects a gradient, and launches the reductions of complete buckets in the same order on every process."""
        self._reached = True
        if not (self.collects_early or self._last_backward):
            return
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
        """Replaces the optimizer's own: drops all gradients; with ``set_to_none=False`` zeroes the reduced ones."""
        self._shown.clear()
        for bucket in self.buckets:
            bucket.clear_gradients(set_to_none)
        for p in (p for group in self.optimizer.param_groups for p in group["params"]):
            p.grad = None  # parameters that are not adopted yet
        if self.guard is not None:
            self.guard.forget()
        self._forget_norm()
        self._stepped = self.stale = False

    def _forget_norm(self) -> None:
        self._norm, self._first = None, True
        self._finite = self._finite_when_clamped = True
        self._clamped = False
        self._clip_factor = self._clipped_since = 1.0

    @property
    def reduced(self) -> bool:
        """Whether a gradient waits for a step."""
        return any(bucket.gradient is not None for bucket in self.buckets)

    def with_gradient(self) -> list[tuple[Bucket, nn.Parameter]]:
        """Returns parameters with a gradient in any process, and their buckets; the same everywhere. Collective."""
        self._heed()
        self._agree()
        return [(b, p) for b in self.buckets for p in b.parameters if b.gradient is not None and p in b.present]

    def show_gradients(self) -> None:
        """Gives parameters their reduced gradient as ``.grad``, sharded like them, until it is used or hidden.

        As with DDP, it is the mean over data ranks, without the loss scale, and the user may change it. Collective;
        takes the memory of all gradients of this process.
        """
        if not self._shown and self.reduced:
            self._agree()
            self._shown = [Shown(bucket, self.scale) for bucket in self.buckets if bucket.gradient is not None]

    def hide_gradients(self) -> None:
        """Removes ``.grad`` from the parameters again, and takes over the user's changes to it."""
        if self._shown:
            for shown in self._shown:
                shown.take()
            self._shown = []
            self._norm = None

    def _heed(self) -> None:
        """Takes over the user's changes to ``.grad`` so far, and leaves it there."""
        if self._shown:
            for shown in self._shown:
                shown.take()
                shown.give()
            self._norm = None

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Allows changes to the shards' gradients inside the context; shown gradients are shown again afterwards."""
        shown = bool(self._shown)
        self.hide_gradients()
        self._norm = None
        yield
        if shown:
            self.show_gradients()

    def clip(self, max_norm: float) -> None:
        """Scales the gradient that the next step uses to at most this norm of the whole model, on every process."""
        if self._clamped:
            self._norm = None
        norm = self.global_norm() * self._clipped_since
        factor = min(1.0, max_norm / (norm + 1e-6))  # torch's clip_grad_norm_ does the same
        self._clipped_since *= factor
        self.applied_clip_factor *= factor
        for shown in self._shown:
            shown.scale_by(factor)
        if not self._shown:
            self._clip_factor *= factor

    def clip_values(self, limit: float) -> None:
        """Limits each element of the gradient that the next step uses to ±limit, as torch's clip_grad_value_ does."""
        self.global_norm()
        self._clamped = True
        self._finite_when_clamped &= self._finite  # clamping hides it
        for shown in self._shown:
            shown.clamp(limit)
        for bucket in [] if self._shown else self.buckets:
            if bucket.gradient is not None and self._clip_factor > 0:  # at 0 the step uses zeros anyway
                bound = min(limit * self.scale / self._clip_factor, torch.finfo(bucket.gradient.dtype).max)
                bucket.gradient.clamp_(-bound, bound)

    def global_norm(self) -> float:
        """Returns the Euclidean norm of the whole gradient, the same on every process, without the loss scale."""
        self._heed()
        self._agree()
        assert self._norm is not None
        return self._norm

    def _agree(self) -> None:
        """Finds the norm, whether all losses are finite, and who has gradients, in one all-reduce of three numbers.

        Each element counts once: a process contributes its squares divided by the number of their holders. A second
        all-reduce, of who has which gradient, is needed only if a process lacks that of a parameter to be trained.
        """
        if self._norm is not None:
            return
        squares = self._squares()
        lacking = sum(p.requires_grad and p not in b.present for b in self.buckets for p in b.parameters)
        wrong = 0 if self.guard is None else self.guard.wrong()
        others = [n.to(squares) if isinstance(n, Tensor) else squares.new_full((), n) for n in (lacking, wrong)]
        numbers = self.comm.all_reduce(
            torch.stack([squares, *others]), "world", tag="gradients.norm", phase="optimizer"
        )
        # Both are read at once, because the host waits for the device each time.
        total, none = torch.stack([numbers[0], numbers[1:].eq(0).all().double()]).tolist()
        self._norm = math.sqrt(total) / self.scale
        self._finite = math.isfinite(self._norm)
        self._clipped_since, self._clamped = self._clip_factor, False
        if self._first:
            self.last_norm, self.applied_clip_factor, self._first = self._norm, 1.0, False
        if none != 1.0:
            _, lacking, wrong = numbers.tolist()
            self._finite &= wrong == 0
            if lacking:
                self._find_present()

    def _find_present(self) -> None:
        """Marks gradients that any process has as present in all."""
        flags = [float(p in b.present) for b in self.buckets for p in b.parameters]
        device = local(next(iter(self.names))).device
        together = self.comm.all_reduce(
            torch.tensor(flags, device=device), "world", tag="gradients.present", phase="optimizer", op="max"
        )
        found = iter(together.tolist())
        for bucket in self.buckets:
            bucket.present = {p for p in bucket.parameters if next(found)}

    def _squares(self) -> Tensor:
        device = local(next(iter(self.names))).device
        found: list[Tensor] = []
        for bucket in self.buckets:
            if bucket.gradient is not None:
                found.append(sum_of_squares(bucket.gradient, self.piece) / bucket.holders)
        return torch.stack(found).sum() if found else torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Replaces the optimizer's own: runs the closure, updates tile by tile, and gathers parameters."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if any(bucket.unreduced for bucket in self.buckets):
            raise RuntimeError(
                "There are gradients that were not reduced over processes: call self.manual_backward(loss) in place "
                "of loss.backward(), and step outside of toggle_model(sync_grad=False)."
            )
        for hook in step_hooks(self.optimizer, "pre"):
            self.show_gradients()
            hook(self.optimizer, (), {})
        self.hide_gradients()
        self._agree()
        finite = self._finite and self._finite_when_clamped
        overflow = self.scaler is not None and not finite
        if not finite and self.guard is not None and self.loss_scale <= SMALLEST:
            self.guard.stop(self._not_finite(), scaled=self.scaler is not None)
        factor = self._clip_factor / self.scale
        group_of = {p: index for index, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        with self._parameters_apart():
            stepped = [b for b in self.buckets if b.gradient is not None and not overflow]
            for bucket in stepped:
                if bucket not in self._of_matrices:
                    self._step_bucket(bucket, factor, group_of)
            if self._matrices is not None:
                self._step_matrices(self._matrices, [b for b in stepped if b in self._of_matrices], factor, group_of)
            self._inner_step()  # has no parameters to update; tells schedulers that there was a step
        if self.scaler is not None:
            self.scaler.update(overflow)
        if self.guard is not None:
            self.guard.forget()
        for bucket in self.buckets:
            bucket.gradient = None
            bucket.present.clear()
        self._forget_norm()
        self._stepped = True
        for hook in step_hooks(self.optimizer, "post"):
            hook(self.optimizer, (), {})
        return result

    def _not_finite(self) -> Iterator[str]:
        """Yields names of parameters whose gradient is not finite in this process's shards."""
        for bucket in self.buckets:
            for p in bucket.parameters if bucket.gradient is not None else ():
                assert bucket.gradient is not None
                if not all(bucket.gradient[where].isfinite().all() for where in bucket.ranges({p})):
                    yield self.names[p]

    @contextmanager
    def _parameters_apart(self) -> Iterator[None]:
        """Leaves the optimizer no hooks and no parameters inside the context, except the tile that it is given."""
        groups = self.optimizer.param_groups
        everything = [group["params"] for group in groups]
        for group in groups:
            group["params"] = []
        try:
            with without_step_hooks(self.optimizer):
                yield
        finally:
            for group, params in zip(groups, everything, strict=True):
                group["params"] = params

    def _step_bucket(self, bucket: Bucket, factor: float, group_of: Mapping[nn.Parameter, int]) -> None:
        """Steps the parameters that have a gradient, each with its group's settings."""
        stepped = self._segments(bucket, group_of)
        self._number(segment for segment, _ in stepped)
        for segment, group in stepped:
            step = self._step_fused if self.tile == "fused" else self._step_tiles
            step(segment, factor, group)
        if stepped:
            bucket.gather_parameters()

    def _segments(self, bucket: Bucket, group_of: Mapping[nn.Parameter, int]) -> list[tuple[Segment, dict[str, Any]]]:
        """Returns the segments of a bucket that have a gradient, each with its group."""
        parameters: dict[int, set[nn.Parameter]] = {}
        for p in bucket.parameters:
            if p in bucket.present and p in group_of:
                parameters.setdefault(group_of[p], set()).add(p)
        return [
            (segment, self.optimizer.param_groups[index])
            for index, its in parameters.items()
            for segment in self.state.divided(bucket, its)
        ]

    def _step_matrices(
        self, matrices: Matrices, buckets: Sequence[Bucket], factor: float, group_of: Mapping[nn.Parameter, int]
    ) -> None:
        """Steps all buckets of matrices: tile by tile, except that matrices are whole in between."""
        optimizer, groups = matrices.optimizer, self.optimizer.param_groups
        stepped = {bucket: self._segments(bucket, group_of) for bucket in buckets}
        directions: dict[Bucket, Tensor] = {}
        for bucket, segments in stepped.items():
            assert bucket.gradient is not None
            for segment, group in segments:
                precision = optimizer.precision(bucket.master.dtype, group)
                whole = directions.setdefault(bucket, torch.zeros_like(bucket.shard, dtype=precision))
                for tile, part, direction in zip(
                    segment.tiles, segment.split(bucket.gradient), segment.split(whole), strict=True
                ):
                    gradient = part.to(tile.dtype)
                    direction.copy_(optimizer.direct(tile, gradient.mul_(factor) if factor != 1.0 else gradient, group))
        present = {p: groups[group_of[p]] for b in buckets for p in b.parameters if p in b.present and p in group_of}
        matrices.orthogonalise(directions, present)
        for bucket, segments in stepped.items():
            for segment, group in segments:
                for tile, update in zip(segment.tiles, segment.split(directions[bucket]), strict=True):
                    optimizer.apply(tile, update, group)
                self._round(segment)
            if segments:
                bucket.gather_parameters()

    def _step_fused(self, segment: Segment, factor: float, group: dict[str, Any]) -> None:
        bucket = segment.bucket
        assert bucket.gradient is not None
        gradients, rounded = segment.split(bucket.gradient), segment.split(bucket.shard)
        for tile, gradient, half in zip(segment.tiles, gradients, rounded, strict=True):
            copy = None if bucket.master is bucket.shard else half
            fused_adam_step(
                tile, gradient, self.optimizer.state[tile], group, factor=factor, rounded=copy, kernel=self.kernel
            )

    def _step_tiles(self, segment: Segment, factor: float, group: dict[str, Any]) -> None:
        bucket = segment.bucket
        assert bucket.gradient is not None
        for tile, part in zip(segment.tiles, segment.split(bucket.gradient), strict=True):
            gradient = part.to(tile.dtype)  # copies only a half-precision gradient
            self._step_tile(group, tile, gradient.mul_(factor) if factor != 1.0 else gradient)
        self._round(segment)

    def _number(self, segments: Iterable[Segment]) -> None:
        """Lets an optimizer that draws at random ask for the numbers of a tile's elements."""
        if not isinstance(self.optimizer, NarrowAdamW):
            return
        place = {
            tile: (segment.bucket, where)
            for segment in segments
            for tile, where in zip(segment.tiles, segment.places(), strict=True)
        }

        def numbers(tile: Tensor) -> Tensor:
            bucket, where = place[tile]  # type: ignore[index]
            return bucket.numbers(where, self._first_number)

        self.optimizer.numbers = numbers

    def _round(self, segment: Segment) -> None:
        """Copies a segment's master copy to half-precision parameters, if these are."""
        bucket = segment.bucket
        if bucket.master is not bucket.shard:
            for where in segment.ranges:
                bucket.shard[where].copy_(bucket.master[where])

    def _step_tile(self, group: dict[str, Any], tile: nn.Parameter, gradient: Tensor) -> None:
        group["params"] = [tile]
        tile.grad = gradient
        self._inner_step()
        tile.grad = None
        group["params"] = []

    # ---- what is known of parameters -----------------------------------------------------------------------------

    def gradients(self) -> dict[str, Tensor]:
        """Returns reduced gradients by name, without the loss scale, sharded like the parameters. Collective."""
        self._heed()
        self._agree()
        found: dict[str, Tensor] = {}
        for bucket in self.buckets:
            if bucket.gradient is not None:
                parts = bucket.unshard(bucket.gradient / self.scale)
                found |= {
                    self.names[p]: g for p, g in zip(bucket.parameters, parts, strict=True) if p in bucket.present
                }
        return found

    def state_dict(self, masters: bool = True) -> dict[str, Any]:
        """Replaces the optimizer's own, see :meth:`ShardedState.state_dict`."""
        return self.state.state_dict(masters)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replaces the optimizer's own, see :meth:`ShardedState.load_state_dict`."""
        self.state.load_state_dict(state_dict)

    def initialize_state(self, names: Collection[str] | None = None) -> None:
        """Creates the state of these parameters (None: all) to load into, without changing anything else."""
        self.adopt(names or ())
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        group_of = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        with self._parameters_apart():
            self._number(segment for segments in self.state.segments.values() for segment in segments)
            for segment in (segment for segments in self.state.segments.values() for segment in segments):
                group = group_of.get(segment.parameters[0], self.optimizer.param_groups[0])
                if names is None or any(self.names[p] in names for p in segment.parameters):
                    for tile in segment.tiles:
                        if self.tile == "fused":  # nothing but the state, as large as all of the shard
                            self.optimizer.state[tile].update(fresh_state(tile))
                        elif self._matrices is not None and segment.bucket in self._of_matrices:
                            self._matrices.optimizer.direct(tile, torch.zeros_like(tile), group)
                        else:
                            self._step_tile(group, tile, torch.zeros_like(tile))
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
