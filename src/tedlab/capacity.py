"""How many slots an expert offers. Plain arithmetic on the configuration: the router and the closed form share it."""

import math

import numpy as np

from tedlab.config import MoEConfig

DEEPSPEED = ("deepspeed_top1", "deepspeed_top2", "deepspeed_topk")  # gatings with its rule of capacity
MIN_CAPACITY = 4  # default of deepspeed.moe.layer.MoE


def group_capacity(moe: MoEConfig, tokens: int, groups: int) -> int:
    """Slots that each expert offers to one capacity group.

    Args:
        moe: gating, choices, capacity factor and multiple.
        tokens: of the group.
        groups: that a data rank's micro-batch has, over which the multiple is divided.
    """
    multiple = max(1, moe.capacity_multiple // groups)
    if moe.gating not in DEEPSPEED:
        return expert_capacity(tokens, moe.num_experts, moe.top_k, moe.capacity_factor, multiple)
    least = MIN_CAPACITY if moe.min_capacity is None else moe.min_capacity
    return deepspeed_capacity(tokens, moe.num_experts, moe.top_k, moe.capacity_factor, least, multiple)


def expert_capacity(tokens: int, num_experts: int, top_k: int, factor: float | None, multiple: int) -> int:
    """Slots that each expert offers to one data rank's micro-batch.

    ceil(top_k · tokens / num_experts · factor), rounded up to a multiple; with ``factor=None`` as many as there are
    tokens, rounded up likewise, so that none is ever dropped. The same in every layout.
    """
    # Exact, for factors of up to nine decimals: in floating point 10 × 1.1 is a little more than 11, which would be
    # rounded up to 12. In whole numbers, which the compiler can follow.
    wanted = tokens if factor is None else -(-top_k * tokens * round(factor * 10**9) // (num_experts * 10**9))
    return -(-wanted // multiple) * multiple


def deepspeed_capacity(
    tokens: int, num_experts: int, top_k: int, factor: float | None, min_capacity: int, multiple: int
) -> int:
    """Slots that each expert offers to one data rank's micro-batch.

    max(ceil(tokens / num_experts · (factor · top_k)), min_capacity), rounded up to a multiple; with ``factor=None`` as
    many as there are tokens, rounded up likewise.
    """
    # DeepSpeed multiplies fp32 numbers, in which 100 / 4 · 1.2 is a little more than 30, and so asks for 31 slots.
    wanted = (
        tokens
        if factor is None
        else max(math.ceil(np.float32(tokens / num_experts) * np.float32(factor * top_k)), min_capacity)
    )
    return -(-wanted // multiple) * multiple
