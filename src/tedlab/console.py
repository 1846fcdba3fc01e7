"""Makes the consoles on which all commands print, so that width, colours and what is taken literally are the same."""

import os
import shutil
import sys

from rich.console import Console

WIDTH = 120  # columns where neither a terminal nor COLUMNS says how many there are
_LINES = 25


def output(quiet: bool = False) -> Console:
    """Returns a console for what a command was asked for, on stdout; ``quiet``: it prints nothing."""
    return _console(stderr=False, quiet=quiet)


def errors() -> Console:
    """Returns a console for progress, on stderr."""
    return _console(stderr=True)


def animated(console: Console) -> bool:
    """Returns whether a console of stderr can draw a bar: a terminal, also if ``FORCE_COLOR`` makes others look so."""
    return sys.stderr.isatty() and console.is_interactive


def _console(stderr: bool, quiet: bool = False) -> Console:
    """Returns a console that shows text as it is: brackets, numbers and colons in it have no effect.

    ``COLUMNS`` says how wide it is, otherwise the terminal. ``NO_COLOR`` leaves out all styles, bold ones as well;
    ``FORCE_COLOR`` keeps them in a pipe; a terminal that is ``TERM=dumb`` gets none.
    """
    stream = sys.stderr if stderr else sys.stdout
    asked = bool(os.environ.get("COLUMNS")) or not stream.isatty()
    size = shutil.get_terminal_size((WIDTH, _LINES)) if asked else None
    return Console(
        stderr=stderr,
        quiet=quiet,
        width=size and size.columns,
        height=size and size.lines,  # without it rich takes a dumb terminal to have 80 columns
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        markup=False,
        emoji=False,
        highlight=False,
    )
