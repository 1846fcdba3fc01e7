"""What a run leaves at Weights & Biases beyond its metrics: charts of W&B's own, and references to checkpoints."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from torch import Tensor
from typing_extensions import override

from tedlab._compat.lightning import forget_anonymous
from tedlab.checkpoint import META, read_meta
from tedlab.compare.runs import Run
from tedlab.compare.traffic import traffic
from tedlab.errors import UsageError

_HEAT_MAP = "wandb/confusion_matrix/v1"  # the one heat map among W&B's presets; its fields have a classifier's names
_MIB = 2**20


class WandbLogger(LightningWandbLogger):
    """Lightning's logger, which can also tell W&B where checkpoints are.

    Args:
        references: Whether each checkpoint becomes a version of the artifact ``checkpoint-<run id>``, which has its
            step as metadata and a reference to each file where it lies. No weights are uploaded.
        arguments: Arguments of Lightning's logger and of ``wandb.init``.
    """

    def __init__(self, references: bool = False, **arguments: Any) -> None:
        super().__init__(**arguments)
        forget_anonymous(self)
        self.references = references
        self._known: set[str] = set()

    @override
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        super().after_save_checkpoint(checkpoint_callback)
        for path in checkpoint_callback.best_k_models:
            self.refer_to(Path(path))

    def refer_to(self, checkpoint: Path) -> None:
        """Logs a checkpoint as an artifact of references, if that was asked for; each one once."""
        checkpoint = checkpoint.resolve()
        if not self.references or str(checkpoint) in self._known:
            return
        import wandb

        self._known.add(str(checkpoint))
        step = read_meta(checkpoint)["global_step"]
        artifact = wandb.Artifact(f"checkpoint-{self.experiment.id}", "model", metadata={"step": step})
        for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
            # The small file that states the step is read, so that a later checkpoint in the same place is another
            # version; reading all weights would take as long as writing them did.
            name = str(file.relative_to(checkpoint))
            artifact.add_reference(file.as_uri(), name, checksum=name == META)
        self.experiment.log_artifact(artifact, aliases=["latest", f"step_{step}"])


def add_to_run(directory: Path, logger: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Adds values to the summary of the W&B run of a training.

    Args:
        directory: The run directory.
        logger: The configuration of the training's logger, with the ``id`` of the run.
        values: What is added.

    Raises:
        UsageError: If the server cannot be reached, or refuses.
    """
    import wandb

    named: dict[str, Any] = {name: logger.get(name) for name in ("project", "entity", "id")}
    mode: Any = os.environ.get("WANDB_MODE") or logger.get("mode")
    silent = wandb.Settings(silent=True)
    try:
        run = wandb.init(**named, dir=directory, resume="allow", mode=mode, settings=silent)
        run.summary.update(dict(values))
        run.finish()
    except (wandb.errors.Error, OSError, ValueError) as error:
        raise UsageError(f"W&B did not take the results for its run {logger['id']}: {error}") from error


def load_chart(load_LE: Tensor, blocks: Sequence[int]) -> Any:
    """Returns a heat map of experts' loads relative to their layer's mean as a chart that W&B draws.

    Args:
        load_LE: Relative loads, (L, E); see :func:`tedlab.moe.relative_load`.
        blocks: Indices of the L blocks, which label the rows.
    """
    import wandb

    experts = load_LE.shape[1]
    rows = [
        [_sorting(block, max(blocks)), _sorting(expert, experts - 1), load]
        for block, loads in zip(blocks, load_LE.tolist(), strict=True)
        for expert, load in enumerate(loads)
    ]
    fields = {"Actual": "block", "Predicted": "expert", "nPredictions": "load"}
    title = {"title": "load of experts / mean of their block"}
    return wandb.plot_table(_HEAT_MAP, wandb.Table(["block", "expert", "load"], data=rows), fields, title)


def closing_charts(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns bar charts of what a finished run sent in a step and of its peak memory, as charts that W&B draws."""
    sent = {
        f"{one.phase} {one.op} {one.group}": one.wire_bytes / _MIB
        for one in traffic(Run("", "", {}, summary, {}))
        if one.wire_bytes
    }
    memory = {
        name: summary[key] / _MIB
        for name in ("parameters", "gradients", "optimizer", "activations", "stash")
        if (key := f"memory/{name}_bytes") in summary
    }
    charts = {
        "charts/sent": ("collective", sent, "MiB sent by rank 0 in a step"),
        "charts/memory": ("category", memory, "MiB at the peak"),
    }
    return {key: _bars(label, values, title) for key, (label, values, title) in charts.items() if values}


def _bars(label: str, values: Mapping[str, float], title: str) -> Any:
    import wandb

    return wandb.plot.bar(wandb.Table([label, "MiB"], data=[[*row] for row in values.items()]), label, "MiB", title)


def _sorting(number: int, most: int) -> str:
    """Writes a number so that texts up to ``most`` sort as the numbers do, since W&B sorts labels as texts."""
    return f"{number:0{len(str(most))}d}"
