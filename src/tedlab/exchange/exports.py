"""``tedlab checkpoint export``: the model of a run becomes a folder that transformers loads."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tedlab.checkpoint import durable
from tedlab.checkpoint.pieces import PieceReader
from tedlab.data.tokenizers import SAVED
from tedlab.exchange import folder
from tedlab.exchange.imports import parameters_of
from tedlab.models.families import Rule, family_for
from tedlab.opened import model_of
from tedlab.places import check_free
from tedlab.progress import advancing
from tedlab.weights import PREFIX

_DTYPES = {f"{d}".removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}


class Exported(NamedTuple):
    """What an export has done.

    Attributes:
        folder: The folder.
        family: The family's ``model_type``.
        parameters: Number of parameters.
        largest_bytes: Size of the largest part of a tensor that was read at a time.
    """

    folder: Path
    family: str
    parameters: int
    largest_bytes: int


def export(
    checkpoint: Path, out: Path, name: str | None = None, dtype: str | None = None, shard_bytes: int = 4 << 30
) -> Exported:
    """Writes the model of a checkpoint as a folder, in files of ``shard_bytes``.

    It holds one tensor at a time; of experts, those that one process held when the checkpoint was written.

    Args:
        checkpoint: The checkpoint; a tokenizer in its run directory is copied.
        out: The folder, which must not exist.
        name: ``model_type`` of the family; None: the one that can express the model.
        dtype: ``bfloat16``, ``float16``, ``float32`` or ``float64``; None: as in the checkpoint.
        shard_bytes: How large a file may be, if it has several tensors.

    Raises:
        FileExistsError: If ``out`` exists.
        FileNotFoundError: If ``checkpoint`` is none.
        ValueError: If no family, or not the one that is named, can express the model, or the checkpoint is damaged, or
            ``out`` cannot be made.
    """
    check_free(out, "an export")
    model, moe = model_of(checkpoint)
    family = family_for(model, moe, name)
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype} is none of {', '.join(_DTYPES)}")
    reader = PieceReader(checkpoint)
    stored = {n.removeprefix(PREFIX): t for n, t in reader.tensors.items() if n.startswith(PREFIX)}
    rules = list(family.rules(model, moe))
    absent = sorted({rule.ours for rule in rules} ^ stored.keys())
    if absent:
        raise ValueError(f"{checkpoint} does not hold the model that it describes: {', '.join(absent[:3])}")
    # All rules about one parameter are together, so that its chunks are read once.
    by_ours: dict[str, list[Rule]] = {}
    for rule in rules:
        by_ours.setdefault(rule.ours, []).append(rule)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for ours, of in by_ours.items():
        precise = ours.endswith(".router.bias")  # moves by less than half precision shows
        kind = stored[ours].properties.dtype if dtype is None or precise else _DTYPES[dtype]
        whole = torch.empty(stored[ours].size, device="meta")
        for rule in of:
            for theirs, part in zip(rule.theirs, rule.transform.split(rule.part(whole)), strict=True):
                shapes[theirs] = kind, ((whole.shape[0], *part.shape) if rule.sliced else tuple(part.shape))
    largest = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal largest
        with advancing("exporting", sum(entry.size.numel() for entry in stored.values())) as advance:
            for ours, of in by_ours.items():
                apart = of[0].expert is not None
                for rows in reader.rows(PREFIX + ours) if apart else [None]:
                    part = reader.read(PREFIX + ours, rows)
                    largest = max(largest, part.numel() * part.element_size())
                    for rule in of if rows is None else of[rows.start : rows.stop]:
                        one = part if rows is None or rule.expert is None else part[rule.expert - rows.start]
                        yield from zip(rule.theirs, rule.transform.split(one), strict=True)
                    advance(part.numel())

    config = family.write(model, moe)
    config["dtype"] = config["torch_dtype"] = f"{shapes[rules[0].theirs[0]][0]}".removeprefix("torch.")
    tokenizer = next((p / SAVED for p in checkpoint.absolute().parents[:2] if (p / SAVED).is_file()), None)
    with durable.appearing(out) as partial:
        folder.write(partial, config, shapes, tensors(), shard_bytes)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, partial / SAVED)
    return Exported(out, family.model_type, parameters_of(model, moe), largest)
