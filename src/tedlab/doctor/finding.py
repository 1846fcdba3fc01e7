"""What a check found."""

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How bad it is, from the best on."""

    SKIPPED = "skipped"
    OK = "ok"
    WARNING = "warning"
    WRONG = "wrong"


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: What was checked.
        said: What was found, with numbers.
        verdict: How bad it is.
        remedy: What to do; empty if nothing is to be done.
    """

    name: str
    said: str
    verdict: Verdict = Verdict.OK
    remedy: str = ""
