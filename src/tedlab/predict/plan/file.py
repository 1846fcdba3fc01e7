"""Reads the file that ``tedlab plan`` writes and ``+plan=FILE`` takes: one override a line, of the keys below only.

Such a file may come from others. If any override were allowed, it could make Hydra call any function: by ``_target_``
below ``optim.optimizer`` or ``logger``, ``hydra.launcher`` or ``--config-dir``; and ``data.module`` is imported. So it
describes a model and its layout, and nothing else.
"""

import re
from dataclasses import fields
from pathlib import Path

from tedlab.config import CommConfig, DataConfig, ModelConfig, MoEConfig, OptimConfig, ParallelConfig
from tedlab.renamed import RENAMED

_GROUPS = {"experiment", "model", "moe", "parallel", "comm", "data", "optim", "trainer"}  # presets of the user's conf/
_SECTIONS = {
    "model": ModelConfig,
    "moe": MoEConfig,
    "parallel": ParallelConfig,
    "comm": CommConfig,
    "data": DataConfig,
    "optim": OptimConfig,
}
_APART = {
    "comm.ledger",
    "data.path",
    "data.field",
    "data.tokenizer",
    "data.cache_dir",
    "data.module",
    "optim.optimizer",
    "model.recompute",
}
_TRAINER = {"accelerator", "devices", "num_nodes", "precision", "max_steps", "accumulate_grad_batches"}
KEYS = {f"{section}.{field.name}" for section, kind in _SECTIONS.items() for field in fields(kind)} - _APART
KEYS |= {*RENAMED, *RENAMED.values()}
KEYS |= {f"trainer.{name}" for name in (*_TRAINER, "gradient_clip_val")} | {"seed", "validate_every"}

_OVERRIDE = re.compile(r"(?:\+\+?)?([\w.]+)=(.*)")
_OPTION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")  # a preset's name, not a path that leads out of conf/
_VALUE = re.compile(r"[^${}()]*")  # no interpolation, no dictionary, no function of Hydra's


def allowed(override: str) -> bool:
    """Returns whether a plan's file may contain the override."""
    parts = _OVERRIDE.fullmatch(override)
    if parts is None:
        return False
    key, value = parts.groups()
    if key in _GROUPS:
        return _OPTION.fullmatch(value) is not None and ".." not in value
    return key in KEYS and _VALUE.fullmatch(value) is not None


def read(path: Path) -> list[str]:
    """Returns the overrides in a file.

    Raises:
        OSError: If there is no such file.
        ValueError: If the file is not text, or has a line that no plan has, which the message quotes.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no plan: it is not text ({error.reason})") from None
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for number, line in enumerate(lines, 1):
        if not allowed(line):
            raise ValueError(
                f"{path}: {line[:80]!r} (override {number}) is nothing that `tedlab plan` writes: a plan "
                "sets presets and numbers of model, moe, parallel, comm, data, optim and trainer. If you trust it, "
                "give it on the command line."
            )
    return lines
