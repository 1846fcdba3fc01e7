"""Checks how the samples of a step divide into the micro-batches of data ranks."""

from tedlab.config import TrainConfig
from tedlab.degrees import ParallelDegrees


def accumulation(config: TrainConfig, degrees: ParallelDegrees) -> int:
    """Returns the number of micro-batches of a step in each data rank, ``trainer.accumulate_grad_batches``.

    Raises:
        ValueError: If a different number is given, or the batch does not divide; the message says what would do.
    """
    batch, micro = config.data.batch_size, config.data.micro_batch_size
    if batch % (micro * degrees.data):
        fitting = (
            ", ".join(str(m) for m in range(1, min(batch, 64) + 1) if batch % (m * degrees.data) == 0)
            or f"none: make data.batch_size a multiple of {degrees.data}"
        )
        raise ValueError(
            f"data.batch_size ({batch}) is not a multiple of data.micro_batch_size × data ranks = "
            f"{micro}×{degrees.data}. With this batch, and {degrees.data} data ranks, data.micro_batch_size can be "
            f"{fitting}"
        )
    accumulate = batch // (micro * degrees.data)
    given = config.trainer.get("accumulate_grad_batches")
    if given not in (None, accumulate):
        raise ValueError(
            f"trainer.accumulate_grad_batches={given}, but data.batch_size / (data.micro_batch_size × data ranks) = "
            f"{batch} / ({micro}×{degrees.data}) = {accumulate}. Leave it null, or change the batch sizes"
        )
    return accumulate
