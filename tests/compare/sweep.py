"""Run directories as ``tedlab train`` leaves them, without training."""

import csv
import json
from pathlib import Path
from typing import Any

import yaml

from tedlab.commands.compare import prepare, task
from tests.test_conf import compose

STEPS = 20
MIB = 2**20
CONFIG: dict[str, Any] = {
    "model": {"layers": 2, "hidden": 128, "vocab_size": 256, "recompute": {"granularity": "block"}},
    "moe": {"num_experts": 4, "every": 2, "top_k": 1},
    "parallel": {"world_size": 4, "tensor": 2, "expert": 2},
    "comm": {"backend": None, "dtd": False, "cac": False, "emulate": None},
    "data": {"path": None, "tokenizer": "byte", "batch_size": 16, "cache_dir": "~/.cache/tedlab"},
    "optim": {"lr": 0.004, "optimizer": {"betas": [0.9, 0.95]}},
    "trainer": {"accelerator": "cpu", "devices": 4, "max_steps": STEPS},
    "logger": {"wandb": {"project": "tedlab", "name": "a run", "save_dir": "?"}},
    "experiment_name": "ablation",
    "seed": 0,
    "output_dir": "?",
    "ckpt_path": None,
    "choices": {"parallel": "tp2_ep2", "hydra/launcher": "basic"},
}
SUMMARY: dict[str, Any] = {
    "train/loss": 3.1260263919830322,
    "val/loss": 3.001272439956665,
    "val/bits_per_byte": 4.330350099412087,
    "perf/tokens_per_second": 8000.0,
    "perf/step_time_s": 0.256,
    "memory/peak_bytes": 400 * MIB,
    "parameters/total": 841600,
    "parameters/active": 446464,
    "steps": STEPS,
    "layout": {"world_size": 4, "tensor": 2, "expert": 2, "data": 2, "expert_data": 1},
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "git_revision": "abc123",
}
LOSSES = [3.5456433296203613, 3.1260263919830322]  # after steps 10 and 20


def ledger(*, dtd: bool, cac: bool) -> dict[str, float]:
    """MiB per step of a made-up ledger: CAC leaves out the recomputation, DTD halves what experts exchange."""
    exchanged = 2.0 if dtd else 4.0
    volumes = {"tensor/all_reduce": 8.0, "expert/all_to_all": exchanged, "tensor/all_gather": 1.0 if dtd else 0.0}
    phases = dict.fromkeys(("forward", "backward", *(() if cac else ("recompute",))), volumes)
    optimizer = {"data/reduce_scatter": 3.0, "data/all_gather": 3.0}
    keys: dict[str, float] = {}
    for phase, sent in {**phases, "optimizer": optimizer, "validation": volumes}.items():
        for collective, size in sent.items():
            if size:
                keys[f"comm/{phase}/{collective}/calls"] = 6 * STEPS
                keys[f"comm/{phase}/{collective}/payload_bytes"] = 2 * size * MIB * STEPS
                keys[f"comm/{phase}/{collective}/wire_bytes"] = size * MIB * STEPS
    return {**keys, "comm/predicted_difference_bytes": 0}


def timed(summary: dict[str, Any], seconds: float = 0.001) -> dict[str, float]:
    """Each collective of a summary took so many seconds per step."""
    calls = [key for key in summary if key.startswith("comm/") and key.endswith("/calls")]
    return {key.replace("/calls", "/seconds"): seconds * STEPS for key in calls}


def write_run(
    directory: Path,
    settings: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
    losses: list[float] = LOSSES,
) -> Path:
    """A finished run: ``settings`` (dotted keys) and ``summary`` replace what it would have."""
    config = json.loads(json.dumps(CONFIG | {"output_dir": str(directory)}))
    config["logger"]["wandb"]["save_dir"] = str(directory)
    for key, value in (settings or {}).items():
        *groups, last = key.split(".")
        node = config
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    whole = SUMMARY | (summary or {})
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (directory / "summary.json").write_text(json.dumps(whole))
    with (directory / "metrics.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["epoch", "step", "train/loss", "val/loss"])
        rows.writerows([0, 10 * index + 9, loss, ""] for index, loss in enumerate(losses))
        rows.writerow([1, whole["steps"], "", whole["val/loss"]])  # the closing validation counts from 1
    return directory


def write_sweep(directory: Path) -> Path:
    """The four runs of DTD × CAC, as ``tedlab train -m`` numbers them."""
    for number in range(4):
        dtd, cac = divmod(number, 2)
        sent = ledger(dtd=bool(dtd), cac=bool(cac))
        speed = {"perf/step_time_s": 0.256 - 0.01 * number, "memory/peak_bytes": (400 + 8 * cac) * MIB}
        write_run(
            directory / str(number), {"comm.dtd": bool(dtd), "comm.cac": bool(cac)}, {**sent, **speed, **timed(sent)}
        )
    return directory


def compare_command(*arguments: str) -> None:
    """``tedlab compare …`` in this process."""
    task(compose(*prepare([*arguments]), name="compare"))
