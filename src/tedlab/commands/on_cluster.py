"""Adds a cluster to a training job, for the commands simulate and plan."""

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from hydra.core.config_store import ConfigStore

from tedlab.config import TrainConfig, with_values
from tedlab.errors import UsageError
from tedlab.predict.cluster import ClusterConfig, cluster_names, load_cluster

_files: dict[str, str] = {}  # paths of the user's cluster files, by the name that Hydra knows them by


@dataclass
class JobOnCluster(TrainConfig):
    """A training job and the cluster that it is to run on."""

    cluster: ClusterConfig | None = None  # required: a preset, or the path of a .yaml file like one


def prepare(arguments: list[str]) -> list[str]:
    """Turns ``world_size`` into ``parallel.world_size``, and cluster files into presets of the group ``cluster``.

    Raises:
        UsageError: If a cluster does not exist, or a file does not describe one.
    """
    made = []
    elsewhere = any(argument.startswith("hydra.searchpath=") for argument in arguments)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key == "world_size":
            argument = f"parallel.{argument}"
        elif equals and key == "cluster":
            argument = f"cluster={','.join(_preset(name, elsewhere) for name in value.split(','))}"
        made.append(argument)
    of_cluster = [argument for argument in made if argument.startswith("cluster.")]
    if of_cluster and not any(argument.startswith("cluster=") for argument in made):
        raise UsageError(f"{of_cluster[0]}: of which cluster? {_choose()}")
    return made


def job_alone(config: JobOnCluster) -> TrainConfig:
    """Returns the training job without its cluster."""
    return TrainConfig(**{field.name: getattr(config, field.name) for field in fields(TrainConfig)})


def on_gpus_of(job: TrainConfig, name: str, cluster: ClusterConfig) -> TrainConfig:
    """Returns the job with ``trainer.accelerator=gpu`` if it is ``cpu`` on a cluster of GPUs, and says so.

    Kernels then count as those that torch has for GPUs.
    """
    if not cluster.of_gpus or job.trainer["accelerator"] != "cpu":
        return job
    print(f"Kernels are those of GPUs, which {name} has; trainer.accelerator=cpu is about this machine.")
    return with_values(job, {"trainer": {**job.trainer, "accelerator": "gpu"}})


def doubts(job: TrainConfig, name: str, cluster: ClusterConfig) -> list[str]:
    """Returns what makes predictions for a job on a cluster doubtful, in a sentence each."""
    found = []
    if job.data.ramp:
        found.append(f"data.ramp: predictions are of a step after step {job.data.ramp[-1].until}, of the last stage.")
    if cluster.of_gpus or job.trainer["accelerator"] == "cpu":
        return found
    return [
        *found,
        f"{name} is a calibration of another device ({cluster.device or 'a CPU'}) than the job's, whose "
        f"trainer.accelerator is {job.trainer['accelerator']}: times are those of that device.",
    ]


def on_cluster(config: JobOnCluster) -> tuple[str, ClusterConfig]:
    """Returns the cluster's name, or the path of its file, and the cluster.

    Raises:
        UsageError: If none was chosen.
    """
    if config.cluster is None:
        raise UsageError(f"Say what to predict for. {_choose()}")
    chosen = str(config.choices.get("cluster"))
    return _files.get(chosen, chosen), config.cluster


def _choose() -> str:
    return f"Choose it with cluster=NAME. Valid: {', '.join(cluster_names())}"


def _preset(name: str, elsewhere: bool) -> str:
    """Returns the option of the group ``cluster`` for the value of ``cluster=``, and registers a file as one.

    With ``elsewhere``, Hydra also searches other places, and reports by itself that a name does not exist.
    """
    path = Path(name.strip("'\""))
    if path.suffix != ".yaml" and elsewhere:
        return name
    cluster = load_cluster(path)  # raises if there is none
    if path.suffix != ".yaml":
        return name
    option = re.sub(r"\W", "_", path.stem)
    while option in cluster_names() or _files.get(option, str(path)) != str(path):
        option = f"another_{option}"
    _files[option] = str(path)
    ConfigStore.instance().store(group="cluster", name=option, node=asdict(cluster))
    return option
