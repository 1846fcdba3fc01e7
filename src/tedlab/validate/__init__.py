"""Checks a whole configuration before any process is launched, and completes a copy with the values that follow.

Hydra checks types and names, and each field declares the range of its number. This package checks what fields must
satisfy together and what they need from outside: files, devices, a checkpoint. It has one module for each part of the
configuration. Every error says what is wrong, the values, and what would be valid.
"""

from pathlib import Path

from tedlab.checkpoint import read_meta
from tedlab.config import Compiler, Documents, Order, Packing, TrainConfig, with_values
from tedlab.data import TextDataModule, data_class, data_module, keeps_position
from tedlab.data.mixture import check_sources
from tedlab.degrees import ParallelDegrees, parallel_degrees
from tedlab.errors import UsageError
from tedlab.predict.cluster import ClusterConfig
from tedlab.ranges import check_ranges
from tedlab.validate.attention import attention_notes
from tedlab.validate.batches import accumulation
from tedlab.validate.checkpoint import check_checkpoint
from tedlab.validate.comm import check_comm, check_interleaving, node_notes
from tedlab.validate.defaults import filled_in
from tedlab.validate.evaluation import check_evaluation, check_sets
from tedlab.validate.experts import check_experts, router_notes
from tedlab.validate.lending import check_lending
from tedlab.validate.loggers import check_callbacks, check_loggers
from tedlab.validate.model import check_model, vocabulary
from tedlab.validate.optim import check_optim
from tedlab.validate.parametrization import parametrization_notes
from tedlab.validate.processes import check_processes
from tedlab.validate.ramp import check_ramp
from tedlab.validate.routing import check_replay, check_routing
from tedlab.validate.settings import (
    OBJECTIVES,
    check_settings,
    check_writable,
    validation_metrics,
)
from tedlab.validate.shortcut import check_shortcut
from tedlab.validate.trainer import check_trainer

__all__ = ["OBJECTIVES", "check", "check_simulated", "complete", "complete_simulated", "notes"]

_GPT2_TOKENS = 50_257


def check(config: TrainConfig, most_processes: int | None = None) -> ParallelDegrees:
    """Validates a configuration without changing it, and tokenises the corpus into the cache if it is not there yet.

    Args:
        config: The configuration as composed.
        most_processes: The most processes allowed on this machine's CPU; None: as many as make sense for training.

    Returns:
        The parallel degrees.

    Raises:
        UsageError: If the configuration is invalid; the message is shorter than a screen.
    """
    return _checked(config, most_processes)[0]


def complete(config: TrainConfig, most_processes: int | None = None) -> TrainConfig:
    """Checks a configuration and returns a copy in which every value that follows from others is filled in.

    These are ``model.vocab_size`` from the tokenizer, ``trainer.accumulate_grad_batches`` from the batch sizes,
    ``moe.capacity_groups`` if sequences are sharded, ``comm.ledger.time`` if a network is emulated,
    ``comm.ranks_per_node`` if it matters, the numbers that replace ``moe.lend.minimum=auto``, and the choice that
    replaces ``comm.cac=auto``. Arguments and exceptions are those of :func:`check`.
    """
    return filled_in(config, *_checked(config, most_processes))


def check_simulated(config: TrainConfig) -> ParallelDegrees:
    """Checks what depends neither on this machine nor on data.

    Raises:
        UsageError: As for :func:`check`.
    """
    return _checked_alone(config)[0]


def complete_simulated(config: TrainConfig, cluster: ClusterConfig | None = None) -> TrainConfig:
    """Completes a configuration like :func:`complete`, for a job that need not fit this machine.

    There is no tokenizer, so ``model.vocab_size=null`` becomes that of GPT-2's, rounded up: 50,304.

    Args:
        config: The configuration as composed.
        cluster: The cluster whose links ``comm.cac=auto`` and ``moe.lend.minimum=auto`` assume; None:
            ``comm.cac_cluster`` and ``moe.lend.cluster``.

    Raises:
        UsageError: As for :func:`check`.
    """
    checked = _checked_alone(config)
    try:
        return filled_in(config, *checked, cluster)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _checked(config: TrainConfig, most_processes: int | None) -> tuple[ParallelDegrees, int]:
    """Checks everything, and returns the degrees and the tokenizer's vocabulary size."""
    try:
        degrees = _check_together(config)
        check_processes(config, most_processes)
        check_writable("output_dir", Path(config.output_dir))
        check_writable("data.cache_dir", Path(config.data.cache_dir).expanduser())
        data = data_module(config.data, config.model.sequence_length, config.seed)
        tokens = getattr(data, "vocab_size", config.model.vocab_size)
        if tokens is None:
            raise ValueError(f"data.module={config.data.module} has no vocab_size; give it one, or model.vocab_size=…")
        several = config.data.documents == Documents.MASKED or config.data.packing == Packing.BEST_FIT
        if several and not hasattr(data, "separator"):
            raise ValueError(
                f"data.documents={config.data.documents} and data.packing={config.data.packing} need the token that "
                f"ends a document, but data.module={config.data.module} has no separator; give it one, or use packed "
                "and concatenate"
            )
        check_sets(config, data)
        size = vocabulary(config, tokens)
        if isinstance(data, TextDataModule):
            _ = data.validation_samples  # raises if they do not fill one batch
        meta = {} if config.ckpt_path is None else read_meta(Path(config.ckpt_path))
        taken = int(meta.get("global_step") or 0)
        if isinstance(data, TextDataModule):
            state = meta.get(type(data).__name__)
            if isinstance(state, dict) and config.ckpt_path is not None:
                data.refuse_other_tokenizer(state, Path(config.ckpt_path))
            if config.data.sources:
                data.mixture(state, taken, int(config.trainer.get("max_steps") or -1))  # or raises
        check_replay(config, taken)
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
    """Checks what must hold on any machine and with any data."""
    check_ranges(config)
    degrees = parallel_degrees(config.parallel)
    check_shortcut(config)
    check_comm(config, degrees)
    check_model(config, degrees)
    check_experts(config, degrees)
    check_lending(config)
    check_documents(config)
    check_sources(config.data)
    check_routing(config)
    check_trainer(config)
    check_settings(config)
    check_evaluation(config)
    check_loggers(config)
    check_callbacks(config)
    check_interleaving(config, accumulation(config, degrees))
    check_ramp(config, degrees)
    check_optim(config)
    return degrees


def check_documents(config: TrainConfig) -> None:
    """Checks what masks of documents cannot be combined with.

    Raises:
        ValueError: If they are asked for in compiled blocks.
    """
    if config.data.documents == Documents.MASKED and config.model.compile != Compiler.NONE:
        raise ValueError(
            f"data.documents=masked makes masks for each batch, which compiled blocks (model.compile="
            f"{config.model.compile}) cannot take; use model.compile=none, or data.documents=packed"
        )


def notes(config: TrainConfig) -> list[str]:
    """Returns notes on settings that are not wrong but have no effect, or one that is easily overlooked."""
    found = []
    if config.parallel.tensor == 1:
        for name, on in (("comm.dtd", config.comm.dtd), ("parallel.sequence", config.parallel.sequence)):
            if on:
                found.append(f"{name}=true does nothing here: with parallel.tensor=1 there are no duplicates.")
        if config.moe.num_experts and config.moe.sliced:
            found.append("moe.slice=tokens does nothing here: with parallel.tensor=1 each process has its own tokens.")
    if config.moe.num_experts:
        found += _folding_notes(config) + _overlap_notes(config)
    found += node_notes(config, parallel_degrees(config.parallel))
    found += router_notes(config.moe)
    found += attention_notes(config)
    found += parametrization_notes(config)
    if not keeps_position(data_class(config.data)):
        found.append(
            f"data.module={config.data.module} has no state_dict and load_state_dict of its own: a run that is resumed "
            "reads its data from the beginning."
        )
    if config.trainer.get("limit_val_batches") == 0 and config.objective in validation_metrics(config):
        found.append(f"Nothing is validated: the objective, {config.objective}, will be nan.")
    return found


def _overlap_notes(config: TrainConfig) -> list[str]:
    comm = config.comm
    toggles = {"comm.overlap_shared": comm.overlap_shared, "comm.overlap_shortcut": comm.overlap_shortcut}
    toggles |= {"comm.chunks": comm.chunks > 1, "comm.interleave": comm.interleave}
    if config.parallel.expert == 1:
        why = "does nothing here: all experts are in one process, so nothing is exchanged"
    elif config.compiles_experts:
        why = (
            f"hides nothing here: with model.compile={config.model.compile}, exchanges with experts are inside what is "
            "compiled, which waits for them at once"
        )
    else:
        return []
    return [f"{name} {why}." for name, on in toggles.items() if on]


def _folding_notes(config: TrainConfig) -> list[str]:
    degrees, found = parallel_degrees(config.parallel), []
    if degrees.folded and degrees.tensor > 1 and not (config.comm.dtd or degrees.sequence or config.moe.sliced):
        found.append(
            f"comm.dtd=false is like true here: parallel.expert_tensor={degrees.expert_tensor} differs from "
            f"parallel.tensor={degrees.tensor}, and such a layout always deals tokens."
        )
    if degrees.order == Order.EXPERT_DATA and 1 in (degrees.expert, degrees.expert_data):
        found.append(
            f"parallel.order=expert_data does nothing here: there is one expert group or one replica of each expert "
            f"(expert {degrees.expert} × expert_data {degrees.expert_data})."
        )
    return found
