"""Emulates a network: a hook makes each collective take at least as long as it would on a given cluster.

**This emulates and does not measure.** A run with this hook sleeps for the time that ``cost.py`` predicts for its
collectives. It shows in wall-clock time how a slower network affects a layout when only one machine is available.
"""

import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch

from tedlab.comm.collectives import TRAINING_PHASES, Collective, Phase
from tedlab.degrees import GroupKind
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.cost import LinkClass, collective_seconds, link_of, wire_bytes_by_link


class Emulation:
    """A hook for :meth:`Collectives.register_hook` that makes each collective wait for the emulated network.

    The network needs ``dilation`` × the predicted seconds, counted from the start of the collective, so that work
    between start and end hides this time as it would on the cluster. There is one network inside nodes and one between
    nodes. Each serves one collective at a time, so a later collective waits for an earlier one.

    The real collective still runs. If it is faster than the emulated one, its time is hidden. If it is slower (gloo
    often is, unless ``dilation`` is large), so is the run. Sleeping overshoots by tens of microseconds a call. On CUDA,
    every start and end synchronises the device, because only then is it known when the work before a collective is
    done. The times of such a run are right in proportion, but their absolute values mean nothing.

    Args:
        cluster: The cluster to emulate.
        groups: The global ranks of this process's group of each kind.
        dilation: How many times slower than the cluster's network the emulated one is, so that toy models on a CPU
            stay in proportion to the compute of a GPU; with 0, collectives are counted but not delayed.
        ranks_per_node: How many consecutive ranks share a node and its network; None: the cluster's GPUs per node.

    Attributes:
        counting: Whether collectives are added to the totals; they are delayed in either case.
        seconds: The seconds predicted for the cluster (not dilated) for all collectives so far, by phase and link.
        wire_bytes: The bytes that a rank of this process's groups has sent, by phase and link.

    Raises:
        ValueError: If the cluster has no room for the groups, or a number is out of range.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        groups: Mapping[GroupKind, Sequence[int]],
        dilation: float = 1.0,
        ranks_per_node: int | None = None,
    ) -> None:
        if dilation < 0:
            raise ValueError(f"dilation is {dilation:g}; it must be at least 0 (0: count only, sleep never)")
        if ranks_per_node is not None and not 1 <= ranks_per_node <= cluster.gpus_per_node:
            raise ValueError(
                f"ranks_per_node is {ranks_per_node}; the nodes of this cluster have room for 1 to "
                f"{cluster.gpus_per_node}"
            )
        self._cluster = cluster if ranks_per_node is None else _with_ranks_per_node(cluster, ranks_per_node)
        self._groups = {kind: tuple(members) for kind, members in groups.items()}
        self._dilation = dilation
        self._free_at: dict[LinkClass, float] = {"in_node": 0.0, "between_nodes": 0.0}
        self._done_at: defaultdict[Collective, deque[float]] = defaultdict(deque)  # equal calls end in order of start
        self.counting = True
        self.seconds: defaultdict[tuple[Phase, LinkClass], float] = defaultdict(float)
        self.wire_bytes: defaultdict[tuple[Phase, LinkClass], float] = defaultdict(float)
        for members in self._groups.values():
            collective_seconds("all_reduce", 0, members, self._cluster)  # fails now rather than during the run

    def __call__(self, call: Collective, event: Literal["start", "end"]) -> None:
        """Handles the start or end of a collective, as a hook does."""
        _synchronize()
        if event == "start":
            self._start(call)
        else:
            self._end(call)

    def _start(self, call: Collective) -> None:
        members = self._groups[call.kind]
        link = link_of(members, self._cluster.gpus_per_node)
        seconds = collective_seconds(call.op, call.even_payload_bytes, members, self._cluster)
        self._free_at[link] = max(time.perf_counter(), self._free_at[link]) + self._dilation * seconds
        self._done_at[call].append(self._free_at[link])
        if not self.counting:
            return
        self.seconds[call.phase, link] += seconds
        split = wire_bytes_by_link(call.op, call.even_payload_bytes, members, self._cluster.gpus_per_node)
        for name, sent in split.items():
            self.wire_bytes[call.phase, name] += sent

    def _end(self, call: Collective) -> None:
        done_at = self._done_at[call].popleft()
        if not self._done_at[call]:
            del self._done_at[call]  # keeps the table small if shapes differ from step to step
        time.sleep(max(0.0, done_at - time.perf_counter()))

    def metrics(self) -> dict[str, float]:
        """Returns the totals of training, ``comm/link/<link>/{wire_bytes, emulated_seconds}``, for a run's summary."""
        return {
            f"comm/link/{link}/{what}": sum(total[phase, link] for phase in TRAINING_PHASES)
            for link in self._free_at
            for what, total in (("wire_bytes", self.wire_bytes), ("emulated_seconds", self.seconds))
        }


def _with_ranks_per_node(cluster: ClusterConfig, ranks: int) -> ClusterConfig:
    """Returns the cluster with only ``ranks`` GPUs of each node in use, which have the node's network to themselves."""
    return replace(cluster, gpus_per_node=ranks, in_node=None if ranks == 1 else cluster.in_node)


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
