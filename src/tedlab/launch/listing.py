"""Finds the run directories below folders, and says from their files how each run stands."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tedlab.history import read_history
from tedlab.launch.locks import is_in_use
from tedlab.launch.outcome import FINISHED, METRICS, SUMMARY, read_summary
from tedlab.untrusted import read_yaml

RUNNING, KILLED, SIMULATED = "running", "killed", "simulated"
MANIFEST = "manifest.json"  # of tedlab.checkpoint, for which torch would be imported
_CONFIG = "config.yaml"
_DEPTH = 4  # runs/NAME/DATE/NUMBER of a sweep


@dataclass(frozen=True)
class Listed:
    """One run.

    Attributes:
        directory: Where its files are.
        state: ``finished``, ``failed`` or ``interrupted`` as its summary says, ``running`` if a process of this machine
            holds its directory, ``killed`` if it has begun and left no summary, ``simulated`` if it was not trained.
        reason: Why it ended, if not as planned.
        steps: The last step that it logged.
        max_steps: How many it was to take; None if its configuration does not say.
        train_loss: The last that it logged; None if it logged none.
        val_loss: The same in validation.
        resumable: The step of its last checkpoint; None if it has none.
        changed: When its files last changed, for people.
    """

    directory: Path
    state: str
    reason: str
    steps: int
    max_steps: int | None
    train_loss: float | None
    val_loss: float | None
    resumable: int | None
    changed: str


def list_runs(places: Sequence[Path]) -> list[Listed]:
    """Returns the runs below some folders, the one that changed last at the end."""
    found = dict.fromkeys(directory for place in places for directory in _directories(place, _DEPTH))
    dated = [(max(file.stat().st_mtime for file in _files(directory)), directory) for directory in found]
    return [_listed(directory, when) for when, directory in sorted(dated)]


def _directories(place: Path, depth: int) -> Iterator[Path]:
    if (place / _CONFIG).is_file():
        yield place
    elif depth:
        for below in sorted(place.iterdir()):
            if below.is_dir() and not below.name.startswith(".") and not below.is_symlink():
                yield from _directories(below, depth - 1)


def _files(directory: Path) -> Iterator[Path]:
    yield from (path for name in (_CONFIG, SUMMARY, METRICS) if (path := directory / name).is_file())


def _listed(directory: Path, when: float) -> Listed:
    summary, config = read_summary(directory), _configuration(directory)
    rows = [] if summary.get("state") == FINISHED else read_history(directory / METRICS)
    in_use = is_in_use(directory)
    state = RUNNING if in_use else str(summary.get("state", FINISHED if summary else KILLED))
    state = SIMULATED if "sim" in config else state
    last = {name: value for row in rows for name, value in row.items()}
    trainer = config.get("trainer")
    max_steps = trainer.get("max_steps") if isinstance(trainer, dict) else None
    return Listed(
        directory,
        state,
        "" if in_use else str(summary.get("reason", "")),
        _whole(last.get("step", summary.get("steps"))) or 0,
        max_steps if isinstance(max_steps, int) and max_steps > 0 else None,
        _number(last.get("train/loss", summary.get("train/loss"))),
        _number(last.get("val/loss", summary.get("val/loss"))),
        _step_of(directory / "checkpoints" / "last.ckpt"),
        time.strftime("%Y-%m-%d %H:%M", time.localtime(when)),
    )


def _configuration(directory: Path) -> dict[str, Any]:
    try:
        return read_yaml(directory / _CONFIG)
    except (OSError, ValueError):
        return {}


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if abs(number) < float("inf") else None


def _step_of(checkpoint: Path) -> int | None:
    """Returns the step that a checkpoint's manifest states; None without a checkpoint, or one that is whole."""
    try:
        step = json.loads((checkpoint / MANIFEST).read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
