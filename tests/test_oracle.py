"""Training is what an independent implementation in plain torch makes of it: of the same weights and the same tokens.

A layout is compared with one process elsewhere, by code that both share. Here both are compared with ``oracle.py``,
which shares nothing: what is wrong in both alike shows here.
"""

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tedlab.certify.compare import relative_error
from tedlab.checkpoint.contents import consolidate
from tedlab.config import TrainConfig, with_values
from tedlab.validate import complete
from tests import oracle
from tests.certify.runs import Plant, composed
from tests.certify.witness import (
    MORE,
    MORE_ROUTERS,
    PARTS,
    ROUTERS,
    SETTINGS,
    SHORTCUTS,
    SMALL,
    STEPS,
    Observation,
    observe,
)
from tests.pool import WorkerPool
from tests.selection import asked_of

LAYOUTS = {"one process": (1, 1, 1), "tensor 2 × expert 2": (4, 2, 2)}
OFTEN = SETTINGS | ROUTERS
DIVIDED = (  # of which CI trains the layout, too: that it is one process in settings like these, certificates say
    *("top1_clipped", "dgmoe_sequence_dropless"),
)
SELDOM = (  # what each of these has, others have as well
    *("ted", "today_sequence", "listed_blocks_of_their_own_width"),
    *("global_sequence_parallel", "sigmoid_raw_sequence_wise_in_slices", "one_choice_normalized_and_one_softmax"),
)


def marked(setting: str, layout: str) -> object:
    if layout == "one process":
        marks = [] if setting in OFTEN else [pytest.mark.exhaustive if setting in SELDOM else pytest.mark.slow]
    else:
        marks = [pytest.mark.slow if setting in DIVIDED else pytest.mark.exhaustive]
    return pytest.param(setting, layout, marks=marks)


TOLERANCE = 1e-10
SINGLE = 1e-6  # biases are kept in float32


def configuration(setting: str, layout: str, directory: Path, name: str = "") -> TrainConfig:
    world, tensor, expert = LAYOUTS[layout]
    text = directory / "text"
    if not text.exists():
        text.mkdir()
        for file in ("one", "two"):
            characters = np.random.default_rng(0).integers(1, 0x250, 500)  # tokens of all of the vocabulary
            (text / file).write_text("".join(map(chr, characters)))
    given = {
        **SMALL,
        **(SETTINGS | ROUTERS | PARTS | SHORTCUTS | MORE | MORE_ROUTERS)[setting],
        "data.path": text,
        "data.cache_dir": directory / "cache",
    }
    degrees = {"parallel.world_size": world, "parallel.tensor": tensor, "parallel.expert": expert}
    if given.get("moe") == "dense":
        given = {key: value for key, value in given.items() if not key.startswith("moe.")}
        degrees["parallel.expert"] = 1
    if given.get("parallel.sequence"):  # tokens queue by slices of the sequence, which one process is told to do, too
        if given.get("moe.dispatch") != "dropless":
            given["moe.capacity_groups"] = 2
        given["parallel.sequence"] = tensor > 1
    if world == 1:
        given = {key: value for key, value in given.items() if key not in ("comm", "comm.cac")}
    config = composed(*(f"{key}={value}" for key, value in (given | degrees).items()))
    output_dir = str(directory / f"{setting}_{world}{name}")
    return complete(replace(config, output_dir=output_dir, checkpoint=replace(config.checkpoint, every=STEPS + 1)))


def expected(config: TrainConfig, found: Observation) -> list[oracle.Step]:
    """What the oracle makes of a run's initial weights, as a consolidated checkpoint has them, and of its tokens."""
    file = found.initial.with_suffix(".safetensors")
    consolidate(found.initial, file)
    optimizer, optim = config.optim.optimizer, config.optim
    training = oracle.Training(
        optim.lr,
        optim.schedule,
        optim.warmup_steps,
        optim.final_lr_fraction,
        optim.decay_fraction,
        STEPS,
        (optimizer["betas"][0], optimizer["betas"][1]),
        optimizer["eps"],
        optimizer["weight_decay"],
        config.trainer.get("gradient_clip_val"),
    )
    return oracle.train(load_file(file), found.batches, config.model, config.moe, training)


Errors = list[dict[str, float]]  # of every step the largest relative error of each quantity, as a step computes them


def errors(found: Observation, steps: Sequence[oracle.Step]) -> Errors:
    assert list(found.record) == list(range(1, len(steps) + 1))
    return [_errors(found.record[number], step) for number, step in enumerate(steps, 1)]


def _errors(record: dict[str, dict[str, Tensor]], step: oracle.Step) -> dict[str, float]:
    def largest(ours: dict[str, Tensor], theirs: dict[str, Any]) -> float:
        assert ours.keys() == theirs.keys()
        return max(relative_error(ours[k], torch.as_tensor(v, dtype=torch.float64)) for k, v in theirs.items())

    def moments(key: str) -> dict[str, Tensor]:
        state, suffix = record["optimizer state"], f" ({key})"
        return {name.removesuffix(suffix): value for name, value in state.items() if name.endswith(suffix)}

    biases = {name: value for name, value in record["next weights"].items() if name.endswith("router.bias")}
    weights = {name: value for name, value in record["next weights"].items() if name not in biases}
    rates = {name: rate for name, rate in record["optimizer settings"].items() if name.startswith("lr ")}
    return {
        "losses and drops": largest(record["losses and drops"], step.losses),
        "gradients": largest(record["gradients"], step.gradients),
        "gradient norm": largest(record["gradient norm"], {"all parameters": step.norm}),
        "clip factor": largest(record["clip factor"], {"all parameters": step.clip_factor}),
        "learning rate": largest(rates, dict.fromkeys(rates, step.lr)),
        "first moments": largest(moments("exp_avg"), step.first_moments),
        "second moments": largest(moments("exp_avg_sq"), step.second_moments),
        "next weights": largest(weights, step.weights),
        "biases": max(0.0, largest(biases, step.biases) - SINGLE) if biases or step.biases else 0.0,
    }


def first_wrong(found: Errors) -> str | None:
    """The first quantity of the first step in which something is wrong."""
    return next((name for step in found for name, error in step.items() if not error < TOLERANCE), None)


def judged(
    pool: WorkerPool, layout: str, cases: Collection[tuple[str, Plant | None]]
) -> dict[tuple[str, Plant | None], Errors]:
    """Errors of several settings, each with a planted bug or without, all trained in one world."""
    with tempfile.TemporaryDirectory() as folder:
        configs = [configuration(setting, layout, Path(folder), str(n)) for n, (setting, _) in enumerate(cases)]
        runs = [(config, plant) for config, (_, plant) in zip(configs, cases, strict=True)]
        found = pool.run(LAYOUTS[layout][0], observe, runs, timeout=250)[0]
        return {
            case: errors(observation, expected(config, observation))
            for case, config, observation in zip(cases, configs, found, strict=True)
        }


@pytest.fixture(scope="module")
def verdicts(pool: WorkerPool, request: pytest.FixtureRequest) -> Callable[[str], dict[str, Errors]]:
    """Errors by setting, of all settings of a layout that this session trains, in one world."""
    cells = asked_of(request)

    @cache
    def of(layout: str) -> dict[str, Errors]:
        settings = [cell["setting"] for cell in cells if cell["layout"] == layout]
        return {name: its for (name, _), its in judged(pool, layout, [(name, None) for name in settings]).items()}

    return of


@pytest.mark.parametrize(
    ("setting", "layout"),
    [
        marked(setting, layout)
        for layout in LAYOUTS
        for setting in SETTINGS | ROUTERS | PARTS | SHORTCUTS | MORE | MORE_ROUTERS
    ],
)
def test_training_is_what_plain_torch_makes_of_it(
    verdicts: Callable[[str], dict[str, Errors]], setting: str, layout: str
) -> None:
    found = verdicts(layout)[setting]
    assert len(found) == STEPS
    assert first_wrong(found) is None, found


def divided(scope: str, directory: Path) -> list[TrainConfig]:
    """The same training without capacities, its global batch divided into four micro-batches, two and one."""
    config = configuration("dropless_today", "one process", directory, scope)
    configs = []
    for parts in (4, 2, 1):
        size = config.data.batch_size // parts
        division = {"data.micro_batch_size": size, "trainer.accumulate_grad_batches": parts}
        name = {"output_dir": f"{config.output_dir}_{parts}"}
        configs.append(with_values(config, {"moe.balance.scope": scope, **division, **name}))
    return configs


@pytest.mark.slow
def test_only_the_balance_of_micro_batches_depends_on_how_a_global_batch_is_divided(pool: WorkerPool) -> None:
    scopes = ("global_batch", "sequence", "micro_batch")
    with tempfile.TemporaryDirectory() as folder:
        runs = [(config, None) for scope in scopes for config in divided(scope, Path(folder))]
        records = [found.record for found in pool.run(1, observe, runs)[0]]
    for number, scope in enumerate(scopes):
        four, *others = records[3 * number : 3 * number + 3]
        for other in others:
            worst = max(
                relative_error(other[step][quantity][name], value)
                for step in four
                for quantity in ("losses and drops", "gradients", "next weights")
                for name, value in four[step][quantity].items()
            )
            assert worst > 1e-4 if scope == "micro_batch" else worst < TOLERANCE, (scope, worst)
