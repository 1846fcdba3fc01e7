"""Gradients of several micro-batches are added up as they come, to the same bits as after each backward pass."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tedlab.models import GPT
from tedlab.nn import partial_parameters, vocab_parallel_cross_entropy
from tedlab.optim import ShardedOptimizer
from tedlab.optim.bucket import local
from tests.comm.test_ledger import MICRO_BATCH, SEQUENCE, VOCABULARY, Overrides, configuration, topology_of
from tests.pool import WorkerPool

MICRO_BATCHES = 3
DTYPES = torch.float64, torch.float32, torch.bfloat16
CASES: dict[str, Overrides] = {
    "tied": {"optim.tile": 50},
    "untied_overlapped": {"model.tie_embeddings": False, "optim.overlap": True, "optim.bucket_elements": 500},
    "sequence_overlapped": {"parallel.sequence": True, "optim.overlap": True},
    "replicated": {"optim.zero": False, "model.recompute.granularity": "none"},
}


def step(overrides: Overrides, dtype: torch.dtype, afterwards: bool) -> list[Tensor]:
    """Reduced gradients and new weights of a step; ``afterwards``: each pass leaves its gradients in the parameters."""
    config = configuration((4, 2, 2), overrides)
    topology = topology_of(config)
    torch.set_default_dtype(dtype)
    model = GPT(config.model, config.moe, topology, 0)
    torch.set_default_dtype(torch.float32)
    optimizer = ShardedOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.1),
        topology.comm,
        {p: n for n, p in model.named_parameters()},
        partial=partial_parameters(model),
        zero=config.optim.zero,
        tile=config.optim.tile,
        bucket_elements=config.optim.bucket_elements,
        overlap=config.optim.overlap,
    )
    if afterwards:
        optimizer.release()
    sums: dict[nn.Parameter, Tensor] = {}
    for number in range(MICRO_BATCHES):
        draw = torch.Generator().manual_seed(MICRO_BATCHES * topology.comm.rank("data") + number)
        batch = torch.randint(VOCABULARY, (MICRO_BATCH, SEQUENCE + 1), generator=draw)
        if number == MICRO_BATCHES - 1:
            optimizer.expect_backward()
        logits, reports = model(batch[:, :-1])
        loss: Any = vocab_parallel_cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), topology.comm).mean()
        (loss + sum(r.balance_loss for r in reports)).backward()
        for p in model.parameters() if afterwards else ():
            assert p.grad is not None
            sums[p] = sums[p].add_(local(p.grad)) if p in sums else local(p.grad)
            p.grad = None
        assert all(p.grad is None for p in model.parameters())
    for p, total in sums.items():
        p.grad = DTensor.from_local(total, p.device_mesh, p.placements) if isinstance(p, DTensor) else total
    optimizer.reduce_gradients()
    gradients = [bucket.gradient.clone() for bucket in optimizer.buckets if bucket.gradient is not None]
    optimizer.optimizer.step()
    return [*gradients, *(bucket.flat for bucket in optimizer.buckets)]


def both_ways(overrides: Overrides) -> list[tuple[list[Tensor], list[Tensor]]]:
    return [(step(overrides, dtype, False), step(overrides, dtype, True)) for dtype in DTYPES]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (case != "tied")) for case in CASES],
)
def test_gradients_added_as_they_come_are_those_added_afterwards(pool: WorkerPool, case: str) -> None:
    for ours, theirs in (pair for pairs in pool.run(4, both_ways, CASES[case]) for pair in pairs):
        assert len(ours) == len(theirs) > 4
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def left_with_hooks() -> list[bool]:
    """Whether a parameter keeps its gradient: beside an optimizer, and after the optimizer was released."""
    config = configuration((2, 1, 1), {"moe.num_experts": 0})
    parameter = nn.Parameter(torch.ones(3))
    optimizer = ShardedOptimizer(
        torch.optim.SGD([parameter]), topology_of(config).comm, {parameter: "all"}, zero=True, tile=None
    )
    kept = []
    for _ in range(2):
        parameter.sum().backward()
        kept.append(parameter.grad is not None)
        optimizer.release()
    return kept


def test_a_released_optimizer_leaves_gradients_to_the_next(pool: WorkerPool) -> None:
    assert pool.run(2, left_with_hooks) == [[False, True]] * 2
