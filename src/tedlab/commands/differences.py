"""Shows at the start of a run what its command line changes: presets, and values of presets with what they were."""

from collections.abc import Collection, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.text import Text
from rich.tree import Tree


def difference_tree(overrides: Sequence[str], groups: Collection[str], preset: DictConfig) -> Tree | None:
    """Returns a tree of what overrides change, by section; None if there are none.

    Args:
        overrides: Those of the command line, without Hydra's own.
        groups: The names of groups of presets.
        preset: What is composed from the presets alone.
    """
    presets, values = split(overrides, groups)
    if not presets and not values:
        return None
    tree = Tree(Text(" ".join(presets) or "default presets"))
    branches: dict[str, Tree] = {}
    for override in values:
        key, _, value = override.partition("=")
        section, _, name = key.lstrip("+~").rpartition(".")
        if section not in branches:
            branches[section] = tree.add(Text(section)) if section else tree
        branches[section].add(Text(f"{name}: {_was(preset, key.lstrip('+~'))}{value or 'removed'}"))
    return tree


def split(overrides: Sequence[str], groups: Collection[str]) -> tuple[list[str], list[str]]:
    """Divides overrides into those that choose presets and those that set values; leaves out Hydra's."""
    presets: list[str] = []
    values: list[str] = []
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~").partition("@")[0]
        if key != "hydra" and not key.startswith(("hydra.", "hydra/")):
            (presets if key in groups else values).append(override)
    return presets, values


def _was(preset: DictConfig, key: str) -> str:
    try:
        known: Any = OmegaConf.select(preset, key, throw_on_resolution_failure=False)
    except Exception:  # a key that OmegaConf cannot look up; Hydra has taken it
        return ""
    return "" if known is None or OmegaConf.is_config(known) else f"{known} → "
