"""Defines the quantities by which runs are compared: the source, format and meaning of each."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tedlab.compare.runs import Run
from tedlab.compare.traffic import wire_total

MIB = 2**20


@dataclass(frozen=True)
class Quantity:
    """A number that a run may have.

    Attributes:
        heading: Heading of its column.
        meaning: Its definition, as a sentence for the report.
        value: Returns the quantity of a run; None if the run has none.
        show: Formats a value.
        timed: Whether an emulated network changes it.
    """

    heading: str
    meaning: str
    value: Callable[[Run], float | None]
    show: Callable[[float], str]
    timed: bool = False


def significant(value: float, digits: int = 3) -> str:
    """Formats a number with at least ``digits`` significant digits and no exponent: 1,234  56.7  0.00123."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def mib(size: float) -> str:
    """Formats bytes as MiB."""
    return significant(size / MIB)


def milliseconds(seconds: float) -> str:
    """Formats seconds as milliseconds."""
    return significant(seconds * 1e3)


def telling(values: Sequence[float | None]) -> list[str]:
    """Formats values with enough digits to tell all different ones apart, at least six; None becomes "–"."""
    different = {repr(value) for value in values if value is not None}
    for digits in range(6, 18):
        texts = ["–" if value is None else f"{value:#.{digits}g}" for value in values]
        if len({text for text in texts if text != "–"}) == len(different):
            break
    return texts


def of_summary(
    key: str, heading: str, meaning: str, show: Callable[[float], str] = significant, *, timed: bool = False
) -> Quantity:
    """Makes the quantity that ``summary.json`` holds under ``key``."""
    return Quantity(heading, meaning, lambda run: run.number(key), show, timed)


TOKENS_SEEN = of_summary(
    "perf/tokens_per_second",
    "tokens/s",
    "Tokens of a step, over all data ranks, by the step time.",
    lambda value: f"{value:,.0f}",
    timed=True,
)
STEP_TIME = of_summary(
    "perf/step_time_s",
    "ms/step",
    "Wall-clock time of one optimizer step: the mean over the run without its first logged interval (warm-up), and "
    "without validation.",
    milliseconds,
    timed=True,
)
SENT = Quantity(
    "sent\nMiB/step",
    "Bytes that rank 0 puts on the wire in one training step, counted by the ledger where each collective happens: "
    "the bytes in the rank's buffer × 2(n−1)/n for an all-reduce of n processes, × (n−1)/n for an all-gather, "
    "reduce-scatter or all-to-all. Validation, metrics and checkpoints are left out.",
    wire_total,
    mib,
)
PEAK = of_summary(
    "memory/peak_bytes",
    "peak\nMiB",
    "Peak memory of the rank that needs most: allocated on the GPU, or resident set of the process on a CPU.",
    mib,
)
RESULTS = (TOKENS_SEEN, STEP_TIME, SENT, PEAK)


def evaluated(runs: Sequence[Run]) -> list[Quantity]:
    """Returns what runs' evaluations on named sets and tasks found: losses, and what tasks measure."""
    keys = dict.fromkeys(key for run in runs for key in run.summary if _EVALUATED.fullmatch(key))
    return [of_summary(key, key.replace("/", "\n"), _MEANING[key.split("/")[0]], _five_digits) for key in keys]


_EVALUATED = re.compile(r"(?:val|eval)/[^/]+/(?!perplexity|bits_per_byte|.*stderr)[^/]+")
_MEANING = {
    "val": "Loss of a named set at the last validation, in nats per token.",
    "eval": "What `tedlab eval` found of a named set (loss, in nats per token) or task.",
}


def _five_digits(value: float) -> str:
    return significant(value, 5)


def _hundredths(share: float) -> str:
    return significant(share * 100)


_MOST = "Of the rank that has most."
FURTHER = (
    of_summary("val/bits_per_byte", "val\nbits/byte", "Validation loss per byte of text, whatever the tokenizer."),
    of_summary(
        "perf/tflops",
        "TFLOP/s\nper device",
        "FLOPs that the model needs for a step, by its time; recomputation is not counted.",
        timed=True,
    ),
    of_summary("perf/mfu", "MFU\n%", "TFLOP/s over the peak of the device.", _hundredths, timed=True),
    of_summary("memory/parameters_bytes", "parameters\nMiB", f"Weights. {_MOST}", mib),
    of_summary("memory/gradients_bytes", "gradients\nMiB", f"Gradients. {_MOST}", mib),
    of_summary("memory/optimizer_bytes", "optimizer\nMiB", f"Optimizer state and master weights. {_MOST}", mib),
    of_summary("memory/activations_bytes", "activations\nMiB", f"What else was there at the peak. {_MOST}", mib),
    of_summary("memory/stash_bytes", "stash\nMiB", f"Collectives' results, for recomputation. {_MOST}", mib),
    of_summary(
        "router/load_cv", "load\nCV", "Standard deviation of the experts' loads over their mean: 0 is balanced."
    ),
    of_summary(
        "router/max_violation",
        "max\nviolation",
        "Load of the fullest expert over the mean, less 1: 0 is balanced.",
    ),
    of_summary(
        "router/entropy",
        "effective\nexperts %",
        "Exponential of the entropy of the experts' loads, over the number of experts: 100 is balanced.",
        _hundredths,
    ),
    of_summary("router/dead_experts", "dead\nexperts %", "Share of experts that got no token.", _hundredths),
    of_summary("router/dropped_fraction", "dropped\n%", "Share of choices that found no slot.", _hundredths),
)
