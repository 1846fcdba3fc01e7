"""Compares how many batches each process has in a loop, and keeps processes in step where the numbers differ.

If experts are divided over data ranks, a whole expert group takes part in every forward pass (in a folded layout, all
processes do), so a process whose data ends early would leave the others waiting.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tedlab.topology import Topology

_UNKNOWN = -1
Lengths = Sequence[int | float]  # batches of each of a process's data loaders; infinite where they have no length


def check_lengths(own: Lengths, stage: str, topology: Topology) -> None:
    """Refuses loops whose known lengths differ between processes, which would leave some of them waiting.

    Raises:
        ValueError: On all processes; the message names two processes and their numbers of batches.
    """
    table = _lengths(own, topology)
    for loader, column in enumerate(zip(*table, strict=True)):
        if _UNKNOWN not in column and len({*column}) > 1:
            other = next(rank for rank, batches in enumerate(column) if batches != column[0])
            which = f" of data loader {loader}" if len(own) > 1 else ""
            raise ValueError(
                f"Processes go through {stage} in step, but process 0 has {column[0]} batches{which} and process "
                f"{other} has {column[other]}. Give each as many: leave the dividing of samples to Lightning "
                "(use_distributed_sampler), or divide them evenly by trainer.strategy.distributed_sampler_kwargs."
            )


def _lengths(own: Lengths, topology: Topology) -> list[list[int]]:
    known = [_UNKNOWN if batches == float("inf") else int(batches) for batches in own]
    mine = torch.tensor([known], dtype=torch.int64, device=topology.device)
    return topology.comm.all_gather(mine, "world", tag="batches.lengths", phase="check").tolist()


class PredictionsInStep:
    """Lets a process with fewer batches to predict than others that need it take part in their last ones.

    It repeats its own last batch as often as necessary, and discards the results.

    Args:
        own: The number of batches of each data loader of this process.
        topology: The topology of this process.

    Raises:
        ValueError: On all processes, if one of them has no batch to repeat.
    """

    def __init__(self, own: Lengths, topology: Topology) -> None:
        table = _lengths(own, topology)
        members = topology.comm.ranks[topology.degrees.in_step]
        self._missing: dict[int, int] = {}  # number of own batches → repetitions after them
        done = 0
        for loader, column in enumerate(zip(*table, strict=True)):
            if 0 in column and max(column) > 0:
                raise ValueError(
                    f"Process {column.index(0)} has no batch to predict of data loader {loader}, while others have up "
                    f"to {max(column)}: use fewer processes, or a smaller batch."
                )
            if _UNKNOWN in column:
                break
            done += column[topology.comm.rank("world")]
            missing = max(column[rank] for rank in members) - column[topology.comm.rank("world")]
            self._missing[done] = self._missing.get(done, 0) + missing
        self._done = 0

    def predict(self, step: Callable[[], Any]) -> Any:
        """Calls ``step`` as often as the others need it, and returns the result of the first call."""
        result = step()
        self._done += 1
        for _ in range(self._missing.get(self._done, 0)):
            step()
        return result
