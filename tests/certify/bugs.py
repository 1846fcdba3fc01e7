"""Mistakes to plant: each a function that changes the code of this process, as it would be had somebody made it.

What the field has shipped (with its thread), what nearly happened here, and what is easily written. Each trains on
without an error. Which test notices which is in ``test_planted_bugs.py``.
"""

import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tedlab import TEDStrategy, capacity, module, parametrization
from tedlab._compat.lightning import MicroBatches
from tedlab.callbacks import FollowRamp
from tedlab.callbacks import average as averages
from tedlab.checkpoint import directory
from tedlab.comm import Collectives, differentiable, issued, raw, recompute
from tedlab.comm.collectives import Pending
from tedlab.comm.route import NodeRoute
from tedlab.config import AverageConfig, ModelConfig, MoEConfig
from tedlab.context import BatchContext
from tedlab.data import MicroBatchSampler, TextDataModule
from tedlab.degrees import GroupKind, ParallelDegrees
from tedlab.models import gpt
from tedlab.models.shortcut import ShortcutBlocks
from tedlab.module import LanguageModel
from tedlab.moe import balance, dispatch, experts, pilot_steps, pilots, ragged, router, row_ops
from tedlab.moe.lending import exchange, plan, policy
from tedlab.moe.local import LocalExperts
from tedlab.moe.ragged import Arrangement, DealtPath, RaggedPath
from tedlab.moe.shared import SharedGateSpec
from tedlab.nn import Embedding, Nonlinearity, VocabParallelEmbedding, activate, attend, attention, norm, sharded
from tedlab.nn import loss as losses
from tedlab.nn.region import ReplicatedRegion, SequenceRegion
from tedlab.optim import LossScaler, ShardedOptimizer, fused
from tedlab.optim import bucket as bucket_of_parameters
from tedlab.optim.blocks import Block
from tedlab.optim.bucket import Bucket, local
from tedlab.optim.matrices import Matrices
from tedlab.optim.segment import Segment
from tedlab.spec import ParameterSpec

Patch = pytest.MonkeyPatch


def _after(patch: Patch, owner: Any, name: str, then: Callable[..., Any]) -> None:
    """``then(result, *arguments)`` takes the place of the result, unless it is None."""
    right = getattr(owner, name)

    def wrong(*arguments: Any, **named: Any) -> Any:
        result = right(*arguments, **named)
        changed = then(result, *arguments)
        return result if changed is None else changed

    patch.setattr(owner, name, wrong)


def _collective(
    patch: Patch, op: str, change: Callable[[Callable[[Tensor], Any], Tensor, Collectives], Any], **where: str
) -> None:
    """``change(launch, x, comm)`` in place of ``launch(x)``, in all collectives of this kind, tag and phase."""
    right = getattr(Collectives, op)

    def wrong(self: Collectives, x: Tensor, kind: str, *, tag: str, phase: str, **options: Any) -> Any:
        def launch(given: Tensor) -> Any:
            return right(self, given, kind, tag=tag, phase=phase, **options)

        asked_for = where.items() <= {"kind": kind, "tag": tag, "phase": phase}.items()
        return change(launch, x, self) if asked_for else launch(x)

    patch.setattr(Collectives, op, wrong)


# ---- gradients: reduction, accumulation, buckets -----------------------------------------------------------------


def _scale_expert_gradients(patch: Patch, factor: float) -> None:
    for op in ("start_reduce_scatter", "start_all_reduce"):
        _collective(patch, op, lambda launch, x, comm: launch(factor * x), kind="expert_data", tag="gradients.reduce")


def expert_gradient_divided_by_expert_data(patch: Patch) -> None:
    """Averaged over its own replicas although it is divided by D already."""
    _scale_expert_gradients(patch, 1 / 2)


def expert_gradient_scaled_by_expert(patch: Patch) -> None:
    """DeepSpeed #5618, pytorch #160285: E_p times too large, as if divided by D_e and not by D."""
    _scale_expert_gradients(patch, 4.0)


def _replicated(bucket: Bucket) -> bool:
    parameter: Any = bucket.parameters[0]
    return not any(placement.is_shard() for placement in parameter.placements)


def replicated_gradient_summed_over_tensor(patch: Patch) -> None:
    """Of norms and biases, which all tensor ranks compute alike and whole."""
    finish = Bucket.finish_reduction

    def wrong(self: Bucket) -> None:
        pending = self._reduction is not None
        finish(self)
        if pending and _replicated(self):
            assert self.gradient is not None
            self.gradient.mul_(2.0)

    patch.setattr(Bucket, "finish_reduction", wrong)


def _experts_summed_again(patch: Patch, kind: GroupKind) -> None:
    """The gradients of experts, once they are reduced, over another group."""
    finish = Bucket.finish_reduction

    def wrong(self: Bucket) -> None:
        pending = self._reduction is not None
        finish(self)
        if pending and self.kind == "expert_data":
            assert self.gradient is not None
            self.gradient = self.comm.all_reduce(self.gradient, kind, tag="gradients.reduce", phase="optimizer")

    patch.setattr(Bucket, "finish_reduction", wrong)


def experts_reduced_over_all_data_ranks(patch: Patch) -> None:
    """Over processes that hold other experts."""
    _experts_summed_again(patch, "data")


def input_gradient_not_summed_over_tensor(patch: Patch) -> None:
    """Each tensor rank goes on with its own part of the gradient (Automodel #1260)."""
    _collective(patch, "all_reduce", lambda launch, x, comm: x, phase="backward")


def step_of_a_stale_gradient(patch: Patch) -> None:
    """A reduction that is not waited for: the shard's first element is lost."""

    def lose(_: None, bucket: Bucket) -> None:
        if bucket.gradient is not None:
            bucket.gradient[0] = 0.0

    _after(patch, Bucket, "finish_reduction", lose)


def accumulated_gradients_lost(patch: Patch) -> None:
    """Those of the last micro-batch take the place of the others'."""
    right = Bucket.collect_gradient

    def wrong(self: Bucket, parameter: Any) -> None:
        if parameter.grad is not None:
            self._collected.pop(parameter, None)
        right(self, parameter)

    patch.setattr(Bucket, "collect_gradient", wrong)


def reduced_before_the_last_micro_batch(patch: Patch) -> None:
    """With overlap: hooks launch in the first backward pass, and what later ones bring is forgotten."""
    right = Bucket.start_reduction

    def always(self: TEDStrategy, loss: Tensor) -> None:
        for optimizer in self.sharded_optimizers:
            optimizer.expect_backward()

    def wrong(self: Bucket) -> None:
        if self._reduction is None and self.gradient is None:
            right(self)
        self._collected.clear()

    patch.setattr(TEDStrategy, "pre_backward", always)
    patch.setattr(Bucket, "start_reduction", wrong)


def micro_batches_not_averaged(patch: Patch) -> None:
    """The gradients of a step's micro-batches are added up: as many times too large."""
    right = TEDStrategy.backward

    def wrong(self: TEDStrategy, closure_loss: Tensor, optimizer: Any, *arguments: Any, **named: Any) -> Tensor:
        assert self.lightning_module is not None
        times = self.lightning_module.trainer.accumulate_grad_batches
        return right(self, closure_loss * times, optimizer, *arguments, **named)

    patch.setattr(TEDStrategy, "backward", wrong)


def _swapped(tensors: list[Any]) -> list[Any]:
    """The first two of equal size in each other's place."""
    for i, one in enumerate(tensors):
        for j in range(i):
            if tensors[j].numel() == one.numel():
                tensors[i], tensors[j] = tensors[j], one
                return tensors
    return tensors


def bucket_filled_in_another_order(patch: Patch) -> None:
    """Gradients of two parameters of one size change places in a bucket."""
    right = Bucket.start_reduction

    def wrong(self: Bucket) -> None:
        parameters = self.parameters
        self.parameters = _swapped(list(parameters))
        right(self)
        self.parameters = parameters

    patch.setattr(Bucket, "start_reduction", wrong)


def router_gradient_not_summed_when_sliced(patch: Patch) -> None:
    """Each tensor rank has routed its own tokens, and keeps its part of the gradient (Automodel #1260)."""
    _collective(patch, "all_reduce", lambda launch, x, comm: x, tag="gradients.partial")


def partial_gradients_summed_twice(patch: Patch) -> None:
    """Over the tensor group, of the router and of norms, with sequence parallelism."""
    _collective(patch, "all_reduce", lambda launch, x, comm: 2 * launch(x), tag="gradients.partial")


# ---- folded layouts, and experts that slice tokens ------------------------------------------------------------------


def folded_expert_gradient_divided_by_expert_data(patch: Patch) -> None:
    """By the number of the experts' replicas, which have nothing to do with the number of data ranks (D)."""

    def wrong(launch: Callable[[Tensor], Any], x: Tensor, comm: Collectives) -> Any:
        return launch(x * comm.size("data") / comm.size("expert_data"))

    for op in ("start_reduce_scatter", "start_all_reduce"):
        _collective(patch, op, wrong, kind="expert_data", tag="gradients.reduce")


def folded_experts_summed_over_the_tensor_group(patch: Patch) -> None:
    """As if they were whole experts of which each tensor rank saw a part of the tokens, and not other experts."""
    _experts_summed_again(patch, "tensor")


def folded_experts_counted_once_for_each_tensor_rank(patch: Patch) -> None:
    """In the norm, as if they were divided like dense layers: T / T_e times."""
    right = Bucket.holders.fget
    assert right is not None

    def wrong(self: Bucket) -> float:
        experts = self.kind == "expert_data"
        return right(self) * (self.comm.size("expert_tensor") / self.comm.size("tensor") if experts else 1)

    patch.setattr(Bucket, "holders", property(wrong))


def tokens_sent_by_every_tensor_rank(patch: Patch) -> None:
    """Of one tensor group, to experts that are divided in another way: each token comes T times, and returns once."""
    patch.setattr(dispatch.DroppingPath, "_own", lambda self, x: x)
    patch.setattr(dispatch.DroppingPath, "_whole", lambda self, y: y)


def gradient_of_a_router_that_slices_kept_by_each_rank(patch: Patch) -> None:
    """X-MoE (b0283d5): nothing sums it over the tensor ranks, each of which routes a slice of the tokens."""
    right = router.RouterSpec.own
    patch.setattr(
        router.RouterSpec, "own", lambda self: (replace(p, own_tokens=False, own_part=False) for p in right(self))
    )


# ---- norm, clipping, loss scale ----------------------------------------------------------------------------------


def replicated_parameter_counted_by_each_tensor_rank(patch: Patch) -> None:
    """In the norm (Megatron #5916, DeepSpeed #8475)."""
    right = Bucket.holders.fget
    assert right is not None

    def wrong(self: Bucket) -> int:
        parameter: Any = self.parameters[0]
        return right(self) // (parameter.device_mesh.size(-1) if _replicated(self) else 1)

    patch.setattr(Bucket, "holders", property(wrong))


def norm_of_the_first_piece(patch: Patch) -> None:
    """Of each bucket's gradient; there is but one piece unless the model is large."""
    right = ShardedOptimizer._squares

    def wrong(self: ShardedOptimizer) -> Tensor:
        whole = [bucket.gradient for bucket in self.buckets]
        for bucket, gradient in zip(self.buckets, whole, strict=True):
            bucket.gradient = None if gradient is None else gradient[: self.piece]
        total = right(self)
        for bucket, gradient in zip(self.buckets, whole, strict=True):
            bucket.gradient = gradient
        return total

    patch.setattr(ShardedOptimizer, "_squares", wrong)


def norm_of_this_process_alone(patch: Patch) -> None:
    """The sum over all processes is forgotten."""
    _collective(patch, "all_reduce", lambda launch, x, comm: x, tag="gradients.norm")


def norm_of_an_earlier_step(patch: Patch) -> None:
    """Kept from the first step on."""
    right = ShardedOptimizer.global_norm

    def wrong(self: ShardedOptimizer) -> float:
        self._norm = getattr(self, "stale_norm", None)
        self.stale_norm = right(self)  # type: ignore[attr-defined]
        return self.stale_norm  # type: ignore[attr-defined]

    patch.setattr(ShardedOptimizer, "global_norm", wrong)


def padding_counted_in_the_norm(patch: Patch) -> None:
    """What fills a bucket up to an even division is not zero."""
    right = Bucket._joined

    def wrong(self: Bucket) -> Tensor:
        filled = right(self)
        filled[sum(self.sizes) :] = 1.0
        return filled

    patch.setattr(Bucket, "_joined", wrong)


def tied_embedding_counted_twice(patch: Patch) -> None:
    """In the norm: once for each of its two uses."""

    def more(total: Tensor, self: ShardedOptimizer) -> Tensor:
        for bucket in self.buckets:
            if "network.embedding.weight" in [self.names[p] for p in bucket.parameters]:
                assert bucket.gradient is not None
                total = total + bucket.gradient.square().sum() / bucket.holders
        return total

    _after(patch, ShardedOptimizer, "_squares", more)


def clipped_before_unscaling(patch: Patch) -> None:
    """The norm that clipping sees is that of the gradient times the loss scale."""

    def wrong(self: ShardedOptimizer, max_norm: float) -> None:
        factor = min(1.0, max_norm / (self.global_norm() * self.scale + 1e-6))
        self._clip_factor *= factor
        self.applied_clip_factor *= factor

    patch.setattr(ShardedOptimizer, "clip", wrong)


def overflow_that_is_not_skipped(patch: Patch) -> None:
    """One process overflows, and the others' norms are what is looked at (Lightning's fp16 plugin)."""

    def overlook(_: None, self: ShardedOptimizer) -> None:
        if not self._finite:
            self._norm, self._finite = 1.0, True

    _after(patch, ShardedOptimizer, "_agree", overlook)


def loss_scale_that_never_grows(patch: Patch) -> None:
    """Halved at every overflow, it ends at 1."""
    right = LossScaler.update

    def wrong(self: LossScaler, overflow: bool) -> None:
        scale = self.scale
        right(self, overflow)
        self.scale = min(scale, self.scale)

    patch.setattr(LossScaler, "update", wrong)


# ---- the step, parameters, initial weights -----------------------------------------------------------------------


def last_tile_left_out(patch: Patch) -> None:
    """The gradient of the elements after the last whole tile is lost."""
    right = ShardedOptimizer._step_tiles

    def wrong(self: ShardedOptimizer, segment: Segment, factor: float, group: dict[str, Any]) -> None:
        if len(segment.tiles[-1]) < len(segment.tiles[0]):
            assert segment.bucket.gradient is not None
            segment.split(segment.bucket.gradient)[-1].zero_()
        right(self, segment, factor, group)

    patch.setattr(ShardedOptimizer, "_step_tiles", wrong)


def parameters_not_gathered(patch: Patch) -> None:
    """Of experts: each process has what it updated, and of the rest what was there."""
    right = Bucket.gather_parameters
    patch.setattr(Bucket, "gather_parameters", lambda self: right(self) if self.kind == "data" else None)


def replicas_that_drift(patch: Patch) -> None:
    """By so little, and on a rank that reports nothing, that outputs would tell only later."""

    def drift(_: None, bucket: Bucket) -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            bucket.flat[0] += 1e-9

    _after(patch, Bucket, "gather_parameters", drift)


def tensor_ranks_with_different_seeds(patch: Patch) -> None:
    """Of initial weights that all should hold alike."""
    _after(patch, sharded, "seed_of", lambda seed, key: seed + dist.get_rank())


def experts_seeded_by_their_local_index(patch: Patch) -> None:
    """The first expert of every process starts with the same weights."""
    right = sharded._fill_matrix

    def wrong(local: Tensor, shape: Any, starts: Any, init: Any, key: str, advance: Any) -> None:
        right(local, shape, starts, init, re.sub(r"\[(\d+)\]", lambda found: f"[{int(found[1]) % 2}]", key), advance)

    patch.setattr(sharded, "_fill_matrix", wrong)


def second_block_of_initial_weights_like_the_first(patch: Patch) -> None:
    """A matrix of more than 2²⁰ values repeats itself."""
    right = sharded.seed_of
    patch.setattr(sharded, "seed_of", lambda key: right(key.rpartition("/")[0]))


def last_piece_of_the_fused_step_left_out(patch: Patch) -> None:
    """What a whole piece of 2¹⁸ elements leaves is never updated."""
    right = fused.fused_adam

    def wrong(decoupled: bool) -> Callable[..., None]:
        def kernel(parameters: Any, *arguments: Any, **named: Any) -> None:
            if parameters[0].numel() != 5:  # of 2¹⁸ + 5
                right(decoupled)(parameters, *arguments, **named)

        return kernel

    patch.setattr(fused, "fused_adam", wrong)


# ---- embeddings, positions, attention, feed-forward --------------------------------------------------------------


def vocabulary_shard_off_by_one(patch: Patch) -> None:
    """The second tensor rank takes its first token for its second."""

    def shift(_: None, self: VocabParallelEmbedding, *arguments: Any) -> None:
        self.start -= dist.get_rank() % 2

    _after(patch, VocabParallelEmbedding, "__init__", shift)


def targets_of_other_ranks_off_by_one(patch: Patch) -> None:
    """In the loss: the second tensor rank looks its targets up one column too far."""
    right = losses.vocab_parallel_cross_entropy

    def wrong(logits: Tensor, targets: Tensor, comm: Collectives) -> Tensor:
        own = targets >= logits.shape[-1]
        return right(logits, torch.where(own, (targets - 1).clamp(min=logits.shape[-1]), targets), comm)

    patch.setattr(gpt, "vocab_parallel_cross_entropy", wrong)


def embedding_gradient_of_other_shards_tokens(patch: Patch) -> None:
    """A token of another rank finds zeros, but its gradient goes to row 0."""

    def forward(self: VocabParallelEmbedding, ids: Tensor) -> Tensor:
        weight = self.local("weight")
        row = ids - self.start
        elsewhere = ((row < 0) | (row >= weight.shape[0])).unsqueeze(-1)
        found = F.embedding(row.masked_fill(elsewhere.squeeze(-1), 0), weight)
        return self.region.leave(found - (found * elsewhere).detach())

    patch.setattr(VocabParallelEmbedding, "forward", forward)


def chunk_means_averaged(patch: Patch) -> None:
    """The mean loss is that of the chunks' means, though the last has fewer tokens."""
    right = losses.linear_cross_entropy

    def wrong(x: Tensor, weight: Tensor, targets: Tensor, comm: Collectives, chunk: int, backend: str) -> Tensor:
        pairs = zip(x.split(chunk), targets.split(chunk), strict=True)
        return torch.stack([right(rows, weight, its, comm, chunk, backend) for rows, its in pairs]).mean()

    patch.setattr(gpt, "linear_cross_entropy", wrong)


def learned_positions_start_anew_in_each_slice(patch: Patch) -> None:
    """With sequence parallelism each tensor rank takes the first positions."""

    def forget(_: None, self: Embedding, *arguments: Any) -> None:
        self.slice = 0

    _after(patch, Embedding, "__init__", forget)


def rotary_positions_start_anew_in_each_slice(patch: Patch) -> None:
    right = gpt.rotation

    def wrong(length: int, *arguments: Any) -> Tensor:
        half = -(-length // 2)
        return torch.cat([right(half, *arguments)] * 2, 1)[:, :length]

    patch.setattr(gpt, "rotation", wrong)


def rotary_pairs_are_neighbours(patch: Patch) -> None:
    """Features 2i and 2i + 1 turn together: right in itself, but another model than the weights were trained in."""

    def wrong(x: Tensor, by: Tensor) -> Tensor:
        cos, sin = by
        first, second = x[..., ::2], x[..., 1::2]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2).to(x.dtype)

    patch.setattr(attention, "rotate", wrong)


def slices_gathered_in_another_order(patch: Patch) -> None:
    """With sequence parallelism a layer sees the positions rotated by half."""

    def rolled(x: Tensor, self: SequenceRegion, *arguments: Any) -> Tensor:
        return x.roll(x.shape[1] // 2, 1) if self.name == "feed_forward" else x

    _after(patch, SequenceRegion, "enter", rolled)


def attention_scaled_by_the_number_of_heads(patch: Patch) -> None:
    """Of this process: another temperature in every layout."""
    right = F.scaled_dot_product_attention

    def wrong(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
        return right(q / math.sqrt(q.shape[1]), k, v, **named)

    patch.setattr(F, "scaled_dot_product_attention", wrong)


def _halves(z: Tensor, how: Nonlinearity) -> Tensor:
    if not how.gated:
        return F.gelu(z)
    gate, linear = z.chunk(2, -1)
    return F.silu(gate) * linear


def swiglu_in_halves(patch: Patch) -> None:
    """First all gates, then all linear parts: another model in every layout, and in one process too."""
    patch.setattr("tedlab.moe.gather.activate", _halves)
    patch.setattr("tedlab.nn.feed_forward.activate", _halves)
    patch.setattr("tedlab.moe.row_ops.activate", _halves)


def gate_of_shared_experts_of_this_slice_alone(patch: Patch) -> None:
    """Its gradient, where each tensor rank weights the results of its own tokens."""
    right = SharedGateSpec.own
    patch.setattr(SharedGateSpec, "own", lambda self: (replace(p, own_tokens=False) for p in right(self)))


def coefficients_of_this_slice_alone(patch: Patch) -> None:
    """The same of both coefficients, in a pair of blocks."""
    gate_of_shared_experts_of_this_slice_alone(patch)


def sum_of_shared_experts_taken_twice(patch: Patch) -> None:
    """Over the tensor group, as if their part of the sum of all experts' results had not been summed yet."""
    _collective(patch, "all_reduce", lambda launch, x, comm: launch(launch(x)), tag="shared.reduce", phase="forward")


def shortcut_from_the_block_s_own_tokens(patch: Patch) -> None:
    """Routed experts read what shared ones read: an ordinary block, in one process too."""

    def late(_: None, self: ShortcutBlocks, *arguments: Any) -> None:
        self.reads = self.slot = 2 * len(self.blocks) - 1

    _after(patch, ShortcutBlocks, "__init__", late)


def linear_part_without_the_one(patch: Patch) -> None:
    """gpt-oss adds 1 to the linear part."""
    right = activate

    def wrong(z: Tensor, how: Nonlinearity) -> Tensor:
        pair = z.unflatten(-1, (-1, 2))
        return (
            right(torch.stack((pair[..., 0], pair[..., 1] - 1), -1).flatten(-2), how) if how.clamped else right(z, how)
        )

    patch.setattr("tedlab.moe.gather.activate", wrong)


def norms_with_another_epsilon(patch: Patch) -> None:
    """1e-6 where 1e-5 was meant."""

    def change(_: None, self: Any, *arguments: Any) -> None:
        self.eps = 1e-6

    from tedlab.nn import norm

    _after(patch, norm._Norm, "__init__", change)


def bias_added_by_each_tensor_rank(patch: Patch) -> None:
    """To its part of an expert's result, before the parts are summed: T times too much."""

    patch.setattr(LocalExperts, "_adds_bias", True)
    right = experts.add_bias
    patch.setattr(experts, "add_bias", lambda partial, bias, groups, adds: right(partial, bias, groups, True))


def gates_gradient_of_this_tensor_rank_alone(patch: Patch) -> None:
    """Each tensor rank weights its part of an expert's result, so that the gradient of a weight is a sum of parts."""
    right = differentiable.copy_to

    def wrong(x: Tensor, comm: Collectives, kind: Any, tag: str) -> Tensor:
        return x if tag == "experts.copy_gates" else right(x, comm, kind, tag)

    patch.setattr("tedlab.moe.local.copy_to", wrong)
    patch.setattr(ragged, "copy_to", wrong)


def choices_counted_for_another_pilot(patch: Patch) -> None:
    """Pilots are counted by sender, so that those of the second sender's choices are the first one's."""
    right = pilots.order_of

    def wrong(choices: Any, code_iq: Tensor, places: int, most: int) -> Any:
        return right(choices, code_iq.roll(most), places, most)

    patch.setattr(pilots, "order_of", wrong)


def weights_applied_where_experts_are_and_again(patch: Patch) -> None:
    """A token's pilots come back as weighted sums."""
    right = pilots.PilotExperts.sums
    patch.setattr(pilots.PilotExperts, "sums", lambda self, x, gate, *rest: right(self, x, gate * gate, *rest))


def weights_gradient_stays_where_experts_are(patch: Patch) -> None:
    """Weights travel with pilots, and their gradients must come back."""
    right = differentiable.all_to_all
    patch.setattr(pilot_steps, "all_to_all", lambda x, *rest: right(x.detach(), *rest))


def gathered_tokens_gradient_of_this_process_alone(patch: Patch) -> None:
    """Each process computes a part of a token's sum, so that the gradient of a gathered token is a sum of parts."""

    def wrong(self: Any, gradient: Tensor) -> Pending:
        own = gradient.chunk(self.comm.size(self.kind))[self.comm.rank(self.kind)].contiguous()
        return Pending(lambda: own)

    patch.setattr(issued._Gathering, "start_adjoint", wrong)


def weights_gradient_stays_on_the_node(patch: Patch) -> None:
    """Weights also travel between nodes, and their gradients must come back all the way."""
    right = differentiable.all_to_all

    def wrong(x: Tensor, comm: Collectives, kind: Any, *rest: Any) -> Tensor:
        return right(x.detach() if kind == "expert_between_nodes" else x, comm, kind, *rest)

    patch.setattr(pilot_steps, "all_to_all", wrong)


def own_pilots_behind_replicas_on_the_way_back(patch: Patch) -> None:
    """X-MoE's dispatcher puts replicas before pilots, and its combiner takes pilots to be the first."""
    right = pilot_steps.Step.back

    def wrong(self: pilot_steps.Step, y_pH: Tensor, arrived: pilot_steps.Arrived) -> Any:
        first = arrived.told.pilots.received[0] if self.kind == "expert_in_node" else 0
        return right(self, torch.cat((y_pH[first:], y_pH[:first])), arrived)

    patch.setattr(pilot_steps.Step, "back", wrong)


def replicas_sent_to_another_rank_of_the_node(patch: Patch) -> None:
    """Numbers and weights of choices go to their expert's process, but pilots to the next one."""
    right = pilot_steps.Step.send

    def wrong(self: pilot_steps.Step, x: Tensor, gate: Tensor, sent: Any, told: Any) -> Any:
        if self.kind == "expert_in_node":
            pilots, to_first = sum(told.pilots.sent), told.pilots.sent[0]
            rolled = torch.cat((sent.token_R[to_first:pilots], sent.token_R[:to_first], sent.token_R[pilots:]))
            sent = replace(sent, token_R=rolled)
        return right(self, x, gate, sent, told)

    patch.setattr(pilot_steps.Step, "send", wrong)


def pilots_of_a_slice_sent_as_if_tensor_ranks_had_the_same(patch: Patch) -> None:
    """As in plain TED, which sums the gradients of tokens over the tensor group: that adds up those of other slices."""
    right = pilots.PilotExperts.enter

    def wrong(self: pilots.PilotExperts, x_TH: Tensor) -> Any:
        return right(self, differentiable.copy_to(x_TH, self.comm, "tensor", "experts.copy"))

    patch.setattr(pilots.PilotExperts, "enter", wrong)


def pilots_drawn_anew_in_recomputation(patch: Patch) -> None:
    """X-MoE draws which choice of a token becomes its pilot; a second pass must come to the same."""
    right = pilots.list_pilots

    def wrong(numbered: Any, *rest: Any) -> Any:
        sent = right(numbered, *rest)
        if not recompute.recomputing():
            return sent
        pilots_sent = int(numbered.pilots_s.sum())
        drawn = torch.randperm(pilots_sent, generator=torch.Generator().manual_seed(1))
        return replace(sent, token_R=torch.cat((sent.token_R[:pilots_sent][drawn], sent.token_R[pilots_sent:])))

    patch.setattr(pilots, "list_pilots", wrong)


def rows_by_way_of_nodes_stay_sorted_by_place(patch: Patch) -> None:
    """After both exchanges rows lie by the sender's place in its node, and must be sorted by sender."""
    patch.setattr(NodeRoute, "_by_node", lambda self, x, sizes: x)


def bias_gradient_of_this_slice_alone(patch: Patch) -> None:
    """A bias that is added to a reduce-scatter's result gets its gradient from this process's slice."""
    right = differentiable._ScatterFrom.backward

    def wrong(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        whole, of_bias, *rest = right(ctx, *grads)
        if of_bias is not None and ctx.bias_shape != whole.shape:
            of_bias = grads[0].sum_to_size(ctx.bias_shape)
        return whole, of_bias, *rest

    patch.setattr(differentiable._ScatterFrom, "backward", staticmethod(wrong))


# ---- routing, capacity, auxiliary losses -------------------------------------------------------------------------


def capacity_not_padded(patch: Patch) -> None:
    """Other tokens are dropped than in one process (DeepSpeed's capacity 17 under tensor 2)."""
    right = capacity.expert_capacity
    patch.setattr(capacity, "expert_capacity", lambda tokens, e, k, factor, multiple: right(tokens, e, k, factor, 1))


def capacity_rounded_down(patch: Patch) -> None:
    right = capacity.expert_capacity
    patch.setattr(
        capacity,
        "expert_capacity",
        lambda tokens, e, k, factor, multiple: right(tokens, e, k, factor, 1) // multiple * multiple,
    )


def capacity_of_all_data_ranks(patch: Patch) -> None:
    """From the tokens of the whole expert group: fewer are dropped than by one rank's share."""
    right = router.group_capacity
    patch.setattr(router, "group_capacity", lambda moe, tokens, groups: right(moe, tokens * 2, groups))


def last_tokens_served_first(patch: Patch) -> None:
    """A full expert drops the tokens that came first."""
    right = router.assign_slots

    def wrong(expert_TK: Tensor, num_experts: int, slots: int, _: None) -> tuple[Tensor, Tensor, Tensor]:
        slot_TK, _, load = right(expert_TK.flip(0), num_experts, slots)
        slot_TK = slot_TK.flip(0).contiguous()
        return slot_TK, router.choices_of_slots(slot_TK, num_experts * slots), load

    patch.setattr(router, "assign_slots", wrong)


def second_choices_beside_first_ones(patch: Patch) -> None:
    """Token by token, each with all its choices, where first choices go before second ones."""
    right = router.assign_slots

    def wrong(expert_TK: Tensor, num_experts: int, slots: int, _: None) -> tuple[Tensor, Tensor, Tensor]:
        slot, _, load = right(expert_TK.reshape(-1, 1), num_experts, slots)
        slot_TK = slot.view_as(expert_TK)
        return slot_TK, router.choices_of_slots(slot_TK, num_experts * slots), load

    patch.setattr(router, "assign_slots", wrong)


def dropped_tokens_get_somebody_elses_result(patch: Patch) -> None:
    """A choice without a slot reads slot 0."""
    patch.setattr(row_ops, "take", lambda x, index, missing=False: x.index_select(0, index.clamp(min=0)))


def gates_detached(patch: Patch) -> None:
    """The router learns from its auxiliary losses alone."""
    right = dispatch.merge_choices
    patch.setattr(
        dispatch,
        "merge_choices",
        lambda y, routing, *kernel: right(y, routing._replace(gate_TK=routing.gate_TK.detach()), *kernel),
    )


def _decided(patch: Patch, change: Callable[[router.Decision, Tensor], router.Decision]) -> None:
    _after(patch, router.Router, "decide", lambda decision, self, logits_TE, *_: change(decision, logits_TE))


def gates_are_logits(patch: Patch) -> None:
    """X-MoE (b0283d5): by default the weights of choices are raw logits, negative ones too."""

    def wrong(self: router.Router, logits_TE: Tensor, scores_TE: Tensor, expert_TK: Tensor) -> Tensor:
        return logits_TE.gather(1, expert_TK)

    patch.setattr(router.Router, "gates", wrong)


def gates_not_renormalised(patch: Patch) -> None:
    """The gates of several choices are their probabilities as they are."""
    _decided(
        patch,
        lambda decision, logits: decision._replace(gate_TK=logits.softmax(-1).topk(decision.gate_TK.shape[1]).values),
    )


def logits_as_weights_of_choices(patch: Patch) -> None:
    """X-MoE's released default weights results with raw logits, which may be negative."""
    _decided(patch, lambda decision, logits: decision._replace(gate_TK=logits.topk(decision.gate_TK.shape[1]).values))


def gates_renormalised_after_dropping(patch: Patch) -> None:
    """What a dropped choice had goes to the others."""

    def change(decision: router.Decision, logits: Tensor) -> router.Decision:
        kept = decision.gate_TK * (decision.slot_TK >= 0)
        return decision._replace(gate_TK=kept / kept.sum(-1, keepdim=True).clamp(min=1e-9))

    _decided(patch, change)


def balance_of_first_choices(patch: Patch) -> None:
    """The load-balancing loss does not count second choices, though it was asked to (GShard's rule)."""

    def wrong(self: router.Router, expert_TK: Tensor, slot_TK: Tensor | None, like_TE: Tensor) -> Tensor:
        return torch.zeros_like(like_TE, requires_grad=False).scatter_(1, expert_TK[:, :1], 1.0)

    patch.setattr(router.Router, "_counted", wrong)


def balance_of_dropped_choices_too(patch: Patch) -> None:
    """Though it was to count those alone that found room."""
    right = router.Router._counted
    patch.setattr(router.Router, "_counted", lambda self, expert_TK, _, like_TE: right(self, expert_TK, None, like_TE))


def balance_of_sequences_over_the_micro_batch(patch: Patch) -> None:
    """All sequences of a micro-batch count together where each was to count by itself."""
    right = router.Router._losses

    def wrong(self: router.Router, decision: Any, z_T: Tensor, padding_T: Any, sequence: int) -> Any:
        return right(self, decision, z_T, padding_T, len(z_T))

    patch.setattr(router.Router, "_losses", wrong)


def probabilities_of_sigmoid_scores_not_normalised(patch: Patch) -> None:
    """In the balance loss, which is then smaller the smaller all scores are."""
    patch.setattr(router.Router, "probabilities", lambda self, scores_TE: scores_TE)


def gates_scaled_twice(patch: Patch) -> None:
    _after(patch, router.Router, "gates", lambda gates_TK, self, *_: gates_TK * self.config.router.gate_scale)


def biases_in_the_weights(patch: Patch) -> None:
    """Choices are weighted by what they were made by, and not by their scores."""
    right = router.Router.gates

    def wrong(self: router.Router, logits_TE: Tensor, scores_TE: Tensor, expert_TK: Tensor) -> Tensor:
        return right(self, logits_TE, scores_TE + local(self.bias) if self.biased else scores_TE, expert_TK)

    patch.setattr(router.Router, "gates", wrong)


def groups_scored_by_their_best_expert(patch: Patch) -> None:
    """DeepSeek-V2's rule in place of V3's."""
    right = router.best_experts
    patch.setattr(router, "best_experts", lambda *arguments: right(*arguments[:-1], "max"))


def groups_of_this_rank(patch: Patch) -> None:
    """Each process counts the experts of groups from its own ones on."""

    def shifted(
        expert_TK: Tensor, preferred_TE: Tensor, bias_E: Tensor | None, top_k: int, groups: int, *_: Any
    ) -> Tensor:
        experts = preferred_TE.shape[-1]
        return (expert_TK + dist.get_rank() * experts // groups) % experts

    _after(patch, router, "best_experts", shifted)


def full_experts_keep_their_worst_choices(patch: Patch) -> None:
    """Where they were to keep those of the highest scores."""
    right = router.assign_slots

    def wrong(expert_TK: Tensor, experts: int, slots: int, priority_TK: Tensor | None = None) -> Any:
        return right(expert_TK, experts, slots, None if priority_TK is None else -priority_TK)

    patch.setattr(router, "assign_slots", wrong)


def biases_move_towards_the_load(patch: Patch) -> None:
    """Whoever has much is given more."""
    _after(patch, balance, "bias_step", lambda step_E, *_: -step_E)
    patch.setattr(router, "bias_step", balance.bias_step)


def biases_of_this_data_rank_alone(patch: Patch) -> None:
    """The load is not summed."""
    _collective(patch, "all_reduce", lambda launch, x, comm: x, tag="router.bias")


def biases_of_the_last_micro_batch(patch: Patch) -> None:
    """What the step's others chose is forgotten."""

    def wrong(self: router.Router, report: router.RouterReport) -> None:
        self._load_E = report.load.clone()

    patch.setattr(router.Router, "count", wrong)


def biases_counted_again_in_recomputation(patch: Patch) -> None:
    """Which changes nothing while all micro-batches are recomputed alike: biases depend on shares of the load."""

    def count(routing: router.Routing, self: router.Router, *_: Any) -> None:
        if self.biased and recompute.recomputing():
            self._load_E += routing.report.load

    _after(patch, router.Router, "forward", count)


def biases_start_anew_on_resume(patch: Patch) -> None:
    def forget(strategy: TEDStrategy) -> None:
        assert strategy.model is not None
        for name, buffer in strategy.model.named_buffers():
            if name.endswith("router.bias"):
                local(buffer).zero_()

    _after_loading(patch, forget)


def global_balance_of_this_micro_batch(patch: Patch) -> None:
    """The load of one micro-batch is taken for that of the step."""
    right = balance.global_losses
    patch.setattr(
        module,
        "global_losses",
        lambda sums, totals, micro_batches: right(sums, sums.counts * micro_batches, micro_batches),
    )


def global_balance_of_the_first_data_rank(patch: Patch) -> None:
    """Its counts, times the number of data ranks, for those of all."""

    def wrong(launch: Callable[[Tensor], Any], x: Tensor, comm: Collectives) -> Any:
        return launch(x if comm.rank("data") == 0 else torch.zeros_like(x)) * comm.size("data")

    _collective(patch, "all_reduce", wrong, tag="router.totals")


def global_balance_of_this_data_rank(patch: Patch) -> None:
    """The counts are not summed: the same error where ranks agree on nothing else."""
    _collective(patch, "all_reduce", lambda launch, x, comm: x * comm.size("data"), tag="router.totals")


def global_balance_of_an_earlier_step(patch: Patch) -> None:
    """Counts that lag behind by a step, as if they were gathered while the step trains."""
    right = LanguageModel.on_step_batches

    def wrong(self: LanguageModel, micro_batches: Any) -> None:
        right(self, micro_batches)
        earlier, self._stale = getattr(self, "_stale", self._totals), self._totals
        self._totals = earlier

    patch.setattr(LanguageModel, "on_step_batches", wrong)


def noise_seeded_by_rank(patch: Patch) -> None:
    """Each process draws what no other draws."""
    _after(patch, BatchContext, "tokens", lambda tokens_T, *_: tokens_T + (dist.get_rank() << 20))


def noise_the_same_for_all_micro_batches(patch: Patch) -> None:
    """A token's number is that within its micro-batch."""
    right = BatchContext.tokens

    def wrong(self: BatchContext, *sizes: int) -> Tensor:
        alone = BatchContext(self._place.device)
        return right(alone, *sizes)

    patch.setattr(BatchContext, "tokens", wrong)


def noise_drawn_anew_in_recomputation(patch: Patch) -> None:
    """Choices are kept, but inputs jitter otherwise than in the forward pass."""
    right = BatchContext.uniform

    def wrong(self: BatchContext, stream: int, *arguments: Any, **named: Any) -> Tensor:
        return right(self, stream + 1000 * recompute.recomputing(), *arguments, **named)

    patch.setattr(BatchContext, "uniform", wrong)


def ties_to_the_last_expert(patch: Patch) -> None:
    """Of equally probable experts another is chosen where there are few tokens: in a slice of a sequence."""
    right = Tensor.topk

    def wrong(self: Tensor, k: int, dim: int = -1, **named: Any) -> Any:
        if len(self) > 20:
            return right(self, k, dim=dim, **named)
        values, indices = right(self.flip(-1), k, dim=dim, **named)
        return torch.return_types.topk((values, self.shape[-1] - 1 - indices))

    patch.setattr(Tensor, "topk", wrong)


def expert_numbers_in_one_byte(patch: Patch) -> None:
    """Expert 256 is taken for expert 0 when choices are sorted."""
    right = router.sort_choices

    def wrong(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        place_TK, choice, _ = right(expert_TK % 256, num_experts)
        return place_TK, choice, right(expert_TK, num_experts)[2]

    patch.setattr("tests.moe.test_router.sort_choices", wrong)


def auxiliary_loss_divided_twice(patch: Patch) -> None:
    """Once more by the data ranks (Megatron #3672)."""
    right = router.balance_loss
    patch.setattr(router, "balance_loss", lambda *tensors: right(*tensors) / 2)


def auxiliary_loss_times_tensor(patch: Patch) -> None:
    """Added up over tensor ranks that all have it whole."""
    right = router.balance_loss
    patch.setattr(router, "balance_loss", lambda *tensors: right(*tensors) * 2)


def z_loss_without_a_gradient(patch: Patch) -> None:
    _after(patch, router.Router, "forward", lambda routing, *_: routing._replace(
        report=routing.report._replace(z_loss=routing.report.z_loss.detach())
    ))  # fmt: skip


def z_loss_summed_over_tokens(patch: Patch) -> None:
    """Not their mean; in every layout alike."""
    _after(patch, router.Router, "forward", lambda routing, *_: routing._replace(
        report=routing.report._replace(z_loss=routing.report.z_loss * len(routing.gate_TK))
    ))  # fmt: skip


# ---- token paths -------------------------------------------------------------------------------------------------


def dropped_tokens_gradient_averaged(patch: Patch) -> None:
    """As if the slices of duplicate token dropping were copies: what tokens get back is divided by T."""
    _collective(patch, "all_gather", lambda launch, x, comm: launch(x) / 2, phase="backward")


def exchange_not_inverted_in_backward(patch: Patch) -> None:
    """Gradients go to the next process, not to the one that sent the tokens."""

    def wrong(launch: Callable[[Tensor], Any], x: Tensor, comm: Collectives) -> Any:
        return launch(x.roll(len(x) // comm.size("expert"), 0))

    _collective(patch, "start_all_to_all", wrong, kind="expert", phase="backward")


def exchange_that_is_not_awaited(patch: Patch) -> None:
    """Results are read while they are on their way: one process joins late, and the other has memory nobody filled."""
    right = raw.Functional.all_to_all

    def wrong(self: raw.Functional, x: Tensor, received: Any, sent: Any, group: dist.ProcessGroup) -> raw.Wait:
        if group.rank() == 1:
            time.sleep(0.02)
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(raw, "_awaited", lambda result: result)
            result: Any = right(self, x, received, sent, group)
        return lambda: torch.nan_to_num(result.elem.clone()).clamp(-1, 1)  # whatever is there, but finite

    patch.setattr(raw.Functional, "all_to_all", wrong)


def chunks_returned_in_another_order(patch: Patch) -> None:
    """The chunk that was computed last is the first."""
    right = dispatch.AllToAllPath.receive
    patch.setattr(dispatch.AllToAllPath, "receive", lambda self, back, routing: right(self, back[::-1], routing))


def rows_of_chunks_swapped(patch: Patch) -> None:
    """The rows of the chunk that was computed last are the first that return."""
    right = ragged._joined
    patch.setattr(ragged, "_joined", lambda back: right(back[::-1]))


def chunk_computed_before_it_has_arrived(patch: Patch) -> None:
    """See :func:`exchange_that_is_not_awaited`, of rows in chunks."""
    exchange_that_is_not_awaited(patch)


def padding_of_dropped_slots_cut_at_the_wrong_end(patch: Patch) -> None:
    """Where T does not divide the capacity, there is one empty slot more than the router knows of."""

    def wrong(self: dispatch.DroppingPath, y: Tensor, routing: Any) -> Tensor:
        y = y[:, y.shape[1] - len(routing.choice_EC) // self.num_experts :]
        return ragged.merge_choices(y.flatten(0, 1), routing)

    patch.setattr(dispatch.DroppingPath, "_tokens", wrong)


def padding_of_dealt_rows_cut_at_the_wrong_end(patch: Patch) -> None:
    """Where T does not divide the rows, the last one is nobody's."""

    def wrong(self: DealtPath, back: list[Any], routing: Any) -> Tensor:
        hand = ragged._joined(back).unsqueeze(1)
        rows = differentiable.gather_from(hand, self.comm, "tensor", "combine.gather", dim=1).flatten(0, 1)
        return ragged.merge_choices(rows[len(rows) - len(routing.choice_EC) :], routing)

    patch.setattr(DealtPath, "receive", wrong)


def _lend_backward(patch: Patch, wrong: Callable[..., Any]) -> None:
    """``wrong(right, ctx, own, of_borrowed)`` in place of the backward pass of an exchange of lent experts."""
    right = exchange._Lend.backward
    patch.setattr(
        exchange._Lend,
        "backward",
        staticmethod(lambda ctx, *grads: wrong(right, ctx, list(grads[:-1]), grads[-1])),
    )


def lent_gradients_not_returned(patch: Patch) -> None:
    """The borrower keeps them, as for weights that are its own."""
    _lend_backward(patch, lambda right, ctx, own, borrowed: right(ctx, *own, torch.zeros_like(borrowed)))


def lent_gradients_returned_twice(patch: Patch) -> None:
    """As when two buffers are keyed by the same pair of expert and borrower."""
    _lend_backward(patch, lambda right, ctx, own, borrowed: right(ctx, *own, 2 * borrowed))


def lent_gradients_divided_by_expert_data(patch: Patch) -> None:
    """Averaged over replicas, which the reduction does anyway."""

    def wrong(right: Any, ctx: Any, own: list[Tensor], borrowed: Tensor) -> Any:
        return right(ctx, *own, borrowed / ctx.comm.size("expert_data"))

    _lend_backward(patch, wrong)


def lent_gradients_of_one_borrower_alone(patch: Patch) -> None:
    """Written over each other where several processes borrow an expert."""

    def wrong(ctx: Any, *grads: Tensor) -> Any:
        *own, flat = grads
        (lent,) = ctx.saved_tensors
        back = ctx.loans.splits.reverse
        returned = ctx.comm.all_to_all(flat, "expert", tag="experts.lend", phase="backward", splits=back)
        parts = returned.split([shape.numel() for shape in ctx.shapes], 1)
        for grad, part, shape in zip(own, parts, ctx.shapes, strict=True):
            before = grad.clone()
            for expert, of_copy in zip(lent.tolist(), part.unflatten(1, shape), strict=True):
                grad[expert] = before[expert] + of_copy
        return None, None, None, *own

    patch.setattr(exchange._Lend, "backward", staticmethod(wrong))


def lent_from_a_stale_copy(patch: Patch) -> None:
    """Copied once, before the optimizer stepped."""
    right, copies = exchange._Lend.forward, {}

    def wrong(ctx: Any, comm: Collectives, loans: Any, lent: Tensor, *weights: Tensor) -> Any:
        stale = copies.setdefault(weights[0].data_ptr(), [weight.clone() for weight in weights])
        *_, flat = right(ctx, comm, loans, lent, *stale)
        return *(weight.view_as(weight) for weight in weights), flat

    patch.setattr(exchange._Lend, "forward", staticmethod(wrong))


def lent_twice_to_the_same_borrower(patch: Patch) -> None:
    """In two ranges of the expert's rows. The borrower adds up the gradients of both, and returns the sum for each."""
    right = policy.least_loaded

    def halves(load_E: Any, *, processes: int, **settings: Any) -> plan.Plan:
        once = right(load_E, processes, **settings)
        twice: list[plan.Loan] = []
        for loan in once.loans:
            middle = (loan.start + loan.stop) // 2
            twice += loan._replace(stop=middle), loan._replace(start=middle)
        return replace(once, loans=tuple(twice))

    def wrong(right: Any, ctx: Any, own: list[Tensor], borrowed: Tensor) -> Any:
        of_both = borrowed.unflatten(0, (-1, 2)).sum(1)
        return right(ctx, *own, of_both.repeat_interleave(2, 0))

    patch.setattr(policy, "least_loaded", halves)
    _lend_backward(patch, wrong)


def limit_of_rows_rounded_down(patch: Patch) -> None:
    """So that rows are left over, which somebody who is full gets: a second range of the same expert.

    LLEP's own code, https://github.com/SalesforceAIResearch/LeastLoadedEP
    """
    patch.setattr(plan, "math", SimpleNamespace(ceil=math.floor))


def rows_returned_in_the_order_of_experts(patch: Patch) -> None:
    """Not in that of the senders who wait for them."""
    patch.setattr(Arrangement, "restore", lambda self, y: y)


def counts_of_experts_swapped(patch: Patch) -> None:
    """Of as many rows as came, the first expert takes the last one's share."""

    def swapped(result: Any, self: RaggedPath, *arguments: Any) -> Any:
        def finish() -> Any:
            (exchange,), moved = result()
            return (replace(exchange, counts_ise=exchange.counts_ise.flip(-1), sizes=exchange.sizes[::-1]),), moved

        return finish

    _after(patch, RaggedPath, "_waiting", swapped)


# ---- recomputation -----------------------------------------------------------------------------------------------


def recompute_that_routes_anew(patch: Patch) -> None:
    """Where the second pass computes other logits, tokens change their experts (torchtitan #1117)."""
    decide = router.Router.decide

    def wrong(self: router.Router, logits_TE: Tensor, *arguments: Any) -> router.Decision:
        return decide(self, -logits_TE if recompute.recomputing() else logits_TE, *arguments)

    patch.setattr(router, "pin", lambda decision: decision)
    patch.setattr(router.Router, "decide", wrong)


def kept_result_of_another_rank(patch: Patch) -> None:
    """Shards are gathered from the wrong end: CAC's results are permuted."""

    def wrong(launch: Callable[[Tensor], Any], x: Tensor, comm: Collectives) -> Any:
        return launch(x).roll(len(x), 0)

    _collective(patch, "all_gather", wrong, kind="tensor", phase="recompute")


def kept_results_in_another_order(patch: Patch) -> None:
    """CAC takes the first two results of one shape for each other."""
    right = recompute._Region.rewind

    def wrong(self: Any) -> None:
        right(self)
        if not recompute._now.second:
            return
        tensors = [n for n, (_, value, _) in enumerate(self._kept) if isinstance(value, Tensor)]
        for i in tensors:
            for j in tensors:
                (a, x, v), (b, y, w) = self._kept[i], self._kept[j]
                if i < j and x.shape == y.shape and x.dtype == y.dtype:
                    self._kept[i], self._kept[j] = (a, y, w), (b, x, v)
                    return

    patch.setattr(recompute._Region, "rewind", wrong)


# ---- optimizer's settings, schedule, data ------------------------------------------------------------------------


def norms_decayed(patch: Patch) -> None:
    """Weight decay pulls norms and biases towards zero, in every layout alike."""

    def change(result: Any, self: LanguageModel) -> None:
        for group in result["optimizer"].param_groups:
            group["weight_decay"] = 0.1

    _after(patch, LanguageModel, "configure_optimizers", change)


def rates_by_the_width_of_the_shard(patch: Patch) -> None:
    """A layer's own tensor, whose fan-in may be divided, is compared with the whole one at the base."""
    right = parametrization.scales

    def wrong(spec: Any, model: ModelConfig, moe: MoEConfig) -> Any:
        size = dist.get_world_size()
        degrees = ParallelDegrees(size, size)

        def local(its: ModelConfig, its_moe: MoEConfig) -> Any:
            made = spec(its, its_moe).parameters()
            if its is not model:
                return SimpleNamespace(parameters=lambda: made)
            parts = (p if p.fan_in is None else replace(p, shape=p.local_shape(degrees)) for p in made)
            return SimpleNamespace(parameters=lambda: parts)

        return right(local, model, moe)

    patch.setattr(module, "scales", wrong)


def initial_weights_of_the_base(patch: Patch) -> None:
    """Initial weights do not follow the width, though learning rates do."""
    patch.setattr(gpt, "scales", lambda *arguments: {})


def schedule_one_step_late(patch: Patch) -> None:
    """The first step has a learning rate of 0, in every layout alike."""
    right = LanguageModel.configure_optimizers

    def wrong(self: LanguageModel) -> Any:
        result: Any = right(self)
        scheduler = result["lr_scheduler"]["scheduler"]
        factor = scheduler.lr_lambdas[0]
        scheduler.lr_lambdas = [lambda step: factor(step - 1) if step else 0.0] * len(scheduler.lr_lambdas)
        for group, base in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = 0.0 * base
        return result

    patch.setattr(LanguageModel, "configure_optimizers", wrong)


def warm_up_from_zero(patch: Patch) -> None:
    from tedlab.optim import schedule
    from tests.optim import test_schedule

    right = schedule.learning_rate_schedule

    def wrong(name: str, warmup: int, *arguments: Any) -> Callable[[int], float]:
        factor = right(name, warmup, *arguments)
        return lambda step: step / warmup if step < warmup else factor(step)

    patch.setattr(test_schedule, "learning_rate_schedule", wrong)


def data_order_by_layout(patch: Patch) -> None:
    """The permutation is drawn from a seed that has the number of data ranks in it."""

    right = MicroBatchSampler.__init__

    def wrong(self: MicroBatchSampler, *arguments: Any, **named: Any) -> None:
        right(self, *arguments, **named)
        self.seed += self.num_replicas

    patch.setattr(MicroBatchSampler, "__init__", wrong)


def every_epoch_in_the_same_order(patch: Patch) -> None:
    patch.setattr(MicroBatchSampler, "set_epoch", lambda self, epoch: None)


# ---- checkpoints -------------------------------------------------------------------------------------------------


def optimizer_state_of_another_shard(patch: Patch) -> None:
    """After loading, each rank holds its neighbour's moments (DeepSpeed #6589)."""
    right = Bucket.shard_of

    def wrong(self: Bucket, tensors: Any) -> Tensor:
        own = self.own
        start = (own.start + self.shard_size) % len(self.flat)
        self.own = slice(start, start + self.shard_size)
        shard = right(self, tensors)
        self.own = own
        return shard

    patch.setattr(Bucket, "shard_of", wrong)


def _loaded_experts(patch: Patch, choose: Callable[[Tensor, int, int], Tensor]) -> None:
    def change(_: Any, tensors: dict[str, Any], *arguments: Any) -> None:
        for name, tensor in tensors["model"].items():
            if "experts" in name:
                own = tensor.to_local()
                own.copy_(choose(tensor.full_tensor(), dist.get_rank(), len(own)))

    _after(patch, directory, "load", change)
    patch.setattr("tedlab.checkpoint.load", directory.load)


def experts_loaded_from_another_rank(patch: Patch) -> None:
    """All expert ranks load the first experts (DeepSpeed #6589)."""
    _loaded_experts(patch, lambda whole, rank, number: whole[:number])


def experts_dealt_out_in_turn_on_loading(patch: Patch) -> None:
    """Process r of E_p takes experts r, r + E_p, … where it holds a run of neighbours."""
    _loaded_experts(patch, lambda whole, rank, number: whole[rank % (len(whole) // number) :: len(whole) // number])


def _after_loading(patch: Patch, then: Callable[[TEDStrategy], None]) -> None:
    _after(patch, TEDStrategy, "load_checkpoint", lambda meta, self, *arguments, **named: then(self))


def positions_off_by_one_on_resume(patch: Patch) -> None:
    def roll(strategy: TEDStrategy) -> None:
        assert strategy.model is not None
        for name, parameter in strategy.model.named_parameters():
            if "positions" in name:
                values = local(parameter)
                values.copy_(values.roll(1, 0))

    _after_loading(patch, roll)


def step_count_starts_anew_on_resume(patch: Patch) -> None:
    """Adam corrects its moments' bias as in a first step."""

    def forget(_: None, self: ShardedOptimizer, *arguments: Any) -> None:
        for state in filter(None, self.optimizer.state.values()):
            state["step"] = torch.zeros_like(state["step"])

    _after(patch, ShardedOptimizer, "load_state_dict", forget)


def matrices_not_joined(patch: Patch) -> None:
    """Each tensor rank makes its own part of a matrix orthogonal."""

    def apart(
        self: Matrices, kind: GroupKind, places: list[Any], parts: list[Tensor], group_of: dict[Any, Any]
    ) -> None:
        for n, place in enumerate(places):
            parts[n] = self._become(place, parts[n], group_of)

    patch.setattr(Matrices, "_within", apart)


def fused_matrices_taken_for_one(patch: Patch) -> None:
    """As a user of torch.optim.Muon does, who sees a parameter and not what is in it."""
    patch.setattr(Block, "matrices", lambda self, whole: [whole])
    patch.setattr(Block, "joined", lambda self, matrices: matrices[0])


def moments_start_anew_on_resume(patch: Patch) -> None:
    def forget(_: None, self: ShardedOptimizer, *arguments: Any) -> None:
        for state in filter(None, self.optimizer.state.values()):
            state["exp_avg"] = torch.zeros_like(state["exp_avg"])

    _after(patch, ShardedOptimizer, "load_state_dict", forget)


def masters_not_restored(patch: Patch) -> None:
    """In half precision: the fp32 copy is made of the rounded weights."""

    def forget(_: None, self: ShardedOptimizer, *arguments: Any) -> None:
        for bucket in self.buckets:
            bucket.master.copy_(bucket.shard)

    _after(patch, ShardedOptimizer, "load_state_dict", forget)


def loss_scale_starts_anew_on_resume(patch: Patch) -> None:
    patch.setattr(LossScaler, "load_state_dict", lambda self, state: None)


def _restored_scheduler(patch: Patch, change: Callable[[Any], None]) -> None:
    from torch.optim.lr_scheduler import LambdaLR

    _after(patch, LambdaLR, "load_state_dict", lambda _, self, *arguments: change(self))


def base_learning_rates_not_restored(patch: Patch) -> None:
    """The rate of the first step after a resume is what was saved; those that follow are computed from others."""

    def change(scheduler: Any) -> None:
        scheduler.base_lrs = [2 * rate for rate in scheduler.base_lrs]

    _restored_scheduler(patch, change)


def schedule_off_by_one_on_resume(patch: Patch) -> None:
    def change(scheduler: Any) -> None:
        scheduler.last_epoch += 1

    _restored_scheduler(patch, change)


def epoch_starts_anew_on_resume(patch: Patch) -> None:
    """The samples that an epoch had read before are read again."""
    right = MicroBatchSampler.start_at
    patch.setattr(MicroBatchSampler, "start_at", lambda self, start, step: right(self, replace(start, offset=0), step))


def micro_batches_of_a_stage_counted_by_all_processes(patch: Patch) -> None:
    """A stage's batch is divided by the number of processes, of which tensor ranks read the same."""
    right = FollowRamp._begin

    def wrong(self: FollowRamp, trainer: Any, module: LanguageModel, batches: int) -> None:
        right(self, trainer, module, batches)
        number = self.ramp.at(trainer.global_step).batch_size // (self.micro_batch_size * trainer.world_size)
        trainer.accumulate_grad_batches = MicroBatches(number, batches)

    patch.setattr(FollowRamp, "_begin", wrong)


def stages_start_anew_on_resume(patch: Patch) -> None:
    """A resumed run counts the steps of its stages from where it was resumed."""
    right = FollowRamp.on_train_start

    def wrong(self: FollowRamp, trainer: Any, module: LanguageModel) -> None:
        first, at = trainer.global_step, self.ramp.at
        self.ramp = SimpleNamespace(at=lambda step: at(step - first))  # type: ignore[assignment]
        right(self, trainer, module)

    patch.setattr(FollowRamp, "on_train_start", wrong)


def elements_numbered_by_this_rank(patch: Patch) -> None:
    """Stochastic rounding draws by where an element is in a process's memory."""
    patch.setattr(bucket_of_parameters, "numbers_of", lambda p, where, first: torch.arange(where.start, where.stop))


def averages_of_the_first_rank_s_shard(patch: Patch) -> None:
    """Each process averages what the first one has."""
    right = averages.averaged

    def wrong(config: AverageConfig, average: Tensor, weight: Tensor, before: int) -> Tensor:
        shared = weight.clone()
        dist.broadcast(shared, src=0)
        return right(config, average, shared, before)

    patch.setattr(averages, "averaged", wrong)


def next_epoch_is_the_first_again_on_resume(patch: Patch) -> None:
    """A resumed run reads its epoch to the end, and then the order of the first."""
    right = MicroBatchSampler.set_epoch
    patch.setattr(MicroBatchSampler, "set_epoch", lambda self, epoch: right(self, 0 if self._start.offset else epoch))


def samples_counted_by_this_rank_on_saving(patch: Patch) -> None:
    """The position in the data is that of one data rank of two."""
    _after(patch, TextDataModule, "state_dict", lambda state, self: {**state, "offset": state["offset"] // 2})


def shared_keys_gradient_of_this_rank_alone(patch: Patch) -> None:
    """Tensor ranks that share a head of keys keep the part of its gradient that their own queries caused."""
    _after(patch, ParameterSpec, "partial", lambda partial, self, layout: partial and self.units is None)


def queries_of_this_rank_normed_by_themselves(patch: Patch) -> None:
    """A norm of all heads together takes the mean square of the heads that this process has."""
    patch.setattr(norm, "reduce_from", lambda x, comm, kind, tag: x * comm.size(kind))


def norm_of_all_heads_differentiated_for_own_heads(patch: Patch) -> None:
    """The mean square's gradient is that which this process's heads cause."""
    patch.setattr(norm, "copy_to", lambda x, comm, kind, tag: x)


def latent_s_gradient_of_own_heads(patch: Patch) -> None:
    """Tensor ranks differentiate the latent of keys and values by their own heads alone."""
    right = ReplicatedRegion.enter

    def wrong(self: ReplicatedRegion, x: Tensor) -> Tensor:
        return x if self.name == "attention.latent" else right(self, x)

    patch.setattr(ReplicatedRegion, "enter", wrong)


def window_of_the_tokens_before(patch: Patch) -> None:
    """A token attends to itself and so many others."""
    right = attend._blocks

    def wrong(length: int, window: int | None, device: torch.device) -> Any:
        return right(length, None if window is None else window + 1, device)

    patch.setattr(attend, "_blocks", wrong)
