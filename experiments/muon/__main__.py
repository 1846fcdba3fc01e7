"""``python -m experiments.muon``: see README.md."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.paper import write_json
from experiments.sweeps import draw, spread, swept
from tedlab.launch.outcome import read_summary

HERE = Path(__file__).parent
RUNS = Path("runs/muon")
OPTIMIZERS = ("adamw", "muon")
RATES = ("2e-3", "4e-3", "8e-3", "16e-3", "32e-3")
# The model of experiments/routers. Newton-Schulz in fp32: this is a CPU.
GIVEN = ("experiment=routers/micro_batch",)


def main() -> None:
    """The command. Runs that have finished are kept."""
    results: dict[str, Any] = {}
    best = {}
    for optimizer in OPTIMIZERS:
        own = ("optim.optimizer.dtype=float32",) if optimizer == "muon" else ()
        given = (*GIVEN, f"optim={optimizer}", *own)
        by_rate = {rate: swept(RUNS / f"{optimizer}_{rate}", (*given, f"optim.lr={rate}")) for rate in RATES}
        results[optimizer] = {rate: _losses(same) for rate, same in by_rate.items()}
        lowest = min(RATES, key=lambda rate: sum(results[optimizer][rate]["val/loss"]))
        best[f"{optimizer}, lr {lowest}"] = by_rate[lowest]
    write_json(HERE / "results.json", results)
    draw(HERE / "loss.png", best)
    shown = Table("learning rate", *OPTIMIZERS, title="validation loss, nats")
    for rate in RATES:
        shown.add_row(rate, *(spread(results[optimizer][rate]["val/loss"]) for optimizer in OPTIMIZERS))
    Console().print(shown)


def _losses(runs: list[Path]) -> dict[str, list[float]]:
    found = [read_summary(run) for run in runs]
    return {name: [values[name] for values in found] for name in ("val/loss", "train/loss")}


if __name__ == "__main__":
    main()
