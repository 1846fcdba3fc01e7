"""How command lines become typed configurations: Hydra, the place of ``conf/``, and errors for misspelt overrides."""

import difflib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path

import hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import CompactHydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from tedlab._compat.hydra import arguments_parser
from tedlab.config import TrainConfig
from tedlab.launch.launcher import leave_if_started_outside
from tedlab.launch.sweep import SweepFailures
from tedlab.predict.plan import file as plan_file
from tedlab.ranges import check_ranges

_HERE = Path(__file__).resolve().parent
CONF = next(d for d in (_HERE / "conf", _HERE.parents[1] / "conf") if d.is_dir())  # a wheel's, a checkout's
_OTHER_GROUPS = ("hydra", "cluster")  # below conf/ or Hydra's own, but no part of a training configuration

_PLAN = "+plan="

ConfigStore.instance().store("schema", TrainConfig)


class UsageError(CompactHydraException):
    """Something that the user can put right; Hydra prints the message alone, and a sweep goes on with its next job."""


def hydra_entry(task: Callable[[TrainConfig], float]) -> Callable[[], None]:
    """The entry point of a command that takes training overrides and calls ``task`` with what they compose to."""

    failures = SweepFailures()

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
    def entry(config: DictConfig) -> float:
        with failures.told():
            missing = sorted(OmegaConf.missing_keys(config))
            if missing:
                raise UsageError(f"{missing[0]} has no value yet: give it one with {missing[0]}=…")
            typed = OmegaConf.to_object(config)
            assert isinstance(typed, TrainConfig)
            try:
                check_ranges(typed)  # before a command makes anything of a number
            except ValueError as error:
                raise UsageError(f"{error}") from None
            return task(typed)

    def main() -> None:
        try:
            sys.argv[1:] = with_plan(sys.argv[1:])
        except UsageError as error:
            sys.exit(f"{error}")
        arguments = arguments_parser().parse_args()
        if not (arguments.config_dir or arguments.config_path or arguments.config_name):
            try:
                check_overrides(arguments.overrides)
                if not (arguments.help or arguments.hydra_help or arguments.cfg or arguments.info):
                    check_run_directory(arguments.overrides)
            except UsageError as error:
                sys.exit(f"{error}")
        try:
            entry()
        finally:
            failures.list_all()
        leave_if_started_outside()

    return main


def with_plan(arguments: list[str]) -> list[str]:
    """Puts the overrides of the file in ``+plan=FILE``, one a line, in its place; others of the command line win.

    Raises:
        UsageError: if there is no such file, or it has what no plan has.
    """
    files = [argument for argument in arguments if argument.startswith(_PLAN)]
    others = [argument for argument in arguments if argument not in files]
    keys = [key.lstrip("+~") for key, equals, _ in (argument.partition("=") for argument in others) if equals]
    planned = []
    for name in files:
        path = Path(name.removeprefix(_PLAN))
        if not path.is_file():
            raise UsageError(f"{name}: there is no such file; `tedlab plan` writes one")
        try:
            lines = plan_file.read(path)
        except (OSError, ValueError) as error:
            raise UsageError(f"+plan={error}") from None
        for line in lines:
            key = line.partition("=")[0].lstrip("+~")
            if not any(key == ours or key.startswith(f"{ours}.") for ours in keys):
                planned.append(line)
    return planned + others


def check_run_directory(overrides: list[str]) -> None:
    """Refuses a place for runs that cannot be made or written to; Hydra would fail there with a traceback.

    Raises:
        UsageError: naming the folder or file that is in the way.
    """
    given = [override.partition("=") for override in overrides]
    places = {key: value.strip("'\"") for key, _, value in given if key in ("hydra.run.dir", "hydra.sweep.dir")}
    for key, value in (places or {"hydra.run.dir": "runs"}).items():
        path = Path(value.partition("${")[0]).absolute()  # as far as it is known
        above = next(place for place in (path, *path.parents) if place.exists())
        if not above.is_dir():
            raise UsageError(f"{key}={value} cannot be made: {above} is not a folder")
        if not os.access(above, os.W_OK | os.X_OK):
            raise UsageError(f"{key}={value} cannot be made: this user may not write to {above}")


def check_overrides(overrides: list[str]) -> None:
    """Refuses overrides of keys, groups or group options that do not exist, and says which come nearest.

    Raises:
        UsageError: naming the first such override.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException:
        return  # Hydra's own message points at the character
    ours = [o for o in parsed if not (o.is_delete() or re.match(r"hydra\b", o.key_or_group))]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        groups = {name: _options(loader, name) for name in loader.list_groups("") if name not in _OTHER_GROUPS}
        chosen = []
        for override in ours:
            if override.key_or_group in groups:
                options = _values(override)
                for option in options:
                    _check_known(option, groups[override.key_or_group], f"{override.key_or_group}={option}", "option")
                chosen.append(f"{override.key_or_group}={options[0]}")
        experiment = [c for c in chosen if c.startswith("experiment=")]
        config = hydra.compose("train", overrides=experiment + [c for c in chosen if c not in experiment])
    for override in ours:
        if override.key_or_group not in groups:
            _check_key(config, override.key_or_group, list(groups), override.is_add() or override.is_force_add())


def _options(loader: ConfigLoader, group: str) -> list[str]:
    """Those of a group, with those in folders below it."""
    below = [f"{name}/{option}" for name in loader.list_groups(group) for option in _options(loader, f"{group}/{name}")]
    return loader.get_group_options(group) + below


def _values(override: Override) -> list[str]:
    if override.is_sweep_override():
        return [str(value) for value in override.sweep_string_iterator()]
    value = override.value()
    return [str(v) for v in value] if isinstance(value, list) else [str(value)]


def _check_key(config: DictConfig, key: str, groups: list[str], added: bool) -> None:
    """Every part of the key must exist; only dictionaries without a type of their own take additions."""
    node, path = config, ""
    for part in key.split("."):
        if not isinstance(node, DictConfig):
            raise UsageError(f"'{key}': '{path}' is a value and has nothing below it.")
        if added and not is_dataclass(OmegaConf.get_type(node)) and part not in node:
            return
        known = [str(k) for k in node]
        where = f"{key}" if not path else f"{key} (below '{path}')"
        _check_known(part, known if path else sorted({*known, *groups} - {"hydra"}), where, "key")
        path = f"{path}.{part}" if path else part
        if OmegaConf.is_missing(node, part) or OmegaConf.is_interpolation(node, part):
            return
        node = node[part]


def _check_known(name: str, known: list[str], where: str, what: str) -> None:
    if name in known or name == "null":
        return
    near = difflib.get_close_matches(name, known, n=1)
    suggestion = f" Did you mean '{near[0]}'?" if near else ""
    raise UsageError(
        f"{where}: there is no {what} '{name}'.{suggestion}\nValid: {', '.join(sorted(known))}\n"
        "`tedlab train --help` shows everything with its value."
    )
