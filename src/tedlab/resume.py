"""Finds the checkpoint from which a run resumes, and takes over values from it.

A checkpoint decides how training continues: every value in ``DECIDED`` stays as it was, unless the command line or the
experiment file that it selects names it. A preset for ``optim`` or ``moe`` names all values of its group; one for
``trainer``, ``data`` or ``parallel`` says where to run and on what, and names none; other text than that of the
checkpoint's run is refused unless it is named. The configuration is changed before
anything is launched, so that config.yaml and the loggers are right and the optimizer follows it, see
:meth:`tedlab.module.LanguageModel.on_load_checkpoint`.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tedlab.checkpoint import META, read_meta
from tedlab.config import (
    AverageConfig,
    BalanceChoices,
    BalanceConfig,
    GroupConfig,
    RampConfig,
    RouterConfig,
    TrainConfig,
    value_of,
    with_values,
)
from tedlab.errors import UsageError
from tedlab.optim.schedule import schedule_of, schedules
from tedlab.renamed import renamed
from tedlab.untrusted import interpolation, read_yaml, typed

DECIDED = (
    *("optim.lr", "optim.schedule", "optim.warmup_steps", "optim.final_lr_fraction", "optim.decay_fraction"),
    "optim.decay_steps",
    *("optim.optimizer", "optim.groups", "optim.loss_scale", "trainer.gradient_clip_val", "trainer.max_steps"),
    *("moe.top_k", "moe.dispatch", "moe.capacity_factor", "moe.capacity_multiple", "moe.capacity_groups"),
    *("moe.aux_loss", "moe.z_loss", "moe.gating", "moe.min_capacity", "moe.random_token_selection"),
    *("moe.second_expert_sampling", "moe.drop_policy", "data.batch_size", "data.ramp", "seed"),
    *(f"moe.router.{option.name}" for option in fields(RouterConfig)),
    *(f"moe.balance.{option.name}" for option in fields(BalanceConfig)),
    *(f"average.{option.name}" for option in fields(AverageConfig)),
)
# Keys in the metadata of weights that no run has trained: the family of what was imported, the recipe of an upcycling.
IMPORTED, UPCYCLED = "imported", "upcycled"
_RATES = ("lr", "schedule", "warmup_steps", "final_lr_fraction", "decay_fraction", "decay_steps")
_RECIPES = ("optim", "moe")  # groups whose presets say how to train
# Values of data that decide which text a run is trained on, and how it becomes samples.
_TEXT_DECIDING = (
    *("path", "field", "tokenizer", "bpe_vocab_size", "validation_fraction", "training_batches", "module"),
    *("documents", "packing", "sources", "mixing", "temperature", "stream"),
)
_WANDB_RUN = re.compile(r"(?:offline-)?run-\d{8}_\d{6}-(\w+)")


def resume(config: TrainConfig, named: Collection[str]) -> tuple[TrainConfig, list[str]]:
    """Sets the checkpoint that a run resumes from (``ckpt_path``), and the values that follow from it.

    Args:
        config: The composed configuration.
        named: The names from :func:`named_values`.

    Returns:
        The resulting configuration, and sentences to print about it, which a new run does not have.

    Raises:
        UsageError: If there is no such checkpoint, or a value that is named cannot be changed.
    """
    if config.resume not in (None, "auto"):
        raise UsageError(f"resume={config.resume} is unknown; valid: auto (go on where the run directory ends), null")
    try:
        last = Path(config.output_dir, "checkpoints", "last.ckpt")
        if config.resume == "auto" and _is_checkpoint(last):
            config = replace(config, ckpt_path=str(last), logger=_same_wandb_run(config))
        if config.ckpt_path is None:
            return config, []
        path = find_checkpoint(Path(config.ckpt_path))
        meta = read_meta(path)
        for key, what in ((IMPORTED, "an import"), (UPCYCLED, "an upcycled model")):
            if key in meta:
                raise ValueError(
                    f"{path} is {what}, which has no optimizer to go on with; weights={config.ckpt_path} starts from it"
                )
        _check_text(config, path, named)
        config, said = take_over(replace(config, ckpt_path=str(path)), meta, named)
        said = [f"Going on from {path}, step {meta.get('global_step')}.", *said]
        stored = _stored(meta, config.data.module.rpartition(".")[2])
        return config, [*said, *_since_when(config, stored, int(meta.get("global_step") or 0))]
    except (OSError, ValueError) as error:
        raise UsageError(f"{error}") from None


def _since_when(config: TrainConfig, stored: Mapping[str, Any], step: int) -> list[str]:
    """Says whether a run with another schedule than its checkpoint's is like one that had it from the start."""
    known = {name: stored[f"optim.{name}"] for name in _RATES if f"optim.{name}" in stored}
    total_before, total = stored.get("trainer.max_steps"), config.trainer["max_steps"]
    before = replace(config.optim, **({"decay_steps": None} | known))  # an older checkpoint has no decay_steps
    if not known or total_before is None or before.schedule not in schedules.names:
        return []
    if (before, total_before) == (config.optim, total):
        return []
    old, new = schedule_of(before, total_before), schedule_of(config.optim, total)
    rates = [(before.lr * old(n), config.optim.lr * new(n)) for n in range(step + 1)]
    other = next((n for n, (was, now) in enumerate(rates[:-1]) if not math.isclose(was, now, rel_tol=1e-9)), None)
    if other is None:
        return ["Up to here the learning rate was that of the new schedule: as if the run had had it from the start."]
    return [
        f"The new schedule differs from the old one from step {other} on: the learning rate goes from "
        f"{rates[step - 1][0]:.6g} in step {step - 1} to {rates[step][1]:.6g} in step {step}."
    ]


def find_checkpoint(path: Path, key: str = "ckpt_path") -> Path:
    """Returns ``path`` if it is a checkpoint, otherwise the last one of the run or checkpoint directory that it is.

    Args:
        path: The path.
        key: The name of the value that has it, for the message.

    Raises:
        FileNotFoundError: If there is none; the message lists checkpoints nearby.
    """
    for place in (path, path / "last.ckpt", path / "checkpoints" / "last.ckpt"):
        if _is_checkpoint(place):
            return place
    what = "is a file" if path.is_file() else "does not exist"
    what = "has no last.ckpt, and no checkpoints/last.ckpt" if path.is_dir() else what
    if (path / "config.json").is_file() and path.is_dir():
        raise FileNotFoundError(
            f"{key}={path} is a folder of transformers: `tedlab checkpoint import hf={path} out=DIR` makes a run "
            f"directory of it, for {key}=DIR"
        )
    near = ", ".join(map(str, _near(path))) or "none"
    raise FileNotFoundError(f"{key}={path} {what}; checkpoints near it: {near}")


def _check_text(config: TrainConfig, checkpoint: Path, named: Collection[str]) -> None:
    """Refuses other text than that of the checkpoint's run, as its config.yaml says, unless it is named.

    Raises:
        ValueError: If ``data`` was merely forgotten: the run would go on, from a new epoch, with another text.
    """
    if "data.path" in named or checkpoint.parent.name != "checkpoints":
        return
    try:
        stored = read_yaml(checkpoint.parent.parent / "config.yaml").get("data")
    except (OSError, ValueError):  # a checkpoint that was moved away from its run
        return
    stored = stored if isinstance(stored, dict) else {}
    now = asdict(config.data)
    for name in _TEXT_DECIDING:
        ours, theirs = now[name], stored.get(name, now[name])
        if theirs != ours and not any(f"{other}.".startswith(f"data.{name}.") for other in named):
            raise ValueError(
                f"{checkpoint} is of a run with data.{name}={_as_is(theirs)}, and this one would go on with "
                f"data.{name}={_as_is(ours)}, which nothing names. Give the run its data again, or name other data "
                "(data=… or data.path=…): a text that is another begins with a new epoch"
            )


def _as_is(value: object) -> object:
    return "null" if value is None else value


def named_values(hydra: Any) -> set[str]:
    """Returns the dotted names of values and sections that the command line or its experiment file sets.

    Args:
        hydra: Hydra's own configuration of the job.
    """
    named = {re.sub(r"^[+~]+", "", override).partition("=")[0].partition("@")[0] for override in hydra.overrides.task}
    experiment = hydra.runtime.choices.get("experiment")
    for source in hydra.runtime.config_sources:
        file = Path(source.path, "experiment", f"{experiment}.yaml")
        if source.schema == "file" and file.is_file():
            content = OmegaConf.to_container(OmegaConf.load(file))
            assert isinstance(content, dict)
            for default in content.pop("defaults", []):
                if isinstance(default, dict):
                    named |= {str(key).removeprefix("override").strip(" /") for key in default}
            named |= {renamed(name) for name in _leaves(content)}
    if "data" in named:  # a preset of data says which text
        named.add("data.path")
    return named - ({"data", "model", "parallel", "trainer"} | {"experiment"})


def take_over(config: TrainConfig, meta: Mapping[str, Any], named: Collection[str]) -> tuple[TrainConfig, list[str]]:
    """Copies the values that a checkpoint decides into ``config``, except those that are named.

    Args:
        config: The composed configuration.
        meta: The metadata of the checkpoint.
        named: The names from :func:`named_values`.

    Returns:
        The changed copy, and up to two sentences: how it differs from the checkpoint, and how from ``config``.

    Raises:
        ValueError: If the saved state does not fit the configured optimizer or loss scale, or the checkpoint contains
            an interpolation.
    """
    stored = _stored(meta, config.data.module.rpartition(".")[2])
    looked_up = interpolation({name: stored[name] for name in DECIDED if name in stored})
    if looked_up is not None:
        raise ValueError(f"the checkpoint's {looked_up} has ${{…}} in it, which is not looked up for a checkpoint")
    kept, changed, values = [], [], {}
    for name in DECIDED:
        if name not in stored:  # the checkpoint is older, or not of this command
            continue
        ours = value_of(config, name)
        value = _options(ours, stored[name], named) if name == "optim.optimizer" else stored[name]
        if name != "optim.optimizer" and is_named(name, named):
            value = ours
        if value != stored[name]:
            changed += _differences(name, value, stored[name])
        if value != ours:
            kept += _differences(name, value, ours)
        values[name] = value
    if any(name == "optim.loss_scale" for name, *_ in changed):
        raise ValueError(
            f"optim.loss_scale={config.optim.loss_scale} is where a run begins; this one goes on with the scale that "
            "the checkpoint has come to. Leave it out"
        )
    ours_now, theirs = (list(of.get("optim.groups", [])) for of in (values, stored))
    if _divisions(ours_now) != _divisions(theirs):
        raise ValueError(
            f"optim.groups={_text(ours_now)} trains other parameters together than the checkpoint's "
            f"{_text(theirs)}, whose optimizer state belongs to these groups. A run that resumes may "
            "change their lr, lr_factor and weight_decay, but not pattern and frozen; weights=… in place of ckpt_path "
            "starts a new run from the checkpoint's weights"
        )
    adamw_now, adamw = (_section(of, "optim.optimizer").get("adamw") for of in (values, stored))
    if adamw_now != adamw:
        raise ValueError(
            f"optim.optimizer.adamw={_text(adamw_now)} gives other parameters to AdamW than the checkpoint's "
            f"{_text(adamw)}, whose state is of these. A run that resumes may not change it; weights=… in "
            "place of ckpt_path starts a new run from the checkpoint's weights"
        )
    said = []
    if changed:
        text = ", ".join(f"{name}={_text(new)} (so far {_text(old)})" for name, new, old in changed)
        said.append(f"Other than so far: {text}.")
    if kept:
        text = ", ".join(f"{name}={_text(new)} (not {_text(old)})" for name, new, old in kept)
        said.append(f"As in the checkpoint, since not named here: {text}.")
    return with_values(config, values), said


def _stored(meta: Mapping[str, Any], data: str) -> dict[str, Any]:
    """Returns the values in a checkpoint by dotted name; the class ``data`` names the data module's section."""
    hyper = _section(meta, "hyper_parameters")
    moe = _section(hyper, "moe")
    routers = {f"moe.{name}": _section(moe, name) for name in ("router", "balance")}
    if moe and "balance" not in moe:  # an older checkpoint, of a loss that counted first choices alone
        routers["moe.balance"] = {"choices": BalanceChoices.FIRST.value}
    sections = {
        **routers,
        "average": _section(meta, "average"),
        "moe": moe,
        "optim": _section(hyper, "optim"),
        "trainer": _section(meta, "trainer"),
    }
    stored = {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    if sections["optim"]:  # an older checkpoint has no groups
        stored["optim.groups"] = [typed(GroupConfig, group) for group in stored.get("optim.groups", [])]
    of_data = _section(meta, data)
    ramp = of_data.get("ramp", [] if "batch_size" in of_data else None)  # an older checkpoint has none
    others = {
        "seed": hyper.get("seed"),
        "data.batch_size": of_data.get("batch_size"),
        "data.ramp": None if ramp is None else [typed(RampConfig, stage) for stage in ramp],
    }
    return stored | {name: value for name, value in others.items() if value is not None}


def _divisions(groups: Sequence[GroupConfig]) -> list[tuple[str, bool]]:
    """Returns what decides which parameters are in which of the optimizer's groups."""
    return [(group.pattern, group.frozen) for group in groups]


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Returns a section; an empty one if it is missing or no mapping, as in a checkpoint not of this command."""
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}


def _options(ours: Mapping[str, Any], stored: Mapping[str, Any], named: Collection[str]) -> dict[str, Any]:
    """Returns the optimizer's stored options, except those that are named. A checkpoint cannot choose the class."""
    stored = stored if isinstance(stored, Mapping) else {}
    kind, theirs = ours.get("_target_"), stored.get("_target_")
    if kind != theirs:
        raise ValueError(
            f"optim.optimizer._target_ is {kind}, but the checkpoint has the state of {theirs}; "
            f"add optim.optimizer._target_={theirs}, or a preset optim=… of it"
        )
    names = {name for name in {*ours, *stored} if is_named(f"optim.optimizer.{name}", named)}
    return {
        **{n: value for n, value in stored.items() if n not in names and not n.startswith("_") and _is_plain(value)},
        **{name: value for name, value in ours.items() if name in names},
        "_target_": kind,
    }


def is_named(name: str, named: Collection[str]) -> bool:
    """Returns whether a value, or a section that holds it, is among those from :func:`named_values`."""
    return any(name == other or name.startswith(f"{other}.") for other in named)


def _is_plain(value: object) -> bool:
    """Returns whether a value consists of numbers, strings and lists only, from which Hydra makes no objects."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _differences(name: str, new: Any, old: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(new, Mapping) and isinstance(old, Mapping):
        keys = [key for key in {**old, **new} if new.get(key) != old.get(key)]
        return [(f"{name}.{key}", new.get(key), old.get(key)) for key in keys]
    return [(name, new, old)]


def _text(value: object) -> str:
    """Formats a value as on a command line."""
    if isinstance(value, list) and all(isinstance(entry, GroupConfig | RampConfig) for entry in value):
        given = [{name: v for name, v in asdict(entry).items() if v not in (None, False)} for entry in value]
        return "[" + ",".join("{" + ",".join(f"{n}:{_text(v)}" for n, v in g.items()) + "}" for g in given) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def _leaves(content: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _is_checkpoint(path: Path) -> bool:
    """Returns whether a path is a checkpoint or the remains of one, for which reading it gives a better error."""
    return any((path / name).is_file() for name in (META, ".metadata")) or (path.parent / f"{path.name}.old").is_dir()


def _near(path: Path) -> list[Path]:
    folder = next(place for place in (path, *path.absolute().parents) if place.is_dir())
    if folder == Path(folder.anchor):
        return []
    patterns = (f"{above}{META}" for above in ("*/", "checkpoints/*/", "*/checkpoints/*/", "*/*/checkpoints/*/"))
    return sorted({file.parent for pattern in patterns for file in folder.glob(pattern)})[:8]


def _same_wandb_run(config: TrainConfig) -> dict[str, Any]:
    """Returns loggers that continue the last W&B run in this run directory."""
    last = last_wandb_run(Path(config.output_dir))
    return {
        name: {**logger, "id": last} if last and is_wandb(logger) and not logger.get("id") else logger
        for name, logger in config.logger.items()
    }


def is_wandb(logger: Mapping[str, Any]) -> bool:
    """Tells whether the configuration of a logger is of one for W&B."""
    return str(logger.get("_target_", "")).endswith("WandbLogger")


def last_wandb_run(directory: Path) -> str | None:
    """Returns the id of the last W&B run in a run directory, in which the names of their folders end; None: none."""
    folders = sorted(Path(directory, "wandb").glob("*run-*"), key=lambda folder: folder.name.split("run-")[1])
    ids = [match[1] for folder in folders if (match := _WANDB_RUN.fullmatch(folder.name))]
    return ids[-1] if ids else None
