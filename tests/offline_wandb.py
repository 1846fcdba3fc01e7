"""What an offline W&B run holds, read from its ``.wandb`` file: records of protocol buffers in LevelDB's log format."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK, _FILE_HEADER, _HEADER = 32768, 7, 7
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """One run.

    Attributes:
        events: in order: ``config`` and ``history`` with their values, ``exit`` with its code.
        name: as people see it.
        group: of the run.
        tags: of the run.
        charts: preset of each chart that W&B draws, by key.
        artifacts: the name of each that was logged, and its references by file.
        preempting: whether it was marked so.
        config: nested, as it was in the end.
        rows: of metrics.
        summary: in the end.
        axes: metrics that were defined.
        exit_code: None if the run never said that it ended.
    """

    events: list[tuple[str, Any]] = field(default_factory=list)
    name: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)
    charts: dict[str, str] = field(default_factory=dict)
    artifacts: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    preempting: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    axes: set[str] = field(default_factory=set)
    exit_code: int | None = None


def read_offline_run(directory: Path) -> OfflineRun:
    """The only run below ``directory/wandb``."""
    from wandb.proto.wandb_internal_pb2 import Record  # where it is missing, other tests still run

    (file,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    run = OfflineRun()
    for data in _records(file.read_bytes()):
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.name, run.group = record.run.display_name, record.run.run_group
            run.tags += record.run.tags
            run.config |= _values(record.run.config.update)
        elif kind == "config":
            run.config |= _values(record.config.update)
            for path, value in _values(record.config.update).items():
                if path.startswith("_wandb.visualize."):
                    run.charts[path.removeprefix("_wandb.visualize.")] = value["panel_config"]["panelDefId"]
                else:
                    run.events.append(("config", {path: value}))
        elif kind == "history":
            row = _values(record.history.item)
            run.rows.append(row)
            run.events.append(("history", row))
        elif kind == "summary":
            run.summary |= _values(record.summary.update)
        elif kind == "metric":
            run.axes.add(record.metric.name or record.metric.glob_name)
        elif kind == "artifact":
            entries = {entry.path: entry.ref for entry in record.artifact.manifest.contents if entry.ref}
            run.artifacts.append((record.artifact.name, entries))
        elif kind == "preempting":
            run.preempting = True
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
            run.events.append(("exit", run.exit_code))
    return run


def _values(items: Any) -> dict[str, Any]:
    """Values by key; a nested key as dotted."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(content: bytes) -> Iterator[bytes]:
    assert content[:4] == b":W&B"
    at, parts = _FILE_HEADER, b""
    while at + _HEADER <= len(content):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:  # padding at the end of a block
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST):
            return
        data = content[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        parts = data if kind in (_WHOLE, _FIRST) else parts + data
        if kind in (_WHOLE, _LAST):
            yield parts
