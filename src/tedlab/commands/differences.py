"""Shows at the start of a run what its command line changes: presets, and values of presets with what they were."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.text import Text
from rich.tree import Tree


def difference_tree(overrides: Sequence[str], groups: Collection[str], preset: DictConfig) -> Tree | None:
    """Returns a tree of what overrides change, a line for each section with several changes; None if there are none.

    Args:
        overrides: Those of the command line, without Hydra's own.
        groups: The names of groups of presets.
        preset: What is composed from the presets alone.
    """
    presets, values = split(overrides, groups)
    if not presets and not values:
        return None
    sections: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for override in values:
        key, _, value = override.partition("=")
        section, _, name = key.lstrip("+~").rpartition(".")
        sections[section][name] = f"{_was(preset, key.lstrip('+~'))}{value or 'removed'}"
    several = {section: of for section, of in sections.items() if section and len(of) > 1}
    others = {
        f"{section}.{name}" if section else name: what
        for section, of in sections.items()
        if section not in several
        for name, what in of.items()
    }
    tree = Tree(_line(" ".join(presets) or "default presets"))
    for section, of in several.items():
        tree.add(_line(f"{section}: {_listed(of)}"))
    if others:
        tree.add(_line(_listed(others)))
    return tree


def _line(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")


def _listed(changes: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {what}" for name, what in changes.items())


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
