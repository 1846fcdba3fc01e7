"""Memory by category is what training really keeps."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from tedlab.callbacks import MemoryByCategory
from tedlab.optim.bucket import local
from tests.pool import WorkerPool
from tests.training import Job, Layout, language_model, loader, trainer

LAYOUT = Layout(2, expert=2)  # experts are nowhere else: their state is not sharded, that of all others is, by two
MIB = 2**20


class Burst(Callback):
    """Lives for the time between forward and backward, as activations do."""

    def __init__(self, mib: int) -> None:
        self.mib = mib

    def on_before_backward(self, *_: Any) -> None:
        torch.ones(self.mib * MIB, dtype=torch.uint8)


def train(layout: Layout, job: Job, burst: int = 0) -> tuple[dict[str, Any], int, int]:
    """Bytes by category; local elements of parameters, and of these the experts'."""
    memory, module = MemoryByCategory(), language_model(job)
    fit = trainer(layout, job, max_steps=1, callbacks=[memory, Burst(burst)], accumulate_grad_batches=1)
    fit.fit(module, loader(layout, job, fit.global_rank))
    sizes = {name: local(p).numel() for name, p in module.named_parameters()}
    return memory.overall(fit), sum(sizes.values()), sum(sizes[name] for name in sizes if "experts" in name)


@pytest.mark.parametrize(
    ("precision", "zero", "weight", "state"),
    [
        ("64-true", True, 8, 16),
        ("32-true", False, 4, 8),
        ("bf16-mixed", True, 4, 8),
        ("bf16-true", True, 2, 12),
    ],
)
def test_parameters_gradients_and_optimizer_state_are_counted_to_the_element(
    pool: WorkerPool, precision: str, zero: bool, weight: int, state: int
) -> None:
    """AdamW keeps two moments; with half-precision parameters in fp32, beside a master copy. And a few step counts."""
    memory, elements, experts = pool.run(2, train, LAYOUT, Job(precision=precision, zero=zero))[0]
    assert memory["memory/gradients_bytes"] == weight * elements
    assert 0 <= memory["memory/parameters_bytes"] - weight * elements < 64
    stepped = experts + (elements - experts) / 2 if zero else elements
    assert 0 <= memory["memory/optimizer_bytes"] - state * stepped < 128


def test_the_categories_make_up_the_peak(pool: WorkerPool) -> None:
    memory = pool.run(1, train, Layout(), Job(), 200)[0][0]
    kinds = ("before", "parameters", "gradients", "optimizer", "activations")
    assert sum(memory[f"memory/{kind}_bytes"] for kind in kinds) == memory["memory/peak_bytes"]
    assert memory["memory/peak_bytes_by_rank"] == [memory["memory/peak_bytes"]]


def test_what_lives_between_forward_and_backward_counts_as_activations(pool: WorkerPool) -> None:
    without, with_it = (pool.run(1, train, Layout(), Job(), mib)[0][0]["memory/activations_bytes"] for mib in (0, 300))
    assert 250 * MIB < with_it - without < 350 * MIB
