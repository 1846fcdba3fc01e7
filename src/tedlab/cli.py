"""The place of ``conf/``, and errors for misspelt overrides, before Hydra composes them."""

import re
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from tedlab._compat.hydra import group_options, translate_files
from tedlab.config import TrainConfig
from tedlab.errors import UsageError
from tedlab.hints import did_you_mean
from tedlab.launch.outside import first_outside
from tedlab.places import obstacle
from tedlab.predict.plan import file as plan_file
from tedlab.renamed import nested, note, old_names, overrides
from tedlab.untrusted import one_line

_HERE = Path(__file__).resolve().parent
CONF = next(d for d in (_HERE / "conf", _HERE.parents[1] / "conf") if d.is_dir())  # a wheel's, a checkout's

_PLAN = "+plan="
_EXTRAS = {"hydra/sweeper/optuna": "tedlab[optuna]"}  # options that presets choose, and what has them

ConfigStore.instance().store("schema", TrainConfig)


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
            lines = renamed(plan_file.read(path))
        except (OSError, ValueError) as error:
            raise UsageError(f"+plan={error}") from None
        for line in lines:
            key = line.partition("=")[0].lstrip("+~")
            if not any(key == ours or key.startswith(f"{ours}.") for ours in keys):
                planned.append(line)
    return planned + others


def with_sources(arguments: list[str]) -> list[str]:
    """Lets ``data.sources`` be given like any value, whole or in parts: the names in it are the user's own."""
    words = []
    for word in arguments:
        key, equals, value = word.partition("=")
        if equals and re.fullmatch(r"data\.sources(\.[\w-]+)*", key):
            names = key.split(".")[2:]
            word = f"++data.sources={''.join(f'{{{name}:' for name in names)}{value}{'}' * len(names)}"
        words.append(word)
    return words


def options_first(arguments: list[str]) -> list[str]:
    """Puts Hydra's options before overrides, in whatever order they are typed; argparse wants overrides together."""
    return sorted(arguments, key=lambda word: not word.startswith("-") and ("=" in word or word.startswith("~")))


def renamed(given: list[str]) -> list[str]:
    """Overrides by the names of now; a note says which had old ones."""
    words, notes = overrides(given)
    for told in notes if first_outside() else ():
        print(told, file=sys.stderr)
    return words


@cache
def rename_in_files() -> None:
    """Makes Hydra take old names in configuration files, too; a note says which file has them."""
    told = set()

    def current(path: str, content: Any) -> Any:
        for old in old_names(content):
            if (path, old) not in told and first_outside():
                print(f"{path}: {note(old)}", file=sys.stderr)
            told.add((path, old))
        return nested(content)

    translate_files(current)


def check_run_directory(overrides: list[str]) -> None:
    """Refuses a place for runs that cannot be made or written to; Hydra would fail there with a traceback.

    Raises:
        UsageError: naming the folder or file that is in the way.
    """
    given = [override.partition("=") for override in overrides]
    places = {key: value.strip("'\"") for key, _, value in given if key in ("hydra.run.dir", "hydra.sweep.dir")}
    for key, value in (places or {"hydra.run.dir": "runs"}).items():
        found = obstacle(Path(value.partition("${")[0]))  # as far as it is known
        if found is not None:
            raise UsageError(f"{key}={value} cannot be made: {found}")


def check_overrides(
    overrides: list[str], name: str = "train", folder: str | None = None, multirun: bool = True
) -> None:
    """Refuses overrides of keys, groups or group options that do not exist, and says which come nearest.

    Args:
        overrides: of the command line.
        name: of the command's file in ``conf/``.
        folder: ``--config-dir``, with presets of the user's own.
        multirun: whether a sweep is asked for; a preset may do so, too.

    Raises:
        UsageError: naming the first such override.
    """
    wrong = [override for override in overrides if "=" not in override and not override.startswith("~")]
    if wrong:
        raise UsageError(f"'{wrong[0]}' is not of the form key=value; `tedlab {name} --help` shows the keys")
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise UsageError(f"'{error.override}' cannot be read: {one_line(error)}") from None
    if any(o.key_or_group == "hydra/launcher" and "submitit" in str(o.value()) for o in parsed) and not find_spec(
        "submitit"
    ):
        raise UsageError("hydra/launcher needs a package that is not installed: pip install 'tedlab[slurm]'")
    ours = [o for o in parsed if not (o.is_delete() or re.match(r"hydra\b", o.key_or_group))]
    if folder is not None and not Path(folder).is_dir():
        raise UsageError(f"--config-dir={folder} is no folder")
    searched = [o.input_line or "" for o in parsed if o.key_or_group == "hydra.searchpath"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            groups = presets(name, folder, searched)
        except MissingConfigException:
            return  # Hydra says where it has looked
        chosen = []
        for override in ours:
            if override.key_or_group in groups:
                options = _values(override, groups[override.key_or_group])
                for option in options:
                    where = f"{override.key_or_group}={option}"
                    _check_known(option, groups[override.key_or_group], where, "option", name)
                chosen.append(f"{override.key_or_group}={options[0]}")
        experiment = [c for c in chosen if c.startswith("experiment=")]
        chosen = experiment + [c for c in chosen if c not in experiment]
        try:
            config = hydra.compose(name, [*searched, *from_folder(folder), *chosen])
        except MissingConfigException as error:
            if error.missing_cfg_file not in _EXTRAS:
                return  # Hydra says what a file names that does not exist
            needs = f"{error.missing_cfg_file} needs a package that is not installed"
            raise UsageError(f"{needs}: pip install '{_EXTRAS[error.missing_cfg_file]}'") from None
        swept = [override for override in ours if override.is_sweep_override()]
        if swept:
            of_hydra = [o.input_line or "" for o in parsed if o not in ours and o.key_or_group != "hydra.searchpath"]
            everything = [*searched, *from_folder(folder), *of_hydra, *chosen]
            try:
                settings = hydra.compose(name, everything, return_hydra_config=True).hydra
            except HydraException as error:
                said = " ".join(str(error).partition("Config search path")[0].split())
                raise UsageError(f"Hydra's own settings: {said}") from None
            _check_sweep(swept, settings, multirun)
    for override in ours:
        if override.key_or_group not in groups:
            added = override.is_add() or override.is_force_add()
            _check_key(config, override.key_or_group, list(groups), added, name)
            _check_type(config, override, name)


def from_folder(folder: str | None) -> list[str]:
    """What ``--config-dir`` is as an override."""
    return [f"hydra.searchpath=[file://{Path(folder).absolute()}]"] if folder else []


def presets(name: str, folder: str | None = None, searched: Sequence[str] = ()) -> dict[str, list[str]]:
    """The options of each group of a command, where Hydra is initialised.

    Args:
        name: of the command's file in ``conf/``.
        folder: ``--config-dir``, with presets of the user's own.
        searched: overrides of ``hydra.searchpath``.
    """
    places = [*searched, *from_folder(folder)]
    listed = group_options(GlobalHydra.instance().config_loader(), name, places)
    choices = hydra.compose(name, places, return_hydra_config=True).hydra.runtime.choices

    def options(group: str) -> list[str]:
        inner = listed(group, ObjectType.GROUP)
        below = [f"{folder}/{option}" for folder in inner for option in options(f"{group}/{folder}")]
        return listed(group, ObjectType.CONFIG) + below

    return {group: options(group) for group in sorted(choices) if not group.startswith("hydra")}


def _values(override: Override, options: Sequence[str]) -> list[str]:
    """The options of a group that an override chooses, of all that there are."""
    value = override.value()
    if isinstance(value, Glob):
        found = value.filter([*options])
        if not found:
            raise UsageError(f"{override.input_line} fits no option of {override.key_or_group}: {', '.join(options)}")
        return found
    if override.is_sweep_override():
        return [str(value) for value in override.sweep_string_iterator()]
    return [str(v) for v in value] if isinstance(value, list) else [str(value)]


def _check_sweep(swept: Sequence[Override], settings: DictConfig, multirun: bool) -> None:
    """A sweep is asked for as such, and only a search draws from an interval: Hydra's own sweeper lists values."""
    first = swept[0].input_line
    if not multirun and settings.mode != RunMode.MULTIRUN:
        raise UsageError(f"{first} has several values: -m makes a sweep of them; a list is written [1,2], a text 'a,b'")
    if str(settings.sweeper.get("_target_")).endswith(".BasicSweeper"):
        for override in swept:
            if override.is_interval_sweep():
                raise UsageError(
                    f"{override.input_line} needs a search that draws from the interval, such as hparams_search=optuna "
                    "(pip install 'tedlab[optuna]'); a sweep takes values: 1e-3,3e-3"
                )


def _check_key(config: DictConfig, key: str, groups: list[str], added: bool, name: str) -> None:
    """Every part of the key must exist; only dictionaries without a type of their own take additions."""
    node, path = config, ""
    for part in key.split("."):
        if not isinstance(node, DictConfig):
            raise UsageError(f"'{key}': '{path}' is a value and has nothing below it.")
        if added and not is_dataclass(OmegaConf.get_type(node)) and part not in node:
            return
        known = [str(k) for k in node]
        where = f"{key}" if not path else f"{key} (below '{path}')"
        _check_known(part, known if path else sorted({*known, *groups}), where, "key", name)
        path = f"{path}.{part}" if path else part
        if OmegaConf.is_missing(node, part) or OmegaConf.is_interpolation(node, part):
            return
        node = node[part]


def _check_type(config: DictConfig, override: Override, name: str) -> None:
    """The value, or each of a sweep, must be of the field's type; what is known later is looked at then."""
    key = override.key_or_group
    try:
        for value in () if override.is_delete() else _each(override):
            OmegaConf.update(config, key, value, force_add=True)
    except ConfigKeyError as error:  # below the key, in a value with fields of its own
        if is_dataclass(error.object_type):
            known = [field.name for field in fields(error.object_type)]
            _check_known(str(error.key), known, str(override.input_line).lstrip("+"), "key", name)
    except ValidationError as error:
        said = one_line(error)
        raise UsageError(said if said.startswith(key) else f"{key}: {said}") from None
    except OmegaConfBaseException:
        return


def _each(override: Override) -> list[Any]:
    """The values that an override gives its key: one, those of a sweep, or the ends of an interval to search."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [value.start, value.end]
    if isinstance(value, Glob):
        raise UsageError(f"{override.input_line}: glob finds options of a group, and {override.key_or_group} is none")
    if not override.is_sweep_override():
        return [value]
    parser = OverridesParser.create()  # reads each as Hydra's sweeper will have it read
    return [
        parser.parse_override(f"{override.key_or_group}={text}").value() for text in override.sweep_string_iterator()
    ]


def _check_known(word: str, known: list[str], where: str, what: str, name: str) -> None:
    if word in known or word == "null":
        return
    raise UsageError(
        f"{where}: there is no {what} '{word}'.{did_you_mean(word, known)}\nValid: {', '.join(sorted(known))}\n"
        f"`tedlab {name} --help` shows everything with its value."
    )
