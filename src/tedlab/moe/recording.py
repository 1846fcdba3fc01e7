"""Routers' side of the record of a run's routing, see ``record.py``."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tedlab.record import Recording


class RoutingRecorder:
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
        recorded_TK = self.recording.choices(step)[router][token_T.cpu().numpy()]
        expert_TK = torch.from_numpy(recorded_TK).to(token_T.device)
        kept_TK = (expert_TK.unsqueeze(-1) == own_TK.unsqueeze(-2)).any(-1)
        self._flips.setdefault(router, []).append(1 - kept_TK.double().mean())
        return expert_TK

    def take_flips(self) -> Tensor:
        """Returns the share of flipped choices by router (L,), over the calls since the last time."""
        flips, self._flips = self._flips, {}
        return torch.stack([torch.stack(flips[router]).mean() for router in sorted(flips)])
