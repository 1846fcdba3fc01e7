"""``tedlab plan``: finds the fastest layout that fits, for a training job on any cluster."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from hydra.core.hydra_config import HydraConfig

from tedlab.commands.application import hydra_entry
from tedlab.commands.on_cluster import JobOnCluster, doubts, job_alone, on_cluster, on_gpus_of, prepare
from tedlab.config import AssumedRouting, PlanConfig


@dataclass
class PlanningConfig(JobOnCluster):
    """The whole configuration of ``tedlab plan``."""

    plan: PlanConfig = field(default_factory=PlanConfig)
    sim: AssumedRouting = field(default_factory=AssumedRouting)


def task(config: PlanningConfig) -> float:
    """Plans one job and returns the predicted time of a step."""
    from tedlab.predict.plan.show import learn_visibly, plan_visibly

    name, cluster = on_cluster(config)
    warnings: list[str] = []
    if config.plan.runs:
        cluster, warnings = learn_visibly(cluster, config.plan.runs)
    job = on_gpus_of(job_alone(config), name, cluster)
    plan = plan_visibly(
        job,
        name,
        cluster,
        reserve_gib=config.plan.reserve_gib,
        simulations=config.plan.simulate,
        find_largest=config.plan.largest,
        given=overrides_of_the_job(HydraConfig.get().overrides.task),
        assumed=config.sim,
        warnings=[*warnings, *doubts(job, name, cluster)],
    )
    return plan.winner.step_seconds


def overrides_of_the_job(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides that ``tedlab train`` takes, and names the trainer, whose default is different here."""
    ours = re.compile(r"\+*(cluster|plan|sim)[.=]")
    job = [override for override in overrides if not ours.match(override)]
    return job if any(override.startswith("trainer=") for override in job) else [*job, "trainer=gpu"]


def prepared(arguments: list[str]) -> list[str]:
    """Turns ``plan.from``, which no field of Python can be called, into ``plan.runs``; see also :func:`prepare`."""
    return prepare([re.sub(r"^(\+*)plan\.from=", r"\1plan.runs=", argument) for argument in arguments])


main = hydra_entry(task, "plan", PlanningConfig, prepared)
