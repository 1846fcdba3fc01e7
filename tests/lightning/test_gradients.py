"""What a LightningModule and callbacks that are not ours see of gradients, and what their changes do.

Each case is one function on ``named_parameters()``: called by a hook in processes of tensor 2 × expert 2, and by the
judge, plain torch in one process. What it returns and the weights in the end must be equal.
"""

from collections.abc import Callable
from typing import Any, Protocol

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from tedlab.config import ShardingOptions
from tests.lightning.plain import Plain, Seeded, adamw, batches, ordered
from tests.lightning.training import assert_same, strategy, trainer, weights
from tests.pool import WorkerPool
from tests.training import full

pytestmark = pytest.mark.slow  # worlds of four processes that train for each of many cases

EPOCHS = 2  # of two steps
ROUTER = "experts.router.weight"


class Named(Protocol):
    def named_parameters(self) -> Any: ...


def look(module: Named) -> Any:
    return {name: p.grad.norm().item() for name, p in module.named_parameters()}


def lightnings_norm(module: Named) -> Any:
    return {name: float(norm) for name, norm in grad_norm(module, 2).items()}  # type: ignore[arg-type]


def clip(module: Named) -> Any:
    return clip_grad_norm_([p for _, p in module.named_parameters()], 0.2).item()


def clip_one_by_one(module: Named) -> Any:
    return clip_grad_norm_([p for _, p in module.named_parameters()], 0.2, norm_type=1.0, foreach=False).item()


def clip_value(module: Named) -> None:
    clip_grad_value_([p for _, p in module.named_parameters()], 0.01)


def zero_router(module: Named) -> None:
    dict(module.named_parameters())[ROUTER].grad.zero_()


def no_router(module: Named) -> None:
    dict(module.named_parameters())[ROUTER].grad = None


def assign(module: Named) -> None:
    for name, p in module.named_parameters():
        p.grad = p.grad * 0.5 if "norm" in name else p.grad.sign()


def through_data(module: Named) -> None:
    for _, p in module.named_parameters():
        p.grad.data.mul_(0.3)


CASES: dict[str, Callable[[Any], Any]] = {
    f.__name__: f
    for f in (look, lightnings_norm, clip, clip_one_by_one, clip_value, zero_router, no_router, assign, through_data)
}


class Edited(Seeded):
    """Whose hook edits gradients before the step."""

    def __init__(self, edit: Callable[[Any], Any]) -> None:
        super().__init__()
        self.edit = edit
        self.seen: list[Any] = []
        self.left: set[str] = set()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append(self.edit(self))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:  # else they are still being added up
            self.left |= {name for name, p in self.named_parameters() if p.grad is not None}


class Clipping(Edited):
    """Whose clipping is its own."""

    on_before_optimizer_step = LightningModule.on_before_optimizer_step  # type: ignore[assignment]

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        self.seen.append(self.edit(self))


class Manual(Edited):
    """By hand; gradients are there as soon as a backward pass has ended."""

    on_before_optimizer_step = LightningModule.on_before_optimizer_step  # type: ignore[assignment]

    def __init__(self, edit: Callable[[Any], Any]) -> None:
        super().__init__(edit)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        for part in (slice(0, len(batch[0]) // 2), slice(len(batch[0]) // 2, None)):
            self.manual_backward(self.loss([t[part] for t in batch]) / 2)
        self.seen.append(self.edit(self))
        optimizer.step()
        optimizer.zero_grad()


class Adversaries(Manual):
    """Two optimizers in turn, each clipped by the norm of its own parameters."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            self.manual_backward(self.loss(batch) * 7)
            optimizer.zero_grad()  # forgets that
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [adamw(dict(part)) for part in halves(self)]


def halves(module: Named) -> list[list[tuple[str, nn.Parameter]]]:
    named = list(module.named_parameters())
    return [[item for item in named if item[0].startswith("experts") is first] for first in (True, False)]


class Accessor(Edited):
    """The same through ``strategy.gradients``, which costs no all-gather."""

    reads_grad = False

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradients = self.trainer.strategy.gradients
        gradients.scale(ROUTER, 0.0)
        gradients.scale("experts.experts.*", 0.5)
        gradients.scale("feed_forward.up.weight", torch.tensor([0.0, 1.0]).repeat(8)[:, None])
        whole = {name: full(g) for name, g in gradients.sharded().items()}
        self.seen.append((gradients.norm(), gradients.norms(), {n: g.norm().item() for n, g in whole.items()}))
        assert torch.equal(gradients.full("inwards.weight"), whole["inwards.weight"])
        with pytest.raises(KeyError, match="nobody"):
            gradients.scale("nobody", 0.0)


def by_accessor(module: Named) -> Any:
    parameters = dict(module.named_parameters())
    parameters[ROUTER].grad.zero_()
    for name, p in parameters.items():
        if name.startswith("experts.experts."):
            p.grad.mul_(0.5)
    parameters["feed_forward.up.weight"].grad[::2] = 0.0
    norms = {name: p.grad.norm().item() for name, p in parameters.items()}
    return torch.tensor(list(norms.values()), dtype=torch.float64).norm().item(), norms, norms


class AfterBackward(Callback):
    """Halves gradients after each backward pass, of a step's first micro-batch twice."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        halve(pl_module)


def halve(module: Named) -> None:
    for _, p in module.named_parameters():
        p.grad.mul_(0.5)


def run(kind: type[Edited], edit: Callable[[Any], Any], **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    module = kind(edit)
    tags: list[str] = []
    fit = trainer(max_epochs=EPOCHS, **options)

    class Listen(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            comm = trainer.strategy.topology.comm
            comm.register_hook(lambda call, event: tags.append(call.tag) if event == "end" else None)

    fit.callbacks.append(Listen())
    fit.fit(module, ordered())
    return {
        "seen": module.seen,
        "weights": {name: tensor for name, tensor in weights(module).items() if name != "offset"},
        "left": module.left,
        "tags": {tag: tags.count(tag) for tag in tags},
    }


class Nobody(Edited):
    """Reads no gradient."""

    on_before_optimizer_step = LightningModule.on_before_optimizer_step  # type: ignore[assignment]


def guests() -> dict[str, Any]:
    results = {name: run(Edited, edit) for name, edit in CASES.items()}
    for name in ("clip", "assign"):
        results[f"{name}, scaled"] = run(Edited, CASES[name], strategy=strategy(loss_scale=2.0**10))
    options = ShardingOptions(overlap=True, bucket_elements=100, tile=7)
    replicated = ShardingOptions(zero=False)
    results["clip, replicated"] = run(Edited, clip, strategy=strategy(sharding=replicated))
    results["clip, overlapped"] = run(Edited, clip, strategy=strategy(sharding=options))
    results["clip, in its own hook"] = run(Clipping, clip)
    results["clip, by hand"] = run(Manual, clip)
    results["adversaries"] = run(Adversaries, clip)
    results["accessor"] = run(Accessor, clip)
    results["accessor, scaled"] = run(Accessor, clip, strategy=strategy(loss_scale=2.0**10, sharding=replicated))
    results["nobody"] = run(Nobody, clip)
    results["halve, accumulated"] = run(Nobody, clip, callbacks=[AfterBackward()], accumulate_grad_batches=2)
    by_value: dict[str, Any] = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    results["trainer's value"] = run(Nobody, clip, **by_value)
    results["trainer's value, scaled"] = run(Edited, look, strategy=strategy(loss_scale=2.0**10), **by_value)
    return results


def in_eight() -> dict[str, Any]:
    return {"clip": run(Edited, clip), "accessor": run(Accessor, clip)}


def seeded() -> Seeded:
    torch.manual_seed(0)
    return Seeded()


def judged(edit: Callable[[Any], Any] | None) -> dict[str, Any]:
    plain, seen = Plain(adamw, seeded), []
    for batch in batches(EPOCHS):
        plain.backward(plain.module.loss(batch))
        if edit is not None:
            seen.append(edit(plain))
        plain.step()
    return {"seen": seen, "weights": plain.weights}


def adversaries() -> dict[str, Any]:
    plain = Plain(adamw, seeded)
    optimizers = [adamw(dict(part)) for part in halves(plain)]
    for batch in batches(EPOCHS):
        for optimizer, part in zip(optimizers, halves(plain), strict=True):
            plain.optimizer = optimizer
            plain.backward(plain.module.loss(batch))
            for name, p in plain.named_parameters():
                if name not in dict(part):
                    p.grad = None
            clip_grad_norm_([p for _, p in part], 0.1)
            plain.step()
    return {"seen": [], "weights": plain.weights}


def halved() -> dict[str, Any]:
    plain = Plain(adamw, seeded)
    for number, batch in enumerate(batches(EPOCHS)):
        plain.backward(plain.module.loss(batch) / 2)
        halve(plain)
        if number % 2:
            plain.step()
    return {"seen": [], "weights": plain.weights}


def judge() -> dict[str, Any]:
    found = {name: judged(edit) for name, edit in CASES.items()}
    found["accessor"] = judged(by_accessor)
    found["nobody"] = judged(None)
    found["trainer's value"] = judged(clip_value)
    found["halve"] = halved()
    found["adversaries"] = adversaries()
    return found


@pytest.fixture(scope="module")
def four(pool: WorkerPool) -> list[dict[str, Any]]:
    return pool.run(4, guests)


@pytest.fixture(scope="module")
def alone(pool: WorkerPool) -> dict[str, Any]:
    return pool.run(1, judge)[0]


def assert_equal(ranks: list[Any], expected: Any) -> None:
    assert expected["weights"]["outwards.weight"].isfinite().all()
    for rank in ranks:
        assert flat(rank["seen"]) == pytest.approx(flat(expected["seen"]), rel=1e-9, abs=1e-12)
        assert_same(rank["weights"], expected["weights"])
        assert not rank["left"], "a gradient was left behind"


def flat(values: Any) -> list[float]:
    if isinstance(values, dict):
        values = [values[key] for key in sorted(values)]
    return [x for value in values for x in flat(value)] if isinstance(values, list | tuple) else [values or 0.0]


@pytest.mark.parametrize("case", CASES)
def test_what_a_hook_sees_and_does_is_what_torch_would(four: Any, alone: Any, case: str) -> None:
    assert_equal([rank[case] for rank in four], alone[case])


@pytest.mark.parametrize("how", ["scaled", "replicated", "overlapped", "in its own hook", "by hand"])
def test_clipping_by_hand_works_however_gradients_are_reduced(four: Any, alone: Any, how: str) -> None:
    """With a loss scale gradients are shown without it."""
    assert_equal([rank[f"clip, {how}"] for rank in four], alone["clip"])


def test_several_optimizers_each_clip_their_own_and_zero_grad_forgets(four: Any, alone: Any) -> None:
    assert_equal([rank["adversaries"] for rank in four], alone["adversaries"])


def test_gradients_that_are_assigned_are_scaled_again(four: Any, alone: Any) -> None:
    assert_equal([rank["assign, scaled"] for rank in four], alone["assign"])


@pytest.mark.parametrize("case", ["accessor", "accessor, scaled"])
def test_the_accessor_knows_norms_and_scales_by_name_without_gathering(four: Any, alone: Any, case: str) -> None:
    for rank in four:
        assert rank[case]["seen"] == four[0][case]["seen"]  # to the last bit
        assert "gradients.gather" not in rank[case]["tags"]
    assert_equal([rank[case] for rank in four], alone["accessor"])


def test_a_callback_that_scales_after_each_of_two_backward_passes_counts_twice(four: Any, alone: Any) -> None:
    assert_equal([rank["halve, accumulated"] for rank in four], alone["halve"])


@pytest.mark.parametrize("case", ["trainer's value", "trainer's value, scaled"])
def test_the_trainer_clips_by_value(four: Any, alone: Any, case: str) -> None:
    expected = alone["trainer's value"]
    for rank in four:
        assert_same(rank[case]["weights"], expected["weights"])
    difference = expected["weights"]["outwards.weight"] - alone["nobody"]["weights"]["outwards.weight"]
    assert difference.abs().max() > 1e-4


def test_nothing_is_gathered_where_nobody_reads(four: Any, alone: Any) -> None:
    for rank in four:
        assert "gradients.gather" not in rank["nobody"]["tags"]
        assert rank["nobody"]["tags"]["gradients.norm"] == 2 * EPOCHS
        assert rank["look"]["tags"]["gradients.gather"] > 0
    assert_equal([rank["nobody"] for rank in four], alone["nobody"])


@pytest.mark.slow
def test_the_same_with_replicated_experts(pool: WorkerPool, alone: Any) -> None:
    """Tensor 2 × expert 2 × expert_data 2."""
    for rank in pool.run(8, in_eight):
        for case, result in rank.items():
            assert_equal([result], alone[case])
