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

LARGEST = 2**31 - 1  # of a whole number that nothing else bounds: what torch indexes kernels and dimensions with


@dataclass(frozen=True)
class Range:
    """A set of finite numbers.

    Attributes:
        least, most: bounds that are inside.
        above, below: bounds that are outside.
        also: single numbers that mean something of their own.
        whole: no fractions.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()
    whole: bool = False

    def check(self, name: str, value: object, optional: bool = False) -> None:
        """Refuses what is not in the set.

        Args:
            name: of the value, as on a command line.
            value: of any type. A boolean is no number.
            optional: whether None is one of the values.

        Raises:
            ValueError: with the name, the value, and what would be valid.
        """
        if not ((optional and value is None) or self._contains(value)):
            null = ", or null" if optional else ""
            raise ValueError(f"{name} is {value}; it must be {self._described(value)}{null}")

    def parse(self, name: str, text: str) -> Any:
        """The number that a word of a command line is.

        Raises:
            ValueError: as :meth:`check`.
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
        """Of the right kind, and finite."""
        if isinstance(value, float):
            return math.isfinite(value) and not self.whole
        return isinstance(value, int) and not isinstance(value, bool)

    def _high_enough(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.above is None or value > self.above)

    def _low_enough(self, value: float) -> bool:
        most = sys.float_info.max if self.most is None else self.most  # Python's integers go on beyond it
        return value <= most and (self.below is None or value < self.below)

    def _described(self, value: object) -> str:
        """The set in words; a bound that is there for slips of the hand only where ``value`` is beyond it."""
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
    """A dataclass field for a whole number, None where its type allows it."""
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
    """A dataclass field for a finite number, None where its type allows it."""
    return field(default=default, metadata={"range": Range(least, most, above, below, also)})


def word(default: StrEnum | None, kind: type[StrEnum] | None = None) -> Any:
    """A dataclass field for one of the words of an enumeration, which is that of the default, or ``kind``.

    The field's type is ``str``, for OmegaConf would take the names of an enumeration's members, not their values. A
    word and its member are equal.
    """
    words = kind if default is None else type(default)
    return field(default=None if default is None else default.value, metadata={"words": words})


class NumberField(NamedTuple):
    """A field that holds a number."""

    name: str
    range: Range
    optional: bool


@cache  # a plan validates thousands of configurations
def number_fields(kind: type) -> tuple[NumberField, ...]:
    """The fields of a dataclass, not of those inside of it, that hold numbers.

    Raises:
        TypeError: if one of them declares no range.
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
    """Checks numbers and words of a dataclass and of those inside of it, but for such as check themselves when made.

    Args:
        config: an instance.
        prefix: of the names in messages, with a dot at its end.

    Raises:
        ValueError: naming the first number that is not in its range, or the first word that is unknown.
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
