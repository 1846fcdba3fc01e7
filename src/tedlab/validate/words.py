"""Provides checks that several modules share."""

from collections.abc import Iterable


def check_known(name: str, value: object, valid: Iterable[str]) -> None:
    """Refuses a value that is not one of the valid words.

    Raises:
        ValueError: If it is none of them; the message lists all.
    """
    words = tuple(valid)
    if value not in words:
        raise ValueError(f"{name}={value} is unknown; valid: {', '.join(words)}")


def check_divides(name: str, value: int, by: str, degree: int) -> None:
    """Refuses a degree that does not divide a size.

    Raises:
        ValueError: If it does not; the message lists the degrees up to 64 that do.
    """
    if value % degree:
        fitting = ", ".join(str(n) for n in range(1, min(value, 64) + 1) if value % n == 0)
        raise ValueError(
            f"{name} ({value}) is not divisible by {by} ({degree}). With this {name}, {by} can be {fitting}"
        )
