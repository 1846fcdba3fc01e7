"""``tedlab eval`` on sets of texts: every layout finds what transformers does; what cannot be evaluated is told."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tedlab.commands.eval import main, prepare
from tedlab.config import EvalConfig, MoEConfig
from tedlab.errors import UsageError
from tedlab.evaluation import results
from tedlab.evaluation.evaluate import evaluate
from tedlab.evaluation.evaluate import given as given_of
from tedlab.evaluation.windows import windows
from tests.commands import run_command
from tests.compare.sweep import compare_command, write_run
from tests.evaluation.tiny import CONTEXT, SEPARATOR, Follows, Tiny, ids, tiny, write_jsonl
from tests.offline_wandb import read_offline_run
from tests.pool import WorkerPool
from tests.test_conf import compose

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("single")

DOCUMENTS = ["the start of it all", "a", "hello, world! this is longer than what the model reads at a time.", "", "ok"]
OTHERS = ["so it is", "what?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    place = tmp_path_factory.mktemp("tiny")
    write_jsonl(place / "docs.jsonl", [{"text": text} for text in DOCUMENTS])
    (place / "others").mkdir()
    for number, text in enumerate(OTHERS):
        (place / "others" / f"{number}.txt").write_text(text)
    return tiny(place)


def config(model: Tiny, **options: Any) -> EvalConfig:
    place = model.run.parent
    sets = {"docs": f"{place / 'docs.jsonl'}", "others": f"{place / 'others'}"}
    given = {"run": str(model.run), "data": sets, "precision": "64-true", "batch_size": 2, "out": f"{place / 'out'}"}
    return EvalConfig(**{**given, **options})


# ---- judged by transformers -----------------------------------------------------------------------------------------


def judged(follows: Follows, streams: list[list[int]], context: int, stride: int) -> tuple[int, float]:
    """How many tokens follow the first ones of streams, and their mean loss, each computed by itself.

    Of a stream's n tokens after the first, token i ≤ context sees all before it. The others are in groups of ``stride``
    (the last may be smaller), and see what is among the last ``context`` tokens before the end of their group.
    """
    losses = []
    for stream in streams:
        n = len(stream) - 1
        for i in range(1, n + 1):
            group = max(0, math.ceil((i - context) / stride))
            end = min(context + group * stride, n)
            seen = stream[max(0, end - context) : i]
            losses.append(-float(follows(seen)[stream[i]]))
    return len(losses), math.fsum(losses) / len(losses)


@pytest.mark.parametrize(
    ("options", "context", "stride"),
    [({}, CONTEXT, CONTEXT), ({"stride": 3}, CONTEXT, 3), ({"context": 10, "stride": 7, "documents": "packed"}, 10, 7)],
    ids=["default", "stride", "packed"],
)
def test_losses_are_those_of_transformers(model: Tiny, options: dict[str, Any], context: int, stride: int) -> None:
    found = evaluate(config(model, **options))
    for name, texts in (("docs", DOCUMENTS), ("others", OTHERS)):
        streams = [[SEPARATOR, *ids(text), SEPARATOR] for text in texts if text]
        if options.get("documents") == "packed":
            streams = [[SEPARATOR, *(token for stream in streams for token in stream[1:])]]
        tokens, loss = judged(model.judge(), streams, context, stride)
        assert found[f"eval/{name}/loss"] == pytest.approx(loss, rel=1e-12)
        assert found[f"eval/{name}/perplexity"] == pytest.approx(math.exp(loss), rel=1e-12)
        bits = loss * tokens / math.log(2) / sum(len(text.encode()) for text in texts)
        assert found[f"eval/{name}/bits_per_byte"] == pytest.approx(bits, rel=1e-12)
        written = json.loads((model.run.parent / "out" / f"step_0_{name}.json").read_text())
        assert (written["tokens"], written["documents"]) == (tokens, sum(1 for text in texts if text))
        assert written["settings"]["stride"] == stride
        assert written["metrics"] == {key: value for key, value in found.items() if f"/{name}/" in key}


LAYOUTS = {
    2: [{"tensor": 2}, {"expert": 2}, {"tensor": 2, "expert": 2, "expert_tensor": 1}, {}],
    4: [
        {"tensor": 2, "expert": 2},
        {"expert": 4},
        {},  # nine windows and two, in micro-batches of two over four data ranks
        {"tensor": 2, "expert": 4, "expert_tensor": 1},
        {"expert": 2, "expert_tensor": 2},
    ],
}


@pytest.mark.parametrize("processes", LAYOUTS)
def test_every_layout_finds_the_same(pool: WorkerPool, model: Tiny, processes: int) -> None:
    one = evaluate(config(model))
    cells = [(config(model, processes=processes, **layout),) for layout in LAYOUTS[processes]]
    for layout, by_rank in zip(LAYOUTS[processes], pool.run_each(processes, evaluate, cells), strict=True):
        for found in by_rank:
            assert found == pytest.approx(one, rel=1e-12), layout
    assert all(math.isfinite(value) for value in one.values())


def test_single_precision_is_close_to_double(model: Tiny) -> None:
    double, single = (evaluate(config(model, precision=word)) for word in ("64-true", "32-true"))
    assert single == pytest.approx(double, rel=1e-5)
    assert single != double


def test_the_batch_changes_nothing(model: Tiny) -> None:
    assert evaluate(config(model, batch_size=7)) == pytest.approx(evaluate(config(model, batch_size=1)), rel=1e-12)


@given(st.integers(0, 60), st.integers(1, 20), st.data())
@settings(max_examples=60)
def test_windows_predict_each_token_once(length: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    tokens = np.arange(length)
    predicted = []
    for window in windows(tokens, context, stride):
        assert len(window.tokens) - 1 <= context
        assert 0 < window.predicted < len(window.tokens)
        assert window.tokens.tolist() == list(range(window.tokens[0], window.tokens[-1] + 1))
        if predicted:
            assert window.predicted <= stride
            assert len(window.tokens) - 1 == context, "further windows have a whole context"
        predicted += window.tokens[-window.predicted :].tolist()
    assert predicted == list(range(1, length))


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_launches_the_processes_of_a_layout(model: Tiny, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tedlab", "eval", f"run={model.run}", f"data={model.run.parent / 'docs.jsonl'}"]
    command += ["processes=2", "tensor=2", "precision=64-true", f"out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loss = evaluate(config(model))["eval/docs/loss"]
    assert f"{loss:.4f}" in done.stdout
    assert results.read(tmp_path).metrics == {}  # out is the folder itself
    assert json.loads((tmp_path / "step_0_docs.json").read_text())["loss"] == pytest.approx(loss, rel=1e-12)


def logged_run(model: Tiny, run: Path, **settings: str) -> Path:
    """The model's run as if it had been logged to W&B."""
    shutil.copytree(model.run, run)
    stored = yaml.safe_load((run / "config.yaml").read_text())
    logger = {"_target_": "tedlab.tracking.WandbLogger", "project": "tedlab", "mode": "offline", **settings}
    (run / "config.yaml").write_text(yaml.safe_dump({**stored, "logger": {"wandb": logger}}))
    return run


@pytest.mark.slow
def test_the_w_and_b_run_of_the_training_gets_the_results(pool: WorkerPool, model: Tiny, tmp_path: Path) -> None:
    run = logged_run(model, tmp_path / "run", id="abc123")
    (found,) = pool.run(1, evaluate, config(model, run=f"{run}", wandb=True))
    assert [*(run / "wandb").glob("offline-run-*-abc123")]
    logged = read_offline_run(run).summary
    assert {key: logged[key] for key in found} == found
    assert logged["evaluations"]["docs"]["stride"] == CONTEXT


def test_no_other_run_at_w_and_b_is_made_for_results(model: Tiny, tmp_path: Path) -> None:
    run = logged_run(model, tmp_path / "run")
    with pytest.raises(ValueError, match=r"which run at W&B is .*run's is not known"):
        evaluate(config(model, run=f"{run}", wandb=True))
    (run / "wandb" / "run-20260101_000000-abc123").mkdir(parents=True)
    found = given_of(config(model, run=f"{run}", wandb=True))
    assert found.logger is not None
    assert found.logger["id"] == "abc123"


def test_what_w_and_b_does_not_take_is_printed_and_saved(
    model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**settings: Any) -> None:
        raise wandb.errors.CommError("there is no such project")

    monkeypatch.setattr("wandb.init", refuse)
    run = logged_run(model, tmp_path / "run", id="abc123")
    with pytest.raises(UsageError, match="W&B did not take the results for its run abc123: there is no such project"):
        evaluate(config(model, run=f"{run}", wandb=True, out=None))
    assert "perplexity" in capsys.readouterr().out
    assert results.read(run).settings.keys() == {"docs", "others"}


def test_compare_shows_what_was_found_at_the_last_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, loss, stride in (("a", 2.5, 8), ("b", 2.25, 4)):
        run = write_run(tmp_path / name, {"optim.lr": loss}, {"val/wiki/loss": 2 * loss, "val/wiki/perplexity": 99.0})
        for step, factor in ((5, 10), (20, 1)):
            results.write(run / "eval", step, "book", {"eval/book/loss": factor * loss}, {"stride": stride})
    compare_command(f"{tmp_path}", f"out={tmp_path / 'table.csv'}")
    said = " ".join(capsys.readouterr().out.split())
    for text in ("book", "wiki", "2.5000", "2.2500", "5.0000", "4.5000"):
        assert text in said
    assert "25.000" not in said
    assert 'eval/book was evaluated with {"stride": 8} in a, but with {"stride": 4} in b' in said
    header, first, _ = (tmp_path / "table.csv").read_text().splitlines()
    row = dict(zip(header.split(","), first.split(","), strict=True))
    assert (row["eval/book/loss"], row["val/wiki/loss"]) == ("2.5", "5.0")


def test_compare_notes_another_step_and_other_text(
    model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.jsonl"
    for name, step, documents in (("a", 5, ["same", "as"]), ("b", 20, ["same", "as"]), ("c", 5, ["sam", "eas"])):
        write_jsonl(texts, [{"text": text} for text in documents])
        monkeypatch.setattr("tedlab.evaluation.evaluate.read_meta", lambda path, step=step: {"global_step": step})
        run = write_run(tmp_path / "runs" / name)
        evaluate(config(model, data={"book": f"{texts}"}, out=f"{run / 'eval'}"))
    compare_command(f"{tmp_path / 'runs'}")
    said = " ".join(capsys.readouterr().out.split())
    ways = re.search(
        r"eval/book was evaluated with (\{.*?\}) in a, but with (\{.*?\}) in b, but with (\{.*?\}) in c:", said
    )
    assert ways is not None
    a, b, c = (json.loads(way) for way in ways.groups())
    assert a.keys() == {"text", "step"}, "the rest is the same"
    assert (a["step"], b["step"], c["step"]) == (5, 20, 5)
    assert a["text"] == b["text"] != c["text"]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"name": 1}', '{"name": "x", "step": 1, "metrics": {"eval/x/loss": "y"}}']
)
def test_a_damaged_result_leaves_a_run_out(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name)
    (tmp_path / "b" / "eval").mkdir()
    (tmp_path / "b" / "eval" / "step_1_x.json").write_text(text)
    compare_command(f"{tmp_path}")
    assert "b is left out: eval/step_1_x.json is damaged" in capsys.readouterr().out.replace("\n", "")


def test_sets_are_given_by_name_or_by_file() -> None:
    words = ["run=here/a,b", "data.wiki=some/*.txt", "data=/texts/book.en.txt"]
    composed = compose(*prepare(words), name="eval")
    assert composed == EvalConfig(run="here/a,b", data={"wiki": "some/*.txt", "book": "/texts/book.en.txt"})


@pytest.mark.parametrize("second", ["data=de/valid.txt", "data.valid=de"])
def test_two_sets_of_one_name_are_refused(second: str) -> None:
    with pytest.raises(UsageError, match=r"two sets are called valid, the second of de.*: use data\.NAME=PATH"):
        prepare(["data=en/valid.txt", second])


@pytest.mark.parametrize("argument", ["data.a/b=x", "data.loss=x", "data.2=x", "data=*.txt", "data.=x", "data.a.b=x"])
def test_a_name_that_no_metric_can_have_is_refused(argument: str) -> None:
    with pytest.raises(UsageError, match=r"would be part of its metrics' names: call it by letters"):
        prepare([argument])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": {}}, "nothing to evaluate on: give texts with data.NAME=PATH"),
        ({"data": {"x": "nowhere.txt"}}, "set 'x': its path 'nowhere.txt' does not exist"),
        (
            {"data": {"x": "{place}/empty.txt"}},
            "set 'x': its path '{place}/empty.txt' names 1 files, all of them empty",
        ),
        ({"data": {"x": "{place}/blank.jsonl"}}, "set 'x' has no text"),
        ({"field": "body"}, "set 'docs': Line 1 of {place}/docs.jsonl has no field 'body'"),
        ({"context": 17}, "context=17 is more than the 16 tokens that the model reads at a time"),
        ({"context": 4, "stride": 5}, "stride=5 is more than context=4"),
        ({"run": "{place}"}, "run={place} has no last.ckpt"),
        ({"run": "{place}/folder"}, "is a folder of transformers: `tedlab checkpoint import"),
        ({"processes": 3, "tensor": 3}, "is not divisible by"),
        ({"out": "{place}/docs.jsonl/x"}, "out={place}/docs.jsonl/x cannot be made"),
        ({"precision": "16-true"}, "precision"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_evaluated_is_told(model: Tiny, options: dict[str, Any], message: str) -> None:
    place = str(model.run.parent)
    (model.run.parent / "empty.txt").touch()
    write_jsonl(model.run.parent / "blank.jsonl", [{"text": ""}])
    filled = json.loads(json.dumps(options).replace("{place}", place))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        evaluate(config(model, **filled))
    assert message.replace("{place}", place) in str(caught.value)


def test_a_model_that_looks_ahead_has_no_likelihood(model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from tedlab.opened import model_of

    shape, _ = model_of(model.run / "checkpoints" / "last.ckpt")
    monkeypatch.setattr("tedlab.opened.model_of", lambda path: (shape, MoEConfig(4, gating="expert_choice")))
    with pytest.raises(ValueError, match=r"moe\.gating=expert_choice, which chooses for a token by more than"):
        evaluate(config(model))


def test_the_command_ends_in_a_short_message(model: Tiny, capfd: pytest.CaptureFixture[str]) -> None:
    code = run_command(main, f"run={model.run}", "data.x=nowhere.txt")
    said = f"{code}" if isinstance(code, str) else capfd.readouterr().err
    assert "set 'x': its path 'nowhere.txt' does not exist" in said
    assert len(said.strip().splitlines()) <= 4, said
