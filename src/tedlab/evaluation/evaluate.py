"""``tedlab eval``: loads a run's model in any layout, evaluates it on named sets, prints and keeps what it found."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tedlab.checkpoint import read_meta
from tedlab.compare.runs import EVALUATIONS
from tedlab.config import Documents, EvalConfig, EvalPrecision
from tedlab.console import output
from tedlab.errors import UsageError
from tedlab.evaluation import results
from tedlab.evaluation.names import check_names
from tedlab.evaluation.scoring import scores
from tedlab.evaluation.sets import SetResult, TextSet, read_set, result_of, said_of_files, windows_of
from tedlab.launch.outside import first_outside
from tedlab.models import GPT
from tedlab.opened import Opened, default_dtype, load, opened
from tedlab.progress import CommandProgress
from tedlab.ranges import check_ranges
from tedlab.resume import find_checkpoint, is_wandb, last_wandb_run
from tedlab.tables import FittingTable
from tedlab.tracking import add_to_run
from tedlab.untrusted import read_yaml
from tedlab.validate.settings import check_writable

_DTYPES = {
    EvalPrecision.SINGLE: torch.float32,
    EvalPrecision.DOUBLE: torch.float64,
    EvalPrecision.BF16: torch.bfloat16,
}


class Given(NamedTuple):
    """What there is to evaluate.

    Attributes:
        model: The run's model and tokenizer.
        masked: Whether it was trained with documents that do not see each other.
        step: How many steps it was trained.
        folder: Where results go.
        sets: The texts.
        context, stride: See :class:`tedlab.config.EvalConfig`.
        directory: The run's.
        logger: Where the run was logged at W&B, with its ``id``, if results go there, too.
        tasks: The result of :func:`tedlab.evaluation.harness.load_tasks`; None: there are none.
    """

    model: Opened
    masked: bool
    step: int
    folder: Path
    sets: Sequence[TextSet]
    context: int
    stride: int
    directory: Path
    logger: Mapping[str, Any] | None
    tasks: Any


def given(config: EvalConfig) -> Given:
    """Reads what a configuration names, and checks all that can be checked before processes are launched.

    Raises:
        FileNotFoundError: If the run, or a set's path, does not exist.
        ValueError: If a number is out of range, a layout does not fit the model, a set has no text, results cannot be
            written, or a file of the run is damaged; the message says which.
    """
    check_ranges(config)
    if not config.data and not config.tasks:
        raise ValueError("there is nothing to evaluate on: give texts with data.NAME=PATH, or tasks=[NAME]")
    check_names(config.data, "data")
    path = find_checkpoint(Path(config.run), "run").absolute()
    directory = path.parents[1]
    if path.parent.name != "checkpoints" or not (directory / "config.yaml").is_file():
        raise FileNotFoundError(
            f"{path} is in no run directory, which has checkpoints/ and config.yaml: its tokenizer is not known"
        )
    model = opened(path, directory, config)
    room = model.model.sequence_length
    context = config.context or room
    stride = config.stride or context
    if context > room:
        raise ValueError(f"context={context} is more than the {room} tokens that the model reads at a time")
    if stride > context:
        raise ValueError(f"stride={stride} is more than context={context}: tokens in between would not be predicted")
    folder = Path(config.out) if config.out is not None else directory / results.DIRECTORY
    check_writable("out", folder)
    stored = _stored(directory)
    logger = _logged_to(directory, stored) if config.wandb else None
    sets = [read_set(name, path, config.field, model.tokenizer) for name, path in config.data.items()]
    tasks = None
    if config.tasks:
        from tedlab.evaluation.harness import load_tasks, rehearse

        tasks = load_tasks(config.tasks, config.include, config.tasks_execute_code)
        both = sorted({*config.data} & {*tasks.names})
        if both:
            raise ValueError(f"{both[0]} is both a set of data and a task: call the set otherwise")
        rehearse(model.tokenizer, context, tasks, config.fewshot, config.limit)
    step = read_meta(path).get("global_step", 0)
    masked = (stored.get("data") or {}).get("documents") == Documents.MASKED
    return Given(model, masked, step, folder, sets, context, stride, directory, logger, tasks)


def _stored(directory: Path) -> dict[str, Any]:
    """Returns the run's configuration, of which parts that are used may come from others."""
    try:
        stored: dict[str, Any] = read_yaml(directory / "config.yaml")
    except ValueError as error:
        raise ValueError(f"{directory / 'config.yaml'} cannot be read: {error}") from None
    for name in ("data", "logger"):
        if not isinstance(stored.get(name) or {}, dict):
            raise ValueError(f"{directory / 'config.yaml'} is damaged: {name} is no mapping")
    return stored


def _logged_to(directory: Path, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration of the run's logger at W&B, with the id of its run there."""
    loggers = [settings for settings in (stored.get("logger") or {}).values() if isinstance(settings, dict)]
    logger = next(filter(is_wandb, loggers), None)
    if logger is None:
        raise ValueError(f"wandb=true, but {directory} was not logged to W&B: its config.yaml has no such logger")
    run_id = logger.get("id") or last_wandb_run(directory)
    if run_id is None:
        raise ValueError(
            f"wandb=true, but which run at W&B is {directory}'s is not known: its config.yaml has no id of it, and its "
            "wandb/ no run. Without wandb=true, results are saved here alone"
        )
    return {**logger, "id": run_id}


def evaluate(config: EvalConfig) -> dict[str, float]:
    """Evaluates in every process of the layout; the first one prints tables and writes files.

    Returns:
        What was found, by the names of metrics; of tasks in the first process of a machine alone.

    Raises:
        FileNotFoundError, ValueError: See :func:`given`.
        UsageError: If W&B does not take the results, which are printed and saved by then.
    """
    found = given(config)
    tokenizer = found.model.tokenizer
    by_task: dict[str, Any] = {}
    with default_dtype(_DTYPES[EvalPrecision(config.precision)]):
        model = load(found.model)
        model.separator = tokenizer.separator if found.masked else None
        by_set = evaluate_sets(model, found, config)
        if found.tasks is not None:
            from tedlab.evaluation.harness import LentModel, run_tasks

            model.separator = None  # a task's texts are whole, and begin with a separator if with nothing else
            lent = LentModel(model, tokenizer, config.batch_size, found.context)
            by_task = run_tasks(lent, found.tasks, config.fewshot, config.limit)
    results_by_name = {**by_set, **by_task}
    metrics = {key: value for name, each in results_by_name.items() for key, value in each.metrics(name).items()}
    if first_outside():
        settings = _keep(found, config, by_set, by_task)
        _print(found, by_set, by_task)
        ignored = [name for name, task in by_task.items() if task.fewshot not in (None, config.fewshot)]
        if config.fewshot is not None and ignored:
            print(f"fewshot={config.fewshot} does not apply to {', '.join(ignored)}, which say how many they have")
        if by_task and lent.shortened:
            print(f"{lent.shortened} contexts lost their beginnings: the model reads {found.context} tokens at a time")
        if found.logger is not None:
            add_to_run(found.directory, found.logger, {**metrics, EVALUATIONS: settings})
    return metrics


def in_layout(config: EvalConfig) -> dict[str, float]:
    """Evaluates in one of several processes; what a file or value is not as it should be is an error for users.

    Raises:
        UsageError: What :func:`evaluate` raises.
    """
    try:
        return evaluate(config)
    except (OSError, ValueError) as error:
        raise UsageError(f"{error}") from error


def evaluate_sets(model: GPT, found: Given, config: EvalConfig) -> dict[str, SetResult]:
    """Returns the result of each set, the same in every process."""
    separator, known = found.model.tokenizer.separator, found.model.tokenizer.vocab_size
    by_set = {}
    with CommandProgress(disable=not first_outside()) as bar:
        for texts in found.sets:
            windows = windows_of(texts, separator, config.documents, found.context, found.stride)
            task = bar.add_task(texts.name, total=len(windows))
            done = scores(
                *(model, windows, config.batch_size),
                known=known,
                advance=lambda count, task=task: bar.update(task, advance=count),  # type: ignore[misc]
            )
            by_set[texts.name] = result_of(texts, done)
    return by_set


def _keep(
    found: Given, config: EvalConfig, by_set: Mapping[str, SetResult], by_task: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Writes results, and returns by name what each depends on."""
    whose = {"checkpoint": str(found.model.path), "layout": found.model.degrees.described()}
    common = {"step": found.step, "context": found.context, "precision": config.precision}
    texts = {each.name: each.digest for each in found.sets}
    settings: dict[str, dict[str, Any]] = {}
    for name, result in by_set.items():
        settings[name] = {"text": texts[name], "documents": config.documents, "stride": found.stride, **common}
        entry = {"path": config.data[name], **asdict(result)}
        results.write(found.folder, found.step, name, result.metrics(name), settings[name], {**entry, **whose})
    for name, task in by_task.items():
        settings[name] = {"fewshot": task.fewshot, "limit": config.limit, "version": task.version, **common}
        entry = {"documents": task.documents}
        results.write(found.folder, found.step, name, task.metrics(name), settings[name], {**entry, **whose})
    return settings


def _print(found: Given, by_set: Mapping[str, SetResult], by_task: Mapping[str, Any]) -> None:
    for said in filter(None, map(said_of_files, found.sets)):
        print(said, file=sys.stderr)
    where = f"{found.model.path.parents[1].name}/{found.model.path.name}"
    console = output()
    console.print(f"{where}, step {found.step}, {found.model.degrees}", soft_wrap=True)
    if by_set:
        table = _table("set", "documents", "tokens", "nats/token", "perplexity", "bits/byte")
        for name, result in by_set.items():
            numbers = f"{result.loss:.4f}", f"{result.perplexity:,.4g}", f"{result.bits_per_byte:.4f}"
            table.add_row(name, f"{result.documents:,}", f"{result.tokens:,}", *numbers)
        console.print(table)
    if by_task:
        table = _table("task", "documents", "examples", "metric", "value", "± standard error")
        for name, task in by_task.items():
            for metric, value in task.values.items():
                if not metric.endswith("_stderr"):
                    error = task.values.get(f"{metric}_stderr")
                    around = "" if error is None else f"{error:.4f}"
                    examples = "" if task.fewshot is None else f"{task.fewshot}"
                    table.add_row(name, f"{task.documents:,}", examples, metric, f"{value:.4f}", around)
        console.print(table)
    console.print(f"saved in {found.folder}", soft_wrap=True)


def _table(first: str, *others: str) -> FittingTable:
    table = FittingTable()
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table
