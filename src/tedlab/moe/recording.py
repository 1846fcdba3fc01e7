"""A record of a run's routing: which experts every token of every step went to, to replay it or to compare runs.

It is a directory of one ``meta.json`` and, for each step and each process that routes tokens of its own, one
``step-00000001-rank-0000.npz`` with ``token`` (T,), the tokens' numbers within the step's global batch (see
``context.py``), and ``choice`` (L, T, K), the experts of each in every MoE layer, most preferred first. Because tokens
have the same numbers in every layout, a record can be replayed in any.
"""

import json
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tedlab.config import TrainConfig

DIRECTORY = "routing"  # of the record, in that of its run
META = "meta.json"
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
        return Shape(tuple(moe.blocks(config.model.layers)), moe.num_experts, moe.top_k, tokens)


class Recorder:
    """Collects a process's choices, and writes them step by step.

    Args:
        directory: The directory of the record.
        rank: The process's rank in the run, which names its files.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self.directory, self.rank = directory, rank
        self._parts: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by router

    def add(self, router: int, token_T: Tensor, expert_TK: Tensor) -> None:
        """Adds the choices of a micro-batch for the router of this number."""
        self._parts.setdefault(router, []).append((token_T, expert_TK))

    def save(self, step: int) -> None:
        """Writes what was added since the last call as the choices of a step, counted from 1."""
        parts, self._parts = [self._parts[router] for router in sorted(self._parts)], {}
        if not parts:
            return
        token_T = torch.cat([token for token, _ in parts[0]]).cpu().numpy()
        choice_LTK = torch.stack([torch.cat([experts for _, experts in of_layer]) for of_layer in parts])
        file = self.directory / f"step-{step:08d}-rank-{self.rank:04d}.npz"
        narrow = np.min_scalar_type(int(choice_LTK.max()))
        with file.with_suffix(".partial").open("wb") as partial:
            np.savez_compressed(partial, token=token_T, choice=choice_LTK.cpu().numpy().astype(narrow))
        file.with_suffix(".partial").replace(file)


def begin(directory: Path, shape: Shape, after: int) -> None:
    """Begins a record, or goes on with one after a step, without what an earlier run left of later steps."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in directory.iterdir():
        part = _PART.fullmatch(file.name)
        if file.suffix == ".partial" or (part and int(part[1]) > after):
            file.unlink()
    (directory / META).write_text(json.dumps(asdict(shape)) + "\n")


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
            meta = json.loads((directory / META).read_text())
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

    def _read(self, step: int) -> Tensor:
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
            except (OSError, ValueError, KeyError, IndexError, EOFError) as error:
                raise ValueError(f"{file} is damaged or of another record: {error}") from None
        missing = int((whole[0, :, 0] < 0).sum())
        if missing:
            raise ValueError(f"{self.directory} lacks {missing:,} of {shape.tokens:,} tokens in step {step}")
        if whole.min() < 0 or whole.max() >= shape.experts:
            raise ValueError(f"{self.directory} names experts beyond 0 to {shape.experts - 1} in step {step}")
        return torch.from_numpy(whole)


class Replay:
    """Gives routers the choices of a record, and counts how many they would have made differently.

    Args:
        recording: The record.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self._flips: dict[int, list[Tensor]] = {}  # of each router, the share in each micro-batch

    def choices(self, step: int, router: int, token_T: Tensor, own_TK: Tensor) -> Tensor:
        """Returns the recorded experts (T, K) of tokens, in place of a router's own choices.

        Args:
            step: The step, from 1.
            router: The number of the router.
            token_T: The tokens' numbers in the step's global batch.
            own_TK: The router's own choices.
        """
        expert_TK = self.recording.choices(step)[router].to(token_T.device)[token_T]
        self._flips.setdefault(router, []).append(flipped(expert_TK, own_TK))
        return expert_TK

    def take_flips(self) -> Tensor:
        """Returns the share of flipped choices by router (L,), over the calls since the last time."""
        flips, self._flips = self._flips, {}
        return torch.stack([torch.stack(flips[router]).mean() for router in sorted(flips)])


def flipped(before_TK: Tensor, after_TK: Tensor) -> Tensor:
    """Returns the share of the choices before, in any order, that a token no longer makes after."""
    kept_TK = (before_TK.unsqueeze(-1) == after_TK.unsqueeze(-2)).any(-1)
    return 1 - kept_TK.double().mean()
