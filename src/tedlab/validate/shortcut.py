"""Checks shortcut-connected experts."""

from tedlab.config import TrainConfig
from tedlab.models import models
from tedlab.models.wiring import check_wiring


def check_shortcut(config: TrainConfig) -> None:
    """Checks ``moe.shortcut``, what obeys it, and that pairs of blocks leave no block over.

    Raises:
        ValueError: If something is invalid; the message says what would do.
    """
    model, moe = config.model, config.moe
    check_wiring(model, moe, config.comm, models[model.architecture].block)
    layers = model.layers
    if moe.num_experts and moe.paired and moe.blocks is None and moe.every == 2 and layers % 2:
        raise ValueError(
            f"model.layers={layers} is odd: moe.shortcut={moe.shortcut} with moe.every=2 makes pairs of blocks, which "
            f"leave the last block over; use model.layers={layers - 1} or {layers + 1}, or list the blocks with "
            f"experts: moe.blocks={[*moe.routed(layers)]}"
        )
