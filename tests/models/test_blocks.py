"""Which blocks have experts, how wide these are, and what every token sees beside them."""

from pathlib import Path
from typing import Any

import pytest

from tedlab.certify.shrink import shrink
from tedlab.config import ModelConfig, MoEConfig
from tedlab.models import GPTSpec
from tests.certify.runs import composed

SIZES: dict[str, Any] = {"layers": 3, "hidden": 8, "heads": 2, "ffn": 20, "sequence_length": 4, "vocab_size": 32}


@pytest.mark.parametrize(
    ("given", "routed"),
    [
        ({}, (1, 3, 5)),
        ({"every": 1}, (0, 1, 2, 3, 4, 5)),
        ({"every": 4}, (3,)),
        ({"every": 1, "first_dense": 2}, (2, 3, 4, 5)),
        ({"every": 2, "first_dense": 2}, (3, 5)),
        ({"blocks": [4, 0, 1]}, (0, 1, 4)),
        ({"blocks": [0], "every": 1, "first_dense": 3}, (0,)),
        ({"num_experts": 0, "blocks": [0]}, ()),
    ],
    ids=str,
)
def test_blocks_with_experts(given: dict[str, Any], routed: tuple[int, ...]) -> None:
    assert MoEConfig(**{"num_experts": 4, **given}).routed(6) == routed


def test_dense_blocks_and_experts_have_widths_of_their_own() -> None:
    moe = MoEConfig(num_experts=4, every=1, first_dense=1, ffn=6)
    shapes = {p.name: p.shape for p in GPTSpec(ModelConfig(**SIZES), moe).parameters()}
    assert shapes["blocks.0.feed_forward.up.weight"] == (20, 8)
    assert shapes["blocks.1.feed_forward.experts.up"] == shapes["blocks.2.feed_forward.experts.up"] == (4, 8, 6)


def test_experts_are_as_wide_as_dense_layers_unless_they_have_a_width() -> None:
    shapes = {p.name: p.shape for p in GPTSpec(ModelConfig(**SIZES), MoEConfig(num_experts=4)).parameters()}
    assert shapes["blocks.1.feed_forward.experts.up"] == (4, 8, 20)


@pytest.mark.parametrize(
    ("overrides", "routed"),
    [
        ([], (1,)),
        (["moe.every=1"], (0, 1)),
        (["moe.every=1", "moe.first_dense=3"], (1,)),
        (["moe.blocks=[0,5]"], (1,)),
        (["moe.blocks=[0,1,2,3,4,5]"], (0, 1)),
    ],
    ids=str,
)
def test_a_likeness_has_dense_blocks_if_the_model_has(tmp_path: Path, overrides: list[str], routed: Any) -> None:
    small = shrink(composed("model.layers=6", "moe.ffn=64", *overrides), tmp_path)
    assert small.moe.routed(small.model.layers) == routed
    assert small.moe.ffn is not None
    assert small.moe.ffn != small.model.ffn
