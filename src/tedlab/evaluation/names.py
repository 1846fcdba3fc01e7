"""Names of sets, which become part of the names of metrics. Nothing here imports torch."""

import re
from collections.abc import Collection

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_TAKEN = ("loss", "bits_per_byte")  # val/loss is another metric


def check_names(names: Collection[str], key: str) -> None:
    """Refuses names that cannot be part of a metric's name.

    Args:
        names: Names of sets.
        key: What the message calls them.

    Raises:
        ValueError: If there is one; the message says what would do.
    """
    for name in names:
        if not _NAME.fullmatch(name) or name in _TAKEN:
            raise ValueError(
                f"{key} has a set called {name!r}, which would be part of its metrics' names: call it by letters, "
                f"digits, '_' and '-', the first of which is a letter, and not {' or '.join(_TAKEN)}"
            )
