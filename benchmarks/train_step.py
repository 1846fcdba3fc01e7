"""The whole training step of one GPU: throughput, share of its peak, memory, and what each part of tedlab brings.

    python -m benchmarks.train_step experiment=gpu/olmoe_1b_7b
    python -m benchmarks.train_step experiment=gpu/ted_1.3b_moe data.micro_batch_size=8 --out FILE.json

First as configured, on random tokens; then on text (the standard library's, byte by byte); then with each of the parts
below switched off. See README.md.
"""

import argparse
import json
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from benchmarks.steps import WARM_UP, composed, free, train
from benchmarks.surroundings import surroundings

TEXT = "on text"
_NCCL = "ncclDevKernel"  # how names of its kernels begin
KINDS = {  # of kernels, by how names begin on an H200 with torch 2.11; those of rows are moe/*_kernels.py's
    "collectives": (_NCCL,),
    "grouped products": ("_ZN7cutlass",),
    "attention and other products": ("cudnn", "void cudnn", "nvjet"),
    "kernels of rows": ("_take", "_combine", "_hidden", "_pilots", "_moved_on", "_runs", "_codes", "_number"),
    "Adam": ("_adam",),
}
OTHERS = "others"
ROWS = {  # what each changes
    "as configured": [],
    TEXT: [],
    "no torch.compile": ["model.compile=none"],
    "all logits at once": ["model.loss_chunk=null"],
    "plain experts": ["moe.kernel=torch"],
    "optimizer in tiles": ["optim.tile=1800000"],
}


class Profile(Callback):
    """Of the first step after the warm-up: kernels by kind and the longest, exposed exchanges, and what was idle."""

    def __init__(self, rows: int) -> None:
        self.rows, self.table = rows, ""
        self.profile = torch.profiler.profile(activities=list(torch.profiler.supported_activities()))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARM_UP * trainer.accumulate_grad_batches:
            self.profile.start()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == (WARM_UP + 1) * trainer.accumulate_grad_batches:
            self.profile.stop()
            kernels: dict[str, list[float]] = {}
            spans = []
            for event in self.profile.events() or ():
                if event.device_type.name == "CUDA" and not event.name.startswith("nccl:"):  # names a kernel again
                    kernels.setdefault(event.name, []).append(event.device_time)
                    spans.append((event.time_range.start, event.time_range.end, event.name))
            longest = sorted(kernels.items(), key=lambda kernel: -sum(kernel[1]))
            lines = [
                f"{sum(taken) / 1e3:9.2f} ms {len(taken):6} × {name.removeprefix('void at::native::')[:150]}"
                for name, taken in longest[: self.rows]
            ]
            total = f"{sum(sum(t) for t in kernels.values()) / 1e3:9.2f} ms in all"
            kinds = by_kind((name, sum(taken) / 1e3) for name, taken in kernels.items())
            of = [f"{taken:9.2f} ms of {kind}" for kind, taken in kinds.items()]
            self.table = "\n".join([total, *of, *lines, *exposed(sorted(spans)), *idle(sorted(spans), self.rows // 4)])


def by_kind(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Returns how long kernels of each kind took.

    Args:
        kernels: The name of each, and how long it took.
    """
    found = dict.fromkeys([*KINDS, OTHERS], 0.0)
    for name, taken in kernels:
        found[next((kind for kind, begins in KINDS.items() if name.startswith(begins)), OTHERS)] += taken
    return found


def exposed(spans: list[tuple[float, float, str]]) -> list[str]:
    """Tells how long NCCL's kernels ran, and how long of it nothing but NCCL did, be it to move bytes or to wait.

    Args:
        spans: As of :func:`idle`.
    """
    computing: list[list[float]] = []  # start and end of each time in which other kernels run
    for start, stop, _ in (span for span in spans if not span[2].startswith(_NCCL)):
        if computing and start <= computing[-1][1]:
            computing[-1][1] = max(computing[-1][1], stop)
        else:
            computing.append([start, stop])
    found: dict[str, tuple[float, float]] = {}
    for start, stop, name in (span for span in spans if span[2].startswith(_NCCL)):
        beside = sum(max(0.0, min(stop, end) - max(start, begin)) for begin, end in computing)
        alone, whole = found.get(short := name.partition("(")[0], (0.0, 0.0))
        found[short] = alone + stop - start - beside, whole + stop - start
    return [f"{alone / 1e3:9.2f} ms of {whole / 1e3:.2f} alone: {name}" for name, (alone, whole) in found.items()]


def idle(spans: list[tuple[float, float, str]], rows: int) -> list[str]:
    """Tells how long a device did nothing, and between which kernels longest.

    Args:
        spans: Start and end in µs, and name, of each kernel, by start.
        rows: How many pairs of kernels are listed.
    """
    gaps: dict[str, list[float]] = {}
    end, last = spans[0][1:] if spans else (0.0, "")  # of what ended last so far
    for start, stop, name in spans:
        if start > end:
            gaps.setdefault(f"{last[:70]} → {name[:70]}", []).append(start - end)
        if stop > end:
            end, last = stop, name
    longest = sorted(gaps.items(), key=lambda gap: -sum(gap[1]))[:rows]
    total = sum(sum(gap) for gap in gaps.values())
    return [f"{total / 1e3:9.2f} ms idle", *(f"{sum(g) / 1e3:9.2f} ms {len(g):6} × {name}" for name, g in longest)]


def attempt(name: str, overrides: list[str], steps: int, text: bool = False) -> dict[str, Any]:
    """One row, of what was measured or why it could not be."""
    row: dict[str, Any] = {"name": name, "overrides": overrides}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    try:
        config = composed(overrides)
        row |= train(config, steps, text).summary(config, device)
    except torch.cuda.OutOfMemoryError:
        row["error"] = "out of memory"
    except Exception:
        row["error"] = traceback.format_exc()
    free()
    print(f"{name}: {row.get('error') or format(row['tokens_per_second'], ',.0f') + ' tokens/s'}", flush=True)
    return row


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """For people."""
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("", "peak GiB", "forward", "backward", "optimizer", "step ms", "tokens/s", "TFLOP/s", "MFU"):
        result.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        if "error" in row:
            result.add_row(row["name"], row["error"].strip().splitlines()[-1][:40])
            continue
        phases = [f"{1e3 * row['phases_s'].get(name, 0.0):.1f}" for name in ("forward", "backward", "optimizer")]
        result.add_row(
            row["name"],
            f"{row['peak_gib']:.1f}",
            *phases,
            f"{1e3 * row['step_s']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tflops']:.0f}",
            "" if row["mfu"] is None else f"{row['mfu']:.1%}",
        )
    return result


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("overrides", nargs="+", help="of tedlab train: a preset, and changes to it")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each row (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="to measure (default: all)")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N longest kernels of a step")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    facts = surroundings(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rows: list[dict[str, Any]] = []
    for name in arguments.rows:
        rows.append(attempt(name, [*arguments.overrides, *ROWS[name]], arguments.steps, text=name == TEXT))
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n")
    Console(width=130).print(table(rows, f"{' '.join(arguments.overrides)}; {facts['device']}"))
    if arguments.profile:
        profile = Profile(arguments.profile)
        train(composed(arguments.overrides), 1, False, profile)
        print(profile.table)


if __name__ == "__main__":
    main()
