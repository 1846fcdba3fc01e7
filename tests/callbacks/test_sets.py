"""Named sets are evaluated at each validation, each token once, alike in every layout, and are logged as it is."""

import csv
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from tedlab.callbacks import Journal, NamedSets
from tedlab.config import DataConfig, InTrainingConfig, MoEConfig
from tedlab.data import TextDataModule
from tedlab.evaluation.scoring import scores
from tedlab.evaluation.windows import Window, windows
from tedlab.models import GPT
from tedlab.topology import Topology
from tests.evaluation.tiny import SEPARATOR, ids, letters
from tests.pool import WorkerPool
from tests.training import MICRO_BATCH, SEQUENCE, Job, Layout, language_model, trainer

TEXTS = {"story": "once there was a set whose last sample is short.", "word": "hello"}
JOB = Job(steps=2, moe=MoEConfig(num_experts=4, capacity_factor=1.0))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    letters(folder / "tokenizer.json")
    (folder / "train.txt").write_text("what is read in training is not what matters here. " * 80)
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def trained(layout: Layout, place: Path, samples: int | None = None) -> list[dict[str, str]]:
    """Two steps, each followed by a validation; the rows that validations left."""
    files = {"path": "train.txt", "tokenizer": "tokenizer.json", "cache_dir": "cache"}
    sizes: dict[str, Any] = {"batch_size": 8, "micro_batch_size": MICRO_BATCH, "validation_samples": 8}
    data = DataConfig(**{key: f"{place / name}" for key, name in files.items()}, **sizes)
    sets = InTrainingConfig({name: f"{place / name}.txt" for name in TEXTS}, samples)
    logs = place / f"{layout}_{samples}"
    fit = trainer(
        layout,
        JOB,
        max_steps=JOB.steps,
        accumulate_grad_batches=JOB.micro_batches // layout.data,
        val_check_interval=JOB.micro_batches // layout.data,
        check_val_every_n_epoch=None,
        callbacks=[NamedSets(sets, "text", MICRO_BATCH, SEQUENCE), Journal(lambda first, last: 100 * (last - first))],
        logger=CSVLogger(logs, name="", version=""),
    )
    fit.fit(language_model(JOB), TextDataModule(data, SEQUENCE, 0))
    if fit.global_rank:
        return []
    with (logs / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["val/loss"]]


NAMES = [f"val/{name}/{value}" for name in TEXTS for value in ("loss", "perplexity", "bits_per_byte")]


def test_every_layout_logs_the_same_at_each_validation(pool: WorkerPool, place: Path) -> None:
    one = pool.run(1, trained, Layout(), place)[0]
    assert [row["tokens"] for row in one] == ["100", "200"]
    assert one[0]["val/story/loss"] != one[1]["val/story/loss"], "the model has learned in between"
    for layout in (Layout(4, 2, 2), Layout(4), Layout(2, 2, 2, 1)):
        rows = pool.run(layout.world_size, trained, layout, place)[0]
        for row, expected in zip(rows, one, strict=True):
            for name in NAMES:
                assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-12), (layout, name)


def test_values_are_means_over_all_tokens(pool: WorkerPool, place: Path) -> None:
    """Micro-batches of two whole samples, of which the last is padding where their number is odd."""
    one, first = (pool.run(1, trained, Layout(), place, samples)[0][0] for samples in (None, 1))
    for name, text in TEXTS.items():
        loss, size = float(one[f"val/{name}/loss"]), len(text)
        assert float(one[f"val/{name}/perplexity"]) == pytest.approx(math.exp(loss), rel=1e-12)
        bits = loss * (size + 1) / math.log(2) / size  # a byte for each letter, and a separator at the end
        assert float(one[f"val/{name}/bits_per_byte"]) == pytest.approx(bits, rel=1e-12)
    story = {name: float(first[f"val/story/{name}"]) for name in ("loss", "bits_per_byte")}
    each = (len(TEXTS["story"]) + 1) / len(TEXTS["story"])  # tokens of a byte, also where not all are evaluated
    assert story["bits_per_byte"] == pytest.approx(story["loss"] / math.log(2) * each, rel=1e-12)
    assert first["val/word/loss"] == one["val/word/loss"]
    assert first["val/story/loss"] != one["val/story/loss"]


def test_other_text_under_the_same_path_is_told_when_a_run_goes_on(place: Path, tmp_path: Path) -> None:
    def opened(text: str) -> NamedSets:
        (tmp_path / "wiki.txt").write_text(text)
        data = DataConfig(
            path=f"{place}/train.txt", tokenizer=f"{place}/tokenizer.json", cache_dir=f"{place}/cache",
            batch_size=8, micro_batch_size=2, validation_samples=8,
        )  # fmt: skip
        sets = NamedSets(InTrainingConfig({"wiki": f"{tmp_path}/wiki.txt"}), "text", MICRO_BATCH, SEQUENCE)
        module = TextDataModule(data, SEQUENCE, 0)
        sets.setup(SimpleNamespace(datamodule=module), SimpleNamespace(), "fit")  # type: ignore[arg-type]
        return sets

    saved = opened(TEXTS["story"]).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(TEXTS["story"]).load_state_dict(saved)
        opened(TEXTS["story"]).load_state_dict({"texts": {"another": "x"}})
    with pytest.warns(UserWarning, match=r"eval\.sets\.wiki has other text than when the checkpoint was saved"):
        opened(TEXTS["story"] + " more").load_state_dict(saved)


# ---- scores ---------------------------------------------------------------------------------------------------------


def network(topology: Topology, moe: MoEConfig) -> GPT:
    torch.set_default_dtype(torch.float64)
    try:
        return GPT(JOB.model, moe, topology, seed=0).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def test_scores_are_those_of_the_models_own_logits(single: Topology) -> None:
    """In a whole micro-batch, in which experts have a capacity."""
    model = network(single, MoEConfig(num_experts=4, capacity_factor=1.0))
    stream = np.array([SEPARATOR, *ids(TEXTS["story"]), SEPARATOR])
    texts = [*windows(stream, SEQUENCE, SEQUENCE)]
    assert len(texts) % MICRO_BATCH, "the last micro-batch has padding"
    found = scores(model, texts[:MICRO_BATCH], MICRO_BATCH, SEQUENCE)
    batch = torch.tensor(np.stack([window.tokens for window in texts[:MICRO_BATCH]]))
    logits, _ = model(batch[:, :-1])
    chosen = logits.log_softmax(-1).gather(-1, batch[:, 1:, None]).squeeze(-1)
    for score, row in zip(found, chosen, strict=True):
        assert score.log_likelihood == pytest.approx(float(row.sum()), rel=1e-12)
        assert score.tokens == SEQUENCE
        assert not score.greedy


def test_greedy_windows_are_those_of_which_every_token_is_the_most_probable(single: Topology) -> None:
    model = network(single, MoEConfig(num_experts=0))
    tokens = ids("so")
    for _ in range(3):
        tokens.append(int(model(torch.tensor([tokens]))[0][0, -1, :30].argmax()))
    greedy, other = np.array(tokens), np.array([*tokens[:-1], (tokens[-1] + 1) % 30])
    found = scores(model, [Window(greedy, 3), Window(other, 3), Window(other[:-1], 2)], 2, known=30)
    assert [score.greedy for score in found] == [True, False, True]


def test_a_masked_model_predicts_nothing_from_separators(single: Topology) -> None:
    model = network(single, MoEConfig(num_experts=0))
    model.separator = SEPARATOR
    packed = np.array([SEPARATOR, *ids("one"), SEPARATOR, *ids("two"), SEPARATOR])
    (score,) = scores(model, [Window(packed, len(packed) - 1)], 1)
    apart = scores(model, [Window(np.array([*ids(word), SEPARATOR]), 3) for word in ("one", "two")], 2)
    assert score.tokens == sum(each.tokens for each in apart) == 6
    assert score.log_likelihood == pytest.approx(sum(each.log_likelihood for each in apart), rel=1e-12)


def test_windows_that_predict_nothing_are_refused(single: Topology) -> None:
    with pytest.raises(ValueError, match="a window of 3 tokens cannot predict 3 of them"):
        scores(network(single, MoEConfig(num_experts=0)), [Window(np.array([1, 2, 3]), 3)], 1)


def others(place: Path) -> str:
    from tedlab import ParallelDegrees

    topology = Topology(ParallelDegrees(2))
    texts = [Window(np.array([1, 2, 3 + topology.comm.rank("data")]), 1)]
    with pytest.raises(ValueError, match="different texts") as caught:
        scores(network(topology, MoEConfig(num_experts=0)), texts, 1)
    return str(caught.value)


def test_processes_that_read_different_texts_say_so_instead_of_waiting(pool: WorkerPool, place: Path) -> None:
    for said in pool.run(2, others, place):
        assert "processes 0 and 1 found different texts to evaluate on (1 and 1 windows)" in said
