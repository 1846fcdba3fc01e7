"""Checks shortcut-connected experts: what they read, the blocks that they need, and where they compute."""

from tedlab.config import Compiler, ExpertKernel, Shortcut, TrainConfig
from tedlab.models import Block, models
from tedlab.models.shortcut import BESIDE


def check_shortcut(config: TrainConfig) -> None:
    """Checks ``moe.shortcut`` and ``comm.shortcut_slot``.

    Raises:
        ValueError: If they are invalid; the message says what would do.
    """
    model, moe, slot = config.model, config.moe, config.comm.shortcut_slot
    if moe.shortcut == Shortcut.NONE or not moe.num_experts:
        if slot is not None:
            raise ValueError(
                f"comm.shortcut_slot={slot} says where shortcut-connected experts compute, and there are none: "
                "choose moe.shortcut=pos1, pos2 or pos3, or leave it null"
            )
        if config.comm.overlap_shortcut:
            raise ValueError(
                "comm.overlap_shortcut=true computes sub-layers beside the exchange of shortcut-connected experts, and "
                "there are none: choose moe.shortcut=pos1, pos2 or pos3, or leave it false"
            )
        return
    if config.comm.overlap_shared:
        raise ValueError(
            f"comm.overlap_shared=true has no place with moe.shortcut={moe.shortcut}, where shared experts are the "
            "last of the sub-layers beside the exchange; use comm.overlap_shortcut=true"
        )
    beside = BESIDE[moe.shortcut]
    if slot is not None and slot > beside:
        raise ValueError(
            f"comm.shortcut_slot={slot}: with moe.shortcut={moe.shortcut} experts run beside {beside} sub-layers, so "
            f"it can be 0 (they compute before the first) to {beside} (after the last), or null"
        )
    if not moe.shared.experts:
        raise ValueError(
            f"moe.shortcut={moe.shortcut} needs shared experts, without which no feed-forward layer would read a "
            "block's own attention; use moe.shared.experts=1, or moe.shortcut=none"
        )
    if models[model.architecture].block is not Block:
        raise ValueError(
            f"moe.shortcut={moe.shortcut} connects the layers of tedlab's own blocks, and "
            f"model.architecture={model.architecture} has others; use moe.shortcut=none, or model.architecture=gpt"
        )
    if model.compile != Compiler.NONE and (moe.ragged or moe.kernel == ExpertKernel.TRITON):
        raise ValueError(
            f"model.compile={model.compile} leaves experts with moe.dispatch={moe.dispatch} and moe.kernel="
            f"{moe.kernel} out, which moe.shortcut={moe.shortcut} has in the middle of a block; use model.compile=none,"
            " or moe.dispatch=capacity with moe.kernel=auto"
        )
    if moe.paired:
        _check_pairs(config)


def _check_pairs(config: TrainConfig) -> None:
    model, moe = config.model, config.moe
    routed = moe.routed(model.layers)
    for block in routed:
        if block == 0 or block - 1 in routed:
            before = "there is none before it" if block == 0 else f"block {block - 1} has experts, too"
            raise ValueError(
                f"moe.shortcut={moe.shortcut} makes a pair of each block with experts and the dense block before it, "
                f"but for block {block} {before}; use moe.every=2, a moe.blocks without block 0 and neighbours, or "
                "moe.shortcut=pos1, which needs no other block"
            )
    layers = model.layers
    if moe.blocks is None and moe.every == 2 and layers % 2:
        raise ValueError(
            f"model.layers={layers} is odd: moe.shortcut={moe.shortcut} with moe.every=2 makes pairs of blocks, which "
            f"leave the last block over; use model.layers={layers - 1} or {layers + 1}, or list the blocks with "
            f"experts: moe.blocks={[*routed]}"
        )
