"""``tedlab simulate``: simulates one rank of a training job on any cluster, on this machine's CPU."""

import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tedlab.commands.application import hydra_entry
from tedlab.commands.on_cluster import JobOnCluster, doubts, job_alone, on_cluster, on_gpus_of, prepare
from tedlab.config import SimulationConfig, TrainConfig, with_values
from tedlab.errors import UsageError

if TYPE_CHECKING:
    from tedlab.predict.sim.show import Ranks


@dataclass
class SimulateConfig(JobOnCluster):
    """The whole configuration of ``tedlab simulate``."""

    sim: SimulationConfig = field(default_factory=SimulationConfig)


def task(config: SimulateConfig) -> float:
    """Simulates one configuration and returns the predicted time of a step; with real values, the largest error."""
    sim, job = config.sim, job_alone(config)
    if sim.values != "fake":
        return _with_real_values(sim, job)
    from tedlab.degrees import parallel_degrees
    from tedlab.predict.sim.routing import routing_of
    from tedlab.predict.sim.show import simulate_visibly
    from tedlab.validate import complete_simulated

    name, cluster = on_cluster(config)
    ranks = _ranks(sim.rank)
    job = on_gpus_of(job, name, cluster)
    job = complete_simulated(with_values(job, {"comm.cac_cluster": name}), cluster)  # for cac=auto
    degrees = parallel_degrees(job.parallel)
    if isinstance(ranks, int) and ranks >= degrees.world_size:
        raise UsageError(f"sim.rank={ranks} is no rank of {degrees}: 0 to {degrees.world_size - 1}")
    routing = routing_of(job, sim.routing or "balanced", sim.zipf, sim.trace)
    summary = simulate_visibly(job, name, cluster, ranks, routing, doubts(job, name, cluster))
    if sim.routing not in (None, "balanced") and routing is not None and degrees.expert > 1:
        from tedlab.predict.plan.choices import show_choices
        from tedlab.predict.plan.lending import show_lending

        show_lending(job, cluster, routing)
        show_choices(job, cluster, routing)
    if summary["comm/predicted_difference_calls"] or summary["comm/predicted_difference_bytes"]:
        sys.exit(
            "The ledger is not what the closed form says (see its table): one of them has a bug; please report it."
        )
    return float(summary["perf/step_time_s"])


def _ranks(asked: Any) -> "Ranks":
    if asked is None:
        return 0
    if asked in ("all", "stages") or (type(asked) is int and asked >= 0):
        return asked
    raise UsageError(f"sim.rank={asked} is not the number of a rank (0 to the world size less 1), nor all or stages")


def _with_real_values(sim: SimulationConfig, config: TrainConfig) -> float:
    """Certifies a world that is too large for processes on this machine, and returns the largest error."""
    import torch

    from tedlab.certify.show import certify_visibly
    from tedlab.predict.sim.threads import MOST_THREADS, run_in_threads
    from tedlab.predict.volumes import tile_of
    from tedlab.validate import check_simulated

    if sim.values != "real":
        raise UsageError(f"sim.values={sim.values}: valid are fake (shapes only, the default) and real")
    if sim.rank is not None:
        raise UsageError("sim.rank says which rank to simulate, but with sim.values=real all are: leave it out")
    if torch.__version__ < "2.13":
        raise UsageError(
            f"sim.values=real needs torch 2.13: in {torch.__version__} ranks cannot be threads (fake tensors crash)"
        )
    if sim.routing is not None:
        raise UsageError("sim.routing is what to assume of routers, but with sim.values=real they choose: leave it out")
    check_simulated(config)
    threads = with_values(config, {"optim.tile": tile_of(config), "certificate_precision": "64-true"})
    threads = replace(threads, trainer={**config.trainer, "accelerator": "cpu"})
    certificate = certify_visibly(threads, run_in_threads, (), MOST_THREADS)
    if not certificate.ok:
        sys.exit(1)
    return max(row.error for row in certificate.rows)


main = hydra_entry(task, "simulate", SimulateConfig, prepare)
