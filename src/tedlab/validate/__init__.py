"""Checks a whole configuration before any process is launched, and fills in what follows from it.

Types and names are Hydra's concern, and each number's range is declared at its field; here it is what the fields must
satisfy together and what they need from outside: files, devices, a checkpoint. One module for each part of the
configuration. Every complaint says what is wrong, the values, and what would be valid.
"""

from pathlib import Path

from tedlab.cli import UsageError
from tedlab.config import TrainConfig
from tedlab.data import TextDataModule
from tedlab.degrees import ParallelDegrees, parallel_degrees
from tedlab.ranges import check_ranges
from tedlab.validate.batches import complete_batches
from tedlab.validate.checkpoint import check_checkpoint
from tedlab.validate.comm import check_comm, choose_what_to_keep
from tedlab.validate.experts import check_experts
from tedlab.validate.loggers import check_loggers
from tedlab.validate.model import check_model, complete_vocabulary
from tedlab.validate.optim import check_optim
from tedlab.validate.processes import check_processes
from tedlab.validate.settings import (
    CERTIFIED_PRECISIONS,
    OBJECTIVES,
    VALIDATION_METRICS,
    check_settings,
    check_writable,
)
from tedlab.validate.trainer import check_trainer

__all__ = ["CERTIFIED_PRECISIONS", "OBJECTIVES", "check", "check_simulated", "notes"]

_GPT2_TOKENS = 50_257


def check(config: TrainConfig, most_processes: int | None = None) -> ParallelDegrees:
    """Validates ``config`` and completes it in place.

    Completed: ``model.vocab_size`` from the tokenizer, ``trainer.accumulate_grad_batches`` from the batch sizes,
    ``comm.cac=auto`` by what it chooses, and
    the corpus itself, which is tokenised into the cache if it is not there yet.

    Args:
        config: as composed.
        most_processes: allowed on this machine's CPU; None: as many as make sense for training.

    Returns:
        The parallel degrees.

    Raises:
        UsageError: with a message of less than a screen.
    """
    try:
        degrees = _check_together(config)
        check_processes(config, most_processes)
        check_writable("output_dir", Path(config.output_dir))
        check_writable("data.cache_dir", Path(config.data.cache_dir).expanduser())
        data = TextDataModule(config.data, config.model.sequence_length, config.seed)
        _complete(config, degrees, data.corpus.tokenizer.vocab_size)
        _ = data.validation_samples  # raises if there is not one batch of them
        if config.ckpt_path is not None:
            check_checkpoint(config, Path(config.ckpt_path))
        return degrees
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None


def check_simulated(config: TrainConfig) -> ParallelDegrees:
    """:func:`check` of what depends neither on this machine nor on data, and completes ``config`` likewise.

    Without a tokenizer, ``model.vocab_size=null`` is that of GPT-2's, rounded up: 50,304.

    Raises:
        UsageError: as there.
    """
    try:
        degrees = _check_together(config)
        _complete(config, degrees, config.model.vocab_size or _GPT2_TOKENS)
        return degrees
    except ValueError as error:
        raise UsageError(str(error)) from None


def _check_together(config: TrainConfig) -> ParallelDegrees:
    """What holds wherever the job runs and on whatever data."""
    check_ranges(config)
    degrees = parallel_degrees(config.parallel)
    check_comm(config, degrees)
    check_model(config, degrees)
    check_experts(config, degrees)
    check_trainer(config)
    check_settings(config)
    check_loggers(config)
    complete_batches(config, degrees)
    check_optim(config)
    return degrees


def _complete(config: TrainConfig, degrees: ParallelDegrees, tokens: int) -> None:
    complete_vocabulary(config, tokens)
    choose_what_to_keep(config, degrees)


def notes(config: TrainConfig) -> list[str]:
    """What is not wrong, but has no effect."""
    found = []
    if config.parallel.tensor == 1:
        for name, on in (("comm.dtd", config.comm.dtd), ("parallel.sequence", config.parallel.sequence)):
            if on:
                found.append(f"{name}=true does nothing here: with parallel.tensor=1 there are no duplicates.")
    if config.trainer.get("limit_val_batches") == 0 and config.objective in VALIDATION_METRICS:
        found.append(f"Nothing is validated: the objective, {config.objective}, will be nan.")
    return found
