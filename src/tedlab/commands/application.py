"""Builds a command from a file in ``conf/``, a dataclass that types it, and a task that takes the composed result."""

import sys
from argparse import Namespace
from collections.abc import Callable
from typing import NoReturn, TypeVar, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tedlab._compat.hydra import arguments_parser
from tedlab.cli import (
    CONF,
    check_overrides,
    check_run_directory,
    options_first,
    rename_in_files,
    renamed,
    with_plan,
    with_sources,
)
from tedlab.commands.help import help_text
from tedlab.config import TrainConfig
from tedlab.errors import UsageError
from tedlab.launch.launcher import leave_if_started_outside
from tedlab.launch.outside import first_outside
from tedlab.launch.sweep import SweepFailures
from tedlab.ranges import check_ranges
from tedlab.untrusted import one_line

C = TypeVar("C")


def hydra_entry(
    task: Callable[[C], float | None],
    name: str,
    schema: type[C],
    prepare: Callable[[list[str]], list[str]] = lambda arguments: arguments,
) -> Callable[[], None]:
    """Returns a command's entry point, which composes ``conf/<name>.yaml`` with the command line and calls ``task``.

    Args:
        task: Runs the command with its configuration, and returns the value that a sweeper minimises.
        name: The command's name.
        schema: The dataclass that types the configuration, ``<name>_schema`` in the file's defaults.
        prepare: Turns the command's own notation on the command line into Hydra's overrides.
    """
    ConfigStore.instance().store(f"{name}_schema", schema)
    rename_in_files()
    failures = SweepFailures()

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)
    def entry(config: DictConfig) -> float | None:
        with failures.told():
            try:
                missing = sorted(OmegaConf.missing_keys(config))
                if missing:
                    raise UsageError(f"{missing[0]} has no value yet: give it one with {missing[0]}=…")
                typed = OmegaConf.to_object(config)
                check_ranges(typed)  # before a command uses any number
            except OmegaConfBaseException as error:
                raise UsageError(one_line(error)) from None
            except ValueError as error:
                raise UsageError(f"{error}") from None
            if isinstance(typed, TrainConfig) and typed.weights is not None:
                typed = _from_weights(typed)
            return task(cast(C, typed))

    def refuse(message: str) -> NoReturn:
        raise UsageError(f"{message}; `tedlab {name} --help` shows what it takes")

    def main() -> None:
        try:
            sys.argv[1:] = prepare(with_sources(with_plan(renamed(options_first(sys.argv[1:])))))
            arguments = arguments_parser(refuse).parse_args()
            _check_modes(arguments)
            if arguments.config_path is None:
                file = arguments.config_name or name
                check_overrides(arguments.overrides, file, arguments.config_dir, arguments.multirun)
                if arguments.help:
                    print(help_text(file, arguments.overrides, arguments.config_dir))
                    return
            if issubclass(schema, TrainConfig) and not (arguments.hydra_help or arguments.cfg or arguments.info):
                check_run_directory(arguments.overrides)
        except UsageError as error:
            sys.exit(f"{error}")
        try:
            entry()
        finally:
            failures.list_all()
        leave_if_started_outside()

    return main


def _check_modes(arguments: Namespace) -> None:
    """Refuses what Hydra can only do one of at a time."""
    modes = ("run", "multirun", "cfg", "info", "shell_completion")
    given = [f"--{mode}".replace("_", "-") for mode in modes if getattr(arguments, mode)]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other: give one of them")
    if arguments.resolve and not arguments.cfg:
        raise UsageError("--resolve belongs to --cfg")


def _from_weights(config: TrainConfig) -> TrainConfig:
    """Makes the model that of ``weights``, and says so."""
    from tedlab.resume import named_values
    from tedlab.weights import start_from

    config, said = start_from(config, named_values(HydraConfig.get()))
    if first_outside():
        print(*said, sep="\n", flush=True)
    return config
