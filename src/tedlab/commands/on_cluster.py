"""A training job on a cluster: what simulate and plan take beside what train takes."""

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from hydra.core.config_store import ConfigStore

from tedlab.config import TrainConfig
from tedlab.errors import UsageError
from tedlab.predict.cluster import ClusterConfig, cluster_names, load_cluster

_files: dict[str, str] = {}  # paths of the user's own clusters, by the name under which Hydra knows them


@dataclass
class JobOnCluster(TrainConfig):
    """A training job, and what it is to run on."""

    cluster: ClusterConfig | None = None  # cluster=NAME: a preset, or the path of a .yaml file like it; needed


def prepare(arguments: list[str]) -> list[str]:
    """Makes ``parallel.world_size`` of ``world_size``, and presets of the group ``cluster`` of files that are paths.

    Raises:
        UsageError: for a cluster that there is not, and for a file that is none.
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
    """The training job."""
    return TrainConfig(**{field.name: getattr(config, field.name) for field in fields(TrainConfig)})


def on_cluster(config: JobOnCluster) -> tuple[str, ClusterConfig]:
    """The cluster, after its name, or the path that it came from.

    Raises:
        UsageError: if none was chosen.
    """
    if config.cluster is None:
        raise UsageError(f"Say what to predict for. {_choose()}")
    chosen = str(config.choices.get("cluster"))
    return _files.get(chosen, chosen), config.cluster


def _choose() -> str:
    return f"Choose it with cluster=NAME. Valid: {', '.join(cluster_names())}"


def _preset(name: str, elsewhere: bool) -> str:
    """The option of the group ``cluster`` for what stands behind ``cluster=``; a file becomes one.

    ``elsewhere``: Hydra looks in other places, too, and will say if there is none of this name.
    """
    path = Path(name.strip("'\""))
    if path.suffix != ".yaml" and elsewhere:
        return name
    cluster = load_cluster(path)  # raises for what there is not
    if path.suffix != ".yaml":
        return name
    option = re.sub(r"\W", "_", path.stem)
    while option in cluster_names() or _files.get(option, str(path)) != str(path):
        option = f"another_{option}"
    _files[option] = str(path)
    ConfigStore.instance().store(group="cluster", name=option, node=asdict(cluster))
    return option
