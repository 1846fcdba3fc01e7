"""Families of published models, each with its configuration and the names of its weights beside our GPT's."""

from collections.abc import Mapping
from typing import Any

from tedlab.config import ModelConfig, MoEConfig
from tedlab.models.families.deepseek import DeepSeekV2, DeepSeekV3
from tedlab.models.families.family import Family, UnknownField, configured, essence
from tedlab.models.families.gpt_oss import GptOss
from tedlab.models.families.llama import Llama
from tedlab.models.families.mapping import Rule
from tedlab.models.families.mixtral import Mixtral
from tedlab.models.families.olmoe import OLMoE
from tedlab.models.families.qwen3 import Qwen3, Qwen3MoE

_KINDS = (Llama, Qwen3, Mixtral, OLMoE, Qwen3MoE, DeepSeekV2, DeepSeekV3, GptOss)
FAMILIES: dict[str, Family] = {family.model_type: family() for family in _KINDS}


def family_of(config: Mapping[str, Any]) -> Family:
    """Returns the family that a ``config.json`` names.

    Raises:
        ValueError: If it names none that is known; the message lists these.
    """
    found = FAMILIES.get(str(config.get("model_type")))
    if found is None:
        raise ValueError(f"its model_type is {config.get('model_type')!r}; tedlab knows {', '.join(sorted(FAMILIES))}")
    return found


def family_for(model: ModelConfig, moe: MoEConfig, name: str | None = None) -> Family:
    """Returns a family that can express a model: whose ``config.json`` of it describes the same model.

    Args:
        model, moe: The model's configuration.
        name: The ``model_type`` of the only family that will do; None: any will.

    Raises:
        ValueError: If there is none; the message says what is different in the nearest.
    """
    if name is not None and name not in FAMILIES:
        raise ValueError(f"family={name} is none of {', '.join(FAMILIES)}")
    ours = essence(model, moe)
    differences: dict[str, list[str]] = {}
    candidates = FAMILIES if name is None else {name: FAMILIES[name]}
    for name, family in candidates.items():
        theirs = essence(*configured(family.read(family.write(model, moe))))
        wrong = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        if not wrong:
            return family
        differences[name] = [f"{key}={ours.get(key)} (there {theirs.get(key)})" for key in wrong]
    nearest = min(differences, key=lambda name: len(differences[name]))
    raise ValueError(
        f"no family of {', '.join(candidates)} can express this model; the nearest is {nearest}, from which it differs "
        f"in {', '.join(differences[nearest])}"
    )


__all__ = ["FAMILIES", "Family", "Rule", "UnknownField", "configured", "essence", "family_for", "family_of"]
