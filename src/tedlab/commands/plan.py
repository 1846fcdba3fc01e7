"""``tedlab plan``: finds the fastest layout that fits on any cluster, for a training job or for inference."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from hydra.core.hydra_config import HydraConfig

from tedlab.commands.application import hydra_entry
from tedlab.commands.on_cluster import JobOnCluster, doubts, job_alone, on_cluster, on_gpus_of, prepare
from tedlab.config import AssumedRouting, PlanConfig, PlannedPhase, ServeConfig, TrainConfig
from tedlab.errors import UsageError
from tedlab.predict.cluster import ClusterConfig, cluster_names, load_cluster
from tedlab.predict.spread import Spread

_OF_ALL = {"plan.phase", "plan.reserve_gib", "plan.runs"}
_OF_PHASES = {  # the values of plan and serve that a phase takes beside these
    PlannedPhase.TRAIN: {"plan.simulate", "plan.largest"},
    PlannedPhase.GENERATE: {"serve.prompt", "serve.output", "serve.batch", "serve.int4", "serve.upload"},
    PlannedPhase.DISAGGREGATED: {
        *("serve.prompt", "serve.output", "serve.latency", "serve.experts_on", "serve.price", "serve.expert_price"),
        *("serve.attention_gpus", "serve.expert_gpus"),
    },
}


@dataclass
class PlanningConfig(JobOnCluster):
    """The whole configuration of ``tedlab plan``."""

    plan: PlanConfig = field(default_factory=PlanConfig)
    sim: AssumedRouting = field(default_factory=AssumedRouting)
    serve: ServeConfig = field(default_factory=ServeConfig)


def task(config: PlanningConfig) -> float:
    """Plans one job and returns the predicted time of a step."""
    from tedlab.predict.plan.show import learn_visibly, plan_visibly
    from tedlab.predict.spread import spread_on

    overrides = HydraConfig.get().overrides.task
    check_of_phase(config.plan, config.serve, overrides)
    name, cluster = on_cluster(config)
    warnings: list[str] = []
    spread = spread_on(cluster)
    if config.plan.runs:
        learned = learn_visibly(cluster, config.plan.runs)
        cluster, warnings, spread = learned.cluster, [*learned.notes], learned.spread
    job = on_gpus_of(job_alone(config), name, cluster)
    if config.plan.phase != PlannedPhase.TRAIN:
        return inference(config, job, name, cluster, warnings, spread)
    plan = plan_visibly(
        job,
        name,
        cluster,
        reserve_gib=config.plan.reserve_gib,
        simulations=config.plan.simulate,
        find_largest=config.plan.largest,
        given=overrides_of_the_job(overrides),
        assumed=config.sim,
        warnings=[*warnings, *doubts(job, name, cluster)],
        spread=spread,
    )
    return plan.winner.step_seconds


def check_of_phase(plan: PlanConfig, serve: ServeConfig, overrides: Sequence[str]) -> None:
    """Refuses what the phase would not look at.

    Raises:
        UsageError: If a value of another phase is not its default, or an override divides the processes of inference.
    """
    phase = PlannedPhase(plan.phase)
    sections = (("plan", plan, PlanConfig()), ("serve", serve, ServeConfig()))
    changed = {
        f"{section}.{key}": value
        for section, given, default in sections
        for key, value in vars(given).items()
        if value != getattr(default, key)
    }
    for key, value in changed.items():
        if key not in _OF_ALL | _OF_PHASES[phase]:
            others = " and ".join(f"phase={other}" for other, taken in _OF_PHASES.items() if key in taken)
            raise UsageError(f"{key}={value} does nothing with phase={phase}: it belongs to {others}")
    if "serve.upload" in changed and not serve.int4:
        raise UsageError(f"upload={serve.upload:g} does nothing without int4=true, which loads experts from the host")
    if phase == PlannedPhase.TRAIN:
        return
    for override in overrides:
        key = override.partition("=")[0].lstrip("+")
        if key.startswith("parallel.") and key != "parallel.world_size":
            raise UsageError(
                f"{override} does nothing with phase={phase}, which tries all layouts: of parallel it takes world_size"
            )


def inference(
    config: PlanningConfig, job: TrainConfig, name: str, cluster: ClusterConfig, warnings: Sequence[str], spread: Spread
) -> float:
    """Plans inference, and returns the predicted time until all texts are finished, or that of a token on two pools.

    Args:
        config: What is asked for.
        job: The job on the GPUs of the cluster.
        name, cluster: The cluster.
        warnings: What makes predictions doubtful beside the cluster's kind.
        spread: How far times may be off.
    """
    from tedlab.predict.serve.load import shares_of
    from tedlab.predict.serve.show import plan_generation
    from tedlab.predict.serve.show_pools import plan_pools

    shares, reserve = shares_of(config.sim, job.moe.num_experts), config.plan.reserve_gib
    on = config.serve.experts_on
    experts = (name, cluster) if on is None else (on, load_cluster(on))
    for warning in dict.fromkeys([*warnings, *doubts(job, name, cluster), *doubts(job, *experts)]):
        print(f"Warning: {warning}")
    if config.plan.phase == PlannedPhase.GENERATE:
        return plan_generation(job, config.serve, name, cluster, reserve, shares, spread=spread).seconds
    return plan_pools(job, config.serve, ((name, cluster), experts), reserve, shares, spread=spread).seconds


def overrides_of_the_job(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides that ``tedlab train`` takes, and names the trainer, whose default is different here."""
    ours = re.compile(r"\+*(cluster|plan|sim|serve)[.=]")
    job = [override for override in overrides if not ours.match(override)]
    return job if any(override.startswith("trainer=") for override in job) else [*job, "trainer=gpu"]


def prepared(arguments: list[str]) -> list[str]:
    """Turns ``plan.from``, which no field of Python can be called, into ``plan.runs``; see also :func:`prepare`.

    ``phase``, and all that inference takes, come without the names of their sections.

    Where no trainer is given, it is that of the cluster's devices: the preset of the command, gpu, or cpu.
    """
    short = re.compile(rf"({'|'.join(field.name for field in fields(ServeConfig))})=")
    longer = (re.sub(r"^(\+*)plan\.from=", r"\1plan.runs=", argument) for argument in arguments)
    longer = (f"plan.{argument}" if argument.startswith("phase=") else argument for argument in longer)
    made = prepare([f"serve.{argument}" if short.match(argument) else argument for argument in longer])
    if not any(argument.startswith(("trainer=", "+plan=")) for argument in arguments) and _of_cpus(arguments):
        made.append("trainer=cpu")
    return made


def _of_cpus(arguments: Sequence[str]) -> bool:
    """Returns whether the clusters that the command line names are all calibrations of CPUs."""
    names = [name for argument in arguments if argument.startswith("cluster=") for name in argument[8:].split(",")]
    paths = [name.strip("'\"") for name in names]
    known = [path for path in paths if path.endswith(".yaml") or path in cluster_names()]
    return bool(known) and len(known) == len(paths) and not any(load_cluster(path).of_gpus for path in known)


main = hydra_entry(task, "plan", PlanningConfig, prepared)
