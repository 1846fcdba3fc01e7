"""Scalings of rotary positions against those of transformers."""

import math
from typing import Any

import pytest
import torch

from tedlab.config import RotaryConfig
from tedlab.nn.rotary import attention_factor, latent_score_factor, rotation

LENGTH, HEAD, BASE, ORIGINAL = 50, 64, 10_000.0, 32
YARN = {"scaling": "yarn", "factor": 40.0, "original_length": ORIGINAL}
SCALINGS: dict[str, dict[str, Any]] = {  # fields of ours
    "none": {},
    "linear": {"scaling": "linear", "factor": 4.0},
    "ntk": {"scaling": "ntk", "factor": 4.0, "original_length": ORIGINAL},
    "yarn": YARN,
    "yarn of gpt-oss": {**YARN, "truncate": False, "beta_fast": 3.0, "beta_slow": 0.5},
    "yarn of DeepSeek-V2": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "yarn with two factors": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn with a factor given": {**YARN, "attention_factor": 1.3},
    "llama3": {
        **{"scaling": "llama3", "factor": 8.0, "original_length": 1024},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
}
THEIR_NAMES = {"original_length": "original_max_position_embeddings"}


@pytest.mark.slow  # importing transformers takes some seconds
@pytest.mark.parametrize("name", SCALINGS)
def test_angles_and_factor_are_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ours = SCALINGS[name]
    kind = {"ntk": "dynamic", "none": "default"}.get(ours.get("scaling", "none"), ours.get("scaling", "none"))
    given = {THEIR_NAMES.get(key, key): value for key, value in ours.items() if key != "scaling"}
    config = transformers.LlamaConfig(
        hidden_size=HEAD,
        num_attention_heads=1,
        max_position_embeddings=ORIGINAL,
        rope_parameters={"rope_type": kind, "rope_theta": BASE, **given},
    )
    if kind == "default":
        frequencies, factor = BASE ** -(torch.arange(0, HEAD, 2) / HEAD), 1.0
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=LENGTH)
    angles = torch.outer(torch.arange(LENGTH).double(), frequencies.double())
    expected = torch.stack((angles.cos(), angles.sin())) * factor
    found = rotation(LENGTH, HEAD, BASE, torch.device("cpu"), torch.float64, RotaryConfig(**ours))
    torch.testing.assert_close(found, expected, rtol=0, atol=LENGTH * 1e-6)  # theirs are of float32
    assert attention_factor(RotaryConfig(**ours)) == pytest.approx(factor, rel=1e-12)


# Worked by hand: the angles of a token at position 1, of pairs that turn by 10000^(-2i/d) without a scaling.
BY_HAND: dict[str, tuple[dict[str, Any], int, list[float]]] = {
    "linear": ({"scaling": "linear", "factor": 4.0}, 4, [1 / 4, 0.01 / 4]),
    # Twice the length: the base is 10000 · (2·2 - 1)^(4/2) = 90000.
    "ntk": ({"scaling": "ntk", "factor": 2.0, "original_length": LENGTH // 2}, 4, [1, 1 / 300]),
    # The second pair turns 400 · 0.01 / 2π = 2/π times, which is 4/π - 1 of the way from 0.5 to 1.
    "llama3": (
        {"scaling": "llama3", "factor": 8.0, "original_length": 400, "low_freq_factor": 0.5, "high_freq_factor": 1.0},
        4,
        [1, 0.01 * (4 / math.pi - 1 + (2 - 4 / math.pi) / 8)],
    ),
    # Pair 2.618 turns 32 times over 4096 tokens, and pair 5.628 once: a ramp from 2 to 6.
    "yarn": (
        {"scaling": "yarn", "factor": 4.0, "original_length": 4096},
        16,
        [10_000 ** (-i / 8) * (k + (1 - k) / 4) for i, k in enumerate((1, 1, 1, 0.75, 0.5, 0.25, 0, 0))],
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_angles_are_those_worked_by_hand(name: str) -> None:
    options, width, expected = BY_HAND[name]
    rotary = RotaryConfig(**options)
    cos, sin = rotation(LENGTH, width, BASE, torch.device("cpu"), torch.float64, rotary)
    torch.testing.assert_close(torch.atan2(sin, cos)[1], torch.tensor(expected).double(), rtol=1e-6, atol=0)
    size = 0.1 * math.log(4) + 1 if name == "yarn" else 1.0
    torch.testing.assert_close(torch.hypot(cos, sin), torch.full_like(cos, size), rtol=1e-12, atol=0)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones() -> None:
    def angles(**options: Any) -> torch.Tensor:
        turns = rotation(2, HEAD, BASE, torch.device("cpu"), torch.float64, RotaryConfig(**options))
        return torch.atan2(turns[1, 1], turns[0, 1])

    plain, stretched = angles(), angles(**{**YARN, "original_length": 4096})
    torch.testing.assert_close(stretched[:4], plain[:4], rtol=1e-12, atol=0)
    torch.testing.assert_close(stretched[-4:], plain[-4:] / 40, rtol=1e-9, atol=0)
    assert (stretched.diff() < 0).all()


def test_latent_attention_s_scores_have_the_square_of_yarn_s_factor() -> None:
    """DeepSeek-V2: the factor 40 and an mscale_all_dim of 0.707, so (0.0707 · ln 40 + 1)²."""
    assert latent_score_factor(RotaryConfig(**YARN, mscale_all_dim=0.707)) == pytest.approx(1.589626, rel=1e-6)
    assert latent_score_factor(RotaryConfig(**YARN)) == 1.0
