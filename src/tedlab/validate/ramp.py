"""Checks the stages of a run (``data.ramp``)."""

import itertools

from tedlab.config import BalanceScope, Compiler, TrainConfig, with_values
from tedlab.data import TextDataModule, data_class
from tedlab.degrees import ParallelDegrees
from tedlab.ranges import check_ranges
from tedlab.validate.batches import accumulation
from tedlab.validate.comm import check_comm, check_interleaving
from tedlab.validate.experts import check_experts


def check_ramp(config: TrainConfig, degrees: ParallelDegrees) -> None:
    """Checks every stage as if the whole run were like it, and what stages cannot be combined with.

    Raises:
        ValueError: If a stage cannot work; the message names it.
    """
    ramp, length = config.data.ramp, config.model.sequence_length
    if not ramp:
        return
    ends = [stage.until for stage in ramp]
    if any(later <= earlier for earlier, later in itertools.pairwise(ends)):
        raise ValueError(f"data.ramp has stages until steps {ends}; each must end later than the one before")
    micro_batches = {accumulation(config, degrees)}
    for number, stage in enumerate(ramp):
        check_ranges(stage, f"data.ramp[{number}].")
        where = f"data.ramp[{number}] (until {stage.until})"
        if stage.batch_size is None and stage.sequence_length is None:
            raise ValueError(f"{where} has neither batch_size nor sequence_length, so it changes nothing")
        rows = stage.sequence_length or length
        if length % rows:
            divisors = ", ".join(str(n) for n in range(1, length) if length % n == 0)
            raise ValueError(
                f"{where} has sequence_length={rows}, which does not divide model.sequence_length={length}, the length "
                f"of a sample; valid: {divisors}"
            )
        sizes = {"data.batch_size": stage.batch_size or config.data.batch_size, "model.sequence_length": rows}
        rest = {"trainer": {**config.trainer, "accumulate_grad_batches": None}}
        staged = with_values(config, {**sizes, **rest})
        try:
            micro_batches.add(accumulation(staged, degrees))
            check_interleaving(staged, accumulation(staged, degrees))
            check_comm(staged, degrees)
            check_experts(staged, degrees)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    by_batch = any(stage.batch_size is not None for stage in ramp)
    if by_batch and not issubclass(data_class(config.data), TextDataModule):
        raise ValueError(
            f"data.ramp changes batch_size, of which data.module={config.data.module} knows nothing; derive it from "
            "tedlab.data.TextDataModule, or change sequence_length alone"
        )
    if config.model.compile != Compiler.NONE and any(stage.sequence_length is not None for stage in ramp):
        raise ValueError(
            f"data.ramp changes sequence_length, and model.compile={config.model.compile} compiles blocks for one "
            "length; use model.compile=none, or change batch_size alone"
        )
    if config.routing.record or config.routing.replay is not None:
        raise ValueError("a record of routing has steps of equally many tokens; leave out routing, or data.ramp")
    over_all = config.moe.balance.scope == BalanceScope.GLOBAL_BATCH and config.moe.num_experts > 0
    if over_all and config.moe.ragged and 1 in micro_batches and len(micro_batches) > 1:
        raise ValueError(
            "moe.balance.scope=global_batch routes every micro-batch twice unless a step has only one; with "
            f"moe.dispatch={config.moe.dispatch}, data.ramp must not change between one and several: give all stages "
            "two or more micro-batches of each data rank, or one"
        )
