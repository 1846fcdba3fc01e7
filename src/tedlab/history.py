"""Reads the rows of ``metrics.csv``, and determines the step at which they, or those of a W&B run, were logged."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOKENS = "tokens"
UNREADABLE = (OSError, ValueError, KeyError, TypeError, OverflowError, csv.Error)  # what rows that are none can cause


def steps_done(row: Mapping[str, Any], step_key: str = "step") -> int:
    """Returns how many optimizer steps had been done when a row was logged.

    This is its ``step``, except in rows without ``tokens``, which older versions wrote: they counted the last finished
    step from 0, though the final validation from 1.
    """
    step = int(row[step_key])
    return step if TOKENS in row else step + 1


def read_history(metrics: Path) -> list[dict[str, str]]:
    """Returns the rows of ``metrics.csv`` without empty values, and with the number of steps done as ``step``.

    It returns no rows if the file does not exist, and leaves out a last line that a killed process did not finish.
    """
    if not metrics.exists():
        return []
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [*csv.DictReader(line for line in lines if line.endswith("\n"))]
    return [{**{k: v for k, v in row.items() if v}, "step": str(steps_done(row))} for row in rows]
