"""Packages of the extra ``data``, which read what Python itself does not."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

_PACKAGES = ("pyarrow", "zstandard")


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


def installed() -> list[str]:
    """Returns which packages of the extra are installed: without them, files are left out of a corpus."""
    return [package for package in _PACKAGES if find_spec(package) is not None]
