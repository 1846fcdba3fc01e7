"""The sharded step equals the plain one, bit for bit across tile sizes; precisions, overflow, overlap, memory.

More layouts and options are in ``tests/certify/test_matrix.py``.
"""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from tedlab.config import MoEConfig
from tests.pool import WorkerPool
from tests.test_parity import compare, reference
from tests.training import Job, Layout, Record, full, language_model, loader, train, trainer

MOE = MoEConfig(num_experts=4, capacity_factor=1.0)


LAYOUTS = [Layout(4, expert=2), Layout(4, tensor=2, expert=2), Layout(8, tensor=2, expert=2)]


SAMPLE = [(LAYOUTS[0], True), (LAYOUTS[1], False), (LAYOUTS[2], True)]  # CI's: with ZeRO and without


@pytest.mark.parametrize(
    ("layout", "zero"),
    [
        pytest.param(*cell, marks=pytest.mark.slow if cell in SAMPLE else pytest.mark.exhaustive)
        for cell in product(LAYOUTS, (True, False))
    ],
    ids=str,
)
def test_three_steps_equal_one_process(pool: WorkerPool, layout: Layout, zero: bool) -> None:
    job = Job(moe=MOE, steps=3, clip=0.1, zero=zero, tile=2000)
    record = pool.run(layout.world_size, train, layout, job)[0]
    errors = compare(record, reference(pool, Job(moe=MOE, steps=3, clip=0.1)))
    wrong = {name: error for name, error in errors.items() if not error < 1e-9}
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        *((Layout(), "64-true"), (Layout(), "bf16-true"), (Layout(4, tensor=2, expert=2), "64-true")),
        pytest.param(Layout(4, tensor=2, expert=2), "bf16-true", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_tile_size_changes_not_one_bit(pool: WorkerPool, layout: Layout, precision: str) -> None:
    """With tiles of 7 elements every tensor is split, and most tiles hold parts of two."""
    jobs = [Job(steps=2, tile=tile, precision=precision, micro_batches=2) for tile in (None, 7, 1_800_000)]
    records = [ranks[0] for ranks in pool.run_each(layout.world_size, train, [(layout, job) for job in jobs])]
    for other in records[1:]:
        for name, weight in records[0].weights.items():
            assert torch.equal(weight, other.weights[name]), name


PRECISIONS = ("32-true", "bf16-true", "bf16-mixed", "16-true")


@pytest.fixture(scope="module")
def records(pool: WorkerPool) -> dict[str, Record]:
    jobs = [(Layout(4, tensor=2, expert=2), Job(moe=MOE, steps=3, precision=precision)) for precision in PRECISIONS]
    return {precision: ranks[0] for precision, ranks in zip(PRECISIONS, pool.run_each(4, train, jobs), strict=True)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_stays_close_to_float64(pool: WorkerPool, records: dict[str, Record], precision: str) -> None:
    record = records[precision]
    exact = reference(pool, Job(moe=MOE, steps=3))
    tolerance = 1e-5 if precision == "32-true" else 2e-2
    assert record.losses == pytest.approx(exact.losses, rel=tolerance)
    stored = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32)
    assert {w.dtype for w in record.weights.values()} == {stored}


def weights_and_skips(layout: Layout, precision: str, overflow_at: int | None) -> tuple[list[dict], int, float]:
    """Trains two steps; in one of them one data rank's loss overflows."""
    job = Job(micro_batches=layout.data, precision=precision)

    class Overflow(Callback):
        weights: list[dict] = []

        def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
            if trainer.global_step == overflow_at and trainer.strategy.topology.comm.rank("data") == 1:
                loss.register_hook(lambda g: g * float("inf"))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.weights.append({n: full(p) for n, p in pl_module.named_parameters()})

    callback = Overflow()
    Overflow.weights = []
    plugins = [MixedPrecision("16-mixed", "cpu")] if precision == "16-mixed" else None
    fit = trainer(
        layout,
        job,
        max_steps=2,
        callbacks=[callback],
        accumulate_grad_batches=1,
        **({"plugins": plugins, "precision": None} if plugins else {}),
    )
    fit.fit(language_model(job), loader(layout, job, fit.global_rank))
    scaler = fit.strategy.loss_scaler
    return callback.weights, scaler.skipped_steps, scaler.scale


@pytest.mark.parametrize("precision", ["16-true", "16-mixed"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(pool: WorkerPool, precision: str) -> None:
    layout = Layout(4, tensor=2, expert=2)
    overflowing, sound = pool.run_each(4, weights_and_skips, [(layout, precision, at) for at in (1, None)])
    for rank, (weights, skipped, scale) in enumerate(overflowing):
        assert skipped == 1, rank
        assert scale == 2.0**15
        assert all(torch.equal(w, weights[1][name]) for name, w in weights[0].items())
    for weights, skipped, scale in sound:
        assert (skipped, scale) == (0, 2.0**16)
        assert any(not torch.equal(w, weights[1][name]) for name, w in weights[0].items())


def state_sizes(layout: Layout, job: Job) -> tuple[int, int]:
    """Elements of optimizer state on this process, and of its local parameters."""
    module = language_model(job)
    fit = trainer(layout, job, max_steps=1, accumulate_grad_batches=job.micro_batches // layout.data)
    fit.fit(module, loader(layout, job, fit.global_rank))
    state = sum(s["exp_avg"].numel() for s in fit.optimizers[0].state.values())
    return state, sum(p.to_local().numel() for p in module.parameters())


def test_zero_divides_the_state_by_the_size_of_each_data_group(pool: WorkerPool) -> None:
    layout = Layout(8, tensor=2, expert=2)  # data 4, expert_data 2
    dense = Job(moe=MoEConfig(num_experts=0))
    jobs = [(replace(layout, expert=1), dense), (layout, Job(zero=False)), (layout, Job())]
    (state, dense_parameters), (everything, parameters), (mixed, _) = (
        ranks[0] for ranks in pool.run_each(8, state_sizes, jobs)
    )
    assert dense_parameters / 4 <= state < dense_parameters / 4 + 16  # at most the padding more
    assert everything == parameters
    assert parameters / 4 < mixed < parameters / 2


def test_reference_of_this_module_is_not_constant(pool: WorkerPool) -> None:
    record: Record = reference(pool, Job(moe=MOE, steps=3))
    assert len(set(record.losses)) == 3


def launches(layout: Layout, job: Job) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Collectives of the last step in order, ``backward`` where that pass ended; and the new weights."""
    seen: list[str] = []

    class Listen(Callback):
        reads_grad = False  # for which gradients would be reduced before this is called

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.clear()
            if batch_idx == 0:
                trainer.strategy.topology.comm.register_hook(
                    lambda call, event: seen.append(call.kind) if (call.tag, event) == reduction else None
                )

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            seen.append("backward")

    reduction = ("gradients.reduce", "start")
    module = language_model(job)
    fit = trainer(layout, job, max_steps=2, callbacks=[Listen()], accumulate_grad_batches=2)
    fit.fit(module, loader(layout, job, fit.global_rank))
    return seen, {n: full(p) for n, p in module.named_parameters()}


def test_overlapped_reductions_start_during_backward_and_change_nothing(pool: WorkerPool) -> None:
    layout = Layout(4, tensor=2, expert=2)
    job = Job(tile=300, bucket_elements=500)  # so that there are several
    after, during = pool.run_each(4, launches, [(layout, replace(job, overlap=overlap)) for overlap in (False, True)])
    for (seen, weights), (seen_overlapped, weights_overlapped) in zip(after, during, strict=True):
        assert seen[0] == "backward"
        assert seen_overlapped == during[0][0]  # every process launches in the same order
        assert seen_overlapped.index("backward") >= 4
        assert sorted(seen) == sorted(seen_overlapped)  # one reduction per bucket and step either way
        assert all(torch.equal(w, weights_overlapped[name]) for name, w in weights.items())
