"""``python -m experiments.resumed``: see README.md."""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.surroundings import surroundings
from experiments.paper import write_json
from tedlab.history import read_history
from tedlab.launch.outcome import METRICS, SUMMARY

HERE = Path(__file__).parent
SAVED, KILLED, REFERENCE, LAST = 80, 100, 100, 240  # steps: of the checkpoint, about the kill's, and the others' last
LOGGED = {
    **{"loss": "train/loss", "val_loss": "val/loss"},
    **{"gradient_norm": "train/gradient_norm", "dead_experts": "router/dead_experts"},
}
EVERY = 5  # steps between two rows of a run's metrics
GIVEN = (
    *("model=gpt_1.3b", "moe=paper16", "moe.dispatch=dropless", "trainer=gpu"),
    *("trainer.precision=bf16-true", "model.compile=inductor", "model.loss_chunk=16384", "optim.tile=fused"),
    # Of all runs, however long: no schedule that depends on the last step.
    *("optim.lr=3e-4", "optim.schedule=constant", "optim.warmup_steps=20"),
    *("data.batch_size=32", "data.micro_batch_size=8", "data.validation_samples=64"),
    *("logger=none", "experiment_name=resumed"),
)
TINY = (
    *("model.layers=2", "model.hidden=32", "model.heads=2", "model.ffn=64", "model.sequence_length=32"),
    *("moe.num_experts=4", "trainer=cpu", "trainer.precision=32-true", "model.compile=none", "optim.tile=null"),
    *("data.batch_size=8", "data.micro_batch_size=2", "data.validation_samples=8"),
)
Run = subprocess.Popen[bytes]


def started(run: Path, gpus: str, *overrides: str) -> Run:
    """Starts ``tedlab train`` on these GPUs; what it prints is beside its directory."""
    run.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tedlab.train", *overrides, f"hydra.run.dir={run}"]
    with run.with_suffix(".log").open("wb") as log:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpus}
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def workers(launcher: int) -> list[int]:
    """Returns the processes of a run: those that the server started which the launcher started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended just now
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    return sorted(pid for pid, parent in parents.items() if parents.get(parent) == launcher)


def wait_for_step(run: Path, process: Run, step: int) -> None:
    """Returns once the run has logged this step.

    Raises:
        RuntimeError: If it ends before.
    """
    while not any(int(row["step"]) >= step for row in read_history(run / METRICS)):
        if process.poll() is not None:
            raise RuntimeError(f"{run} ended before step {step}: see {run.with_suffix('.log')}")
        time.sleep(0.2)


def of_run(run: Path) -> dict[str, Any]:
    """Returns what a run logged: losses and the like by step, and medians of its speed after the first two rows."""
    rows = read_history(run / METRICS)
    found: dict[str, Any] = {
        name: {int(row["step"]): float(row[column]) for row in rows if column in row} for name, column in LOGGED.items()
    }
    for name in ("tokens_per_second", "step_time_s", "tflops", "mfu"):
        values = [float(row[f"perf/{name}"]) for row in rows if f"perf/{name}" in row][2:]
        found[name] = statistics.median(values) if values else None
    if (run / SUMMARY).is_file():
        summary = json.loads((run / SUMMARY).read_text())
        found |= {name: summary.get(name) for name in ("memory/peak_bytes", "parameters/total", "parameters/active")}
    return found


def differences(ours: dict[int, float], theirs: dict[int, float]) -> dict[str, float]:
    """Returns at how many steps both runs logged losses, and the largest and the mean difference of these."""
    both = [abs(ours[step] - theirs[step]) for step in sorted(ours.keys() & theirs.keys())]
    return {"steps": len(both), "largest": max(both), "mean": statistics.mean(both)} if both else {"steps": 0}


def measured(runs: Path, gpus: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Trains on so many GPUs, kills, goes on with half of them, and trains a reference on another one meanwhile."""
    given = (*GIVEN, f"trainer.log_every_n_steps={EVERY}", f"validate_every={SAVED}", *overrides)
    killed, resumed, reference = runs / "killed", runs / "resumed", runs / "reference"
    layouts = {1: "single", 2: "ep2", 4: "ep4"}
    all_gpus = [str(number) for number in range(gpus)]
    last, seldom = f"trainer.max_steps={LAST}", "checkpoint.every=null"
    began = time.monotonic()
    often = f"checkpoint.every={SAVED}"
    first = started(killed, ",".join(all_gpus), *given, last, often, f"parallel={layouts[gpus]}")
    wait_for_step(killed, first, KILLED)
    os.kill(workers(first.pid)[-1], signal.SIGKILL)
    struck = time.monotonic()
    first.wait()
    ended = time.monotonic()
    half = gpus // 2
    to_compare = f"trainer.max_steps={REFERENCE}"
    one = started(reference, str(half), *given, to_compare, seldom, "parallel=single")
    goes_on = f"parallel={layouts[half]}", f"ckpt_path={killed}"
    second = started(resumed, ",".join(all_gpus[:half]), *given, last, seldom, *goes_on)
    codes = {"resumed": second.wait(), "reference": one.wait()}
    found = {run.name: of_run(run) for run in (killed, resumed, reference)}
    return {
        "gpus": gpus,
        "overrides": given,
        "seconds": {"to_kill": struck - began, "from_kill_to_end": ended - struck, "rest": time.monotonic() - ended},
        "codes": codes,
        "runs": found,
        "killed_beside_reference": differences(found["killed"]["loss"], found["reference"]["loss"]),
        # After the checkpoint, before the kill.
        "resumed_beside_killed": differences(found["resumed"]["loss"], found["killed"]["loss"]),
    }


def draw(path: Path, found: dict[str, Any]) -> None:
    """Draws the losses of the three runs."""
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    gpus = found["gpus"]
    names = {
        "reference": "one GPU",
        "killed": f"expert {gpus}, a process killed",
        "resumed": f"goes on with expert {gpus // 2}",
    }
    for (run, label), style in zip(names.items(), ("-", "--", "-."), strict=True):
        loss = found["runs"][run]["loss"]
        axes.plot([*map(int, loss)], [*loss.values()], style, label=label, linewidth=1.2)
    axes.axvline(SAVED, color="0.7", linewidth=0.8)
    axes.set(xlabel=f"step (checkpoint at {SAVED})", ylabel="training loss, nats per byte")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m experiments.resumed", description="See README.md.")
    parser.add_argument("--runs", type=Path, default=Path("runs/resumed"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=HERE, help="where results.json and loss.png go (default: here)")
    parser.add_argument("--gpus", type=int, default=4, choices=(2, 4), help="of the first run (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="of the model's 24 blocks (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a small model on CPUs, to see that it works")
    arguments = parser.parse_args()
    facts = surroundings(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found = measured(arguments.runs, arguments.gpus, TINY if arguments.tiny else (f"model.layers={arguments.layers}",))
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "results.json", facts | found)
    draw(arguments.out / "loss.png", found)
    print(
        json.dumps(
            {name: found[name] for name in ("seconds", "codes", "killed_beside_reference", "resumed_beside_killed")}
        )
    )


if __name__ == "__main__":
    main()
