"""Computes how many slots an expert offers, from the configuration alone; the router and the closed form share it."""

import math

import numpy as np

from tedlab.config import MoEConfig

DEEPSPEED = ("deepspeed_top1", "deepspeed_top2", "deepspeed_topk")  # the gatings that follow its capacity rule
MIN_CAPACITY = 4  # the default of deepspeed.moe.layer.MoE


def group_capacity(moe: MoEConfig, tokens: int, groups: int) -> int:
    """Returns the slots that each expert offers to one capacity group.

    Args:
        moe: The configuration, with gating, top_k, capacity factor and multiple.
        tokens: The number of tokens in the group.
        groups: The number of groups in a data rank's micro-batch, which share the capacity multiple.
    """
    multiple = max(1, moe.capacity_multiple // groups)
    if moe.gating not in DEEPSPEED:
        return expert_capacity(tokens, moe.num_experts, moe.top_k, moe.capacity_factor, multiple)
    least = MIN_CAPACITY if moe.min_capacity is None else moe.min_capacity
    return deepspeed_capacity(tokens, moe.num_experts, moe.top_k, moe.capacity_factor, least, multiple)


def expert_capacity(tokens: int, num_experts: int, top_k: int, factor: float | None, multiple: int) -> int:
    """Returns the slots that each expert offers to one data rank's micro-batch, the same in every layout.

    They are ceil(top_k · tokens / num_experts · factor), rounded up to a multiple. With ``factor=None`` there are as
    many as tokens, rounded up in the same way, so that no token is ever dropped.
    """
    # Integers, which the compiler can trace, make this exact for factors of up to nine decimals. In floating point,
    # 10 × 1.1 is a little more than 11 and would be rounded up to 12.
    wanted = tokens if factor is None else -(-top_k * tokens * round(factor * 10**9) // (num_experts * 10**9))
    return -(-wanted // multiple) * multiple


def deepspeed_capacity(
    tokens: int, num_experts: int, top_k: int, factor: float | None, min_capacity: int, multiple: int
) -> int:
    """Returns the slots that each expert offers to one data rank's micro-batch, by DeepSpeed's rule.

    They are max(ceil(tokens / num_experts · (factor · top_k)), min_capacity), rounded up to a multiple. With
    ``factor=None`` there are as many as tokens, rounded up in the same way.
    """
    # DeepSpeed multiplies fp32 numbers, in which 100 / 4 · 1.2 is a little more than 30, and so asks for 31 slots.
    wanted = (
        tokens
        if factor is None
        else max(math.ceil(np.float32(tokens / num_experts) * np.float32(factor * top_k)), min_capacity)
    )
    return -(-wanted // multiple) * multiple
