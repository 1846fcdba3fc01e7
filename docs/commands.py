"""Finds the commands that documents tell readers to type, runs them, and cuts out what they show of the output."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Runs ``python -m tedlab`` with arguments in a folder, and returns what it prints to stdout.
Run = Callable[[Sequence[str], Path], str]

_FENCE = re.compile(r"```bash\n(.*?)```", re.DOTALL)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e[-+]?\d+)?")
_BOX = re.compile(r"[│┃┏┓┗┛┡┩┌┐└┘├┤┬┴┼╇┳━─]+")

# With these, a training run takes seconds and prints what it prints without them, but for numbers.
QUICK = (
    *("model.layers=2", "model.hidden=16", "model.heads=2", "model.ffn=16", "model.sequence_length=8"),
    *(
        "trainer.max_steps=3",
        "trainer.log_every_n_steps=1",
        "data.batch_size=8",
        "data.micro_batch_size=2",
        "data.validation_samples=8",
    ),
)


@dataclass(frozen=True)
class Shown:
    """What a document shows of the output of the commands above it.

    Attributes:
        first: A regular expression for the first line that is shown.
        until: One for the first line after it that is not shown; the end of a table stays. None: all is shown.
        exact: Whether numbers are the same on every machine. Otherwise only words are compared.
    """

    first: str
    until: str | None = None
    exact: bool = False

    def of(self, output: str) -> str:
        """Returns the part of a command's output, as a fenced block."""
        lines = [line.rstrip() for line in output.splitlines()]
        lines = lines[next(n for n, line in enumerate(lines) if re.match(self.first, line.strip())) :]
        if self.until is not None:
            end = next(n for n, line in enumerate(lines) if re.search(self.until, line))
            bottom = next((line for line in lines[end:] if line.startswith("└")), "") if "│" in lines[end] else ""
            lines = [*lines[:end], *filter(None, [bottom])]
        return "```\n" + "\n".join(lines) + "\n```\n"

    def same(self, one: str, other: str) -> bool:
        """Returns whether two such blocks agree."""
        return one == other if self.exact else words(one) == words(other)


def words(text: str) -> list[str]:
    """Returns what is left of a text without its numbers and the lines of its tables."""
    return _NUMBER.sub("#", _BOX.sub(" ", text)).split()


def commands(text: str) -> list[str]:
    """Returns the commands in the bash blocks of a document, each in one line."""
    joined = "\n".join(_FENCE.findall(text)).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def run_commands(
    lines: Sequence[str], folder: Path, run: Run, added: Mapping[str, Sequence[str]] | None = None
) -> list[str]:
    """Runs those commands that are of tedlab, one after another, as if typed in a folder.

    Args:
        lines: Commands. ``<date>`` stands for the newest run directory that fits.
        folder: Where they run.
        run: Runs ``python -m tedlab``.
        added: Arguments to add to a command of this name, such as :data:`QUICK`.

    Returns:
        What each prints, without the path of the folder.
    """
    printed = []
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        if program == "tedlab":
            arguments = [_dated(argument, folder) for argument in arguments]
            output = run([*arguments, *(added or {}).get(arguments[0], ())], folder)
            printed.append(_without(f"{folder}/", output))
    return printed


def _dated(argument: str, folder: Path) -> str:
    if "<date>" not in argument:
        return argument
    before, _, after = argument.partition("<date>")
    key, equals, place = before.rpartition("=")
    newest = max((folder / place).iterdir(), key=lambda path: path.stat().st_mtime)
    return f"{key}{equals}{place}{newest.name}{after}"


def _without(place: str, output: str) -> str:
    """Takes a path out of an output, and keeps its tables as wide as they are."""
    lines = []
    for line in output.splitlines():
        short = line.replace(place, "")
        lines.append(short[:-1] + " " * (len(line) - len(short)) + "│" if short.endswith("│") else short)
    return "\n".join(lines)


def in_a_new_process(arguments: Sequence[str], folder: Path) -> str:
    """Runs ``python -m tedlab`` as a shell does."""
    root = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "COLUMNS": "120",
        "PYTHONPATH": f"{root / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, "-m", "tedlab", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
