"""Names of configuration values that have moved. The old ones work for one more release, with a note.

On the command line, in the files of plans, in the configurations and checkpoints of finished runs.
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
    """The name that a dotted name has now."""
    return RENAMED.get(name, name)


def overrides(given: Iterable[str]) -> tuple[list[str], list[str]]:
    """Overrides by the names of now, and a note for each that had an old one."""
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
    """A configuration, or some of its sections, as it would be stored today."""
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
    """A copy with one value at the end of a path."""
    name, *below = path
    return {**config, name: _moved(config.get(name) or {}, below, value) if below else value}
