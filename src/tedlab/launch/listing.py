"""Finds the run directories below folders, and says from their files how each run stands."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tedlab.history import UNREADABLE, read_history
from tedlab.launch.locks import is_in_use
from tedlab.launch.outcome import FINISHED, METRICS, SUMMARY, read_summary
from tedlab.untrusted import flat, read_yaml

RUNNING, KILLED, SIMULATED, DAMAGED = "running", "killed", "simulated", "damaged"
MANIFEST = "manifest.json"  # of tedlab.checkpoint, for which torch would be imported
_CONFIG = "config.yaml"
_DEPTH = 4  # runs/NAME/DATE/NUMBER of a sweep


@dataclass(frozen=True)
class Listed:
    """One run.

    Attributes:
        directory: Where its files are.
        state: ``finished``, ``failed`` or ``interrupted`` as its summary says, ``running`` if a process of this machine
            holds its directory, ``killed`` if it has begun and left no summary, ``simulated`` if it was not trained,
            ``damaged`` if its folder or its metrics cannot be read.
        reason: Why it ended, if not as planned, or what cannot be read.
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
    """Returns the runs below some folders, the one that changed last at the end; folders it cannot read are damaged."""
    found = dict.fromkeys(directory for place in places for directory in _directories(place, _DEPTH))
    return [
        _listed(directory, when) for when, directory in sorted((_changed(directory), directory) for directory in found)
    ]


def _directories(place: Path, depth: int) -> Iterator[Path]:
    try:
        is_run = (place / _CONFIG).is_file()
        inside = [] if is_run or not depth else sorted(below for below in place.iterdir() if below.is_dir())
    except OSError:
        is_run, inside = True, []  # what it is cannot be seen, and is said
    if is_run:
        yield place
    for below in inside:
        if not below.name.startswith(".") and not below.is_symlink():
            yield from _directories(below, depth - 1)


def _changed(directory: Path) -> float:
    try:
        files = [path for name in (_CONFIG, SUMMARY, METRICS) if (path := directory / name).is_file()]
        return max(path.stat().st_mtime for path in files or [directory])
    except OSError:
        return time.time()


def _rows(directory: Path) -> tuple[list[dict[str, str]], str]:
    """Returns the rows of a run's metrics, and why they cannot be read; empty if they can."""
    try:
        (directory / _CONFIG).stat()
        return read_history(directory / METRICS), ""
    except OSError as error:
        return [], f"{error.strerror}: {error.filename}"
    except UNREADABLE:
        return [], f"{METRICS} cannot be read: move it away"


def _listed(directory: Path, when: float) -> Listed:
    summary, config, in_use = read_summary(directory), _configuration(directory), is_in_use(directory)
    rows, damage = ([], "") if summary.get("state") == FINISHED and not in_use else _rows(directory)
    state = RUNNING if in_use else flat(summary.get("state", FINISHED if summary else KILLED))
    state = DAMAGED if damage else state
    state = SIMULATED if "sim" in config else state
    last = {name: value for row in rows for name, value in row.items()}
    trainer = config.get("trainer")
    max_steps = trainer.get("max_steps") if isinstance(trainer, dict) else None
    return Listed(
        directory,
        state,
        damage or ("" if in_use else flat(summary.get("reason", ""))),
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
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None


def _step_of(checkpoint: Path) -> int | None:
    """Returns the step that a checkpoint's manifest states; None without a checkpoint, or one that is whole."""
    try:
        step = json.loads((checkpoint / MANIFEST).read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None
