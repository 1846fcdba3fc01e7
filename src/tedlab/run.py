"""Runs one process of a training run: builds the parts from the configuration, fits and reports."""

import functools
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import hydra
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger

from tedlab._compat.lightning import has_started
from tedlab.callbacks import (
    AverageWeights,
    CommunicationLedger,
    FollowRamp,
    Journal,
    MemoryByCategory,
    NamedSets,
    Prune,
    RecordRouting,
    ReplayRouting,
    RouterHealth,
    RunProgress,
    StepCheckpoint,
    StepMetrics,
)
from tedlab.checkpoint import read_meta
from tedlab.config import Documents, Packing, TrainConfig
from tedlab.data import TextDataModule, data_module
from tedlab.data.ramp import Ramp
from tedlab.evaluation import results
from tedlab.history import read_history
from tedlab.launch.outcome import METRICS, SIGTERM, SUMMARY, Outcome, Signalled, signals_raised, write_unfinished
from tedlab.module import LanguageModel
from tedlab.nn import Reading
from tedlab.predict.cluster import load_cluster
from tedlab.predict.emulate import Emulation
from tedlab.predict.flops import training_flops
from tedlab.record import DIRECTORY, Shape, record_in
from tedlab.report import about, announce, note_branch, report, report_left_out, resolved_yaml, wandb_loggers
from tedlab.resume import find_checkpoint
from tedlab.strategy import TEDStrategy, gpus
from tedlab.tracking import WandbLogger
from tedlab.weights import load_into

_LONGEST_NAME = 128


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains as configured, given a configuration that :func:`tedlab.validate.complete` has completed.

    Returns:
        The run's summary in the first process, which is also in ``summary.json``; an empty dictionary in the others.
    """
    config = replace(config, logger=_with_tidy_names(config.logger))
    directory = Path(config.output_dir)
    ramp = Ramp.of(config.data, config.model.sequence_length)
    read = functools.partial(ramp.tokens, sample=config.model.sequence_length)
    metrics = StepMetrics(read, functools.partial(_flops, config, ramp))
    routers = RouterHealth(config.moe.routed(config.model.layers), directory, config.router_picture_every)
    memory = MemoryByCategory()
    comm = config.comm
    emulated = None
    if comm.emulate is not None:
        emulated = functools.partial(
            Emulation,
            load_cluster(comm.emulate),
            dilation=comm.emulate_dilation,
            ranks_per_node=comm.emulate_ranks_per_node,
        )
    ledger = CommunicationLedger(config, emulated)
    journal = Journal(read)
    facts = LambdaCallback(on_train_start=lambda trainer, _: _announce(config, trainer, module))
    callbacks = [metrics, routers, *_routing(config, directory), memory, ledger, journal, facts, RunProgress()]
    callbacks += _first_weights(config)
    if config.eval.sets:
        sizes = config.data.micro_batch_size, config.model.sequence_length
        callbacks.append(NamedSets(config.eval, config.data.field, *sizes))
    trainer, module, data = build(config, callbacks)
    with _ending(config, trainer, module):
        if trainer.is_global_zero:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / SUMMARY).unlink(missing_ok=True)  # from an earlier run here
            until = None if config.ckpt_path is None else read_meta(Path(config.ckpt_path))["global_step"]
            _keep_earlier_metrics(trainer, directory, until)
            note_branch(config, until)
            (directory / "config.yaml").write_text(resolved_yaml(config))
            if isinstance(data, TextDataModule):
                data.tokenizer.save(directory)
                report_left_out(data.corpora, directory)
        _announce(config, trainer)
        trainer.fit(module, data, ckpt_path=config.ckpt_path)
        last = directory / "checkpoints" / "last.ckpt"
        _save_last(trainer, last)
        for logger in wandb_loggers(trainer):
            if isinstance(logger, WandbLogger):
                logger.refer_to(last)
        if trainer.global_step % config.validate_every:
            trainer.validate(module, data, verbose=False)
        validation = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        measured = {**metrics.overall(), **routers.overall(), **memory.overall(trainer), **validation}
        measured |= ledger.overall(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Prune):
                measured |= callback.outcome()
        summary = report(config, trainer, module, data, measured, [ledger.table(trainer)])
    dist.destroy_process_group()
    return summary


def _flops(config: TrainConfig, ramp: Ramp, first: int, last: int) -> int:
    """Returns the model FLOPs of the steps from ``first`` up to, without, ``last``."""
    model = config.model
    return sum(
        steps
        * stage.batch_size
        * model.sequence_length
        * training_flops(replace(model, sequence_length=stage.sequence_length), config.moe, config.optim.groups)
        for stage, steps in ramp.between(first, last)
    )


def _first_weights(config: TrainConfig) -> list[Callback]:
    """Returns what loads ``weights`` into a run that begins; one that goes on has its own by now."""
    if config.weights is None or config.ckpt_path is not None:
        return []
    path = find_checkpoint(Path(config.weights), "weights")
    return [LambdaCallback(on_fit_start=lambda _, module: load_into(module, path))]


def _routing(config: TrainConfig, directory: Path) -> list[Callback]:
    found: list[Callback] = []
    if config.routing.record:
        found.append(RecordRouting(directory / DIRECTORY, Shape.of(config)))
    if config.routing.replay is not None:
        found.append(ReplayRouting(record_in(Path(config.routing.replay))))
    return found


def _save_last(trainer: Trainer, last: Path) -> None:
    """Saves the end of a run unless ``last`` already holds it. All processes must call this.

    The first process decides for all: others may still see an older ``last`` on a shared file system, and saving needs
    every process.
    """
    behind = trainer.is_global_zero and (not last.exists() or read_meta(last)["global_step"] < trainer.global_step)
    if trainer.strategy.broadcast(behind):
        trainer.save_checkpoint(last)


@contextmanager
def _ending(config: TrainConfig, trainer: Trainer, module: LanguageModel) -> Iterator[None]:
    """Makes the first process record in ``summary.json`` and W&B how the run ended, however it ends."""
    if not trainer.is_global_zero:
        yield
        return

    outcomes: list[Outcome] = []

    def unfinished(outcome: Outcome) -> dict[str, Any]:
        outcomes.append(outcome)  # the first one is why: a signal can surface as the failure of what it interrupted
        known = {"steps": trainer.global_step, **(about(config, module) if hasattr(module, "network") else {})}
        return write_unfinished(Path(config.output_dir), outcomes[0], known)

    with signals_raised(unfinished) as arrived:
        try:
            yield
        except BaseException as error:
            arrived()
            left = unfinished(Outcome.of(error))
            _tell(wandb_loggers(trainer), left)
            if left["reason"] == SIGTERM and not isinstance(error, Signalled):
                raise Signalled(signal.SIGTERM) from None  # others were ended as well, and this one saw that first
            raise
    for logger in wandb_loggers(trainer):
        logger.experiment.finish()


def _tell(loggers: Iterable[Any], left: Mapping[str, Any]) -> None:
    """Tells W&B how a run ended that did not finish."""
    try:
        for logger in loggers:
            if not has_started(logger):  # W&B itself failed to start
                continue
            logger.experiment.summary.update(left)
            if left["reason"] == SIGTERM and "WANDB_SWEEP_ID" not in os.environ:
                # A scheduler takes the machine away. In a sweep it may be W&B's agent that ends a bad run, which would
                # start again what was preempted.
                logger.experiment.mark_preempting()
            logger.experiment.finish(exit_code=1)
    except Exception as error:
        # SLURM ends all processes of a step at once, W&B's service as well; what then fails is not why this run ended.
        why = f"{error}".strip().partition("\n")[0] or type(error).__name__
        print(f"W&B was not told how this run ended: {why}", file=sys.stderr)
        import wandb  # not above: it takes each process most of a second, and many runs do without

        with suppress(Exception):
            wandb.teardown()  # or W&B tries when Python exits, and prints how that failed


def _announce(config: TrainConfig, trainer: Trainer, module: LanguageModel | None = None) -> None:
    if trainer.is_global_zero:
        for logger in trainer.loggers[1:]:  # the first is metrics.csv
            announce(config, logger, module)


def build(
    config: TrainConfig, callbacks: list[Callback], logged: bool = True
) -> tuple[Trainer, LanguageModel, LightningDataModule]:
    """Builds the parts of a run in one of its processes; checkpoints go to ``output_dir/checkpoints``."""
    quieten()
    seed_everything(config.seed, verbose=False)
    directory = Path(config.output_dir)
    data = data_module(config.data, config.model.sequence_length, config.seed)
    data.prepare_data()
    module = language_model(config, getattr(data, "bytes_per_token", 1.0), getattr(data, "separator", 0))
    devices = None if config.trainer["accelerator"] == "cpu" else gpus(config.trainer["devices"])
    settings = dict(config.trainer)
    if devices is not None:
        settings["devices"] = len(set(devices))  # Lightning does not know GPUs that several processes share
    if settings.get("enable_progress_bar") is False:
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    if config.average.kind is not None:
        callbacks = [AverageWeights(config.average), *callbacks]  # first: others see a step's average
    if config.data.ramp:
        ramp = Ramp.of(config.data, config.model.sequence_length)
        callbacks = [*callbacks, FollowRamp(ramp, config.data.micro_batch_size, config.validate_every)]
    callbacks += [hydra.utils.instantiate(further) for further in config.callbacks.values()]
    trainer = Trainer(
        **settings,
        strategy=strategy_of(config, parallel_devices=devices),
        val_check_interval=config.validate_every * config.trainer["accumulate_grad_batches"],
        check_val_every_n_epoch=None,
        callbacks=[*callbacks, _checkpoints(config, directory)],
        logger=_loggers(config, directory) if logged else False,
        default_root_dir=directory,
    )
    return trainer, module, data


def language_model(config: TrainConfig, bytes_per_token: float = 1.0, separator: int = 0) -> LanguageModel:
    """Returns the module of a configuration, for data of whose documents each ends with the separator."""
    data = config.data
    reading = Reading(separator, data.documents == Documents.MASKED, data.packing == Packing.BEST_FIT)
    return LanguageModel(config.model, config.moe, config.optim, config.seed, bytes_per_token, reading)


def strategy_of(config: TrainConfig, kind: Callable[..., TEDStrategy] = TEDStrategy, **others: Any) -> TEDStrategy:
    """Returns the strategy of a configuration.

    Args:
        config: A complete configuration.
        kind: TEDStrategy, or a callable that takes the same arguments.
        others: Arguments that replace those of the configuration or are added to them.
    """
    arguments: dict[str, Any] = {
        "comm": config.comm,
        "sharding": config.optim,
        "checkpoints": config.checkpoint,
        "sequence_parallel": config.parallel.sequence,
        "expert_tensor_parallel_size": config.parallel.expert_tensor,
        "order": config.parallel.order,
        "loss_scale": config.optim.loss_scale,
        "stop_on_nonfinite": config.optim.stop_on_nonfinite,
        "process_group_backend": config.comm.backend,
        "timeout": timedelta(seconds=config.comm.timeout_s),
        "check_replicas_every": config.check_replicas_every,
    }
    return kind(config.parallel.tensor, config.parallel.expert, **(arguments | others))


def _checkpoints(config: TrainConfig, directory: Path) -> ModelCheckpoint:
    settings = config.checkpoint
    common: dict[str, Any] = {
        "dirpath": directory / "checkpoints",
        "filename": "step_{step}",
        "auto_insert_metric_name": False,
        "save_top_k": settings.keep,
        "save_last": "link",
        "enable_version_counter": False,  # else a second run in this directory adds last-v1.ckpt beside last.ckpt
    }
    if settings.monitor is None:
        return StepCheckpoint(settings.every or config.trainer["max_steps"], **common)
    # Lightning counts validations, which it calls epochs.
    return ModelCheckpoint(**common, monitor=settings.monitor, every_n_epochs=1, save_on_train_epoch_end=False)


def _loggers(config: TrainConfig, directory: Path) -> list[Logger]:
    loggers = [hydra.utils.instantiate(settings) for settings in config.logger.values()]
    return [CSVLogger(directory, name="", version="", flush_logs_every_n_steps=1), *loggers]


def _with_tidy_names(loggers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Strips names, which may be composed of empty parts, and cuts them to the 128 characters that W&B accepts."""
    tidy = {}
    for key, settings in loggers.items():
        name = settings.get("name")
        if isinstance(name, str):
            name = name.strip()
            settings = {**settings, "name": name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"}
        tidy[key] = settings
    return tidy


def _keep_earlier_metrics(trainer: Trainer, directory: Path, until: int | None) -> None:
    """Keeps what belongs to a run that resumes in its own directory: rows of metrics.csv, and evaluations.

    Lightning starts that file anew. The old one remains until all rows are in the new one, since a run may be killed
    here as anywhere.

    Args:
        trainer: The trainer, whose first logger writes metrics.csv.
        directory: The run directory.
        until: The last step that is kept; None for a new run, which keeps nothing of an earlier one.
    """
    results.forget(directory, until)
    metrics, earlier = directory / METRICS, directory / f"{METRICS}.earlier"
    if until is None:
        earlier.unlink(missing_ok=True)  # otherwise the next run to resume here would use it
        return
    if not earlier.exists():  # if it exists, a run was killed here before the new file had all rows
        if not metrics.exists():
            return
        metrics.rename(earlier)
    for row in read_history(earlier):
        step = int(row.pop("step"))
        if step <= until:
            values = {name: int(value) if value.isdigit() else float(value) for name, value in row.items()}
            trainer.loggers[0].log_metrics(values, step)
    earlier.unlink()


def quieten() -> None:
    """Silences advice and deprecation warnings from our dependencies that a user cannot act on."""
    os.environ.setdefault("WANDB_SILENT", "true")
    for message in (
        ".*does not have many workers.*",  # samples come from a memory map, so workers would only use up cores
        ".*exists and is not empty. Previous log files.*",  # Hydra has created the run directory and writes there, too
        ".*The dirpath has changed from.*",  # a resumed run has its own directory, and nothing is lost
        ".*defined a .validation_step. but have no .val_dataloader.*",  # a simulation does not validate
        ".*isinstance.treespec, LeafSpec.. is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
