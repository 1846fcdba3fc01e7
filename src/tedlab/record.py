"""A record of a run's routing: which experts every token of every step went to, to replay it or to compare runs.

It is a directory of one ``meta.json`` and, for each step and each process that routes tokens of its own, one
``step-00000001-rank-0000.npz`` with ``token`` (T,), the tokens' numbers within the step's global batch (see
``context.py``), and ``choice`` (L, T, K), the experts of each in every MoE layer, most preferred first. Because tokens
have the same numbers in every layout, a record can be replayed in any. ``moe/recording.py`` writes and replays it.
"""

import json
import re
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from tedlab.config import TrainConfig

DIRECTORY = "routing"  # of the record, in that of its run
RECORD_META = "meta.json"
_PART = re.compile(r"step-(\d{8})-rank-\d{4,}\.npz")


@dataclass(frozen=True)
class Shape:
    """What must agree between a record and the run that replays it.

    Attributes:
        blocks: Indices of the blocks with experts.
        experts: Number of experts, E.
        top_k: Choices per token, K.
        tokens: Tokens in a step's global batch.
    """

    blocks: tuple[int, ...]
    experts: int
    top_k: int
    tokens: int

    @staticmethod
    def of(config: TrainConfig) -> "Shape":
        """Returns the shape of a run's record."""
        moe, tokens = config.moe, config.data.batch_size * config.model.sequence_length
        return Shape(moe.routed(config.model.layers), moe.num_experts, moe.top_k, tokens)


def begin(directory: Path, shape: Shape, after: int) -> None:
    """Begins a record, or goes on with one after a step, without what an earlier run left of later steps."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in directory.iterdir():
        part = _PART.fullmatch(file.name)
        if file.suffix == ".partial" or (part and int(part[1]) > after):
            file.unlink()
    (directory / RECORD_META).write_text(json.dumps(asdict(shape)) + "\n")


def record_in(path: Path) -> Path:
    """Returns the record that a path names: itself, or that of the run whose directory it is."""
    return path / DIRECTORY if (path / DIRECTORY).is_dir() else path


class Recording:
    """A record on disk, which may come from others: reading it executes nothing.

    Args:
        directory: The directory of the record.

    Raises:
        ValueError: If it is not the directory of a record.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            meta = json.loads((directory / RECORD_META).read_text())
            blocks = tuple(int(block) for block in meta["blocks"])
            self.shape = Shape(blocks, int(meta["experts"]), int(meta["top_k"]), int(meta["tokens"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{directory} is not the record of a run's routing: {error}") from None
        names = (_PART.fullmatch(file.name) for file in sorted(directory.iterdir()))
        self._files: dict[int, list[Path]] = {}
        for name in names:
            if name:
                self._files.setdefault(int(name[1]), []).append(directory / name[0])
        self.choices = lru_cache(maxsize=1)(self._read)  # of one step, which all its micro-batches and layers read

    @property
    def steps(self) -> list[int]:
        """The steps in the record, from 1."""
        return sorted(self._files)

    def _read(self, step: int) -> np.ndarray:
        """Returns the choices of a step: (L, tokens, K) int64.

        Raises:
            ValueError: If the record lacks the step or any of its tokens, or is damaged.
        """
        shape = self.shape
        whole = np.full((len(shape.blocks), shape.tokens, shape.top_k), -1, dtype=np.int64)
        if step not in self._files:
            raise ValueError(f"{self.directory} has no record of step {step}")
        for file in self._files[step]:
            try:
                with np.load(file, allow_pickle=False) as part:
                    whole[:, part["token"]] = part["choice"]
            except (OSError, ValueError, KeyError, IndexError, EOFError, BadZipFile, zlib.error) as error:
                raise ValueError(f"{file} is damaged or of another record: {error}") from None
        missing = int((whole[0, :, 0] < 0).sum())
        if missing:
            raise ValueError(f"{self.directory} lacks {missing:,} of {shape.tokens:,} tokens in step {step}")
        if whole.min() < 0 or whole.max() >= shape.experts:
            raise ValueError(f"{self.directory} names experts beyond 0 to {shape.experts - 1} in step {step}")
        return whole


def flip_rates(before: Recording, after: Recording) -> dict[int, np.ndarray]:
    """Returns, for each step that both records have, the share of choices that flipped, by layer (L,).

    A choice of ``before`` has flipped if its token does not make it in ``after``, first or last.

    Raises:
        ValueError: If the records are of different shapes, damaged or incomplete.
    """
    if before.shape != after.shape:
        raise ValueError(f"{before.directory} and {after.directory} are records of different shapes")
    rates = {}
    for step in sorted({*before.steps} & {*after.steps}):
        ours, theirs = before.choices(step), after.choices(step)
        kept = (ours[..., :, None] == theirs[..., None, :]).any(-1)
        rates[step] = 1 - kept.mean((1, 2))
    return rates
