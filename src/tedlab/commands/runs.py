"""``tedlab runs [DIR …]``: lists runs with their states and losses, the newest last, and says how to resume them.

DIR is a run, a sweep, or a folder with such folders; by default ``runs``. It reads files and changes none.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from tedlab.commands.arguments import ArgumentParser

ROWS = 20


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = ArgumentParser(prog="tedlab runs", description=__doc__)
    parser.add_argument("places", nargs="*", type=Path, default=[Path("runs")], metavar="DIR", help="default: runs")
    parser.add_argument("--all", action="store_true", help=f"list all runs, not only the newest {ROWS}")
    options = parser.parse_args(arguments)
    missing = [place for place in options.places if not place.is_dir()]
    if missing:
        sys.exit(f"There is no folder {missing[0]}. `tedlab runs DIR` lists the runs in DIR")
    show(options.places, None if options.all else ROWS)


def show(places: Sequence[Path], most: int | None) -> None:
    """Prints the newest ``most`` runs below some folders; None: all of them."""
    from rich.text import Text

    from tedlab.commands.continued import command_to_continue
    from tedlab.console import output
    from tedlab.launch.listing import DAMAGED, KILLED, list_runs
    from tedlab.launch.outcome import FAILED, INTERRUPTED
    from tedlab.tables import FittingTable
    from tedlab.untrusted import flat

    found = list_runs(places)
    shown = found if most is None else found[-most:]
    console = output()
    if not found:
        console.print(f"There are no runs in {', '.join(map(flat, places))}.")
        return
    table = FittingTable(box=None, padding=(0, 2, 0, 0))
    for name in ("run", "state", "step", "train loss", "val loss", "last change"):
        table.add_column(name, justify="right" if name in ("step", "train loss", "val loss") else "left")
    for run in shown:
        steps = f"{run.steps:,}" + (f" / {run.max_steps:,}" if run.max_steps else "")
        losses = ("" if loss is None else f"{loss:.4f}" for loss in (run.train_loss, run.val_loss))
        cells = (flat(run.directory), run.state, steps, *losses, run.changed)
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    if len(shown) < len(found):
        console.print(f"… and {len(found) - len(shown)} older ones (--all)")
    for run in shown:
        reason = f" ({run.reason})" if run.reason else ""
        if run.state == DAMAGED and run.resumable is None:
            console.print(f"{flat(run.directory)} {run.state}{reason}", soft_wrap=True)
        if run.state in (FAILED, INTERRUPTED, KILLED, DAMAGED) and run.resumable is not None:
            command = command_to_continue(run.directory)
            where = f"{command}   # goes on at step {run.resumable}"
            if command is None:
                where = (
                    f"It goes on at step {run.resumable} with its own overrides (they are not kept here), resume=auto "
                    f"and hydra.run.dir={flat(run.directory)}"
                )
            console.print(f"{flat(run.directory)} {run.state}{reason}\n  {where}", soft_wrap=True)
