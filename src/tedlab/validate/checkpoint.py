"""Checks that the checkpoint to resume from is of this model, and leaves steps to train."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from tedlab.checkpoint import read_meta
from tedlab.config import BiasUpdate, ModelConfig, MoEConfig, TrainConfig
from tedlab.moe import routers
from tedlab.renamed import nested
from tedlab.spec import Init
from tedlab.untrusted import typed
from tedlab.validate.experts import GATING_OPTIONS

_DEFAULTS = {  # the values for fields that are newer than a checkpoint
    section: {
        **{f.name: f.default for f in fields(kind) if f.default is not MISSING},
        **{f.name: asdict(f.default_factory()) for f in fields(kind) if f.default_factory is not MISSING},
    }
    for section, kind in (("model", ModelConfig), ("moe", MoEConfig))
}


def check_checkpoint(config: TrainConfig, path: Path) -> None:
    """Checks a checkpoint against a configuration, which must be complete otherwise.

    Raises:
        OSError: If there is no such checkpoint.
        ValueError: If the path is no checkpoint of a run, or one of another model, or leaves no step to train.
    """
    meta = read_meta(path)
    stored: Any = meta.get("hyper_parameters")
    known = isinstance(stored, Mapping) and all(isinstance(stored.get(name), Mapping) for name in ("model", "moe"))
    if not known or not isinstance(meta.get("global_step"), int):
        raise ValueError(
            f"{path} is not a checkpoint of this command, but of another program or of weights alone: it does not say "
            "which model (hyper_parameters.model, .moe) and which step it is of"
        )
    if meta["global_step"] >= config.trainer["max_steps"]:
        raise ValueError(
            f"{path} is of step {meta['global_step']}, so with trainer.max_steps ({config.trainer['max_steps']}) "
            "nothing is left to train; raise trainer.max_steps"
        )
    stored = nested(stored)
    ours: dict[str, Any] = {"model": asdict(config.model), "moe": asdict(config.moe)}
    shape_free = {"init_std", "recompute", "compile", "loss_chunk", "aux_loss", "z_loss", "top_k", "gating"}
    shape_free |= {
        *GATING_OPTIONS,
        "router",
        "balance",
        "dispatch",
        "capacity_factor",
        "capacity_multiple",
        "capacity_groups",
        "kernel",
        "lend",
        "slice",
    }
    differences = [
        f"{section}.{name}: {stored[section].get(name)} in the checkpoint, {value} here"
        for section, values in ours.items()
        for name, value in values.items()
        if name not in shape_free and stored[section].get(name, _DEFAULTS[section].get(name)) != value
    ]
    if config.moe.num_experts:
        differences += _router_differences(config.moe, typed(MoEConfig, stored["moe"]))
    if differences:
        raise ValueError(f"{path} is a checkpoint of another model:\n  " + "\n  ".join(differences))


def _router_differences(ours: MoEConfig, stored: MoEConfig) -> list[str]:
    """Returns how routers' weights and biases, of which a checkpoint has all or none, differ."""
    found = []
    weights = [any(True for _ in routers[moe.gating].spec(1, moe, Init()).own()) for moe in (stored, ours)]
    if weights[0] != weights[1]:
        found.append(
            f"moe.gating: {stored.gating} in the checkpoint, {ours.gating} here, and only one of them has weights"
        )
    learned = [moe.router.bias for moe in (stored, ours)]
    if learned[0] != learned[1]:
        found.append(f"moe.router.bias: {learned[0]} in the checkpoint, {learned[1]} here")
    biases = [moe.router.bias_update != BiasUpdate.NONE for moe in (stored, ours)]
    if biases[0] != biases[1]:
        found.append(
            f"moe.router.bias_update: {stored.router.bias_update} in the checkpoint, {ours.router.bias_update} here, "
            "and only one of them has biases"
        )
    return found
