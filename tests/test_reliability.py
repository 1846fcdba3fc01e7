"""docs/reliability.md: each promise names tests, and they exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"


def promises() -> dict[str, list[str]]:
    """The rows of the table of promises: what is promised, and the tests that are named."""
    table = PAGE.read_text().partition("## Promises")[2]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    return {" | ".join(row[:-1]): re.findall(r"`([^`]+)`", row[-1]) for row in rows}


def test_every_promise_is_a_row_of_its_own() -> None:
    assert len(promises()) >= 15
    assert PAGE.read_text().count("::test_") == sum(len(names) for names in promises().values())


@pytest.mark.parametrize("promise", promises())
def test_a_promise_names_tests_that_exist(promise: str) -> None:
    names = promises()[promise]
    assert names, "a promise without a test"
    for name in names:
        file, _, test = name.partition("::")
        functions = {
            node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)
        }
        assert test in functions, name
