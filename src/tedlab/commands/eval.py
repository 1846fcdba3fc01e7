"""``tedlab eval run=<dir> data.NAME=<path> tasks=[NAME]``: evaluates the model of a run on texts and tasks."""

from pathlib import Path

from tedlab.commands.application import hydra_entry
from tedlab.commands.literal import quote, quoted
from tedlab.config import EvalConfig
from tedlab.errors import UsageError
from tedlab.evaluation.names import check_names

_SET = "data."


def prepare(arguments: list[str]) -> list[str]:
    """Quotes paths, and makes sets of texts of ``data.NAME=PATH``, and of ``data=PATH``, named after the file.

    Raises:
        UsageError: If a set has a name that cannot be part of a metric's name, or that of another set.
    """
    prepared: list[str] = []
    names: set[str] = set()
    for argument in quoted(arguments, ("run", "field", "include", "out")):
        key, equals, path = argument.partition("=")
        if equals and key == "data":
            key = f"{_SET}{Path(path).name.split('.')[0]}"
        if equals and key.startswith(_SET):
            try:
                check_names([key.removeprefix(_SET)], "data")
            except ValueError as error:
                raise UsageError(f"{error}: data.NAME={path}") from None
            if key in names:
                raise UsageError(
                    f"two sets are called {key.removeprefix(_SET)}, the second of {path}: use data.NAME=PATH"
                )
            names.add(key)
            argument = f"++{key}={quote(path)}"
        prepared.append(argument)
    return prepared


def task(config: EvalConfig) -> None:
    """Evaluates, in one process or in as many as the layout has."""
    from tedlab.evaluation.evaluate import evaluate, given, in_layout
    from tedlab.launch import outside
    from tedlab.launch.launcher import launch

    try:
        if config.processes == 1 and not outside.started_outside():
            evaluate(config)
        else:
            outside.check(config.processes)
            found = given(config)  # says what is wrong before any process starts
            launch(in_layout, config, config.processes, log_in=found.folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"{error}") from None


main = hydra_entry(task, "eval", EvalConfig, prepare)
