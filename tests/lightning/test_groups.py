"""``optim.groups``: what is frozen and has rates of its own, as torch's AdamW with parameter groups does it."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from tedlab import Topology
from tedlab.certify.compare import relative_error
from tedlab.config import GroupConfig, MoEConfig, OptimConfig
from tedlab.errors import UsageError
from tedlab.models import GPT, GPTSpec
from tedlab.module import LanguageModel
from tedlab.optim import Grouping
from tedlab.optim.bucket import local
from tedlab.validate import check_simulated
from tests.certify.runs import composed
from tests.pool import WorkerPool
from tests.training import Job, Layout, Recorder, full, loader, trainer

RATE, DECAY, WARM_UP, STEPS = 1e-2, 0.05, 3, 3
JOB = Job(moe=MoEConfig(num_experts=4, top_k=2, every=1, z_loss=0.01), clip=0.05, steps=STEPS, micro_batches=2)
LAYOUT = Layout(4, tensor=2, expert=2)
Settings = tuple[float, float] | None  # learning rate and weight decay; None: frozen

CASES: dict[str, tuple[list[GroupConfig], Callable[[str], Settings]]] = {  # and what they mean, spelt out
    "frozen_router": (
        [GroupConfig(pattern="blocks.*.feed_forward.router.*", frozen=True)],
        lambda name: None if "router" in name else (RATE, DECAY),
    ),
    "experts_only": (
        [GroupConfig(pattern="*.experts.*", lr_factor=0.5), GroupConfig(pattern="*", frozen=True)],
        lambda name: (RATE / 2, DECAY) if "experts" in name else None,
    ),
    "frozen_experts_and_rates": (
        [
            GroupConfig(pattern="blocks.1.*.experts.*", lr=0.03, weight_decay=0.2),
            GroupConfig(pattern="*.experts.*", frozen=True),
            GroupConfig(pattern="embedding.*", lr_factor=0.1),
        ],
        lambda name: (
            ((0.03, 0.2) if name.startswith("blocks.1.") else None)
            if "experts" in name
            else (RATE / 10 if name.startswith("embedding") else RATE, DECAY)
        ),
    ),
    "last_block_only": (
        [GroupConfig(pattern="blocks.1.*"), GroupConfig(pattern="*", frozen=True)],
        lambda name: (RATE, DECAY) if name.startswith("blocks.1.") else None,
    ),
    "positions_only": (
        [GroupConfig(pattern="positions.*"), GroupConfig(pattern="*", frozen=True)],
        lambda name: (RATE, DECAY) if name.startswith("positions") else None,
    ),
}
HOW: dict[str, dict[str, Any]] = {
    "": {},
    "fused, overlapped, small buckets": {"tile": "fused", "overlap": True, "bucket_elements": 100},
}
CELLS = [(case, how) for case in CASES for how in HOW if not how or case == "frozen_experts_and_rates"]
RESUMED = [("frozen_experts_and_rates", how) for how in HOW]


def module(case: str) -> LanguageModel:
    # The gradient of a key bias is zero in theory and rounding noise in practice, which Adam divides by eps.
    optimizer: dict[str, Any] = {"_target_": "torch.optim.AdamW", "eps": 1e-5, "weight_decay": DECAY}
    optim = OptimConfig(optimizer=optimizer, lr=RATE, schedule="constant", warmup_steps=WARM_UP, groups=CASES[case][0])
    return LanguageModel(JOB.model, JOB.moe, optim, JOB.seed)


class Batches:
    """Those of a process from one on, as a data module that resumes would have them."""

    def __init__(self, rank: int, first: int) -> None:
        self.rank, self.first = rank, first

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.islice(loader(LAYOUT, JOB, self.rank), self.first, None)


class Saving(Callback):
    """Saves before the last step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == STEPS - 1 and not self.path.exists():
            trainer.save_checkpoint(self.path)


def run(case: str, how: str, path: Path) -> dict[str, Any]:
    """Trains, or goes on from a checkpoint if there is one at ``path``."""
    model, recorder, resumed = module(case), Recorder(), path.exists()
    fit = trainer(
        LAYOUT,
        replace(JOB, **HOW[how]),
        max_steps=STEPS,
        callbacks=[recorder, Saving(path)],
        gradient_clip_val=JOB.clip,
        accumulate_grad_batches=1,
    )
    batches = Batches(fit.global_rank, STEPS - 1 if resumed else 0)
    fit.fit(model, batches, ckpt_path=path if resumed else None)
    (sharded,) = fit.strategy.sharded_optimizers
    state = sharded.state_dict()["state"]
    return {
        "weights": {short(name): full(p) for name, p in model.named_parameters()},
        "gradients": {short(name) for name in recorder.gradients},
        "state": {short(name) for name, entries in state.items() if entries},
        "elements": sum(sum(bucket.sizes) for bucket in sharded.buckets),
        "of this process": {short(name): local(p).numel() for name, p in model.named_parameters()},
    }


def short(name: str) -> str:
    return name.removeprefix("network.")


def guests(folder: Path) -> tuple[dict[tuple[str, str], Any], dict[tuple[str, str], Any]]:
    """Runs without a break, and some of them with one."""
    first = {cell: run(*cell, folder / "_".join(cell)) for cell in CELLS}
    return first, {cell: run(*cell, folder / "_".join(cell)) for cell in RESUMED}


def judged(case: str, topology: Topology) -> dict[str, Tensor]:
    """The same training by torch alone: every gradient is computed, and those of trained parameters are used."""
    torch.set_default_dtype(torch.float64)
    try:
        model = GPT(JOB.model, JOB.moe, topology, JOB.seed)
    finally:
        torch.set_default_dtype(torch.float32)
    leaves = {name: nn.Parameter(local(p).clone()) for name, p in model.named_parameters()}
    settings = {name: CASES[case][1](name) for name in leaves}
    trained = {name: leaf for name, leaf in leaves.items() if settings[name] is not None}
    groups = [
        {"params": [leaf], "lr": settings[name][0], "weight_decay": settings[name][1] if decays(name) else 0.0}
        for name, leaf in trained.items()
    ]
    optimizer = torch.optim.AdamW(groups, eps=1e-5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    batches = iter(loader(Layout(), JOB, 0))
    for _ in range(STEPS):
        for _ in range(JOB.micro_batches):
            batch = next(batches)
            loss, reports = model.loss(batch[:, :-1], batch[:, 1:])
            for report in reports:
                loss = loss + JOB.moe.aux_loss * report.balance_loss + JOB.moe.z_loss * report.z_loss
            (loss / JOB.micro_batches).backward()
        for name, p in model.named_parameters():
            leaves[name].grad, p.grad = local(p.grad).clone(), None
        nn.utils.clip_grad_norm_(trained.values(), JOB.clip)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                local(p).copy_(leaves[name])
    return {name: leaf.detach() for name, leaf in leaves.items()}


def decays(name: str) -> bool:
    return "bias" not in name and "norm" not in name


def judge() -> dict[str, dict[str, Tensor]]:
    topology = Topology.single("cpu")
    return {case: judged(case, topology) for case in CASES}


@pytest.fixture(scope="module")
def ours(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return pool.run(4, guests, tmp_path_factory.mktemp("groups"))


@pytest.fixture(scope="module")
def theirs(pool: WorkerPool) -> dict[str, dict[str, Tensor]]:
    return pool.run(1, judge)[0]


@pytest.mark.parametrize(("case", "how"), CELLS)
def test_weights_move_as_under_torch_s_parameter_groups(ours: Any, theirs: Any, case: str, how: str) -> None:
    for rank, _ in ours:
        errors = {name: relative_error(w, theirs[case][name]) for name, w in rank[case, how]["weights"].items()}
        assert errors.keys() == theirs[case].keys()
        assert {name: error for name, error in errors.items() if error > 1e-10} == {}


@pytest.mark.parametrize("case", CASES)
def test_a_frozen_parameter_has_no_gradient_no_bucket_and_no_state(ours: Any, case: str) -> None:
    for rank, again in ours:
        found = rank[case, ""]
        trained = {name for name in found["weights"] if CASES[case][1](name) is not None}
        assert trained < found["weights"].keys()
        assert found["gradients"] == found["state"] == trained
        assert again.get((case, ""), found)["state"] == trained
        assert found["elements"] == sum(found["of this process"][name] for name in trained)


@pytest.mark.parametrize(("case", "how"), RESUMED)
def test_a_run_that_resumes_ends_where_one_without_a_break_does(ours: Any, case: str, how: str) -> None:
    for rank, again in ours:
        for name, weight in rank[case, how]["weights"].items():
            torch.testing.assert_close(again[case, how]["weights"][name], weight, rtol=1e-12, atol=0)


def test_the_cases_differ(theirs: Any) -> None:
    for name in ("blocks.1.feed_forward.experts.up", "norm.weight", "blocks.1.feed_forward.router.weight"):
        assert len({theirs[case][name].sum().item() for case in CASES}) > 2


# ---- names ----------------------------------------------------------------------------------------------------------

NAMES = [p.name for p in GPTSpec(JOB.model, MoEConfig(num_experts=4)).parameters()]


def test_the_optimizer_s_groups_come_in_pairs_and_in_order() -> None:
    groups = [
        GroupConfig(pattern="*.router.*", frozen=True),
        GroupConfig(pattern="*.attention.*", lr=3.0),
        GroupConfig(pattern="blocks.*", lr_factor=2.0, weight_decay=0.5),
    ]
    grouping, optim = Grouping(groups), OptimConfig(optimizer={}, lr=0.25, groups=groups)
    assert grouping.options(optim) == [
        *({}, {"weight_decay": 0.0}),
        *({"lr": 3.0}, {"lr": 3.0, "weight_decay": 0.0}),
        *({"lr": 0.5, "weight_decay": 0.5}, {"lr": 0.5, "weight_decay": 0.0}),
    ]
    assert grouping.index("embedding.weight", 2, True) == 0
    assert grouping.index("norm.weight", 1, False) == 1
    assert grouping.index("blocks.0.attention.qkv.weight", 2, True) == 2
    assert grouping.index("blocks.0.norm1.weight", 1, False) == 5
    assert not grouping.trains("blocks.1.feed_forward.router.weight")


WRONG: dict[str, tuple[str, list[str]]] = {  # and what the message must say
    "nothing_matches": (
        "[{pattern: '*.rooter.*', frozen: true}]",
        ["optim.groups[0]", "*.rooter.*", "Did you mean 'router' by 'rooter'?", "blocks.*.feed_forward.router.weight"],
    ),
    "an_earlier_pattern_takes_all": (
        "[{pattern: '*', lr: 1}, {pattern: '*.router.*', frozen: true}]",
        ["optim.groups[1]", "router.weight to *", "narrower pattern first"],
    ),
    "nothing_trains": ("[{pattern: '*', frozen: true}]", ["freezes every parameter", "*.experts.*"]),
    "two_rates": ("[{pattern: '*.router.*', lr: 1, lr_factor: 2}]", ["both lr=1.0 and lr_factor=2.0"]),
    "a_rate_of_what_is_frozen": ("[{pattern: '*.router.*', lr: 1, frozen: true}]", ["frozen", "lr means nothing"]),
    "a_negative_rate": ("[{pattern: '*.router.*', lr: -1}]", ["optim.groups[0].lr is -1.0", "positive"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_group_without_a_meaning_is_refused_before_anything_starts(case: str) -> None:
    groups, said = WRONG[case]
    with pytest.raises(UsageError) as caught:
        check_simulated(composed(f"optim.groups={groups}"))
    for words in said:
        assert words in str(caught.value)
