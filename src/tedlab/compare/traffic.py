"""Reads from a run's ledger what one training step communicates, by phase, group and operation, and by link."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from tedlab.compare.runs import Run

PHASES = ("forward", "recompute", "backward", "optimizer")  # the phases of a training step; validation is no part of it
OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
LINKS = {"in_node": "in node", "between_nodes": "between nodes"}

_KEY = re.compile(rf"comm/({'|'.join(PHASES)})/([^/]+)/([^/]+)/calls")


class Traffic(NamedTuple):
    """One kind of collective, per training step of rank 0.

    Attributes:
        phase: Phase of the step.
        group: Kind of process group.
        op: Operation.
        calls: Number of calls.
        payload_bytes: Bytes in the rank's buffers.
        wire_bytes: Bytes that the rank sends.
        seconds: Time that the calls take; None if they were not timed.
    """

    phase: str
    group: str
    op: str
    calls: float
    payload_bytes: float
    wire_bytes: float
    seconds: float | None


def traffic(run: Run) -> list[Traffic]:
    """Returns every kind of collective in a training step of a run, ordered by phase, operation and group."""
    found = []
    for phase, group, op in (match.groups() for key in run.summary if (match := _KEY.fullmatch(key))):
        calls, payload, wire, seconds = (
            _per_step(run, f"comm/{phase}/{group}/{op}/{what}")
            for what in ("calls", "payload_bytes", "wire_bytes", "seconds")
        )
        found.append(Traffic(phase, group, op, calls or 0.0, payload or 0.0, wire or 0.0, seconds))
    order = sorted_ops(t.op for t in found)
    return sorted(found, key=lambda t: (PHASES.index(t.phase), order.index(t.op), t.group))


def sorted_ops(ops: Iterable[str]) -> list[str]:
    """Returns each operation once: the known ones in their usual order, then the others."""
    return sorted(set(ops), key=lambda op: (OPS.index(op) if op in OPS else len(OPS), op))


def wire_by(collectives: Iterable[Traffic], *fields: str) -> dict[tuple[str, ...], float]:
    """Sums wire bytes over collectives that agree in these fields."""
    sums: dict[tuple[str, ...], float] = {}
    for collective in collectives:
        key = tuple(getattr(collective, field) for field in fields)
        sums[key] = sums.get(key, 0.0) + collective.wire_bytes
    return sums


def wire_total(run: Run) -> float | None:
    """Returns the bytes that rank 0 sends in a training step; None if the run kept no ledger."""
    if not any(key.startswith("comm/") for key in run.summary):
        return None
    return sum(collective.wire_bytes for collective in traffic(run))


def seconds_by_phase(run: Run) -> dict[str, float]:
    """Returns seconds in collectives per training step by phase; empty if they were not timed."""
    sums: dict[str, float] = {}
    for collective in traffic(run):
        if collective.seconds is not None:
            sums[collective.phase] = sums.get(collective.phase, 0.0) + collective.seconds
    return sums


def wire_by_link(run: Run) -> dict[str, float]:
    """Returns the bytes that rank 0 sends per training step within its node and to other nodes; empty if unknown."""
    return _by_link(run, "wire_bytes")


def emulated_seconds_by_link(run: Run) -> dict[str, float]:
    """Returns the seconds that an emulated network added per training step by link; empty if none was emulated."""
    return _by_link(run, "emulated_seconds")


def _per_step(run: Run, key: str) -> float | None:
    """Divides a total of the summary by the steps counted; returns None if the run has no such total."""
    total, steps = run.number(key), run.summary.get("comm/steps", run.summary["steps"])
    return total / steps if total is not None and steps else None


def _by_link(run: Run, what: str) -> dict[str, float]:
    values = {name: _per_step(run, f"comm/link/{link}/{what}") for link, name in LINKS.items()}
    return {name: value for name, value in values.items() if value is not None}
