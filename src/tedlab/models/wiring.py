"""Checks how ``moe.shortcut`` connects blocks: what routed experts read, the blocks it needs, where they compute."""

from torch import nn

from tedlab.config import (
    BalanceScope,
    CommOptions,
    Compiler,
    ExpertKernel,
    ModelConfig,
    MoEConfig,
    Noise,
    Shortcut,
)
from tedlab.models.block import Block
from tedlab.models.shortcut import BESIDE


def check_wiring(model: ModelConfig, moe: MoEConfig, comm: CommOptions, block: type[nn.Module]) -> None:
    """Checks ``moe.shortcut`` and what obeys it.

    Args:
        model: Architecture.
        moe: Experts.
        comm: Options of communication.
        block: Class of the model's blocks.

    Raises:
        ValueError: If they are invalid; the message says what would do.
    """
    slot = comm.shortcut_slot
    if moe.shortcut == Shortcut.NONE or not moe.num_experts:
        if slot is not None:
            raise ValueError(
                f"comm.shortcut_slot={slot} says where shortcut-connected experts compute, and there are none: "
                "choose moe.shortcut=pos1, pos2 or pos3, or leave it null"
            )
        if comm.overlap_shortcut:
            raise ValueError(
                "comm.overlap_shortcut=true computes sub-layers beside the exchange of shortcut-connected experts, and "
                "there are none: choose moe.shortcut=pos1, pos2 or pos3, or leave it false"
            )
        return
    if block is not Block:
        raise ValueError(
            f"moe.shortcut={moe.shortcut} connects the layers of tedlab's own blocks, and "
            f"model.architecture={model.architecture} has others; use moe.shortcut=none, or model.architecture=gpt"
        )
    if moe.shortcut == Shortcut.DGMOE:
        _check_double_gate(model, moe, comm)
    else:
        _check_shortcut(model, moe, comm)
    if moe.paired:
        _check_pairs(model, moe)


def _check_shortcut(model: ModelConfig, moe: MoEConfig, comm: CommOptions) -> None:
    slot = comm.shortcut_slot
    if comm.overlap_shared:
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
    if model.compile != Compiler.NONE and (moe.ragged or moe.kernel == ExpertKernel.TRITON):
        raise ValueError(
            f"model.compile={model.compile} leaves experts with moe.dispatch={moe.dispatch} and moe.kernel="
            f"{moe.kernel} out, which moe.shortcut={moe.shortcut} has in the middle of a block; use model.compile=none,"
            " or moe.dispatch=capacity with moe.kernel=auto"
        )


def _check_double_gate(model: ModelConfig, moe: MoEConfig, comm: CommOptions) -> None:
    """Checks an ablation that knows none of what would tell a token's two tensors apart, or one from another token."""
    needed: dict[str, tuple[object, object]] = {
        "moe.top_k": (moe.top_k, 1),
        "moe.gating": (moe.gating, "default"),
        "moe.shared.experts": (moe.shared.experts, 0),
        "moe.router.expert_groups": (moe.router.expert_groups, 1),
        "moe.router.noise": (moe.router.noise, Noise.NONE),
        "moe.router.jitter": (moe.router.jitter, 0.0),
        "model.compile": (model.compile, Compiler.NONE),
        "comm.overlap_shortcut": (comm.overlap_shortcut, False),
        "comm.shortcut_slot": (comm.shortcut_slot, None),
        "comm.overlap_shared": (comm.overlap_shared, False),
    }
    for name, (given, value) in needed.items():
        if given != value:
            raise ValueError(
                f"moe.shortcut=dgmoe routes two tensors of each token to one expert each, in one exchange and without "
                f"shared experts: it needs {name}={_written(value)}, not {_written(given)}; or use moe.shortcut=pos2"
            )
    if moe.num_experts < 2:
        raise ValueError(
            f"moe.shortcut=dgmoe gives each token two different experts, and moe.num_experts is {moe.num_experts}; use "
            "at least 2"
        )
    if moe.balance.scope == BalanceScope.SEQUENCE:
        raise ValueError(
            "moe.shortcut=dgmoe balances both tensors of all tokens together, which moe.balance.scope=sequence would "
            "do for each by itself; use micro_batch or global_batch"
        )


def _written(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"


def _check_pairs(model: ModelConfig, moe: MoEConfig) -> None:
    routed = moe.routed(model.layers)
    for block in routed:
        if block == 0 or block - 1 in routed:
            before = "there is none before it" if block == 0 else f"block {block - 1} has experts, too"
            raise ValueError(
                f"moe.shortcut={moe.shortcut} makes a pair of each block with experts and the dense block before it, "
                f"but for block {block} {before}; use moe.every=2, a moe.blocks without block 0 and neighbours, or "
                "moe.shortcut=pos1, which needs no other block"
            )
