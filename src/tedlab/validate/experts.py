"""Checks the experts: their number, their routing and their capacity."""

from tedlab.config import (
    BalanceConfig,
    BalanceScope,
    BiasUpdate,
    Compiler,
    ExpertKernel,
    Granularity,
    GroupScore,
    LendPolicy,
    MoEConfig,
    RouterConfig,
    SharedConfig,
    TrainConfig,
)
from tedlab.degrees import ParallelDegrees, check_divides
from tedlab.moe import mixtures, routers
from tedlab.spec import Layout

GATING_OPTIONS = ("min_capacity", "random_token_selection", "second_expert_sampling", "drop_policy")


def check_experts(config: TrainConfig, degrees: ParallelDegrees) -> None:
    """Checks the experts, if the model has any.

    Raises:
        ValueError: If they are invalid; the message says what would do.
    """
    model, moe = config.model, config.moe
    if moe.num_experts == 0:
        if degrees.expert > 1:
            raise ValueError(
                f"parallel.expert is {degrees.expert}, but moe.num_experts is 0: a dense model has no experts"
            )
        if degrees.folded:
            raise ValueError(
                f"parallel.expert_tensor is {degrees.expert_tensor}, but moe.num_experts is 0: a dense model has no "
                "experts; leave parallel.expert_tensor null"
            )
        return
    if degrees.folded:
        _check_folded(config, degrees)
    if moe.sliced:
        _check_slice(config, degrees)
    _check_numbers(moe, model.layers)
    _check_kernel(config)
    if moe.unlimited:
        _check_unlimited(config)
    else:
        capacity_groups(config, degrees)
    _check_gating(moe)


def _check_folded(config: TrainConfig, degrees: ParallelDegrees) -> None:
    given, folded = config.moe.lend.policy, f"parallel.expert_tensor={degrees.expert_tensor} and parallel.tensor="
    folded += str(degrees.tensor)
    if given != LendPolicy.NONE:
        raise ValueError(
            f"moe.lend.policy={given} plans for tensor ranks that list the same rows, but with {folded} each lists its "
            "own; leave parallel.expert_tensor null, or use moe.lend.policy=none"
        )


def _check_slice(config: TrainConfig, degrees: ParallelDegrees) -> None:
    moe, length = config.moe, config.model.sequence_length
    if degrees.sequence:
        raise ValueError(
            "moe.slice=tokens slices the tokens that tensor ranks hold alike, but with parallel.sequence=true each has "
            "its own positions already; use one of the two"
        )
    if config.comm.dtd:
        raise ValueError(
            "comm.dtd=true drops duplicate tokens, but with moe.slice=tokens routed experts get none; use one of the "
            "two"
        )
    if moe.inputs > 1:
        raise ValueError(
            f"moe.slice=tokens slices one tensor, but with moe.shortcut={moe.shortcut} experts read two; use "
            "moe.slice=none"
        )
    check_divides("model.sequence_length", length, "parallel.tensor", degrees.tensor)
    if "groups" not in routers[moe.gating].supports:
        raise ValueError(f"moe.slice=tokens needs moe.gating=default; moe.gating is {moe.gating}")


def check_mixture(moe: MoEConfig, layers: int) -> None:
    """Checks what must hold of experts in any layout and with any data.

    Raises:
        ValueError: If they are invalid; the message says what would do.
    """
    if moe.num_experts:
        _check_numbers(moe, layers)
        _check_gating(moe)


def _check_numbers(moe: MoEConfig, layers: int) -> None:
    _check_blocks(moe, layers)
    if not moe.shared.experts and moe.shared != SharedConfig():
        raise ValueError(
            f"moe.shared.ffn={moe.shared.ffn}, moe.shared.combine={moe.shared.combine} would have no effect: "
            "moe.shared.experts is 0"
        )
    if moe.top_k > moe.num_experts:
        raise ValueError(f"moe.top_k ({moe.top_k}) is larger than moe.num_experts ({moe.num_experts})")
    mixtures[moe.dispatch]  # raises if it is unknown


def _check_blocks(moe: MoEConfig, layers: int) -> None:
    if moe.blocks is not None:
        if not moe.blocks or len({*moe.blocks}) < len(moe.blocks) or not all(0 <= n < layers for n in moe.blocks):
            raise ValueError(
                f"moe.blocks={moe.blocks} must list each block that has experts once, by its number from 0 to "
                f"{layers - 1} (model.layers is {layers}); moe=dense has none"
            )
    elif moe.every > layers:
        raise ValueError(
            f"moe.every ({moe.every}) is larger than model.layers ({layers}): no block would have experts. "
            f"Choose 1 to {layers}, or moe=dense"
        )
    elif not moe.routed(layers):
        raise ValueError(
            f"moe.first_dense ({moe.first_dense}) and moe.every ({moe.every}) leave none of model.layers ({layers}) "
            f"with experts. Choose a moe.first_dense below {layers // moe.every * moe.every}, or moe=dense"
        )


def _check_kernel(config: TrainConfig) -> None:
    model, moe = config.model, config.moe
    recomputed = model.recompute.granularity
    left_out = model.compile != Compiler.NONE and (moe.ragged or moe.kernel == ExpertKernel.TRITON)
    if left_out and recomputed != Granularity.NONE:
        because = f"moe.dispatch={moe.dispatch}" if moe.ragged else f"moe.kernel={moe.kernel}"
        instead = "moe.dispatch=capacity" if moe.ragged else "moe.kernel=auto"
        raise ValueError(
            f"model.compile={model.compile} with {because} leaves the experts out, and a block of which parts are "
            f"compiled cannot be recomputed (model.recompute.granularity={recomputed}); use "
            f"model.recompute.granularity=none, model.compile=none, or {instead}"
        )
    if config.moe.kernel != ExpertKernel.TRITON:
        return
    if config.trainer.get("accelerator") == "cpu":
        raise ValueError(
            "moe.kernel=triton needs a GPU, not trainer.accelerator=cpu; use trainer=gpu or moe.kernel=auto"
        )


def _check_unlimited(config: TrainConfig) -> None:
    moe = config.moe
    if "dropless" not in routers[moe.gating].supports:
        raise ValueError(
            f"moe.gating={moe.gating} decides who gets an expert's slots, of which moe.dispatch={moe.dispatch} has "
            "none; use moe.gating=default, or moe.dispatch=capacity"
        )
    if moe.drop_policy is not None or not moe.balance.dropped:
        raise ValueError(
            "moe.drop_policy and moe.balance.dropped=false are about choices that find an expert full, which "
            "moe.dispatch=dropless does not know; leave them as they are, or use moe.dispatch=capacity"
        )
    if moe.capacity_groups not in (None, 1):
        raise ValueError(
            f"moe.capacity_groups={moe.capacity_groups} divides a capacity, of which moe.dispatch={moe.dispatch} has "
            "none; leave it null, or use moe.dispatch=capacity"
        )


def capacity_groups(config: TrainConfig, degrees: ParallelDegrees) -> int | None:
    """Returns ``moe.capacity_groups``, or one for each shard if it is not given and sequences are sharded.

    Raises:
        ValueError: If positions do not divide into these groups; the message says what would do.
    """
    shards = degrees.tensor if Layout(degrees).inside(config.moe).sequence else 1
    given = config.moe.capacity_groups
    if not config.moe.num_experts or config.moe.unlimited:
        return given
    if given is None and shards > 1:
        given = shards
    groups, length = given or 1, config.model.sequence_length
    if length % groups or groups % shards:
        fitting = ", ".join(str(n) for n in range(1, min(length, 64) + 1) if length % n == 0 and n % shards == 0)
        why = "moe.slice=tokens" if config.moe.sliced else "parallel.sequence"
        raise ValueError(
            f"moe.capacity_groups is {groups}; it must divide model.sequence_length ({length})"
            + (f" and be a multiple of parallel.tensor ({shards}) with {why}" if shards > 1 else "")
            + f": {fitting or 'impossible here'}"
        )
    if groups > 1 and "groups" not in routers[config.moe.gating].supports:
        raise ValueError(f"moe.capacity_groups={groups} needs moe.gating=default; moe.gating is {config.moe.gating}")
    return given


def _check_gating(moe: MoEConfig) -> None:
    router = routers[moe.gating]
    for name, default in vars(RouterConfig()).items():
        if getattr(moe.router, name) != default and name not in router.router_options:
            those = ", ".join(gating for gating in routers.names if name in routers[gating].router_options)
            raise ValueError(
                f"moe.router.{name}={getattr(moe.router, name)} would have no effect with moe.gating={moe.gating}; "
                f"leave it {default}, or choose moe.gating from {those}"
            )
    if moe.balance != BalanceConfig() and "balance" not in router.supports:
        raise ValueError(
            f"moe.balance is for routers that learn from a balance loss as it defines it, not for moe.gating="
            f"{moe.gating}; leave it as it is, or use moe.gating=default"
        )
    _check_groups(moe)
    if router.needed_top_k not in (None, moe.top_k):
        raise ValueError(
            f"moe.gating={moe.gating} needs moe.top_k={router.needed_top_k}, but moe.top_k is {moe.top_k}; "
            "deepspeed_topk takes any top_k"
        )
    for name in GATING_OPTIONS:
        if getattr(moe, name) is not None and name not in router.options:
            users = [gating for gating in routers.names if name in routers[gating].options]
            raise ValueError(
                f"moe.{name}={getattr(moe, name)} would have no effect with moe.gating={moe.gating}; leave it null, "
                f"or choose moe.gating={' or '.join(users)}"
            )


def _check_groups(moe: MoEConfig) -> None:
    groups, chosen = moe.router.expert_groups, moe.router.chosen_groups
    check_divides("moe.num_experts", moe.num_experts, "moe.router.expert_groups", groups)
    if chosen > groups:
        raise ValueError(f"moe.router.chosen_groups ({chosen}) is larger than moe.router.expert_groups ({groups})")
    among = moe.num_experts // groups * chosen
    if moe.top_k > among:
        raise ValueError(
            f"moe.top_k ({moe.top_k}) is larger than the {among} experts in {chosen} of {groups} groups; raise "
            f"moe.router.chosen_groups to {-(-moe.top_k * groups // moe.num_experts)} or more"
        )
    if groups == 1 and moe.router.group_score != GroupScore.MAX:
        raise ValueError(
            f"moe.router.group_score={moe.router.group_score} ranks groups of experts, but there is one: "
            "moe.router.expert_groups is 1"
        )


def router_notes(moe: MoEConfig) -> list[str]:
    """Returns notes on how experts are chosen and balanced."""
    if not moe.num_experts:
        return []
    found = []
    if moe.gating == "expert_choice":
        found.append(
            "moe.gating=expert_choice sees the future: which experts a token gets depends on later tokens. Losses of "
            "next-token prediction are better than those of a model that writes a text."
        )
    as_deepseek = moe.aux_loss <= 0.0001 and moe.balance.scope == BalanceScope.SEQUENCE
    if moe.router.bias_update != BiasUpdate.NONE and moe.aux_loss > 0 and not as_deepseek:
        found.append(
            f"Biases balance the experts (moe.router.bias_update={moe.router.bias_update}), and so does "
            f"moe.aux_loss={moe.aux_loss}; DeepSeek-V3 uses 0.0001, with moe.balance.scope=sequence."
        )
    return found
