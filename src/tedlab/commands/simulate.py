"""``tedlab simulate [overrides]``: one rank of a job on any cluster, simulated on this machine's CPU.

Takes the overrides of ``tedlab train``, and of its own:

    cluster=NAME     what to predict times for: a file in conf/cluster, or the path of one (.yaml)
    world_size=N     GPUs in all; short for parallel.world_size=N
    sim.rank=R       which of them to simulate (0); stages: one of each kind that differs; all: every one reported
    sim.routing=R    with moe.dispatch=dropless, how often experts are chosen: balanced (default), zipf, trace
    sim.zipf=S       its exponent: the r-th expert is chosen in proportion to r^-S
    sim.trace=FILE   router_trace.npz of a run
    sim.values=real  instead: all ranks (128 at most) with real numbers, small and in float64, against one process
"""

import functools
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from tedlab.cli import UsageError, hydra_entry
from tedlab.config import TrainConfig, with_values

if TYPE_CHECKING:
    from tedlab.predict.sim.show import Ranks

_OWN = ("cluster", "sim.rank", "sim.routing", "sim.zipf", "sim.trace", "sim.values")


def task(own: dict[str, str], config: TrainConfig) -> float:
    """Simulates one configuration and returns the predicted time of a step; with real values, the largest error."""
    if own.get("sim.values", "fake") != "fake":
        return _with_real_values(own, config)
    from tedlab.degrees import parallel_degrees
    from tedlab.predict.cluster import cluster_names, load_cluster
    from tedlab.predict.sim.routing import routing_of
    from tedlab.predict.sim.show import simulate_visibly
    from tedlab.validate import complete_simulated

    if "cluster" not in own:
        raise UsageError(f"Say what to predict for, with cluster=NAME. Valid: {', '.join(cluster_names())}")
    cluster = load_cluster(own["cluster"])
    ranks = _ranks(own.get("sim.rank", "0"))
    config = complete_simulated(with_values(config, {"comm.cac_cluster": own["cluster"]}))  # for cac=auto
    degrees = parallel_degrees(config.parallel)
    if isinstance(ranks, int) and ranks >= degrees.world_size:
        raise UsageError(f"sim.rank={ranks} is no rank of {degrees}: 0 to {degrees.world_size - 1}")
    routing = routing_of(config, own.get("sim.routing", "balanced"), own.get("sim.zipf"), own.get("sim.trace"))
    summary = simulate_visibly(config, own["cluster"], cluster, ranks, routing)
    if summary["comm/predicted_difference_calls"] or summary["comm/predicted_difference_bytes"]:
        sys.exit(
            "The ledger is not what the closed form says (see its table): one of them has a bug; please report it."
        )
    return float(summary["perf/step_time_s"])


def _ranks(text: str) -> "Ranks":
    if text == "all":
        return "all"
    if text == "stages":
        return "stages"
    if text.isdecimal():
        return int(text)
    raise UsageError(f"sim.rank={text} is not the number of a rank (0 to the world size less 1), nor all or stages")


def _with_real_values(own: dict[str, str], config: TrainConfig) -> float:
    """The certificate of a world that this machine has no processes for."""
    import torch

    from tedlab.certify.show import certify_visibly
    from tedlab.predict.sim.threads import MOST_THREADS, run_in_threads

    if own["sim.values"] != "real":
        raise UsageError(f"sim.values={own['sim.values']}: valid are fake (shapes only, the default) and real")
    if "sim.rank" in own:
        raise UsageError("sim.rank says which rank to simulate, but with sim.values=real all are: leave it out")
    if torch.__version__ < "2.13":
        raise UsageError(
            f"sim.values=real needs torch 2.13: in {torch.__version__} ranks cannot be threads (fake tensors crash)"
        )
    if "sim.routing" in own:
        raise UsageError("sim.routing is what to assume of routers, but with sim.values=real they choose: leave it out")
    threads = replace(config, trainer={**config.trainer, "accelerator": "cpu"}, certificate_precision="64-true")
    certificate = certify_visibly(threads, run_in_threads, (), MOST_THREADS)
    if not certificate.ok:
        sys.exit(1)
    return max(row.error for row in certificate.rows)


def own_arguments(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Those of this command by name, and the others, which are overrides of a training configuration.

    Raises:
        UsageError: for a key below ``sim`` that does not exist.
    """
    own, others = {}, []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in _OWN:
            own[name] = value
        elif name.startswith("sim."):
            raise UsageError(f"{name}: there is no such key. Valid: {', '.join(n for n in _OWN if '.' in n)}")
        else:
            others.append(f"parallel.{argument}" if name == "world_size" else argument)
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
