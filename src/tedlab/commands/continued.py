"""Keeps the command line of a run in its directory, and makes of it the one that continues the run.

A checkpoint says how a model is trained, but not what it is, on which data, in which layout: the overrides do.
"""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tedlab.commands.literal import quote

COMMAND = "command.json"
# resume=auto finds the checkpoint, and a loss scale is where a run begins: one that goes on must not name it.
_NOT_AGAIN = ("resume", "ckpt_path", "optim.loss_scale", "hydra.run.dir", "hydra.mode")
_PLAIN = re.compile(r"[\w./+-]+")  # what Hydra reads as typed


def keep_command(directory: Path, hydra: Any) -> None:
    """Writes ``command.json``: the arguments of ``tedlab train`` that compose a run's configuration again.

    Args:
        directory: The run directory.
        hydra: Hydra's own configuration of the job; that of a job of a sweep has the values of this job alone.
    """
    arguments = [*_folders(hydra), *hydra.overrides.task]
    arguments += [word for word in hydra.overrides.hydra if word.lstrip("+").startswith("hydra.searchpath=")]
    if str(hydra.mode).endswith("MULTIRUN"):
        arguments.append("hydra.mode=RUN")  # an experiment's file may begin a sweep
    kept = {"cwd": str(hydra.runtime.cwd), "arguments": arguments}
    (directory / COMMAND).write_text(json.dumps(kept, indent=2) + "\n")


def command_to_continue(directory: Path) -> str | None:
    """Returns the line for a shell that continues a run at its last checkpoint.

    Paths in it are meant from where the run was started, so it goes there first if this is elsewhere. Returns None if
    the run directory does not say how the run was started, as before tedlab kept it.
    """
    try:
        kept = json.loads((directory / COMMAND).read_text(encoding="utf-8"))
        there, arguments = Path(kept["cwd"]), kept["arguments"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(arguments, list):
        return None
    if not all(isinstance(word, str) and word.isprintable() for word in (*arguments, str(there), str(directory))):
        return None
    again = [word for word in arguments if word == "hydra.mode=RUN" or _key(word) not in _NOT_AGAIN]
    here = there.absolute() == Path.cwd()
    place = str(directory if here else directory.absolute())
    place = place if _PLAIN.fullmatch(place) else quote(place)
    line = shlex.join(["tedlab", "train", *again, "resume=auto", f"hydra.run.dir={place}"])
    return line if here else f"cd {shlex.quote(str(there))} && {line}"


def _folders(hydra: Any) -> Iterator[str]:
    """Yields the options that name a configuration file, and a folder with presets, of the user's own."""
    if hydra.job.config_name != "train":
        yield f"--config-name={hydra.job.config_name}"
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            yield f"--config-dir={source.path}"


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]
