"""``tedlab compare``: the command line."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from tedlab.cli import UsageError
from tedlab.compare.charts import charts
from tedlab.compare.comparison import Comparison, compare
from tedlab.compare.page import page
from tedlab.compare.runs import read_runs
from tedlab.compare.terminal import show

_EXAMPLES = """\
examples:
  tedlab compare runs/ablation_comm/<date>                    a sweep: one row for each of its runs
  tedlab compare runs/main/<date> runs/main/<other date>      single runs; the first is the reference
  tedlab compare <sweep> --by comm.dtd,comm.cac --out report.html
  tedlab compare --wandb me/tedlab --group runs/ablation_comm/<date> --out report.html --workspace
"""


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if bool(options.directories) == bool(options.wandb):
        parser.error("give run or sweep directories, or --wandb ENTITY/PROJECT --group GROUP")
    if bool(options.wandb) != bool(options.group):
        parser.error("--wandb ENTITY/PROJECT and --group GROUP belong together")
    if options.wandb and options.wandb.count("/") != 1:
        parser.error(f"--wandb {options.wandb}: write it as ENTITY/PROJECT")
    if options.workspace and not options.wandb:
        parser.error("--workspace needs --wandb ENTITY/PROJECT --group GROUP")
    if options.out is not None and options.out.suffix != ".html":
        parser.error(f"--out {options.out}: the report is an HTML file, its name must end in .html")
    try:
        _run(options)
    except (UsageError, OSError) as error:
        sys.exit(f"{error}")


def _run(options: argparse.Namespace) -> None:
    if options.wandb:
        from tedlab.compare.wandb_runs import read_group

        runs, notes = read_group(options.wandb, options.group, options.force)
    else:
        runs, notes = read_runs(options.directories, options.force)
    by = [key.strip() for key in options.by.split(",")] if options.by else []
    comparison = compare(runs, by, notes, options.force)
    show(comparison)
    if options.out is not None:
        Console(soft_wrap=True, highlight=False).print(f"Report: {write(comparison, options.out)}", markup=False)
    if options.workspace:
        from tedlab.compare.workspace import save_workspace

        save_workspace(comparison, options.wandb, options.group)


def write(comparison: Comparison, out: Path) -> Path:
    """Writes the report, and its charts as PNG into the folder ``<stem>_charts`` beside it."""
    drawn = charts(comparison)
    folder = out.with_name(f"{out.stem}_charts")
    folder.mkdir(parents=True, exist_ok=True)
    for chart in drawn:
        (folder / f"{chart.name}.png").write_bytes(chart.light)
    out.write_text(page(comparison, drawn), encoding="utf-8")
    return out


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tedlab compare",
        description="Finished runs side by side: settings that differ, losses with all digits that tell them apart,\n"
        "speed, bytes by operation and phase, memory, and ratios to the first run.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directories",
        type=Path,
        nargs="*",
        metavar="DIR",
        help="a run directory (with config.yaml), or a directory with runs directly below it, such as a sweep's",
    )
    parser.add_argument("--by", metavar="KEY[,KEY…]", help="show these settings; default: all that differ")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help="write a self-contained report, and its charts as PNG into FILE_charts/ beside it",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="compare runs of different models, data or numbers of steps, with a note that their losses do not mean "
        "the same (an error otherwise), and also runs that failed or were interrupted, as far as they came",
    )
    server = parser.add_argument_group("runs on a W&B server")
    server.add_argument("--wandb", metavar="ENTITY/PROJECT", help="read the runs from there, not from directories")
    server.add_argument("--group", help="of the runs; tedlab train calls it as the directory of a sweep")
    server.add_argument(
        "--workspace",
        action="store_true",
        help="also save a view of the group with the same charts in the project (needs tedlab's extra 'wandb')",
    )
    return parser
