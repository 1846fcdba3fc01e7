"""An emulated network: a hook that makes each collective take at least as long as it would on a given cluster.

**Emulated, not measured**: what a run with this hook spends in collectives is the prediction of ``cost.py``, slept
through, on top of an ordinary run. It shows in wall-clock time what a slower network does to a layout, when all that
is at hand is one machine.
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
    """A hook for :meth:`Collectives.register_hook`: at its end a collective waits for the emulated network.

    The network needs ``dilation`` × the predicted seconds, counted from the start of the collective, so that work done
    between start and end hides it as it would there. Collectives inside nodes and those between nodes each have a
    network of their own, which serves one at a time: of several under way the later ones wait for the earlier.

    The real collective runs all the same. Where it takes less than the emulated one its time is hidden; where it takes
    more (gloo often does, unless ``dilation`` is large) the run is slower than emulated. Sleeping overshoots by tens of
    microseconds a call. On CUDA the device is synchronised at every start and end, since only then is it known when
    work before a collective was done: correct in proportion, but no time of such a run is worth quoting otherwise.

    Args:
        cluster: what is emulated.
        groups: the global ranks of this process's group of each kind.
        dilation: how many times slower than the cluster's network, so that toy models on a CPU stay in proportion to
            the compute of a GPU; 0 only counts.
        ranks_per_node: consecutive ranks that share a node, and its network; None: the cluster's GPUs per node.

    Attributes:
        counting: whether collectives are added to the totals; they take their time in any case.
        seconds: predicted for the cluster (not dilated), by phase and link, over all collectives so far.
        wire_bytes: that a rank of this process's groups sent, by phase and link.

    Raises:
        ValueError: if the cluster has no room for the groups, or a number is out of range.
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
            collective_seconds("all_reduce", 0, members, self._cluster)  # raises before the run does

    def __call__(self, call: Collective, event: Literal["start", "end"]) -> None:
        """Hears of a collective, as hooks do."""
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
            del self._done_at[call]  # shapes may differ from step to step without end
        time.sleep(max(0.0, done_at - time.perf_counter()))

    def metrics(self) -> dict[str, float]:
        """Totals of training, ``comm/link/<link>/{wire_bytes, emulated_seconds}``, for a run's summary."""
        return {
            f"comm/link/{link}/{what}": sum(total[phase, link] for phase in TRAINING_PHASES)
            for link in self._free_at
            for what, total in (("wire_bytes", self.wire_bytes), ("emulated_seconds", self.seconds))
        }


def _with_ranks_per_node(cluster: ClusterConfig, ranks: int) -> ClusterConfig:
    """The cluster with only so many GPUs of each node in use: these have its network for themselves."""
    return replace(cluster, gpus_per_node=ranks, in_node=None if ranks == 1 else cluster.in_node)


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
