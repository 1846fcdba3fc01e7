"""Initial weights and learning rates follow the width as the papers' tables say, and activations show that they do.

The expected factors are worked by hand; the coordinate check trains, and knows nothing of them.
"""

from dataclasses import replace
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from experiments.mup.coordinates import ADAMW, Moves, model_of, moves, slopes
from tedlab import ParallelDegrees, Topology
from tedlab.config import AttentionConfig, LatentConfig, ModelConfig, MoEConfig, OptimConfig, SharedConfig
from tedlab.models import GPT, GPTSpec
from tedlab.module import parameter_groups
from tedlab.optim import Grouping, Muon
from tedlab.parametrization import Scale, at_base, parametrizations, scales
from tedlab.spec import ParameterSpec

BASE, WIDE = 32, 128  # four times as wide
MUON: dict[str, Any] = {"_target_": "tedlab.optim.Muon", "weight_decay": 0.1}
EXPERTS = MoEConfig(4, top_k=2, dispatch="dropless", shared=SharedConfig(1, combine="cg1"))
# A vocabulary of 64: wider than the base, narrower than the model.
MODEL = model_of(WIDE, BASE, "mup")
HIDDEN = Scale(1 / 2, 1 / 4, 1 / 2)
# Names of whatever is no vector and no table, and what fan-in four times as large makes of it.
FACTORS = {
    "blocks.0.attention.qkv.weight": HIDDEN,
    "blocks.0.attention.out.weight": HIDDEN,
    "blocks.0.feed_forward.up.weight": HIDDEN,
    "blocks.0.feed_forward.down.weight": HIDDEN,
    "blocks.1.feed_forward.experts.up": HIDDEN,
    "blocks.1.feed_forward.experts.down": HIDDEN,
    "blocks.1.feed_forward.shared.up.weight": HIDDEN,
    "blocks.1.feed_forward.shared.down.weight": HIDDEN,
    "blocks.1.feed_forward.router.weight": Scale(1 / 4, 1 / 4, 1 / 4),
    "blocks.1.feed_forward.shared.gate.weight": Scale(1 / 4, 1 / 4, 1 / 4),
}
SAME = ("embedding.weight", "positions.weight", "norm.weight", "blocks.1.feed_forward.experts.up_bias")


def test_factors_are_those_worked_by_hand() -> None:
    found = scales(GPTSpec, MODEL, EXPERTS)
    assert {name: found[name] for name in FACTORS} == FACTORS
    # The larger dimension of the logits' weights, whose root Muon's updates are multiplied by, grows from 64 to 128.
    assert found["output.weight"] == Scale(1 / 4, 1 / 4, pytest.approx(1 / 2 / sqrt(2)))
    assert {found[name] for name in SAME} == {Scale()}
    left = {name for name in found if "blocks.1.attention" not in name} - {*FACTORS, *SAME, "output.weight"}
    assert {found[name] for name in left} == {Scale()}
    assert all("norm" in name or "bias" in name for name in left)


def test_spectral_factors_differ_where_the_fan_out_stays_and_was_the_larger() -> None:
    found = scales(GPTSpec, replace(MODEL, parametrization="spectral"), EXPERTS)
    ours = scales(GPTSpec, MODEL, EXPERTS)
    differing = {name for name in found if found[name] != pytest.approx(ours[name])}
    assert differing == {"output.weight"}
    # min(1, √(64 / 128)) / √128 over min(1, √(64 / 32)) / √32.
    assert found["output.weight"].init == pytest.approx(sqrt(1 / 2) / 2)


def test_the_base_has_all_widths_in_proportion() -> None:
    latent = AttentionConfig(latent=LatentConfig(kv_rank=64, q_rank=96))
    model = replace(MODEL, attention=latent, heads=8, kv_heads=8, ffn=256, base_hidden=WIDE // 2)
    moe = replace(EXPERTS, ffn=48, shared=SharedConfig(1, ffn=24))
    base, its_moe = at_base(model, moe)
    assert (base.hidden, base.heads, base.kv_heads, base.ffn) == (64, 4, 4, 128)
    assert (base.attention.latent.kv_rank, base.attention.latent.q_rank) == (32, 48)
    assert (its_moe.ffn, its_moe.shared.ffn) == (24, 12)
    same = replace(base, **{n: getattr(model, n) for n in ("hidden", "heads", "kv_heads", "ffn", "attention")})
    assert same == model
    assert replace(its_moe, ffn=48, shared=moe.shared) == moe


@pytest.mark.parametrize(("optimizer", "hidden"), [(ADAMW, 1 / 4), (MUON, 1 / 2)], ids=["adamw", "muon"])
@pytest.mark.usefixtures("single")
def test_rates_and_initial_weights_of_a_real_model(optimizer: dict[str, Any], hidden: float) -> None:
    optim = OptimConfig(optimizer=optimizer, lr=0.01)
    narrow = replace(MODEL, parametrization="standard", base_hidden=None)
    ours, theirs = (GPT(model, EXPERTS, Topology(ParallelDegrees(1)), 0) for model in (MODEL, narrow))
    names = {p: name for name, p in ours.named_parameters()}
    groups = parameter_groups(ours, Grouping.under(optim, scales(GPTSpec, MODEL, EXPERTS)), optim)
    seen = {names[p]: group for group in groups for p in group["params"]}
    assert {*seen} == {*names.values()}
    for name, parameter in theirs.named_parameters():
        factor = FACTORS.get(name.replace("blocks.1.attention", "blocks.0.attention"), Scale())
        factor = Scale(1 / 4, 1 / 4) if name == "output.weight" else factor
        rate = hidden if factor == HIDDEN else factor.rate  # Muon leaves the router, gates and logits to AdamW
        decay = 0.0 if "norm" in name or "bias" in name else 0.1
        assert seen[name].get("lr", 0.01) == pytest.approx(0.01 * rate), name
        assert seen[name].get("weight_decay", 0.1) * rate == pytest.approx(decay), name
        weights = ours.get_parameter(name).to_local()  # type: ignore[attr-defined]
        torch.testing.assert_close(weights, parameter.to_local() * (factor.init if parameter.std() > 0 else 1))


@pytest.mark.parametrize("parametrization", ["mup", "spectral"])
@pytest.mark.usefixtures("single")
def test_at_the_base_nothing_differs_from_standard(parametrization: str) -> None:
    model, optim = model_of(BASE, BASE, parametrization), OptimConfig(optimizer=ADAMW, lr=0.01)
    plain = model_of(BASE, None, "standard")
    ours, theirs = (GPT(its, EXPERTS, Topology(ParallelDegrees(1)), 0) for its in (model, plain))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())  # type: ignore[attr-defined]
    of = [Grouping.under(optim, scales(GPTSpec, its, EXPERTS)).options(optim) for its in (model, plain)]
    assert of[0] == of[1]


def test_muons_updates_keep_the_spectral_norm_that_a_width_asks_for() -> None:
    """Of a real update, so that it does not matter how Muon's own factor is written."""
    norms = {}
    for width in (BASE, WIDE):
        p = nn.Parameter(torch.zeros(2 * width, width, dtype=torch.float64))
        spec, base = (ParameterSpec("up", (2 * w, w), fan_in=1) for w in (width, BASE))
        rate = parametrizations["mup"](spec, base).matrix_rate
        optimizer = Muon([{"params": [p], "matrix": True, "lr": 0.1 * rate}], lr=0.1, weight_decay=0.0)
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype)
        optimizer.step()
        norms[width] = float(torch.linalg.matrix_norm(p.detach(), 2))  # √(fan-out / fan-in) is √2 at both
    assert norms[WIDE] == pytest.approx(norms[BASE], rel=0.1)  # Newton-Schulz leaves singular values near 1


# ---- the coordinate check ----------------------------------------------------------------------------------------

WIDTHS, STEPS, SEEDS = (32, 64, 128, 256), 4, 5


def grown(parametrization: str, optimizer: dict[str, Any] = ADAMW) -> dict[str, float]:
    """The power of the width with which what four steps change grows, by activation; a mean over seeds."""
    base = None if parametrization == "standard" else WIDTHS[0]
    means: list[Moves] = []
    for width in WIDTHS:
        model = model_of(width, base, parametrization)
        of = [moves(model, 0.01, STEPS, seed, optimizer) for seed in range(SEEDS)]
        means.append({name: list(np.mean([its[name] for its in of], axis=0)) for name in of[0]})
    return slopes(WIDTHS, means, STEPS - 1)


ACTIVATIONS = {"attention 0", "feed-forward 0", "attention 1", "router 1", "experts 1", "logits"}


@pytest.mark.parametrize("parametrization", ["mup", "spectral"])
@pytest.mark.usefixtures("single")
def test_activations_move_alike_at_every_width(parametrization: str) -> None:
    found = grown(parametrization)
    assert {*found} == ACTIVATIONS
    assert {name: slope for name, slope in found.items() if abs(slope) > 0.2} == {}


@pytest.mark.usefixtures("single")
def test_without_a_parametrization_they_grow_with_the_width() -> None:
    found = grown("standard")
    assert {*found} == ACTIVATIONS
    assert {name: slope for name, slope in found.items() if slope < 0.5} == {}


@pytest.mark.usefixtures("single")
def test_the_check_names_the_layer_whose_fan_in_is_not_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ParameterSpec.fans.fget  # type: ignore[attr-defined]
    wrong = property(lambda spec: None if spec.name.endswith("router.weight") else right(spec))
    monkeypatch.setattr(ParameterSpec, "fans", wrong)
    found = grown("mup")
    assert {name for name, slope in found.items() if abs(slope) > 0.2} == {"router 1"}


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_a_matrix_without_a_fan_in_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = GPTSpec.parameters
    unstated = lambda self: (replace(p, fan_in=None) for p in right(self))  # noqa: E731
    monkeypatch.setattr(GPTSpec, "parameters", unstated)
    with pytest.raises(ValueError, match=r"blocks\.0\.attention\.qkv\.weight: 2 dimensions.*give it a fan_in"):
        scales(GPTSpec, MODEL, EXPERTS)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no_base": ({"base_hidden": None}, "needs model.base_hidden"),
    "base_of_nothing": ({"parametrization": "standard"}, "base_hidden=32 means nothing"),
    "tied": ({"tie_embeddings": True}, "model.tie_embeddings=false"),
    "fraction_of_a_head": ({"heads": 2}, r"0.25 × model.hidden=128, .*model.heads=2 .*Use a multiple of 64"),
    "unknown": ({"parametrization": "mu"}, "valid: standard, mup, spectral"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused(name: str) -> None:
    values, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        scales(GPTSpec, replace(MODEL, **values), EXPERTS)


def test_a_parametrization_of_a_package_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parametrizations._parts, "halved", lambda parameter, base: Scale(init=0.5))
    model: ModelConfig = replace(MODEL, parametrization="halved")
    assert {*scales(GPTSpec, model, EXPERTS).values()} == {Scale(init=0.5)}
