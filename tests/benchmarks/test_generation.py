"""``benchmarks.generation`` lets transformers generate as well as it can: with a cache and with its fastest experts."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.generation import _CPU, _WAYS, Contender, both, by_tedlab, by_transformers, fastest, in_turns
from benchmarks.vs_transformers import SHAPES

pytestmark = pytest.mark.usefixtures("single")
TINY = ["model.layers=1", "model.hidden=32", "model.heads=2", "model.ffn=16", "model.vocab_size=64"]


@pytest.mark.parametrize("name", ["olmoe", "qwen3_30b"])
def test_both_compute_a_single_token_once_the_prompt_is_cached(name: str) -> None:
    shape = SHAPES[name]
    ours, theirs = both(shape, [*_CPU, *shape.small, *TINY], torch.device("cpu"))
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
    _, theirs = both(shape, [*_CPU, *TINY], torch.device("cpu"))
    assert theirs.get_correct_experts_implementation(None) == _WAYS[0]


def test_the_fastest_decodes_fastest_and_what_memory_forbids_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert found == {
        "slow start": {"first_s": 5, "tokens_per_second": 3 / 2},
        "fast start": {"first_s": 1, "tokens_per_second": 3 / 4},
    }
    assert fastest(found) == ("slow start", {"first_s": 1, "tokens_per_second": 3 / 2})
    assert order == ["a", "a", "b", "b"] * 4
