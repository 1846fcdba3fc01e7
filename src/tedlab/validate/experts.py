"""Checks the experts: their number, their routing and their capacity."""

from tedlab.config import Compiler, ExpertKernel, Granularity, MoEConfig, TrainConfig
from tedlab.degrees import ParallelDegrees
from tedlab.moe import mixtures, routers

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
        return
    if moe.every > model.layers:
        raise ValueError(
            f"moe.every ({moe.every}) is larger than model.layers ({model.layers}): no block would have experts. "
            f"Choose 1 to {model.layers}, or moe=dense"
        )
    if moe.top_k > moe.num_experts:
        raise ValueError(f"moe.top_k ({moe.top_k}) is larger than moe.num_experts ({moe.num_experts})")
    mixtures[moe.dispatch]  # raises if it is unknown
    _check_kernel(config, degrees)
    if moe.unlimited:
        _check_unlimited(config)
    else:
        capacity_groups(config, degrees)
    _check_gating(moe)


def _check_kernel(config: TrainConfig, degrees: ParallelDegrees) -> None:
    kernel = config.moe.kernel
    if kernel != ExpertKernel.TRITON:
        return
    if not config.moe.unlimited or degrees.tensor * degrees.expert > 1:
        raise ValueError(
            f"moe.kernel=triton is for dropless experts that are all in one process, not for "
            f"moe.dispatch={config.moe.dispatch}, parallel.tensor={degrees.tensor}, parallel.expert={degrees.expert}; "
            "use moe.kernel=auto"
        )
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
    if moe.capacity_groups not in (None, 1):
        raise ValueError(
            f"moe.capacity_groups={moe.capacity_groups} divides a capacity, of which moe.dispatch={moe.dispatch} has "
            "none; leave it null, or use moe.dispatch=capacity"
        )
    if config.model.compile != Compiler.NONE and config.model.recompute.granularity != Granularity.NONE:
        raise ValueError(
            f"model.compile={config.model.compile} with moe.dispatch={moe.dispatch} leaves the experts out, and a "
            f"block of which parts are compiled cannot be recomputed "
            f"(model.recompute.granularity={config.model.recompute.granularity}); use "
            "model.recompute.granularity=none, model.compile=none, or moe.dispatch=capacity"
        )


def capacity_groups(config: TrainConfig, degrees: ParallelDegrees) -> int | None:
    """Returns ``moe.capacity_groups``, or one for each shard if it is not given and sequences are sharded.

    Raises:
        ValueError: If positions do not divide into these groups; the message says what would do.
    """
    shards = degrees.tensor if degrees.sequence else 1
    given = config.moe.capacity_groups
    if not config.moe.num_experts or config.moe.unlimited:
        return given
    if given is None and shards > 1:
        given = shards
    groups, length = given or 1, config.model.sequence_length
    if length % groups or groups % shards:
        fitting = ", ".join(str(n) for n in range(1, min(length, 64) + 1) if length % n == 0 and n % shards == 0)
        raise ValueError(
            f"moe.capacity_groups is {groups}; it must divide model.sequence_length ({length})"
            + (f" and be a multiple of parallel.tensor ({shards}) with parallel.sequence" if shards > 1 else "")
            + f": {fitting or 'impossible here'}"
        )
    if groups > 1 and "groups" not in routers[config.moe.gating].supports:
        raise ValueError(f"moe.capacity_groups={groups} needs moe.gating=default; moe.gating is {config.moe.gating}")
    return given


def _check_gating(moe: MoEConfig) -> None:
    router = routers[moe.gating]
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
