"""Parametrizations: how initial weights and learning rates follow a model's width, so that what was tuned stays good.

A parametrization compares the specification of each parameter with that of the same model at a base width
(``model.base_hidden``), where ``model.init_std`` and ``optim.lr`` are as configured. Beside shapes it needs one fact of
a parameter: which dimension products sum over (:attr:`tedlab.spec.ParameterSpec.fan_in`). No forward pass knows of it,
and no layout: shapes are those of whole parameters.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import gcd, sqrt
from typing import Any, NamedTuple

from tedlab.config import ModelConfig, MoEConfig
from tedlab.registry import Registry
from tedlab.spec import Fans, ParameterSpec, Spec

STANDARD = ModelConfig.parametrization


class Scale(NamedTuple):
    """What values of a parameter are multiplied by.

    Attributes:
        init: Factor on the standard deviation of its initial values.
        rate: Factor on its learning rate where each element steps by about the rate, as under AdamW.
        matrix_rate: The same where its whole matrix is stepped, by singular values of about √(its larger dimension)
            times the rate, as under :class:`tedlab.optim.Muon`.
    """

    init: float = 1.0
    rate: float = 1.0
    matrix_rate: float = 1.0


# Of a parameter and the same one at the base width.
Parametrization = Callable[[ParameterSpec, ParameterSpec], Scale]
parametrizations: Registry[Parametrization] = Registry("model.parametrization")


@parametrizations.register(STANDARD)
def standard(parameter: ParameterSpec, base: ParameterSpec) -> Scale:
    """Returns factors of 1: one standard deviation and one learning rate for every width."""
    return Scale()


@parametrizations.register("mup")
def mup(parameter: ParameterSpec, base: ParameterSpec) -> Scale:
    """Returns factors as in table 3 of Yang et al., "Tensor Programs V" (arXiv 2203.03466).

    With m the fan-in over the base's, a matrix begins with weights ∝ 1/√m, or ∝ 1/m if its fan-out does not grow, as
    that of logits or of a router (Małaśnicki et al., arXiv 2508.09752). The learning rate of both is ∝ 1/m. Tables,
    biases and norms stay as they are.
    """
    now, then = parameter.fans, base.fans
    if now is None or then is None:
        return Scale()
    m = now.inwards / then.inwards
    return Scale(1 / m if now.outwards == then.outwards else 1 / sqrt(m), 1 / m, _matrix_rate(now, then))


@parametrizations.register("spectral")
def spectral(parameter: ParameterSpec, base: ParameterSpec) -> Scale:
    """Returns factors that keep spectral norms ∝ √(fan-out / fan-in), after Yang et al. (arXiv 2310.17813).

    Weights begin ∝ min(1, √(fan-out / fan-in)) / √fan-in. This differs from :func:`mup` where the fan-out does not grow
    and is larger than the fan-in, as a vocabulary may be.
    """
    now, then = parameter.fans, base.fans
    if now is None or then is None:
        return Scale()
    std, its = (min(1, sqrt(fans.outwards / fans.inwards)) / sqrt(fans.inwards) for fans in (now, then))
    return Scale(std / its, then.inwards / now.inwards, _matrix_rate(now, then))


def _matrix_rate(now: Fans, then: Fans) -> float:
    """Returns the factor with which updates' spectral norms are ∝ √(fan-out / fan-in), where they were ∝ √(larger)."""
    wanted, its = (sqrt(fans.outwards / fans.inwards) / sqrt(max(fans)) for fans in (now, then))
    return wanted / its


def scales(spec: Callable[[ModelConfig, MoEConfig], Spec], model: ModelConfig, moe: MoEConfig) -> Mapping[str, Scale]:
    """Returns the scale of each parameter of a model by its name; none if no base width is given.

    Args:
        spec: Makes the specification of a model of its configuration.
        model: The architecture, with ``vocab_size`` set.
        moe: The experts.

    Raises:
        ValueError: If no such base is possible, embeddings are tied, or a matrix does not state its fan-in; the message
            says what would do.
    """
    name, base_hidden = model.parametrization, model.base_hidden
    scale = parametrizations[name]
    if name == STANDARD:
        if base_hidden is not None:
            raise ValueError(
                f"model.base_hidden={base_hidden} means nothing with model.parametrization={STANDARD}, where nothing "
                "follows the width; use model.parametrization=mup, or leave it null"
            )
        return {}
    if base_hidden is None:
        raise ValueError(
            f"model.parametrization={name} needs model.base_hidden, the model.hidden at which model.init_std and "
            "optim.lr were tuned"
        )
    if model.tie_embeddings:
        raise ValueError(
            f"model.parametrization={name} scales the weights that make logits and not those of the embedding, which "
            "model.tie_embeddings=true makes the same; use model.tie_embeddings=false"
        )
    pairs = zip(spec(model, moe).parameters(), spec(*at_base(model, moe)).parameters(), strict=True)
    found = {}
    for parameter, base in pairs:
        wider = sum(now != then for now, then in zip(parameter.shape, base.shape, strict=True))
        if parameter.fan_in is None and wider > 1:
            raise ValueError(
                f"{parameter.name}: {wider} dimensions of {parameter.shape} grow with the width, and its ParameterSpec "
                f"does not say which of them products sum over, on which model.parametrization={name} depends; give it "
                "a fan_in"
            )
        found[parameter.name] = scale(parameter, base)
    return found


def at_base(model: ModelConfig, moe: MoEConfig) -> tuple[ModelConfig, MoEConfig]:
    """Returns the model whose ``hidden`` is ``model.base_hidden``, and whose other widths are narrower in proportion.

    These are the number of heads, of which each keeps its width, and the widths of feed-forward layers, experts and
    latents.

    Raises:
        ValueError: If one would not be a whole number; the message says which base widths would do.
    """
    base, hidden, latent = model.base_hidden, model.hidden, model.attention.latent
    assert base is not None
    widths = {
        **{f"model.{name}": getattr(model, name) for name in ("hidden", "heads", "kv_heads", "ffn")},
        **{f"model.attention.latent.{name}": getattr(latent, name) for name in ("kv_rank", "q_rank")},
        **{"moe.ffn": moe.ffn, "moe.shared.ffn": moe.shared.ffn},
    }
    given = {name: width for name, width in widths.items() if width is not None}
    odd = [name for name, width in given.items() if width * base % hidden]
    if odd:
        step = hidden // gcd(*given.values())
        raise ValueError(
            f"model.base_hidden={base} is {base / hidden:.4g} × model.hidden={hidden}, and so much of {odd[0]}="
            f"{given[odd[0]]} is no whole number: at the base, all widths are narrower in proportion, and there are "
            f"fewer heads of the same width. Use a multiple of {step}"
        )
    then: dict[str, Any] = {name: None if width is None else width * base // hidden for name, width in widths.items()}

    def of(section: str) -> dict[str, Any]:
        return {name.rpartition(".")[2]: width for name, width in then.items() if name.rpartition(".")[0] == section}

    attention = replace(model.attention, latent=replace(latent, **of("model.attention.latent")))
    shared = replace(moe.shared, **of("moe.shared"))
    return replace(model, **of("model"), attention=attention), replace(moe, **of("moe"), shared=shared)
