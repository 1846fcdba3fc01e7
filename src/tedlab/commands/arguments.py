"""Reads the command lines of commands that Hydra does not compose; their help and errors look like those of others."""

import argparse
import sys
from typing import Any, NoReturn

from typing_extensions import override


class ArgumentParser(argparse.ArgumentParser):
    """A parser that describes a command by its module's docstring, and ends it at a mistake with a sentence and 1."""

    def __init__(self, *, description: str | None = None, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description and plain(description), **options)

    @override
    def error(self, message: str) -> NoReturn:
        sys.exit(f"{message}; `{self.prog} --help` shows what it takes")


def plain(docstring: str) -> str:
    """Returns a docstring as a terminal shows it."""
    return docstring.replace("``", "`")
