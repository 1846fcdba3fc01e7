"""What counting every collective costs: ``python -m benchmarks.ledger <run directory>``.

Times the ledger's hook by itself, and sets it beside the collectives per step and the step time of a finished run.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console

from tedlab.comm import TRAINING_PHASES, Collective, Ledger

CALLS = 100_000


def seconds_per_collective() -> float:
    """Of one call of the hook before and one after a collective, timing of the collectives being off."""
    ledger = Ledger()
    call = Collective(
        "all_to_all", "expert", 4, "forward", "dispatch.all_to_all", torch.Size([16, 8, 64]), torch.float32
    )
    began = time.perf_counter()
    for _ in range(CALLS):
        ledger(call, "start")
        ledger(call, "end")
    return (time.perf_counter() - began) / CALLS


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="directory of a finished run, without comm.ledger.time")
    summary = json.loads((parser.parse_args().run / "summary.json").read_text())
    training = [k for k in summary if k.endswith("/calls") and k.split("/")[1] in TRAINING_PHASES]
    per_step = sum(summary[key] for key in training) / summary["comm/steps"]
    cost = seconds_per_collective()
    share = cost * per_step / summary["perf/step_time_s"]
    Console().print(
        f"{cost * 1e6:.1f} µs a collective × {per_step:g} collectives a step = {cost * per_step * 1e6:.0f} µs, "
        f"{share:.3%} of a step of {summary['perf/step_time_s'] * 1e3:,.0f} ms"
    )


if __name__ == "__main__":
    main()
