"""``benchmarks.generation`` lets transformers generate as well as it can: with a cache and with its fastest experts."""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.generation import (
    _CPU,
    _WAYS,
    Contender,
    both,
    by_tedlab,
    by_transformers,
    fastest,
    in_turns,
    main,
    steps_apart,
)
from benchmarks.vs_transformers import SHAPES

pytestmark = pytest.mark.usefixtures("single")
TINY = ["model.layers=1", "model.hidden=32", "model.heads=2", "model.ffn=16", "model.vocab_size=64"]


@pytest.mark.parametrize("name", ["olmoe", "qwen3_30b"])
def test_both_compute_a_single_token_once_the_prompt_is_cached(name: str) -> None:
    shape = SHAPES[name]
    ours, theirs = both(shape, [*_CPU, *shape.small, *TINY], torch.device("cpu"), torch.float32)
    positions: dict[str, list[int]] = {}

    def note(model: str, module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        positions.setdefault(model, []).append((*given, *named.values())[0].shape[1])

    ours.blocks[0].register_forward_pre_hook(partial(note, "tedlab"), with_kwargs=True)
    theirs.model.layers[0].register_forward_pre_hook(partial(note, "transformers"), with_kwargs=True)
    ids = torch.randint(1, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    texts = [by_tedlab(ours, ids, 4)]
    assert positions.pop("tedlab") == [16, 1, 1, 1]
    for way in _WAYS:
        texts.append(by_transformers(theirs, way, ids, 4))
        assert positions.pop("transformers") == [16, 1, 1, 1]
        assert theirs.config._experts_implementation == way
    assert all(text == texts[0] for text in texts)


def test_transformers_default_is_among_its_ways() -> None:
    shape = SHAPES["olmoe"]
    _, theirs = both(shape, [*_CPU, *TINY], torch.device("cpu"), torch.float32)
    assert theirs.get_correct_experts_implementation(None) == _WAYS[0]


def test_results_say_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr("benchmarks.generation.measure", lambda *given: measured.append(given) or [])
    out = tmp_path / "generation.json"
    asked = "olmoe --set model.layers=3 --batches 2 --prompt 5 --tokens 4 --bf16 --out"
    monkeypatch.setattr(sys, "argv", ["generation", *asked.split(), str(out)])
    main()
    written = json.loads(out.read_text())
    ((_, overrides, batches, lengths, dtype),) = measured
    assert (batches, lengths, dtype) == ([2], (5, 4), torch.bfloat16)
    assert (written["prompt"], written["tokens"], written["dtype"]) == (5, 4, "bfloat16")
    assert written["overrides"] == {"olmoe": overrides}
    assert overrides[-1] == "model.layers=3"


def test_texts_part_by_so_many_steps_of_the_dtype() -> None:
    """The model likes token 7 best, with 3, then 5, a step of bf16 less, and 2 with 1, after any text but [1, 9]."""

    def model(ids: torch.Tensor) -> Any:
        logits = torch.zeros(1, ids.shape[1], 16, dtype=torch.bfloat16)
        logits[:, -1, [7, 5, 2]] = torch.tensor([3, 3 - 2**-6, 1], dtype=torch.bfloat16)
        if ids.tolist() == [[1, 9]]:
            logits[:, -1, 5] = 3
        return SimpleNamespace(logits=logits)

    ids = torch.tensor([[1], [1]])
    assert steps_apart(model, ids, [[7, 7], [5, 5]], [[7, 7], [5, 5]]) is None
    assert steps_apart(model, ids, [[7, 7], [5, 5]], [[7, 7], [7, 2]]) == 1
    assert steps_apart(model, ids, [[9, 7], [5, 5]], [[9, 5], [5, 5]]) == 0
    assert steps_apart(model, ids, [[4, 7], [7, 2]], [[4, 5], [7, 7]]) == 2 * 2**6


def test_the_fastest_decodes_fastest_and_what_memory_forbids_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One takes 5 seconds for its prompt and 2 for each further token, another 1 and 4; in one round all take longer.

    The clock is the test's. The round before, which does not count, takes 90 seconds more.
    """
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("benchmarks.generation.time", SimpleNamespace(perf_counter=lambda: clock.now))
    order = []

    def waiting(name: str, prompt: float, token: float, ids: torch.Tensor, tokens: int) -> list[list[int]]:
        order.append(name)
        turn = order.count(name) - 1  # two of each round
        clock.now += prompt + token * (tokens - 1) + (90, 0, 30, 0)[turn // 2]
        return []

    def failing(ids: torch.Tensor, tokens: int) -> list[list[int]]:
        raise torch.OutOfMemoryError

    contenders: dict[str, Contender] = {"slow start": partial(waiting, "a", 5, 2), "none": failing}
    contenders["fast start"] = partial(waiting, "b", 1, 4)
    found = in_turns(contenders, torch.zeros(3, 1), 5, rounds=3)
    said = capsys.readouterr().out.splitlines()
    assert said[1:3] == [
        "3 texts, the round that does not count: slow start 103.00 s, fast start 107.00 s",
        "3 texts, round 1 of 3: slow start 13.00 s, fast start 17.00 s",
    ]
    assert found == {
        "slow start": {"first_s": 5, "tokens_per_second": 3 / 2},
        "fast start": {"first_s": 1, "tokens_per_second": 3 / 4},
    }
    assert fastest(found) == ("slow start", {"first_s": 1, "tokens_per_second": 3 / 2})
    assert order == ["a", "a", "b", "b"] * 4
