"""Writes what a finished run leaves behind: the summary, the loss curve and the closing table."""

import json
import math
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import OmegaConf
from rich.table import Table

from tedlab.config import TrainConfig
from tedlab.console import output
from tedlab.data import Corpus, TextDataModule, bigram_loss
from tedlab.data.files import EMPTY, LeftOut, listed
from tedlab.history import read_history
from tedlab.launch.outcome import FINISHED, write_summary
from tedlab.models import count_parameters
from tedlab.module import LanguageModel
from tedlab.predict.flops import training_flops
from tedlab.strategy import TEDStrategy
from tedlab.tables import FittingTable
from tedlab.tracking import closing_charts

BRANCH, CERTIFICATE = "branch.json", "certificate.json"
LEFT_OUT = "left_out.txt"
_MEMORY = {  # the closing table's names for the categories
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "stash": "CAC",
    "activations": "activations etc.",
    "before": "libraries",
}


def resolved_yaml(config: TrainConfig) -> str:
    """Returns the configuration as YAML, with every value written out."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def report_left_out(corpora: Mapping[str, Corpus], directory: Path) -> None:
    """Lists the files of sources that were left out of them, and why, in a file; warns unless all are empty.

    Args:
        corpora: The corpora by source; one without ``data.sources`` has no name.
        directory: The run directory.
    """
    file = directory / LEFT_OUT
    file.unlink(missing_ok=True)
    left_out = [
        LeftOut(f"{name}: {left.name}" if name else left.name, left.reason)
        for name, corpus in corpora.items()
        for left in corpus.left_out
    ]
    if not left_out:
        return
    file.write_text("".join(f"{left.name}: {left.reason}\n" for left in left_out))
    missing = [left for left in left_out if left.reason != EMPTY]
    if missing:
        named = sum(corpus.source_files for corpus in corpora.values()) + len(missing)
        where = "data.sources" if any(corpora) else "data.path"
        print(
            f"{len(missing)} of {named} files of {where} were left out: {listed(missing)}. All of them: {file}",
            file=sys.stderr,
            flush=True,
        )


def report(
    config: TrainConfig,
    trainer: Trainer,
    module: LanguageModel,
    data: LightningDataModule,
    measured: Mapping[str, Any],
    tables: Sequence[Table] = (),
) -> dict[str, Any]:
    """Writes ``summary.json`` and ``loss.png`` and prints the table, in the first process only.

    Args:
        config: The configuration of the run.
        trainer: The trainer, which has finished.
        module: The trained model.
        data: The data that it was trained on; if it is one text, a bigram model of it is the
            baseline.
        measured: Final validation metrics, throughput, router health, memory and communication.
        tables: Tables to print before the closing one.

    Returns:
        The summary in the first process, an empty dictionary in the others.
    """
    if not trainer.is_global_zero:
        return {}
    directory = Path(config.output_dir)
    baseline = {}
    if isinstance(data, TextDataModule) and not config.data.sources:  # of a mixture there is no one corpus to count
        bigram = bigram_loss(data.corpus, config.model.sequence_length, data.validation_samples)
        bits = bigram / math.log(2) / data.bytes_per_token
        baseline = {"baseline/bigram_loss": bigram, "baseline/bigram_bits_per_byte": bits}
    degrees = module.topology.degrees
    last_train_loss = [value for _, value in _column(directory / "metrics.csv", "train/loss")][-1:]
    summary: dict[str, Any] = {
        "state": FINISHED,
        "train/loss": last_train_loss[0] if last_train_loss else None,
        **measured,
        **baseline,
        **about(config, module),
        **_stepped(trainer),
        **branch_of(directory),
        "steps": trainer.global_step,
        "certificate": certified(directory),
        "output_dir": str(directory),
    }
    write_summary(directory, summary)
    (directory / "hparams.yaml").unlink(missing_ok=True)  # Lightning's empty file; ours is config.yaml
    _plot(directory, baseline.get("baseline/bigram_loss"))
    for logger in wandb_loggers(trainer):
        logger.log_metrics(closing_charts(summary), step=trainer.global_step)
        logger.experiment.summary.update(summary)
    console = output()
    for table in (*tables, _table(config, summary, str(degrees))):
        console.print(table)
    return summary


def _stepped(trainer: Trainer) -> dict[str, Any]:
    """Returns what ``optim.tile`` was here, and on a GPU its name, by which predictions recognise it."""
    strategy = trainer.strategy
    assert isinstance(strategy, TEDStrategy)
    device = strategy.root_device
    name = {"device": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return name | {"optim/tile": strategy.sharded_optimizers[0].tile}


def wandb_loggers(trainer: Trainer) -> list[WandbLogger]:
    """Returns the W&B loggers in the first process, and none in the others, where they have no run."""
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger) and trainer.is_global_zero]


def about(config: TrainConfig, module: LanguageModel) -> dict[str, Any]:
    """Returns the entries of a summary that need no measurement: sizes, layout, versions."""
    parameters = count_parameters(module, config.moe.inputs * config.moe.top_k)
    degrees = module.topology.degrees
    return {
        "parameters/total": parameters.total,
        "parameters/active": parameters.active,
        "flops/per_token": training_flops(config.model, config.moe, config.optim.groups),
        "layout": degrees.described(),
        "choices": config.choices,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("tedlab", "torch", "lightning")}},
        "git_revision": _git_revision(),
    }


def announce(config: TrainConfig, logger: Logger, module: LanguageModel | None = None) -> None:
    """Logs the whole configuration, nested, as hyper-parameters; once there is a model, also facts about it."""
    known: dict[str, Any] = {"certificate": certified(Path(config.output_dir))}
    if module is not None:
        facts = about(config, module)
        known["parameters"] = {name: facts[f"parameters/{name}"] for name in ("total", "active")}
        known |= {name: facts[name] for name in ("layout", "versions", "git_revision")}
    logger.log_hyperparams({**asdict(config), **known})


def note_branch(config: TrainConfig, step: int | None) -> None:
    """Notes in ``branch.json`` from which checkpoint of another run, and of which step, this one goes on.

    A run that goes on in its own directory keeps the note, and one that begins anew there has none.
    """
    file = Path(config.output_dir, BRANCH)
    if config.ckpt_path is None:
        file.unlink(missing_ok=True)
    elif not Path(config.ckpt_path).resolve().is_relative_to(file.parent.resolve()):
        file.write_text(json.dumps({"checkpoint": str(Path(config.ckpt_path).resolve()), "step": step}) + "\n")


def branch_of(directory: Path) -> dict[str, Any]:
    """Returns the summary's entries about where a run branched off; none if it began by itself."""
    file = directory / BRANCH
    if not file.exists():
        return {}
    branch = json.loads(file.read_text())
    return {"branch/checkpoint": branch["checkpoint"], "branch/step": branch["step"]}


def certified(directory: Path) -> dict[str, Any] | None:
    """Returns the verdict and fingerprint of the run's certificate, or None if it has none."""
    file = directory / CERTIFICATE
    if not file.exists():
        return None
    certificate = json.loads(file.read_text())
    return {"ok": certificate["ok"], "fingerprint": certificate["fingerprint"]}


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # it was installed from a wheel, or there is no git


def _column(metrics: Path, name: str) -> list[tuple[int, float]]:
    """Returns the (step, value) pairs of one metric in order."""
    return [(int(row["step"]), float(row[name])) for row in read_history(metrics) if name in row]


def _plot(directory: Path, bigram: float | None) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150)
    for name, style in (("train/loss", {"lw": 1.2}), ("val/loss", {"lw": 1.8, "marker": "o", "ms": 4})):
        points = _column(directory / "metrics.csv", name)
        axes.plot([step for step, _ in points], [loss for _, loss in points], label=name, **style)
    if bigram is not None:
        axes.axhline(bigram, color="gray", ls="--", lw=1, label=f"bigram model ({bigram:.3f})")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(directory / "loss.png")
    plt.close(figure)


def _table(config: TrainConfig, summary: Mapping[str, Any], layout: str) -> Table:
    directory = summary["output_dir"]
    table = FittingTable(title=f"{config.experiment_name}: {summary['steps']} steps", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    text = "baseline/bigram_loss" in summary
    if summary["train/loss"] is not None:
        table.add_row("train loss", f"{summary['train/loss']:.4f} nats/token")
    if "val/loss" in summary:  # absent with trainer.limit_val_batches=0
        bits = summary["val/bits_per_byte"]
        table.add_row("validation loss", f"{summary['val/loss']:.4f} nats/token, {bits:.4f} bits/byte")
    if text:
        bigram, bits = summary["baseline/bigram_loss"], summary["baseline/bigram_bits_per_byte"]
        table.add_row("bigram model", f"{bigram:.4f} nats/token, {bits:.4f} bits/byte, on the same text")
    if "perf/step_time_s" in summary:
        table.add_row("throughput", _speed(config, summary))
    if "router/load_cv" in summary:
        health = (
            f"{summary['router/load_cv']:.2f} coefficient of variation, "
            f"{1 + summary['router/max_violation']:.2f} × mean at most, {summary['router/dead_experts']:.1%} dead, "
            f"{summary['router/dropped_fraction']:.1%} dropped"
        )
        table.add_row("expert load", health)
    table.add_row("layout", layout)
    table.add_row("parameters", f"{summary['parameters/total']:,} total, {summary['parameters/active']:,} active")
    memory = [f"{peak / 2**20:,.0f}" for peak in summary["memory/peak_bytes_by_rank"]]
    cpu = config.trainer["accelerator"] == "cpu"
    kind = "of the process" if cpu else "allocated on the GPU"
    table.add_row("peak memory", f"{', '.join(memory)} MiB by rank ({kind})")
    categories = ["parameters", "gradients", "optimizer", "stash", "activations", *(["before"] if cpu else [])]
    shares = [f"{_MEMORY[name]} {summary[f'memory/{name}_bytes'] / 2**20:,.1f}" for name in categories]
    table.add_row("of which", ", ".join(shares))
    pictures = "loss.png, router_load.png" if "router/load_cv" in summary else "loss.png"
    table.add_row("saved in", directory)
    table.add_row("", f"summary.json, metrics.csv, config.yaml, {pictures}, checkpoints/last.ckpt")
    if text:
        table.add_row("sample text", f'tedlab generate run={directory} prompt="def "')
    if config.logger.get("wandb", {}).get("mode") == "offline":
        table.add_row("upload to W&B", f"wandb sync {directory}/wandb/offline-run-*")
    return table


def _speed(config: TrainConfig, summary: Mapping[str, Any]) -> str:
    text = f"{summary['perf/tokens_per_second']:,.0f} tokens/s, {summary['perf/step_time_s'] * 1e3:,.0f} ms/step"
    kind = "process" if config.trainer["accelerator"] == "cpu" else "GPU"
    text += f", {summary['perf/tflops']:.3g} TFLOP/s per {kind}"
    return text + (f", MFU {summary['perf/mfu']:.1%}" if "perf/mfu" in summary else "")
