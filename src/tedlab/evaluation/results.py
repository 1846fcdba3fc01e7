"""Keeps what evaluations found in ``eval/`` of the run's directory, where ``tedlab compare`` looks for it."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

DIRECTORY = "eval"
_FILE = re.compile(r"step_(\d+)_.*\.json")
_NO_FILE_NAME = re.compile(r"[^\w.-]")
METRICS, SETTINGS = "metrics", "settings"


class Found(NamedTuple):
    """What the evaluations of a run found.

    Attributes:
        metrics: Values by the names of metrics, such as ``eval/wiki/loss``.
        settings: By the name of a set or task, what its values depend on.
    """

    metrics: dict[str, float]
    settings: dict[str, dict[str, Any]]


def write(
    folder: Path,
    step: int,
    name: str,
    metrics: Mapping[str, float],
    settings: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the result of a set or task at a step, in place of an earlier one, and returns the file.

    Args:
        folder: Where to; it is made if need be.
        step: How many steps the model was trained.
        name: The set's or task's.
        metrics: What was found, by the names of metrics.
        settings: What that depends on.
        more: Whatever else is worth keeping.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step}_{_NO_FILE_NAME.sub('_', name)}.json"
    entry = {"name": name, "step": step, METRICS: metrics, SETTINGS: settings, **(more or {})}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(entry, indent=2, ensure_ascii=False) + "\n")
    os.replace(partial, path)
    return path


def forget(directory: Path, after: int | None) -> None:
    """Removes what was found in a run's directory of steps that the run there does not have.

    Args:
        directory: The run's.
        after: The last step whose results are kept; None for a new run, which keeps none.
    """
    for path in (directory / DIRECTORY).glob("step_*.json"):
        if (match := _FILE.fullmatch(path.name)) and (after is None or int(match[1]) > after):
            path.unlink()


def read(directory: Path) -> Found:
    """Returns what was found of a run, for each set and task at the last step that it was evaluated at.

    Args:
        directory: The run's.

    Raises:
        ValueError: If a file is damaged; the message names it.
    """
    latest: dict[str, dict[str, Any]] = {}
    for path in sorted((directory / DIRECTORY).glob("step_*.json")):
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            if not all(isinstance(entry[key], kind) for key, kind in _KINDS.items()):
                raise TypeError("an entry is of another type than tedlab writes")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{DIRECTORY}/{path.name} is damaged ({type(error).__name__}: {error})") from None
        if entry["name"] not in latest or entry["step"] >= latest[entry["name"]]["step"]:
            latest[entry["name"]] = entry
    metrics = {key: value for entry in latest.values() for key, value in entry[METRICS].items()}
    return Found(metrics, {name: entry[SETTINGS] for name, entry in latest.items()})


_KINDS: Mapping[str, type] = {"name": str, "step": int, METRICS: dict, SETTINGS: dict}
