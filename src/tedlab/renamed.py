"""Renamed configuration values, whose old names work for one more release, with a note.

This covers the command line, plan files, and the configurations and checkpoints of finished runs.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

RENAMED = {
    "model.checkpoint": "model.recompute.granularity",
    "checkpoint.early_stop": "model.recompute.early_stop",
}
_KEY = re.compile(r"(?P<prefix>\+\+?|~|)(?P<key>[\w.]+)(?P<rest>=.*|)", re.DOTALL)


def renamed(name: str) -> str:
    """Returns the current form of a dotted name."""
    return RENAMED.get(name, name)


def overrides(given: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns overrides with current names, and a note for each that had an old one."""
    words, notes = [], []
    for word in given:
        parts = _KEY.fullmatch(word)
        if parts is not None and parts["key"] in RENAMED:
            new = RENAMED[parts["key"]]
            notes.append(f"{parts['key']} is now {new}; its old name goes with the next release.")
            word = f"{parts['prefix']}{new}{parts['rest']}"
        words.append(word)
    return words, notes


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stored configuration, or some of its sections, with current names."""
    config = dict(values)
    for old, new in RENAMED.items():
        *sections, name = old.split(".")
        place: Any = config
        for section in sections:
            place = place.get(section) if isinstance(place, Mapping) else None
        if isinstance(place, Mapping) and name in place:
            config = _moved(config, sections, {k: v for k, v in place.items() if k != name})
            config = _moved(config, new.split("."), place[name])
    return config


def _moved(config: Mapping[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """Returns a copy in which the value at the end of a path is replaced."""
    name, *below = path
    return {**config, name: _moved(config.get(name) or {}, below, value) if below else value}
