"""Texts grow by what attention remembers as if they were computed again for each token, in every layout."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from tedlab import ParallelDegrees, Topology
from tedlab.config import (
    AttentionConfig,
    LatentConfig,
    ModelConfig,
    MoEConfig,
    RotaryConfig,
    RouterConfig,
    SharedConfig,
)
from tedlab.decode import _Steps, continuations, why_no_graph
from tedlab.models import GPT
from tedlab.nn.attend import attend_visible
from tedlab.sampling import Sampling
from tests.pool import WorkerPool

LEARNED = ModelConfig(2, 16, 4, 24, sequence_length=24, vocab_size=32, init_std=0.3)
ROTARY = replace(LEARNED, positions="rotary", norm="rms", bias=False, activation="swiglu", tie_embeddings=False)
LATENT = LatentConfig(kv_rank=6, q_rank=8, nope_dim=6, rope_dim=4, v_dim=5)
ROWS, SLOTS = (
    MoEConfig(num_experts=4, top_k=2, dispatch=kind, capacity_factor=None) for kind in ("dropless", "capacity")
)
MODELS = {
    "learned positions": (LEARNED, SLOTS),
    "grouped queries, norms of heads": (replace(ROTARY, kv_heads=2, qk_norm="head"), ROWS),
    "norms of all heads": (replace(ROTARY, qk_norm="full"), ROWS),
    "windows and sinks": (
        replace(ROTARY, kv_heads=2, attention=AttentionConfig(window=4, full_every=2, sinks=True)),
        replace(ROWS, router=RouterConfig(gates="softmax")),
    ),
    "latents": (replace(ROTARY, attention=AttentionConfig(latent=LATENT)), replace(ROWS, shared=SharedConfig(1))),
    "stretched": (replace(ROTARY, rotary=RotaryConfig("yarn", factor=2.0, original_length=12)), ROWS),
    "stretched by length": (replace(ROTARY, rotary=RotaryConfig("ntk", factor=2.0, original_length=12)), ROWS),
    "hashed tokens": (ROTARY, MoEConfig(num_experts=4, top_k=2, dispatch="dropless", gating="hash")),
    "shortcut": (LEARNED, replace(ROWS, every=2, top_k=1, shared=SharedConfig(1, combine="cg1"), shortcut="pos2")),
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8], [9, 7], [9, 3, 2, 3, 8]]
LAYOUTS = {"T2": (2, 2, 1), "E2": (2, 1, 2), "T2_E2": (4, 2, 2), "D2": (2, 1, 1), "E4": (4, 1, 4)}
FOLDED = {"T2_E2": (2, 2, 2, 1), "E2_T2": (4, 1, 2, 2), "T2_E4": (4, 2, 4, 1)}


def network(model: ModelConfig, moe: MoEConfig, topology: Topology) -> GPT:
    torch.set_default_dtype(torch.float64)
    try:
        return GPT(model, moe, topology, seed=0).eval()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "stretched by length"])
def test_logits_are_those_of_the_whole_text(single: Topology, name: str) -> None:
    model = network(*MODELS[name], single)
    texts = [list(prompt) for prompt in PROMPTS]
    longest = max(map(len, texts))
    steps = _Steps(model, texts, longest, 20, torch.device("cpu"))
    assert steps.can_remember
    draw = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        for step in range(13):
            remembered, again = steps.remembered(), steps.whole(24, longest + step)
            torch.testing.assert_close(remembered, again, rtol=1e-12, atol=1e-12)
            for text in texts:
                text.append(int(torch.randint(32, (), generator=draw)))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "stretched by length"])
def test_steps_that_could_be_recorded_give_the_same_logits(single: Topology, name: str) -> None:
    """One function of tensors that stay in place is called again for each token, as a CUDA graph is."""
    model = network(*MODELS[name], single)
    texts = [list(prompt) for prompt in PROMPTS]
    recorded = []

    def record(compute: Any) -> Any:
        recorded.append(compute)
        compute()  # as a warm-up
        return compute

    steps = _Steps(model, texts, 7, 20, torch.device("cpu"), record)
    with torch.inference_mode():
        for step in range(13):
            torch.testing.assert_close(steps.remembered(), steps.whole(24, 7 + step), rtol=1e-12, atol=1e-12)
            for number, text in enumerate(texts):
                text.append((5 * step + number) % 32)
    assert len(recorded) == 1


def test_what_the_host_must_read_is_no_graph(single: Topology) -> None:
    model = network(ROTARY, ROWS, single)
    assert "the host reads how many rows" in (why_no_graph(model) or "")
    assert why_no_graph(model.to(torch.bfloat16)) is None
    model.blocks[1].float()
    assert "the host reads how many rows" in (why_no_graph(model) or "")
    slots = network(LEARNED, SLOTS, single).to(torch.bfloat16)
    assert "moe.dispatch=dropless" in (why_no_graph(slots) or "")
    assert why_no_graph(network(LEARNED, MoEConfig(num_experts=0), single)) is None


@pytest.mark.parametrize("name", ["grouped queries, norms of heads", "windows and sinks", "latents"])
def test_texts_of_one_length_need_masks_of_windows_only(
    single: Topology, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    masked = []

    def noting(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None, *more: Any) -> Any:
        masked.append(visible is not None)
        return attend_visible(q, k, v, visible, *more)

    monkeypatch.setattr("tedlab.nn.past.attend_visible", noting)
    model = network(*MODELS[name], single)
    texts = [[3, 1, 4, 1], [5, 9, 2, 6]]
    steps = _Steps(model, texts, 4, 12, torch.device("cpu"))
    with torch.inference_mode():
        for step in range(5):
            torch.testing.assert_close(steps.remembered(), steps.whole(24, 4 + step), rtol=1e-12, atol=1e-12)
            for number, text in enumerate(texts):
                text.append(number + step)
    assert masked == [*[True, False] * 4] if "windows" in name else [False] * 8


def test_logits_of_the_whole_text_are_those_of_the_models_forward_pass(single: Topology) -> None:
    model = network(*MODELS["latents"], single)
    steps = _Steps(model, PROMPTS, 7, 20, torch.device("cpu"))
    with torch.inference_mode():
        for row, prompt in zip(steps.whole(24, 7), PROMPTS, strict=True):
            torch.testing.assert_close(row, model(torch.tensor([prompt]))[0][0, -1], rtol=1e-12, atol=1e-12)


@dataclass
class Written:
    """What a layout writes."""

    news: list[list[int | None]]
    logits: torch.Tensor  # of the first step and the third, of its own texts


def written(degrees: tuple[int, ...], name: str, sampling: Sampling, prompts: Sequence[Sequence[int]]) -> Written:
    processes, tensor, expert, *folded = degrees
    topology = Topology(ParallelDegrees(processes, tensor, expert, False, *folded))
    model = network(*MODELS[name], topology)
    seen: list[torch.Tensor] = []

    class Listening(Sampling):
        def choose(self, logits_BV: torch.Tensor, streams: Any) -> torch.Tensor:
            seen.append(logits_BV)
            return super().choose(logits_BV, streams)

    listening = Listening(sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed)
    news = list(
        continuations(model, prompts, 6, listening, ended=lambda number, added: number == 1 and len(added) == 2)
    )
    return Written(news, torch.stack([seen[0], seen[2]]))


@pytest.mark.parametrize("name", ["grouped queries, norms of heads", "latents", "learned positions", "hashed tokens"])
def test_layouts_write_what_one_process_writes(pool: WorkerPool, name: str) -> None:
    sampling = Sampling(0.9, top_k=20, top_p=0.95, seed=3)
    (one,) = pool.run(1, written, (1, 1, 1), name, sampling, PROMPTS)
    assert [step[1] is None for step in one.news] == [False, False, True, True, True, True]
    for layout in [*LAYOUTS.values(), *(FOLDED.values() if name in ("latents", "hashed tokens") else [])]:
        ranks = pool.run(layout[0], written, layout, name, sampling, PROMPTS)
        for rank, found in enumerate(ranks):
            assert found.news == one.news, (layout, rank)
            sides = layout[0] // layout[1]
            texts = [*range(5), *[4] * (-5 % sides)][rank // layout[1] :: sides]
            torch.testing.assert_close(found.logits, one.logits[:, texts], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["grouped queries, norms of heads", "stretched by length", "hashed tokens"])
def test_a_text_does_not_depend_on_those_beside_it(single: Topology, name: str) -> None:
    model = network(*MODELS[name], single)
    together = list(continuations(model, PROMPTS, 9, Sampling(1.2, seed=5)))
    for number, prompt in enumerate(PROMPTS):
        alone = list(continuations(model, [prompt], 9, Sampling(1.2, seed=5 + number)))
        assert [step[number] for step in together] == [step[0] for step in alone]


def test_beyond_its_positions_a_model_reads_the_end_of_a_text(single: Topology) -> None:
    model = network(*MODELS["learned positions"], single)
    ids = list(PROMPTS[0])
    for (token,) in continuations(model, [ids], 30, Sampling(0)):
        window = torch.tensor([ids[-24:]])
        assert token == int(model(window)[0][0, -1].argmax())
        ids.append(token)
    assert len(ids) == 37


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[1], []], "prompt 1 has 0 tokens"), ([[1] * 25], "prompt 0 has 25 tokens; the model has room for 1 to 24")],
)
def test_prompts_that_do_not_fit_are_refused(single: Topology, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(continuations(network(*MODELS["learned positions"], single), prompts, 2, Sampling()))


@pytest.mark.parametrize(
    ("model", "moe", "message"),
    [
        (replace(LEARNED, compile="inductor"), SLOTS, "model.compile=inductor would compile each length"),
        (LEARNED, replace(SLOTS, slice="tokens"), "moe.slice divide the positions of a text"),
    ],
    ids=["compiled", "sliced"],
)
def test_models_that_cannot_compute_single_tokens_are_refused(
    pool: WorkerPool, model: ModelConfig, moe: MoEConfig, message: str
) -> None:
    for said in pool.run(2, refused, model, moe):
        assert message in said


def refused(model: ModelConfig, moe: MoEConfig) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        next(continuations(network(model, moe, Topology(ParallelDegrees(2, tensor=2))), [[1, 2]], 2, Sampling()))
    return str(caught.value)


def test_attention_that_remembers_nothing_computes_again(single: Topology) -> None:
    """As a guest's may, which would otherwise see each new token alone."""
    model = network(*MODELS["grouped queries, norms of heads"], single)
    expected = list(continuations(model, PROMPTS, 5, Sampling(0)))

    class Hidden(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            object.__setattr__(self, "inner", inner)  # nobody finds it among the modules

        def forward(self, *given: Any) -> Any:
            return self.inner(*given)

    for block in model.blocks:
        block.attention = Hidden(block.attention)
    assert list(continuations(model, PROMPTS, 5, Sampling(0))) == expected


def test_a_model_that_trained_computes_as_in_evaluation_and_goes_on_training(single: Topology) -> None:
    model = network(ROTARY, replace(ROWS, router=RouterConfig(jitter=0.9)), single)
    expected = list(continuations(model, PROMPTS, 5, Sampling(0)))
    model.train()
    assert list(continuations(model, PROMPTS, 5, Sampling(0))) == expected
    assert model.training


# ---- sampling -------------------------------------------------------------------------------------------------------

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])


def shares(sampling: Sampling) -> list[float]:
    """How often each token is chosen of 4,000 times."""
    samples = 4000
    logits = PROBABILITIES.log().expand(samples, -1)
    chosen = sampling.choose(logits, sampling.streams(samples))
    return (torch.bincount(chosen, minlength=5) / samples).tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.1, 0.4, 0.05, 0.25, 0.2]),
        (Sampling(0), [0, 1, 0, 0, 0]),
        (Sampling(top_k=1), [0, 1, 0, 0, 0]),
        (Sampling(top_k=3), [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        (Sampling(top_p=0.3), [0, 1, 0, 0, 0]),
        (Sampling(top_p=0.6), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),  # 0.4 is less, and with 0.25 it is enough
        (Sampling(top_k=3, top_p=0.7), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),  # of 0.85, 0.65 is more than 0.7
        (Sampling(0.5), [p * p / 0.275 for p in PROBABILITIES.tolist()]),
    ],
    ids=str,
)
def test_tokens_are_chosen_as_often_as_they_should_be(sampling: Sampling, expected: list[float]) -> None:
    for found, wanted in zip(shares(sampling), expected, strict=True):
        assert abs(found - wanted) < (0.03 if 0 < wanted < 1 else 1e-9)  # four standard deviations


def test_seeds_choose_streams() -> None:
    logits = torch.zeros(3, 1000)
    first = Sampling(seed=7).choose(logits, Sampling(seed=7).streams(3))
    assert torch.equal(first, Sampling(seed=7).choose(logits, Sampling(seed=7).streams(3)))
    assert torch.equal(first[1:], Sampling(seed=8).choose(logits[:2], Sampling(seed=8).streams(2)))
    assert len(set(first.tolist())) == 3


@pytest.mark.parametrize("wrong", [[float("nan"), 1.0], [float("inf"), 1.0], [float("-inf")] * 2], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_no_text(wrong: list[float], temperature: float) -> None:
    with pytest.raises(ValueError, match="the model's logits are not finite: it has diverged"):
        Sampling(temperature).choose(torch.tensor([wrong]), Sampling().streams(1))
