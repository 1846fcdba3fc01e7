"""``tedlab plan [overrides]``: the fastest layout that fits, for a job on any cluster.

Takes the overrides of ``tedlab train``; what they set of layout, micro-batch and toggles stays as it is. Of its own:

    cluster=NAME         a file in conf/cluster, or the path of one (.yaml)
    world_size=N         GPUs in all; short for parallel.world_size=N
    plan.reserve_gib=X   GiB of a GPU that are left for the CUDA context, NCCL and kernels' workspaces (1.2)
    plan.simulate=N      how many of the best are simulated (4)
    plan.largest=true    first find the largest base model that fits
"""

import functools
import sys

from hydra.core.hydra_config import HydraConfig

from tedlab.cli import UsageError, hydra_entry
from tedlab.config import TrainConfig
from tedlab.ranges import Range

_OWN = {"cluster": "", "plan.reserve_gib": "1.2", "plan.simulate": "4", "plan.largest": "false"}


def task(own: dict[str, str], config: TrainConfig) -> float:
    """Plans one job and returns the predicted time of a step."""
    from tedlab.predict.cluster import cluster_names, load_cluster
    from tedlab.predict.plan.show import plan_visibly

    if not own["cluster"]:
        raise UsageError(f"Say what to plan for, with cluster=NAME. Valid: {', '.join(cluster_names())}")
    try:
        reserve = Range(0).parse("plan.reserve_gib", own["plan.reserve_gib"])
        simulations = Range(1, 1000, whole=True).parse("plan.simulate", own["plan.simulate"])
    except ValueError as error:
        raise UsageError(f"{error}") from None
    if own["plan.largest"] not in ("true", "false"):
        raise UsageError(f"plan.largest={own['plan.largest']} is neither true nor false")
    plan = plan_visibly(
        config,
        own["cluster"],
        load_cluster(own["cluster"]),
        reserve_gib=reserve,
        simulations=simulations,
        find_largest=own["plan.largest"] == "true",
        given=HydraConfig.get().overrides.task,
    )
    return plan.winner.step_seconds


def own_arguments(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Those of this command by name, and the others, which are overrides of a training configuration.

    Raises:
        UsageError: for a key below ``plan`` that does not exist.
    """
    own, others = dict(_OWN), []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in own:
            own[name] = value
        elif name.startswith("plan."):
            raise UsageError(f"{name}: there is no such key. Valid: {', '.join(key for key in own if '.' in key)}")
        else:
            others.append(f"parallel.{argument}" if name == "world_size" else argument)
    if not any(argument.startswith("trainer=") for argument in others):
        others.append("trainer=gpu")  # whose precisions and processes those of a cluster are
    return own, others


def main() -> None:
    """The command line."""
    try:
        own, sys.argv[1:] = own_arguments(sys.argv[1:])
    except UsageError as error:
        sys.exit(f"{error}")
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__)
    hydra_entry(functools.partial(task, own))()
