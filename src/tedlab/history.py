"""The rows of ``metrics.csv``, and of a W&B run: what each was logged at."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOKENS = "tokens"


def steps_done(row: Mapping[str, Any], step_key: str = "step") -> int:
    """How many optimizer steps had been done when a row was logged.

    That is its ``step``, but for rows of runs that did not log ``tokens`` yet: they counted the last finished step from
    0, though the closing validation from 1.
    """
    step = int(row[step_key])
    return step if TOKENS in row else step + 1


def read_history(metrics: Path) -> list[dict[str, str]]:
    """The rows of ``metrics.csv`` without what is empty, each with its steps done as ``step``; none without a file.

    A last line that a killed process did not finish is left out.
    """
    if not metrics.exists():
        return []
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [*csv.DictReader(line for line in lines if line.endswith("\n"))]
    return [{**{k: v for k, v in row.items() if v}, "step": str(steps_done(row))} for row in rows]
