"""``python -m experiments.mup``: see README.md."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from experiments.mup.coordinates import Moves, model_of, moves, slopes, trained
from experiments.paper import write_json
from tedlab import Topology

HERE = Path(__file__).parent
FORMS = ("standard", "mup")
WIDTHS, STEPS, SEEDS, RATE = (32, 64, 128, 256), 4, 5, 0.01
RATES = tuple(2.0**-n for n in range(10, 3, -1))  # of the search
TRAINED, SEARCH_SEEDS = 40, 2


def main() -> None:
    """The command, which takes some three minutes of one core."""
    torch.set_num_threads(1)
    Topology.single()
    results = {form: {"moves": checked(form), "losses": searched(form)} for form in FORMS}
    write_json(HERE / "results.json", results)
    draw(results, HERE / "mup.png")
    Console().print(table(results))


def checked(form: str) -> list[Moves]:
    """The moves of activations at each width, as means over seeds."""
    found = []
    for width in WIDTHS:
        model = model_of(width, _base(form), form)
        of = [moves(model, RATE, STEPS, seed) for seed in range(SEEDS)]
        found.append({name: [float(x) for x in np.mean([its[name] for its in of], axis=0)] for name in of[0]})
    return found


def searched(form: str) -> list[list[float]]:
    """The loss after training at each width and each learning rate, as means over seeds."""
    models = [model_of(width, _base(form), form) for width in WIDTHS]
    seeds = range(SEARCH_SEEDS)
    return [[float(np.mean([trained(m, lr, TRAINED, seed) for seed in seeds])) for lr in RATES] for m in models]


def _base(form: str) -> int | None:
    return None if form == "standard" else WIDTHS[0]


def best(of_rates: list[float]) -> float:
    """The rate with the least loss."""
    return RATES[int(np.argmin(of_rates))]


def table(results: dict[str, Any]) -> Table:
    """The powers of the width, and the best rate of each width."""
    names = list(results["mup"]["moves"][0])
    shown = Table("form", *names, "best rates, by width")
    for form, of in results.items():
        powers = slopes(WIDTHS, of["moves"], STEPS - 1)
        rates = ", ".join(f"{best(row):.4f}" for row in of["losses"])
        shown.add_row(form, *(f"{powers[name]:+.2f}" for name in names), rates)
    return shown


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws the coordinate check above and the search below, one column for each form."""
    figure, rows = plt.subplots(2, len(FORMS), figsize=(9, 7), sharey="row", layout="constrained")
    for form, above, below in zip(FORMS, *rows, strict=True):
        for name in results[form]["moves"][0]:
            above.plot(WIDTHS, [of[name][STEPS - 1] for of in results[form]["moves"]], "o-", label=name)
        above.set(title=form, xscale="log", yscale="log", xlabel="hidden", xticks=WIDTHS)
        above.set_xticks(WIDTHS, map(str, WIDTHS))
        above.minorticks_off()
        for shade, (width, of) in enumerate(zip(WIDTHS, results[form]["losses"], strict=True)):
            colour = plt.get_cmap("viridis")(shade / len(WIDTHS))
            below.plot(RATES, of, color=colour, label=f"hidden {width}")
            below.plot(best(of), min(of), "o", color=colour)
        below.set(xscale="log", xlabel="learning rate at the base" if _base(form) else "learning rate")
    rows[0][0].set_ylabel(f"mean change of activations in {STEPS} steps")
    rows[1][0].set(ylabel=f"training loss after {TRAINED} steps", ylim=(None, 4.5))
    rows[0][0].legend(fontsize="small")
    rows[1][0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
