"""What several checks say in the same way."""

from collections.abc import Iterable


def check_known(name: str, value: object, valid: Iterable[str]) -> None:
    """Refuses what is not one of so many words.

    Raises:
        ValueError: naming all of them.
    """
    words = tuple(valid)
    if value not in words:
        raise ValueError(f"{name}={value} is unknown; valid: {', '.join(words)}")


def check_divides(name: str, value: int, by: str, degree: int) -> None:
    """Refuses a degree that does not divide a size.

    Raises:
        ValueError: naming the degrees up to 64 that do.
    """
    if value % degree:
        fitting = ", ".join(str(n) for n in range(1, min(value, 64) + 1) if value % n == 0)
        raise ValueError(
            f"{name} ({value}) is not divisible by {by} ({degree}). With this {name}, {by} can be {fitting}"
        )
