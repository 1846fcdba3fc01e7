"""Packages of the extra ``data``, which read formats that Python itself does not."""

from importlib import import_module
from typing import Any


class MissingExtra(ValueError):
    """A package is not installed; the message is a clause that says which, and how to install it."""


def needed(package: str, what: str) -> Any:
    """Imports a package.

    Raises:
        MissingExtra: If it is not installed.
    """
    try:
        return import_module(package)
    except ImportError:
        distribution = package.partition(".")[0]
        raise MissingExtra(f"{what} needs {distribution}: pip install 'tedlab[data]'") from None
