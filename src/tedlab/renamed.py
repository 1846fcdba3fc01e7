"""Renamed configuration values, whose old names work for one more release, with a note. Some switches are words now.

This covers the command line, plan files, configuration files, and the configurations and checkpoints of finished runs.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

RENAMED = {
    "model.checkpoint": "model.recompute.granularity",
    "checkpoint.early_stop": "model.recompute.early_stop",
    "moe.shared.gated": "moe.shared.combine",
}
# Switches that have become words, which take the place of ``true`` and ``false`` wherever these are given.
WORDS = {
    "model.qk_norm": {"true": "head", "false": "none"},
    "moe.shared.combine": {"true": "cg1", "false": "add"},
}
_KEY = re.compile(r"(?P<prefix>\+\+?|~|)(?P<key>[\w.]+)(?P<rest>=.*|)", re.DOTALL)


def renamed(name: str) -> str:
    """Returns the current form of a dotted name."""
    return RENAMED.get(name, name)


def note(old: str) -> str:
    """Returns what a user is told who gives an old name."""
    return f"{old} is now {RENAMED[old]}; its old name goes with the next release."


def overrides(given: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns overrides with current names, and a note for each that had an old one."""
    words, notes = [], []
    for word in given:
        parts = _KEY.fullmatch(word)
        if parts is not None and parts["key"] in RENAMED:
            notes.append(note(parts["key"]))
        if parts is not None and parts["key"] in {*RENAMED, *WORDS}:
            key, rest = renamed(parts["key"]), parts["rest"]
            if rest and key in WORDS:
                rest = "=" + ",".join(_in_words(key, value) for value in rest.removeprefix("=").split(","))
            word = f"{parts['prefix']}{key}{rest}"
        words.append(word)
    return words, notes


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stored configuration, or some of its sections, with current names."""
    config = dict(values)
    for old in old_names(values):
        *sections, name = old.split(".")
        place = _section(config, sections)
        config = _moved(config, sections, {key: value for key, value in place.items() if key != name})
        config = _moved(config, RENAMED[old].split("."), place[name])
    for switch in WORDS:
        *sections, name = switch.split(".")
        place = _section(config, sections)
        if isinstance(place.get(name), bool):
            config = _moved(config, [*sections, name], _in_words(switch, str(place[name])))
    return config


def _in_words(switch: str, value: str) -> str:
    """Returns the word for a switch's old value, and any other value as it is."""
    return WORDS[switch].get(value.strip("'\"").lower(), value)


def old_names(values: Mapping[str, Any]) -> list[str]:
    """Returns the old names in a nested configuration."""
    split = [(old, old.split(".")) for old in RENAMED]
    return [old for old, (*sections, name) in split if name in _section(values, sections)]


def _section(config: Mapping[str, Any], path: list[str]) -> Mapping[str, Any]:
    """Returns what is at the end of a path; nothing if it is no section."""
    place: Any = config
    for name in path:
        place = place.get(name) if isinstance(place, Mapping) else None
    return place if isinstance(place, Mapping) else {}


def _moved(config: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """Returns a copy in which the value at the end of a path is replaced."""
    name, *below = path
    return {**config, name: _moved(config.get(name) or {}, below, value) if below else value}
