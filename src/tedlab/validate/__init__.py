"""Checks a whole configuration before any process is launched, and completes a copy of it by what follows.

Types and names are Hydra's concern, and each number's range is declared at its field; here it is what the fields must
satisfy together and what they need from outside: files, devices, a checkpoint. One module for each part of the
configuration. Every complaint says what is wrong, the values, and what would be valid.
"""

from pathlib import Path

from tedlab.config import TrainConfig, with_values
from tedlab.data import data_module
from tedlab.degrees import ParallelDegrees, parallel_degrees
from tedlab.errors import UsageError
from tedlab.predict.cluster import ClusterConfig
from tedlab.ranges import check_ranges
from tedlab.validate.batches import accumulation
from tedlab.validate.checkpoint import check_checkpoint
from tedlab.validate.comm import check_comm
from tedlab.validate.complete import filled_in
from tedlab.validate.experts import check_experts
from tedlab.validate.loggers import check_callbacks, check_loggers
from tedlab.validate.model import check_model, vocabulary
from tedlab.validate.optim import check_optim
from tedlab.validate.processes import check_processes
from tedlab.validate.settings import (
    OBJECTIVES,
    VALIDATION_METRICS,
    check_settings,
    check_writable,
)
from tedlab.validate.trainer import check_trainer

__all__ = ["OBJECTIVES", "check", "check_simulated", "complete", "complete_simulated", "notes"]

_GPT2_TOKENS = 50_257


def check(config: TrainConfig, most_processes: int | None = None) -> ParallelDegrees:
    """Validates a configuration, which stays as it is.

    The corpus is tokenised into the cache if it is not there yet.

    Args:
        config: as composed.
        most_processes: allowed on this machine's CPU; None: as many as make sense for training.

    Returns:
        The parallel degrees.

    Raises:
        UsageError: with a message of less than a screen.
    """
    return _checked(config, most_processes)[0]


def complete(config: TrainConfig, most_processes: int | None = None) -> TrainConfig:
    """A copy in which every value that follows from others is filled in, once all has been checked.

    Filled in: ``model.vocab_size`` from the tokenizer, ``trainer.accumulate_grad_batches`` from the batch sizes,
    ``moe.capacity_groups`` where sequences are sharded, ``comm.ledger.time`` where a network is emulated, and
    ``comm.cac=auto`` by what it chooses.

    Args and exceptions: as of :func:`check`.
    """
    return filled_in(config, *_checked(config, most_processes))


def check_simulated(config: TrainConfig) -> ParallelDegrees:
    """:func:`check` of what depends neither on this machine nor on data.

    Raises:
        UsageError: as there.
    """
    return _checked_alone(config)[0]


def complete_simulated(config: TrainConfig, cluster: ClusterConfig | None = None) -> TrainConfig:
    """:func:`complete` for a job that need not fit this machine.

    Without a tokenizer, ``model.vocab_size=null`` is that of GPT-2's, rounded up: 50,304.

    Args:
        config: as composed.
        cluster: what ``comm.cac=auto`` reckons with; None: ``comm.cac_cluster``.

    Raises:
        UsageError: as of :func:`check`.
    """
    return filled_in(config, *_checked_alone(config), cluster)


def _checked(config: TrainConfig, most_processes: int | None) -> tuple[ParallelDegrees, int]:
    """Degrees, and the number of the tokenizer's tokens."""
    try:
        degrees = _check_together(config)
        check_processes(config, most_processes)
        check_writable("output_dir", Path(config.output_dir))
        check_writable("data.cache_dir", Path(config.data.cache_dir).expanduser())
        data = data_module(config.data, config.model.sequence_length, config.seed)
        tokens = data.corpus.tokenizer.vocab_size
        size = vocabulary(config, tokens)
        _ = data.validation_samples  # raises if there is not one batch of them
        if config.ckpt_path is not None:
            check_checkpoint(with_values(config, {"model.vocab_size": size}), Path(config.ckpt_path))
        return degrees, tokens
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None


def _checked_alone(config: TrainConfig) -> tuple[ParallelDegrees, int]:
    try:
        degrees, tokens = _check_together(config), config.model.vocab_size or _GPT2_TOKENS
        vocabulary(config, tokens)
        return degrees, tokens
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
    check_callbacks(config)
    accumulation(config, degrees)
    check_optim(config)
    return degrees


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
