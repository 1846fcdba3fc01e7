"""What other frameworks got wrong, by the thread that reports it: each as a run that must equal one process.

``test_planted_bugs.py`` has the same mistakes the other way round: planted here, they are found.
"""

import pytest

from tedlab.certify import Certificate, certify
from tests.certify.runs import composed, in_pool
from tests.pool import WorkerPool


def certified(pool: WorkerPool, *overrides: str) -> Certificate:
    certificate = certify(composed(*overrides), in_pool(pool), continuations=())
    assert certificate.ok, str(certificate.culprit)
    return certificate


def test_deepspeed_5618_expert_gradients_do_not_grow_with_expert_parallelism(pool: WorkerPool) -> None:
    """Also pytorch #160285 (2× at E_p = 2), Megatron #5956 (divided by E_p)."""
    certified(pool, "parallel=ep4")


def test_megatron_5916_the_gradient_norm_counts_experts_and_nothing_twice(pool: WorkerPool) -> None:
    """Also DeepSpeed #8475. The norm is compared with that of one process, and clipping depends on it."""
    certificate = certified(pool, "parallel=tp2_ep2", "trainer.gradient_clip_val=0.01")
    assert {"gradient norm", "clip factor"} <= {row.quantity for row in certificate.rows}


def test_megatron_1628_tensor_parallel_experts_without_expert_parallelism(pool: WorkerPool) -> None:
    certified(pool, "parallel=tp4")


def test_automodel_1260_gradients_through_the_router_are_whole(pool: WorkerPool) -> None:
    """Also Automodel #2995, transformers #48205: the loss looks right, the router's gradient is a part."""
    certified(pool, "parallel=tp2_ep2", "moe.top_k=2", "moe.aux_loss=0", "moe.z_loss=0")


@pytest.mark.parametrize("layout", ["tp2", "dp2", "ep2"])
def test_megatron_3672_auxiliary_losses_do_not_depend_on_the_layout(pool: WorkerPool, layout: str) -> None:
    """Also Megatron #5047, Automodel #1412: divided by D, by T, or by the number of accumulated micro-batches."""
    certified(pool, f"parallel={layout}", "moe.aux_loss=1.0", "moe.z_loss=1.0")


def test_deepspeed_5066_experts_without_a_token(pool: WorkerPool) -> None:
    """Also DeepSpeed #4808, #5794, torchtitan #1166: they hang or diverge. Three tokens, eight experts."""
    overrides = ["moe.num_experts=8", "model.sequence_length=3", "data.micro_batch_size=1", "data.batch_size=2"]
    certified(pool, "parallel=ep2", *overrides)


def test_deepspeed_capacity_that_tensor_parallelism_does_not_divide(pool: WorkerPool) -> None:
    """``input dimension 1 (17) is not divisible by tensor parallel world size (2)``; here it is padded alike."""
    certified(pool, "parallel=tp2_ep2", "moe.capacity_factor=1.05")


def test_deepspeed_drift_tensor_ranks_that_draw_random_numbers_route_alike(pool: WorkerPool) -> None:
    """Random token selection under different seeds made replicas drift; data ranks are one here, so one process draws
    the same."""
    certified(pool, "parallel=tp2", "moe.gating=deepspeed_top1", "moe.capacity_factor=0.5")


def test_deepspeed_6589_each_rank_loads_its_own_experts(pool: WorkerPool) -> None:
    certificate = certify(composed("parallel=ep2"), in_pool(pool))
    assert certificate.ok, str(certificate.culprit)
    assert sum("checkpoint" in row.quantity for row in certificate.rows) == 3
