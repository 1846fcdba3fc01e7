"""The contract with Lightning has a row for all that there is, each with a test that exists; the page says the same."""

import importlib
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks
import lightning.pytorch.loggers
import lightning.pytorch.plugins
import lightning.pytorch.profilers
import pytest
from lightning.pytorch import Callback, LightningDataModule, LightningModule

from tests.lightning import contract
from tests.lightning.introspection import methods_of, trainer_arguments

OFFERED = {
    "Arguments of Trainer": trainer_arguments(),
    "LightningModule": methods_of(LightningModule),
    "LightningDataModule": methods_of(LightningDataModule),
    "Hooks of Callback": methods_of(Callback),
    "Callbacks": lightning.pytorch.callbacks.__all__,
    "Loggers": lightning.pytorch.loggers.__all__,
    "Profilers": lightning.pytorch.profilers.__all__,
    "Plugins": lightning.pytorch.plugins.__all__,
}


@pytest.mark.parametrize("section", OFFERED)
def test_each_name_that_lightning_offers_has_one_row(section: str) -> None:
    assert sorted(row.name for row in contract.SECTIONS[section]) == sorted(OFFERED[section])


def cases(function: Any) -> set[str]:
    """Identifiers of a parametrized test."""
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    return {str(value) for mark in marks for value in mark.args[1]}


@pytest.mark.parametrize("test", sorted({row.test for rows in contract.SECTIONS.values() for row in rows}))
def test_each_named_test_exists(test: str) -> None:
    file, _, name = test.partition("::")
    name, _, case = name.partition("[")
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    function = getattr(module, name)
    assert name.startswith("test_")
    assert Path(file).name.startswith("test_")
    assert not case or case.removesuffix("]") in cases(function)


def test_the_page_is_the_table() -> None:
    assert contract.PAGE.read_text() == contract.render(), "python -m tests.lightning.contract writes it"
