"""The numbers and words that a field of a configuration takes: declared beside the field, checked for all alike.

``whole`` and ``real`` make dataclass fields with a range, ``word`` those with an enumeration; :func:`check_ranges`
walks a configuration and refuses the first value outside of its own. What values must satisfy *together* is
``validate``'s.
"""

import math
import sys
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from functools import cache
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

LARGEST = 2**31 - 1  # the default bound of whole numbers: torch indexes kernels and dimensions with int32


@dataclass(frozen=True)
class Range:
    """A set of finite numbers.

    Attributes:
        least, most: Inclusive bounds.
        above, below: Exclusive bounds.
        also: Single numbers outside the bounds that have a special meaning.
        whole: Whether only whole numbers are in the set.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()
    whole: bool = False

    def check(self, name: str, value: object, optional: bool = False) -> None:
        """Refuses values that are not in the set.

        Args:
            name: The name of the value, as on a command line.
            value: A value of any type; booleans do not count as numbers.
            optional: Whether None is allowed.

        Raises:
            ValueError: If the value is not in the set; the message says what would be valid.
        """
        if not ((optional and value is None) or self._contains(value)):
            null = ", or null" if optional else ""
            raise ValueError(f"{name} is {value}; it must be {self._described(value)}{null}")

    def parse(self, name: str, text: str) -> Any:
        """Parses a number from a command line.

        Raises:
            ValueError: If it is not in the set, as for :meth:`check`.
        """
        value: object
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            value = text
        self.check(name, value)
        return value

    def _contains(self, value: object) -> bool:
        if not self._is_number(value):
            return False
        return value in self.also or (self._high_enough(value) and self._low_enough(value))  # type: ignore[arg-type]

    def _is_number(self, value: object) -> bool:
        """Returns whether a value is a finite number, and whole if it must be."""
        if isinstance(value, float):
            return math.isfinite(value) and not self.whole
        return isinstance(value, int) and not isinstance(value, bool)

    def _high_enough(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.above is None or value > self.above)

    def _low_enough(self, value: float) -> bool:
        most = sys.float_info.max if self.most is None else self.most  # Python's integers may exceed it
        return value <= most and (self.below is None or value < self.below)

    def _described(self, value: object) -> str:
        """Describes the set in words; mentions a whole number's upper bound only if ``value`` exceeds it."""
        number = self._is_number(value)
        kind = [] if number else ["a whole number" if self.whole else "a finite number"]
        low = [f"at least {self.least:,}"] if self.least is not None else []
        low += ["positive" if self.above == 0 else f"larger than {self.above:,}"] if self.above is not None else []
        beyond = number and not self._low_enough(value)  # type: ignore[arg-type]
        high = [f"at most {self.most:,}"] if self.most is not None and (beyond or not self.whole) else []
        high += [f"smaller than {self.below:,}"] if self.below is not None else []
        bounds = " and ".join(low + high)
        return ", ".join(kind + ([bounds] if bounds else [])) + "".join(f", or {other}" for other in self.also)


def whole(default: Any = MISSING, *, least: int, most: int = LARGEST, also: tuple[int, ...] = ()) -> Any:
    """Returns a dataclass field for a whole number, or None if its type allows that."""
    return field(default=default, metadata={"range": Range(least, most, also=also, whole=True)})


def real(
    default: Any = MISSING,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    also: tuple[float, ...] = (),
) -> Any:
    """Returns a dataclass field for a finite number, or None if its type allows that."""
    return field(default=default, metadata={"range": Range(least, most, above, below, also)})


def word(default: StrEnum | None, kind: type[StrEnum] | None = None) -> Any:
    """Returns a dataclass field for a word of an enumeration, ``kind`` if the default is None, else the default's.

    The field's type is ``str``, because OmegaConf would take the names of an enumeration's members, not their values. A
    word equals its member.
    """
    words = kind if default is None else type(default)
    return field(default=None if default is None else default.value, metadata={"words": words})


class NumberField(NamedTuple):
    """A dataclass field that holds a number."""

    name: str
    range: Range
    optional: bool


@cache  # a plan validates thousands of configurations
def number_fields(kind: type) -> tuple[NumberField, ...]:
    """Returns the fields of a dataclass that hold numbers, without those of nested dataclasses.

    Raises:
        TypeError: If one of them declares no range.
    """
    found = []
    for name, hint in get_type_hints(kind).items():
        types = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if int in types or float in types:
            declared = kind.__dataclass_fields__[name].metadata.get("range")  # type: ignore[attr-defined]
            if not isinstance(declared, Range):
                raise TypeError(
                    f"{kind.__name__}.{name} is a number without a range: declare it with whole() or real()"
                )
            found.append(NumberField(name, declared, type(None) in types))
    return tuple(found)


def check_ranges(config: Any, prefix: str = "") -> None:
    """Checks the numbers and words of a dataclass and of nested ones, except those with a ``__post_init__`` check.

    Args:
        config: A dataclass instance.
        prefix: The prefix of names in messages, which ends with a dot unless it is empty.

    Raises:
        ValueError: If a number is out of its range or a word is unknown; the message names the first.
    """
    for name, range_, optional in number_fields(type(config)):  # type: ignore[arg-type]
        range_.check(f"{prefix}{name}", getattr(config, name), optional)
    for inner in fields(config):
        value = getattr(config, inner.name)
        words = inner.metadata.get("words")
        if words is not None and value not in (*words, inner.default):
            null = ", or null" if inner.default is None else ""
            raise ValueError(f"{prefix}{inner.name}={value} is unknown; valid: {', '.join(words)}{null}")
        if is_dataclass(value) and not hasattr(value, "__post_init__"):
            check_ranges(value, f"{prefix}{inner.name}.")
