"""Whether a plan's first choice is the fastest: its first ones and the slowest of its front, predicted and measured.

    python -m benchmarks.plan_order                   # OLMoE's width on all GPUs; calibrates first; some three minutes
    python -m benchmarks.plan_order --cluster FILE    # with a calibration of this machine that there is already
    python -m benchmarks.plan_order --tiny            # the same program in a minute on a CPU, to see that it works

Everything is predicted before anything is measured. See README.md.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.expert_parallel import TINY, attempt
from benchmarks.processes import Row
from benchmarks.steps import incomplete
from benchmarks.surroundings import surroundings
from tedlab.config import CalibrateConfig, PlanConfig, TrainConfig
from tedlab.launch.launcher import launch
from tedlab.predict.calibrate import calibrate
from tedlab.predict.cluster import ClusterConfig, load_cluster
from tedlab.predict.plan.plan import Plan, make_plan, overrides, simulated, worker_processes
from tedlab.predict.plan.search import Candidate
from tedlab.predict.plan.show import fixed_by
from tedlab.predict.spread import spread_on

_JOB = ["trainer=gpu", "parallel=single", "preset=olmoe_1b_7b", "model.layers=6", "model.sequence_length=4096"]
_JOB += ["trainer.precision=bf16-true", "model.compile=inductor", "optim.lr=1e-6"]
_SAMPLES = 4  # of each process in a step
_SIMULATED = 8  # some differ in the size of micro-batches alone
_GIB = 2**30


def job(processes: int, tiny: bool, more: Sequence[str]) -> list[str]:
    """Returns the overrides that all choices share."""
    size = [f"parallel.world_size={processes}", f"data.batch_size={_SAMPLES * processes}"]
    return [*_JOB, *size, *(TINY if tiny else ()), *more]


def planned(config: TrainConfig, cluster: ClusterConfig, fixed: Sequence[str], first: int) -> list[Candidate]:
    """Returns the candidates to measure, with the simulator's predictions."""
    with worker_processes() as workers:
        reserve = PlanConfig().reserve_gib * _GIB
        plan = make_plan(config, cluster, workers, reserve=reserve, simulations=_SIMULATED, fixed=fixed)
        last = workers.submit(simulated, config, cluster, plan.front[-1]).result()
    return chosen(plan, last, first)


def chosen(plan: Plan, last: Candidate, first: int) -> list[Candidate]:
    """Returns a plan's first choices, of each layout with its toggles the fastest, and then ``last`` as a contrast."""
    fastest: dict[tuple[Any, ...], Candidate] = {}
    for candidate in plan.simulated:
        alike = {**candidate.settings, "data.micro_batch_size": None}
        fastest.setdefault(tuple(sorted(alike.items())), candidate)
    choices = list(fastest.values())[:first]
    return choices if last.settings in [choice.settings for choice in choices] else [*choices, last]


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """For people: settings are those in which rows differ."""
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    result.add_column("settings", overflow="fold")
    for column in ("predicted, s", "range", "measured, s", "off by", "order", "measured", "GiB", "measured"):
        result.add_column(column, justify="right", no_wrap=True)
    same = set.intersection(*(set(row["settings"]) for row in rows))
    for row in rows:
        settings = " ".join(setting for setting in row["settings"] if setting not in same)
        low, high = row["predicted_range_s"]
        cells = [f"{row['predicted_s']:.4f}", f"{low:.4f} to {high:.4f}"]
        if "error" in row:
            cells += [row["error"].strip().splitlines()[-1][:40], "", f"{place(row, rows, 'predicted_s')}", ""]
            result.add_row(settings, *cells, f"{row['predicted_gib']:.2f}", "")
            continue
        cells += [f"{row['measured_s']:.4f}", f"{row['predicted_s'] / row['measured_s'] - 1:+.1%}"]
        cells += [f"{place(row, rows, key)}" for key in ("predicted_s", "measured_s")]
        measured = f"{row['measured_gib']:.2f}" if row["measured_gib"] else ""  # a CPU keeps no record
        result.add_row(settings, *cells, f"{row['predicted_gib']:.2f}", measured)
    return result


def place(row: dict[str, Any], rows: list[dict[str, Any]], key: str) -> int:
    """Returns 1 for the quickest of the rows that have this."""
    return 1 + sum(other[key] < row[key] for other in rows if key in other)


def verdict(rows: list[dict[str, Any]]) -> str:
    """Says what following the plan costs."""
    done = [row for row in rows if "error" not in row]
    if not done:
        return "Nothing could be measured."
    first = min(done, key=lambda row: row["predicted_s"])
    over = first["measured_s"] / min(row["measured_s"] for row in done)
    return f"What is predicted to be the fastest took {over:.3f} x the time of the fastest of {len(done)} measured."


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan_order",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--processes", type=int, help="as many GPUs (default: all)")
    parser.add_argument("--cluster", help="a cluster file (default: calibrates)")
    parser.add_argument("--first", type=int, default=3, help="choices of the plan (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides of the job")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on two processes of a CPU")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    device = "cpu" if arguments.tiny else "cuda"
    processes = arguments.processes or (2 if arguments.tiny else torch.cuda.device_count())
    if not processes:
        parser.error("there is no GPU; --tiny runs on a CPU")
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.cluster or str(Path(folder, "mine.yaml"))
        if arguments.cluster is None:
            launch(calibrate, CalibrateConfig(path, processes, device, quick=arguments.tiny), processes)
        cluster, lines = load_cluster(path), Path(path).read_text().splitlines()
    asked = job(processes, arguments.tiny, arguments.set)
    candidates = planned(incomplete(asked), cluster, fixed_by(arguments.set), arguments.first)
    rows: list[dict[str, Any]] = [
        {
            "settings": overrides(candidate),
            "predicted_s": candidate.step_seconds,
            "predicted_range_s": spread_on(cluster).range(candidate.step_seconds),
            "predicted_gib": candidate.peak_bytes / _GIB,
        }
        for candidate in candidates
    ]
    facts = surroundings(torch.device(device)) | {"processes": processes, "job": asked, "calibration": lines}

    def save() -> None:
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n")

    save()
    row = Row("", processes, steps=arguments.steps)
    for number, planned_row in enumerate(rows, 1):
        found = attempt(replace(row, name=f"choice {number}", overrides=(*asked, *planned_row["settings"])))
        if "error" in found:
            planned_row["error"] = found["error"]
        else:
            planned_row |= {"measured_s": found["step_s"], "measured_gib": found["peak_gib"]}
            planned_row |= {"measured_steps_s": found["steps_s"], "measured_phases_s": found["phases_s"]}
        save()
        print(found["name"], found.get("error") or f"{found['step_s']:.4f} s", flush=True)
    Console(width=170).print(table(rows, f"{processes} x {facts['device']}: {' '.join(asked)}"))
    print(verdict(rows))


if __name__ == "__main__":
    main()
