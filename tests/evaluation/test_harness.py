"""Tasks of the lm-eval harness: what it is told is what transformers says, in every layout; what fails is told."""

import json
import math
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from tedlab.commands import eval as command
from tedlab.config import EvalConfig
from tedlab.errors import UsageError, WorkerFailed
from tedlab.evaluation.evaluate import evaluate, given
from tests.evaluation.tiny import CONTEXT, LETTERS, SEPARATOR, Follows, Tiny, ids, tiny, write_jsonl
from tests.pool import WorkerPool

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("single")

QUESTIONS = [
    {"question": "is it so", "choices": [" yes", " no, never"], "answer": 0},
    {"question": "who?", "choices": [" the one", " a", " many of us"], "answer": 2},
    {"question": "a very long question that does not fit", "choices": [" ok", " no"], "answer": 1},
    {"question": "when", "choices": [" now", " then"], "answer": 1},
    {"question": "so", "choices": [" be it", " what"], "answer": 0},
]
TASK: dict[str, Any] = {
    "task": "tiny",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    "metadata": {"version": 3},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    place = tmp_path_factory.mktemp("tiny")
    (place / "tasks").mkdir()
    task(place, "tiny", QUESTIONS)
    return tiny(place)


def task(place: Path, name: str, rows: list[Any], **changed: Any) -> str:
    """Writes the file of a task and its data, and returns the path."""
    data = write_jsonl(place / f"{name}.jsonl", rows)
    options = {"data_files": {"test": f"{data}"}, "cache_dir": f"{place / 'cache'}"}
    path = place / "tasks" / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**TASK, "task": name, "dataset_kwargs": options, **changed}))
    return f"{path}"


def config(model: Tiny, *tasks: str, **options: Any) -> EvalConfig:
    given = {"run": str(model.run), "tasks": [*tasks], "precision": "64-true", "batch_size": 2}
    return EvalConfig(**{**given, "out": f"{model.run.parent / 'out'}", **options})


def likelihood(follows: Follows, before: str, after: str) -> float:
    """The log-probability of a continuation by transformers, each token by itself, of the last tokens that fit."""
    stream = ids(before) or [SEPARATOR]
    total = len(stream) + len(ids(after))
    stream = [*stream, *ids(after)]
    begin = max(0, total - CONTEXT - 1)
    places = range(total - len(ids(after)), total)
    return math.fsum(float(follows(stream[begin:place])[stream[place]]) for place in places)


# ---- what the harness is told ---------------------------------------------------------------------------------------


def lent(model: Tiny, **options: Any) -> Any:
    from tedlab.evaluation.harness import LentModel
    from tedlab.opened import load, opened

    whose = opened(model.run / "checkpoints" / "last.ckpt", model.run, config(model, **options))
    torch.set_default_dtype(torch.float64)
    try:
        return LentModel(load(whose), whose.tokenizer, 2, CONTEXT)
    finally:
        torch.set_default_dtype(torch.float32)


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments, task_name="x", doc_id=7)


PAIRS = [
    ("the start", " of it"),
    ("", "alone"),
    ("a", " b"),
    ("so long that it loses its beginning", " here"),
    (" ", "x"),
]


SAMPLED = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 2.0}


def answers(model: Tiny, layout: dict[str, int]) -> tuple[list[Any], list[float], list[str]]:
    told = lent(model, **layout)
    texts = ["short", "a text that is longer than what the model reads"]
    until = [asked("the ", {"until": ["e", "\n"], "max_gen_toks": 6}), asked("once upon a time there", {"until": "q"})]
    until[1].args[1]["max_gen_toks"] = 5
    until += [asked("how", SAMPLED)] * 3
    (greedy,) = told.generate_until([asked("how", {"until": [], "max_gen_toks": 4})])
    pairs = told.loglikelihood([asked(*pair) for pair in [*PAIRS, ("how", greedy)]])
    return pairs, told.loglikelihood_rolling([asked(text) for text in texts]), told.generate_until(until)


def test_likelihoods_are_those_of_transformers(model: Tiny) -> None:
    follows = model.judge()
    pairs, rolling, generated = answers(model, {})
    assert pairs.pop()[1], "what greedy decoding has written"
    for (before, after), (found, greedy) in zip(PAIRS, pairs, strict=True):
        moved = before[len(before.rstrip()) :]  # blanks at the end of a context belong to the continuation
        expected = likelihood(follows, before.rstrip(), moved + after)
        assert found == pytest.approx(expected, rel=1e-12), (before, after)
        assert not greedy
    assert rolling[0] == pytest.approx(likelihood(follows, "", "short"), rel=1e-12)
    prompt = ids("the ")
    for _ in range(6):
        prompt.append(int(follows(prompt)[: 1 + len(LETTERS)].argmax()))
        if prompt[-1] == SEPARATOR:
            break
    written = "".join(["<|endoftext|>", *LETTERS][token] for token in prompt[4:])
    assert generated[0] == written.split("e")[0].split("\n")[0].split("<")[0]
    assert len(generated[1]) <= 5


def sampled(model: Tiny, layout: dict[str, int], batch: int) -> list[str]:
    told = lent(model, **layout)
    told.batch = batch
    other = asked("how", {**SAMPLED, "temperature": 3.0})
    return told.generate_until([*[asked("how", SAMPLED)] * 5, other, asked("who", SAMPLED)])


def test_samples_depend_on_no_batch_and_repeats_differ(model: Tiny) -> None:
    one = sampled(model, {}, 1)
    assert len({*one[:5]}) == 5
    assert sampled(model, {}, 3) == sampled(model, {}, 16) == one


def test_a_prompt_keeps_half_the_context_where_a_task_does_not_say_how_much_to_write(model: Tiny) -> None:
    from lm_eval.defaults import default_gen_kwargs

    told = lent(model)
    for options in ({"until": []}, default_gen_kwargs("e")):
        (text,) = told.generate_until([asked("abcdefgh", options)])
        assert len(text) <= CONTEXT // 2
    assert told.shortened == 0


LAYOUTS = [{"tensor": 2, "expert": 2}, {"expert": 4}, {}, {"tensor": 2, "expert": 4, "expert_tensor": 1}]


@pytest.mark.slow
def test_every_layout_answers_alike(pool: WorkerPool, model: Tiny) -> None:
    one = answers(model, {})
    cells = [(model, {"processes": 4, **layout}) for layout in LAYOUTS]
    for by_rank in pool.run_each(4, answers, cells):
        for pairs, rolling, generated in by_rank:
            assert [value for value, _ in pairs] == pytest.approx([value for value, _ in one[0]], rel=1e-12)
            assert [greedy for _, greedy in pairs] == [greedy for _, greedy in one[0]]
            assert rolling == pytest.approx(one[1], rel=1e-12)
            assert generated == one[2]


# ---- tasks ----------------------------------------------------------------------------------------------------------


def expected(model: Tiny) -> dict[str, float]:
    """Accuracies by hand: a choice wins by its log-probability, or by that for each of its letters."""
    follows = model.judge()
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for row in QUESTIONS:
        values = [likelihood(follows, row["question"], choice) for choice in row["choices"]]
        each = [value / len(choice) for value, choice in zip(values, row["choices"], strict=True)]
        right["acc"].append(values.index(max(values)) == row["answer"])
        right["acc_norm"].append(each.index(max(each)) == row["answer"])
    return {name: sum(which) / len(which) for name, which in right.items()}


def test_a_task_of_ones_own_has_the_accuracies_worked_by_hand(model: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(config(model, f"{model.run.parent / 'tasks' / 'tiny.yaml'}"))
    by_hand = expected(model)
    assert by_hand["acc"] != by_hand["acc_norm"], "the two can be told apart"
    assert {name: found[f"eval/tiny/{name}"] for name in by_hand} == by_hand
    p = by_hand["acc"]
    assert found["eval/tiny/acc_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (len(QUESTIONS) - 1)))
    said = capsys.readouterr().out
    assert f"{p:.4f}" in said
    assert "3 contexts lost their beginnings: the model reads 16 tokens at a time" in said
    written = json.loads((model.run.parent / "out" / "step_0_tiny.json").read_text())
    common = {"step": 0, "context": 16, "precision": "64-true"}
    assert written["settings"] == {"fewshot": 0, "limit": None, "version": "3", **common}
    assert (written["metrics"], written["documents"]) == (found, len(QUESTIONS))


@pytest.mark.slow
def test_layouts_find_the_same_of_tasks_by_name_and_examples_stand_before_them(pool: WorkerPool, model: Tiny) -> None:
    options = {
        "include": f"{model.run.parent / 'tasks'}",
        "limit": 3,
        "data": {"rows": f"{model.run.parent}/tiny.jsonl"},
    }
    given = config(model, "tiny", **options, field="question")
    one = evaluate(given)
    by_rank = pool.run(4, evaluate, EvalConfig(**{**vars(given), "processes": 4, "tensor": 2, "expert": 2}))
    assert by_rank[0] == pytest.approx(one, rel=1e-12)
    assert "eval/rows/loss" in one
    (few,) = pool.run(1, evaluate, EvalConfig(**{**vars(given), "fewshot": 1}))
    assert few.keys() == one.keys()


@pytest.mark.slow
def test_the_command_evaluates_a_task_in_a_layout(model: Tiny, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tedlab", "eval", f"run={model.run}", f"out={tmp_path}", "precision=64-true"]
    command += [f"tasks=[{model.run.parent / 'tasks' / 'tiny.yaml'}]", "processes=2", "tensor=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert f"{expected(model)['acc_norm']:.4f}" in done.stdout
    assert (tmp_path / "step_0_tiny.json").is_file()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": [" yes", ""]}, "document 1 of task bad: '', whose probability is asked for, has 0 tokens"),
        ({"choices": [" no", " far too long to be read"]}, "has 24 tokens; it must have 1 to 16"),
    ],
    ids=["empty", "long"],
)
def test_choices_that_have_no_probability_are_told(model: Tiny, row: dict[str, Any], message: str) -> None:
    file = task(model.run.parent, "bad", [QUESTIONS[0], {**QUESTIONS[1], "answer": 0, **row}])
    with pytest.raises(ValueError, match="task bad") as caught:
        evaluate(config(model, file))
    assert message in str(caught.value)


def test_tasks_that_cannot_be_loaded_are_told(model: Tiny) -> None:
    place = model.run.parent
    with pytest.raises(FileNotFoundError, match=r"tasks has nowhere\.yaml, and there is no such file"):
        evaluate(config(model, "nowhere.yaml"))
    with pytest.raises(FileNotFoundError, match="include=nowhere is no folder"):
        evaluate(config(model, "tiny", include="nowhere"))
    file = task(place, "lost", QUESTIONS, dataset_kwargs={"data_files": {"test": f"{place}/lost_for_good.jsonl"}})
    with pytest.raises(ValueError, match=r"task '.*lost\.yaml' cannot be loaded: .*lost_for_good"):
        evaluate(config(model, file))
    with pytest.raises(ValueError, match="tiny is both a set of data and a task: call the set otherwise"):
        evaluate(config(model, f"{place}/tasks/tiny.yaml", data={"tiny": f"{place}/tiny.jsonl"}, field="question"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"doc_to_text": "{{ cycler.__init__.__globals__.os.mkdir('PLACE/ran') }}"},
            "access to attribute '__init__' of 'type' object is unsafe",
        ),
        ({"metric_list": [{"metric": "PLACE/script.py"}]}, "no metric 'PLACE/script.py' of its own"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "no metric 'acc' of its own"),
        ({"process_docs": "!function code.process"}, "it would run Python code (!function code.process)"),
        ({"unsafe_code": True}, "runs what the model writes: allow it with tasks_execute_code=true"),
    ],
    ids=lambda value: f"{value}"[:20],
)
def test_files_of_tasks_run_no_code(
    model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], message: str
) -> None:
    for name in ("script", "code"):
        (tmp_path / f"{name}.py").write_text("import os\nos.mkdir('ran')\ndef process(docs):\n    return docs\n")
    (tmp_path / "tasks").mkdir()
    monkeypatch.chdir(tmp_path)
    file = Path(task(tmp_path, "hostile", QUESTIONS, **changed))
    text = (
        file.read_text().replace("PLACE", f"{tmp_path}").replace("'!function code.process'", "!function code.process")
    )
    file.write_text(text)
    shutil.copy("code.py", "tasks")
    with pytest.raises(ValueError, match=r"task '.*hostile") as caught:
        evaluate(config(model, f"{file}"))
    assert message.replace("PLACE", f"{tmp_path}") in str(caught.value)
    assert not (tmp_path / "ran").exists()
    if "process_docs" in changed:
        with pytest.raises(ValueError, match="!function"):
            evaluate(config(model, "hostile", include="tasks"))
        assert not (tmp_path / "ran").exists()
        given(config(model, "hostile", include="tasks", tasks_execute_code=True))
        assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("row", "changed", "options", "why"),
    [
        ({"answer": None}, {}, {}, "a document lacks what its file asks for, or has it in another form (TypeError: "),
        ({"choices": None}, {}, {}, "a document lacks what its file asks for"),
        ({}, {}, {"fewshot": 5}, "fewshot=5, and it has 5 examples, a document that it asks about included"),
        (
            {},
            {"doc_to_text": "{{question}} ", "doc_to_choice": ["a" * 16, "b"]},
            {},
            "has 17 tokens; it must have 1 to 16",
        ),
        (
            {},
            {"output_type": "generate_until", "generation_kwargs": {"max_gen_toks": 16}, "metric_list": None},
            {},
            "max_gen_toks=16, and the model reads 16 tokens at a time, of which a prompt needs some: give 1 to 15",
        ),
    ],
    ids=["answer", "choices", "fewshot", "blank", "generate"],
)
def test_a_task_that_cannot_be_run_is_told_before_anything_is_computed(
    model: Tiny, tmp_path: Path, row: dict[str, Any], changed: dict[str, Any], options: dict[str, Any], why: str
) -> None:
    (tmp_path / "tasks").mkdir()
    split = {"fewshot_split": "test"} if options else {}
    file = task(tmp_path, "odd", [*QUESTIONS[:-1], {**QUESTIONS[-1], **row}], **split, **changed)
    with pytest.raises(ValueError, match=r"task 'odd' cannot be run: .") as caught:
        given(config(model, file, **options))
    assert why in str(caught.value)
    with pytest.raises(UsageError, match="task 'odd' cannot be run"):
        command.task(config(model, file, processes=2, tensor=2, **options))


@pytest.mark.parametrize("layout", [{}, {"processes": 2, "tensor": 2}], ids=["alone", "tensor"])
@pytest.mark.slow
def test_a_task_that_fails_on_answers_is_told_in_a_sentence(
    model: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str], layout: dict[str, int]
) -> None:
    """Its own code takes the answer of the rehearsal, which is right, and none of a model that has learnt nothing."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.py").write_text(
        "def only_right(doc, results):\n    return {'acc': {'yes': 1}[results[0].strip()]}\n"
    )
    own = {
        "output_type": "generate_until",
        "doc_to_target": "yes",
        "process_results": "!function own.only_right",
        "generation_kwargs": {"until": [], "max_gen_toks": 4},
    }
    file = Path(task(tmp_path, "odd", QUESTIONS, **own))
    file.write_text(file.read_text().replace("'!function own.only_right'", "!function own.only_right"))
    given_ = config(model, f"{file}", tasks_execute_code=True, **layout)
    with pytest.raises((UsageError, WorkerFailed), match=r"the lm-eval harness failed in odd: KeyError: ") as caught:
        command.task(given_)
    assert len(f"{caught.value}".splitlines()) == 1
    assert "Traceback" not in capfd.readouterr().err
    log = Path(given_.out or "") / "failure.log"
    assert log.exists() == bool(layout)
    assert not layout or ("KeyError" in log.read_text() and f"{log}" in f"{caught.value}")


def test_a_task_without_examples_says_that_fewshot_does_not_apply(
    model: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tasks").mkdir()
    task(tmp_path, "bare", QUESTIONS, num_fewshot=0)
    task(tmp_path, "dressed", QUESTIONS, num_fewshot=1)
    group = {"group": "both", "task": ["bare", "dressed"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "tasks" / "both.yaml").write_text(yaml.safe_dump(group))
    evaluate(config(model, "both", include=f"{tmp_path / 'tasks'}", fewshot=2, limit=2, out=f"{tmp_path}"))
    kept = {name: json.loads((tmp_path / f"step_0_{name}.json").read_text()) for name in ("bare", "dressed", "both")}
    assert {name: each["settings"]["fewshot"] for name, each in kept.items()} == {"bare": 0, "dressed": 2, "both": None}
    assert "fewshot=2 does not apply to bare, which say how many they have" in capsys.readouterr().out


def test_errors_are_bootstrapped_in_this_process_and_in_silence(
    model: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tasks").mkdir()
    monkeypatch.setattr("multiprocessing.Pool", None)
    first = {"doc_to_choice": None, "doc_to_target": "{{choices[0]}}", "metric_list": [{"metric": "perplexity"}]}
    file = task(tmp_path, "first", QUESTIONS, output_type="loglikelihood", **first)
    found = evaluate(config(model, file, out=f"{tmp_path}"))
    assert found["eval/first/perplexity_stderr"] > 0
    assert "bootstrapping" not in capsys.readouterr().out


def test_a_group_has_the_mean_and_the_documents_of_what_is_in_it(model: Tiny, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    for name, count in (("first", 3), ("second", 2)):
        task(tmp_path, name, QUESTIONS[:count])
    means = [{"metric": "acc", "weight_by_size": True}]
    inner = {"group": "inner", "task": ["first"], "aggregate_metric_list": means}
    outer = {"group": "outer", "task": ["inner", "second"], "aggregate_metric_list": means}
    for group in (inner, outer):
        (tmp_path / "tasks" / f"{group['group']}.yaml").write_text(yaml.safe_dump(group))
    found = evaluate(config(model, "outer", include=f"{tmp_path / 'tasks'}", out=f"{tmp_path}"))
    parts = {name: found[f"eval/{name}/acc"] for name in ("first", "second")}
    assert found["eval/inner/acc"] == parts["first"]
    assert found["eval/outer/acc"] == pytest.approx((3 * parts["first"] + 2 * parts["second"]) / 5)
    counts = {
        name: json.loads((tmp_path / f"step_0_{name}.json").read_text())["documents"] for name in ("inner", "outer")
    }
    assert counts == {"inner": 3, "outer": 5}


def test_what_is_given_twice_is_refused(model: Tiny, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    own, other = f"{model.run.parent / 'tasks' / 'tiny.yaml'}", task(tmp_path, "tiny", QUESTIONS[:2])
    with pytest.raises(ValueError, match=f"tasks has 'tiny' twice, the second time in {other}"):
        evaluate(config(model, own, other))


def test_a_task_whose_data_is_nowhere_near_is_told_in_a_sentence(model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no data") from ConnectionError(socket.gaierror("no such host"))

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    file = task(model.run.parent, "remote", QUESTIONS, dataset_path="some/hub", dataset_kwargs={})
    with pytest.raises(ValueError, match="its data is not on this machine, and no hub can be reached"):
        evaluate(config(model, file))


@pytest.mark.slow
def test_an_unknown_task_is_told_with_those_like_it(model: Tiny) -> None:
    """The harness lists its own by reading thousands of files."""
    with pytest.raises(ValueError, match=r"tasks has 'helaswag', which .* Did you mean 'hellaswag'\?"):
        evaluate(config(model, "helaswag"))


def test_without_the_harness_tasks_are_refused(model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "tedlab.evaluation.harness", raising=False)
    with pytest.raises(ValueError, match=r"not installed .*: pip install 'tedlab\[eval\]'"):
        evaluate(config(model, "tiny"))
