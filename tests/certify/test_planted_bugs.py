"""Certify notices what the field has shipped: each known bug, planted into a layout, is found, named and measured."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tedlab import capacity
from tedlab.certify import certify
from tedlab.certify.certificate import CONTINUATIONS
from tedlab.checkpoint import directory
from tedlab.comm import differentiable, recompute
from tedlab.moe import router
from tedlab.moe.ragged import Arrangement, ReplicatedRows
from tedlab.nn import sharded
from tedlab.optim import ShardedOptimizer
from tedlab.optim.bucket import Bucket
from tests.certify.runs import Plant, composed, in_pool
from tests.pool import WorkerPool


def _scale_expert_gradients(patch: pytest.MonkeyPatch, factor: float) -> None:
    finish = Bucket.finish_reduction

    def wrong(self: Bucket) -> None:
        pending = self._reduction is not None
        finish(self)
        if pending and self.kind == "expert_data":
            assert self.gradient is not None
            self.gradient.mul_(factor)

    patch.setattr(Bucket, "finish_reduction", wrong)


def expert_gradient_divided_by_expert_data(patch: pytest.MonkeyPatch) -> None:
    """Averaged over its own replicas although it is divided by D already."""
    _scale_expert_gradients(patch, 1 / 2)


def expert_gradient_scaled_by_expert(patch: pytest.MonkeyPatch) -> None:
    """DeepSpeed #5618, pytorch #160285: E_p times too large."""
    _scale_expert_gradients(patch, 4.0)


def input_gradient_not_summed_over_tensor(patch: pytest.MonkeyPatch) -> None:
    """Each tensor rank goes on with its own part of the gradient (Automodel #1260)."""
    patch.setattr(differentiable._CopyTo, "backward", staticmethod(lambda ctx, grad: (grad, None, None, None)))


def replicated_parameter_counted_by_each_tensor_rank(patch: pytest.MonkeyPatch) -> None:
    """In the norm (Megatron #5916, DeepSpeed #8475)."""
    right = Bucket.holders.fget
    assert right is not None

    def wrong(self: Bucket) -> int:
        parameter = self.parameters[0]
        replicated = not any(placement.is_shard() for placement in parameter.placements)
        return right(self) // (parameter.device_mesh.size(-1) if replicated else 1)

    patch.setattr(Bucket, "holders", property(wrong))


def tensor_ranks_with_different_seeds(patch: pytest.MonkeyPatch) -> None:
    """Of initial weights that all should hold alike."""
    right = sharded._seed
    patch.setattr(sharded, "_seed", lambda key: right(key) + dist.get_rank())


def capacity_not_padded(patch: pytest.MonkeyPatch) -> None:
    """Other tokens are dropped than in one process (DeepSpeed's capacity 17 under tensor 2)."""
    right = capacity.expert_capacity
    patch.setattr(capacity, "expert_capacity", lambda tokens, e, k, factor, multiple: right(tokens, e, k, factor, 1))


def auxiliary_loss_divided_twice(patch: pytest.MonkeyPatch) -> None:
    """Once more by the data ranks (Megatron #3672)."""
    right = router.balance_loss
    patch.setattr(router, "balance_loss", lambda *tensors: right(*tensors) / 2)


def optimizer_state_of_another_shard(patch: pytest.MonkeyPatch) -> None:
    """After loading, each rank holds its neighbour's moments (DeepSpeed #6589)."""
    right = Bucket.shard_of

    def wrong(self: Bucket, tensors: Any) -> Tensor:
        own = self._own
        self._own = slice((own.start + self.shard_size) % len(self.flat), None)
        self._own = slice(self._own.start, self._own.start + self.shard_size)
        shard = right(self, tensors)
        self._own = own
        return shard

    patch.setattr(Bucket, "shard_of", wrong)


def experts_loaded_from_another_rank(patch: pytest.MonkeyPatch) -> None:
    """All expert ranks load the first experts (DeepSpeed #6589)."""
    right = directory.load

    def wrong(tensors: dict[str, Any], path: Any, **options: Any) -> None:
        right(tensors, path, **options)
        for name, tensor in tensors["model"].items():
            if "experts" in name:
                tensor.to_local().copy_(tensor.full_tensor()[: len(tensor.to_local())])

    patch.setattr("tedlab.checkpoint.load", wrong)


def step_of_a_stale_gradient(patch: pytest.MonkeyPatch) -> None:
    """A reduction that is not waited for: the shard's first element is lost."""
    finish = Bucket.finish_reduction

    def wrong(self: Bucket) -> None:
        finish(self)
        if self.gradient is not None:
            self.gradient[0] = 0.0

    patch.setattr(Bucket, "finish_reduction", wrong)


def replicas_that_drift(patch: pytest.MonkeyPatch) -> None:
    """By so little, and on a rank that reports nothing, that outputs would tell only later."""
    gather = Bucket.gather_parameters

    def wrong(self: Bucket) -> None:
        gather(self)
        if dist.get_rank() == dist.get_world_size() - 1:
            self.flat[0] += 1e-9

    patch.setattr(Bucket, "gather_parameters", wrong)


def router_gradient_not_summed_when_sliced(patch: pytest.MonkeyPatch) -> None:
    """Each tensor rank has routed its own tokens, and keeps its part of the gradient (Automodel #1260)."""
    patch.setattr(ShardedOptimizer, "_sum_partial_gradients", lambda self: None)


def recompute_that_routes_anew(patch: pytest.MonkeyPatch) -> None:
    """Where the second pass computes other logits, tokens change their experts (torchtitan #1117)."""
    decide = router.Router.decide

    def wrong(self: router.Router, logits_TE: Tensor, *rest: Any) -> router.Decision:
        return decide(self, -logits_TE if recompute._now.second else logits_TE, *rest)

    patch.setattr(router, "pin", lambda decision: decision)
    patch.setattr(router.Router, "decide", wrong)


def dropped_tokens_gradient_averaged(patch: pytest.MonkeyPatch) -> None:
    """As if the slices were copies: what tokens get back is divided by T."""
    right = differentiable._gathered

    def wrong(*arguments: Any) -> Tensor:
        return right(*arguments) / (2 if arguments[-1] == "backward" else 1)

    patch.setattr(differentiable, "_gathered", wrong)


def kept_result_of_another_rank(patch: pytest.MonkeyPatch) -> None:
    """Shards are gathered from the wrong end: CAC's results are permuted."""
    repeated = recompute._Region.repeated

    def wrong(self: Any, *arguments: Any) -> Tensor:
        result = repeated(self, *arguments)
        return result.roll(1, 0) if self.plan.get(arguments[1]) is recompute.Second.SLICE else result

    patch.setattr(recompute._Region, "repeated", wrong)


def overflow_that_is_not_skipped(patch: pytest.MonkeyPatch) -> None:
    """One process overflows, and the others' norms are what is looked at (Lightning's fp16 plugin)."""
    right = ShardedOptimizer._agree

    def wrong(self: ShardedOptimizer) -> None:
        right(self)
        self._finite = True

    patch.setattr(ShardedOptimizer, "_agree", wrong)


def bias_added_by_each_tensor_rank(patch: pytest.MonkeyPatch) -> None:
    """To its part of an expert's result, before the parts are summed: T times too much."""

    def wrong(self: ReplicatedRows, partial: Tensor, bias: Tensor, exchange: Any, arrangement: Arrangement) -> Tensor:
        y = differentiable.reduce_from(partial + bias, self.comm, "expert_tensor", "experts.reduce")
        return arrangement.restore(y)

    patch.setattr(ReplicatedRows, "leave", wrong)


def rows_returned_in_the_order_of_experts(patch: pytest.MonkeyPatch) -> None:
    """Not in that of the senders who wait for them."""
    patch.setattr(Arrangement, "restore", lambda self, y: y)


TP2 = ["parallel=tp2"]
RECOMPUTED = ["model.checkpoint=block"]
CASES: list[tuple[Plant, list[str], str, str]] = [
    # bug, layout, first wrong quantity, what is said of it
    (
        expert_gradient_divided_by_expert_data,
        ["parallel.world_size=4", "parallel.tensor=1", "parallel.expert=2"],
        "gradients",
        "first in step 1: network.blocks.1.feed_forward.experts.up is 0.5 × what one process has = 1/expert or 1/exp",
    ),
    (
        expert_gradient_scaled_by_expert,
        ["parallel=ep4"],
        "gradients",
        "first in step 1: network.blocks.1.feed_forward.experts.up is 4 × what one process has = expert or data",
    ),
    (input_gradient_not_summed_over_tensor, TP2, "gradients", "no multiple of what one process has"),
    (replicated_parameter_counted_by_each_tensor_rank, TP2, "gradient norm", "all parameters is 1."),
    (tensor_ranks_with_different_seeds, TP2, "outputs", "in step 1: logits"),
    (capacity_not_padded, [*TP2, "moe.capacity_factor=1.05"], "outputs", "in step 1"),
    (
        auxiliary_loss_divided_twice,
        ["parallel=ep2"],
        "losses and drops",
        "in step 1: train/aux_loss is 0.5 × what one process has = 1/expert or 1/data",
    ),
    (
        optimizer_state_of_another_shard,
        ["parallel=ep2"],
        "checkpoint continued from one process",
        "in step 3: optimizer state: network.",
    ),
    (
        experts_loaded_from_another_rank,
        ["parallel=ep2"],
        "checkpoint continued from one process",
        "in step 3: outputs: logits",
    ),
    (replicas_that_drift, ["parallel=dp2"], "next weights", "in step 1: network."),
    (step_of_a_stale_gradient, ["parallel=ep2"], "gradients", "is no multiple"),
    (router_gradient_not_summed_when_sliced, [*TP2, "parallel.sequence=true"], "gradients", "first in step 1"),
    (recompute_that_routes_anew, [*TP2, *RECOMPUTED], "gradients", "first in step 1"),
    (dropped_tokens_gradient_averaged, [*TP2, "comm.dtd=true"], "gradients", "first in step 1"),
    (kept_result_of_another_rank, [*TP2, *RECOMPUTED, "comm.cac=shard"], "gradients", "first in step 1"),
    (bias_added_by_each_tensor_rank, [*TP2, "moe.dispatch=dropless"], "outputs", "first in step 2: logits"),
    (rows_returned_in_the_order_of_experts, ["parallel=ep2", "moe.dispatch=dropless"], "outputs", "in step 1"),
    (overflow_that_is_not_skipped, [*TP2, "trainer.precision=16-true"], "gradients", "is absent in one process"),
]


@pytest.mark.parametrize(("bug", "overrides", "quantity", "said"), CASES, ids=[case[0].__name__ for case in CASES])
def test_a_planted_bug_is_caught_and_named(
    pool: WorkerPool, bug: Plant, overrides: list[str], quantity: str, said: str
) -> None:
    needed = [name for name in CONTINUATIONS if quantity.endswith(name)]  # what comes later would not be named
    certificate = certify(composed(*overrides), in_pool(pool, bug), continuations=needed)
    assert not certificate.ok
    culprit = certificate.culprit
    assert culprit is not None
    assert culprit.quantity == quantity, certificate.rows
    assert said in str(culprit)
    assert culprit.error > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("overrides", dict.fromkeys(tuple(case[1]) for case in CASES), ids=" ".join)
def test_without_a_bug_the_same_configurations_pass(pool: WorkerPool, overrides: tuple[str, ...]) -> None:
    certificate = certify(composed(*overrides), in_pool(pool))
    assert certificate.ok, certificate.rows
    assert torch.tensor([row.compared for row in certificate.rows]).min() >= 3
