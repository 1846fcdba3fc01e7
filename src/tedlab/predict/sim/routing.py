"""Decides how often each expert is chosen in a simulated step, on which shapes depend if there is no capacity.

``balanced`` chooses all equally often. ``zipf`` chooses the r-th expert of every layer, counted from 1, in proportion
to r^-exponent. ``trace`` chooses as in the last step of a real run's ``router_trace.npz``. All data ranks and all
micro-batches choose alike; tensor ranks with tokens of their own divide a data rank's choices evenly.
"""

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from tedlab.comm.rows import Rows, hands, relayed, rows_of, spread
from tedlab.config import LendConfig, LendPolicy, TrainConfig
from tedlab.degrees import parallel_degrees
from tedlab.errors import UsageError
from tedlab.moe import mixtures
from tedlab.moe.lending import Plan, Policy, policy_of, slots_of
from tedlab.moe.pilot_rows import PilotSenders, pilots_of, rows_of_gathered
from tedlab.spec import Layout

ROUTINGS = ("balanced", "zipf", "trace")


class SimulatedLayer(NamedTuple):
    """The rows of one layer in one expert group.

    Attributes:
        lists_isE: (i, s, E): the rows that each sender lists; i is 1 where all its tensor ranks list the same.
        sent_isV: (processes that divide an expert and send rows of their own, senders, V): the rows that each sends, by
            slot. Unless experts are lent, slots are experts.
        first_P: The first slot of each process, and V.
        plan: Who computes which rows.
    """

    lists_isE: np.ndarray
    sent_isV: np.ndarray
    first_P: tuple[int, ...]
    plan: Plan

    def arriving(self, process: int) -> np.ndarray:
        """Returns the rows in a process's slots: (processes that divide it, senders, slots of one)."""
        return self.sent_isV[:, :, self.first_P[process] : self.first_P[process + 1]]

    def between(self, tensor: int) -> np.ndarray:
        """Returns the rows that each process sends to each, (senders, processes), at one tensor rank of each."""
        return np.add.reduceat(self.sent_isV[tensor], self.first_P[:-1], axis=1)


class SimulatedRouting:
    """The rows that each process of an expert group sends and receives in one micro-batch.

    Args:
        config: A configuration whose experts have no capacity.
        shares_LE: (MoE layers, experts) proportions in which each layer chooses its experts; None: all equally often.

    Attributes:
        shares_LE: These.
        dropped: The share of choices that no expert takes, because its capacity is full.
    """

    def __init__(self, config: TrainConfig, shares_LE: np.ndarray | None = None) -> None:
        moe, degrees = config.moe, parallel_degrees(config.parallel)
        self.blocks = moe.routed(config.model.layers)
        self.degrees, self.local_experts, self.lend = degrees, moe.num_experts // degrees.expert, moe.lend
        spec = mixtures[moe.dispatch].dispatch(config.model.hidden, moe)
        layout = spec.obeyed(Layout(degrees, config.comm, moe.sliced))
        self.layout, self.deals, self.gathers = layout, layout.deals, layout.gathers
        self._own_lists, self.pilots, self.gathered = layout.sequence, spec.pilots(layout), spec.gathered(layout)
        self.chunks, self.nodes = spec.chunks(layout), layout.nodes
        tokens = config.data.micro_batch_size * config.model.sequence_length * moe.inputs
        self._tokens = tokens
        if shares_LE is None:
            shares_LE = np.ones((len(self.blocks), moe.num_experts))
        self.shares_LE = shares_LE
        self.dropped = 0.0  # the share of choices beyond the capacity
        self.planned: dict[tuple[int, ...], list[SimulatedLayer]] = {}  # by the nodes of an expert group
        self._folded: dict[tuple[tuple[int, ...], ...], list[SimulatedLayer]] = {}  # by the tensor ranks of senders
        self._pilots: list[np.ndarray] = []  # if these travel, which nobody lends with: see :func:`pilots_of`
        self._counts: list[np.ndarray] = []
        if self.pilots:
            self._pilots = [pilots_of(list(shares_E), tokens, moe.top_k, layout) for shares_E in shares_LE]
            return
        for shares_E in shares_LE:
            chosen_E = spread(list(shares_E), tokens * moe.top_k, tokens)
            counts_E = spec.taken(chosen_E, layout, tokens)
            self._counts.append(np.tile(counts_E, (degrees.expert, 1)))
            self.dropped += (1 - np.sum(counts_E) / np.sum(chosen_E)) / len(self.blocks)

    def lending(self, lend: LendConfig) -> "SimulatedRouting":
        """Returns the same choices with experts lent in another way."""
        other = copy(self)
        other.lend, other.planned = lend, {}
        return other

    def layers(self, rank: int = 0) -> list[SimulatedLayer]:
        """Returns the layers of a rank's expert group, if rows travel and no pilots.

        Groups differ by where they lie on nodes, and in a folded layout by the tensor ranks that are in them.
        """
        if self.degrees.folded:
            return self._folded_layers(rank)
        group = self.degrees.groups(self.degrees.groups(rank)["expert_tensor"][0])["expert"]
        members = [member for first in group for member in self.degrees.groups(first)["expert_tensor"]]
        nodes = tuple(member // (self.lend.ranks_per_node or self.degrees.world_size) for member in members)
        alike = tuple(node - nodes[0] for node in nodes)
        if alike not in self.planned:
            policy = policy_of(self.lend, group, self.degrees.expert_tensor)
            self.planned[alike] = [self._layer(counts_sE, policy) for counts_sE in self._counts]
        return self.planned[alike]

    def _folded_layers(self, rank: int) -> list[SimulatedLayer]:
        senders = self.degrees.senders(rank)[: self.gathers]
        places = tuple(tuple(self.degrees.coordinates(sender)["tensor"] for sender in group) for group in senders)
        if places not in self._folded:
            self._folded[places] = []
            for counts_sE in self._counts:
                sent = hands(counts_sE[:1], self.deals)[:, 0][np.array(places)]
                first_P = tuple(range(0, sent.shape[-1] + 1, self.local_experts))
                nothing = Plan(counts_sE.sum(0), self.degrees.expert)
                self._folded[places].append(SimulatedLayer(sent, sent, first_P, nothing))
        return self._folded[places]

    def _layer(self, counts_sE: np.ndarray, policy: Policy | None) -> SimulatedLayer:
        lists = hands(counts_sE, self.deals) if self._own_lists else counts_sE[None]
        load_E = counts_sE.sum(0)
        plan = Plan(load_E, self.degrees.expert) if policy is None else policy(load_E)
        slots = slots_of(plan, lists)
        sent = slots.counts_isV if self._own_lists else hands(slots.counts_isV[0], self.deals)
        return SimulatedLayer(lists, sent, slots.first_P, plan)

    def rows(self, rank: int) -> dict[int, Rows]:
        """Returns the rows that a rank of the world moves in one micro-batch, by block."""
        if self.pilots:
            senders = PilotSenders(self.layout, rank)
            moved = [senders.moved(sent_tx).rows for sent_tx in self._pilots]
            if self.gathered:
                moved = [rows_of_gathered(self.layout, self._tokens, rows.computed) for rows in moved]
            return dict(zip(self.blocks, moved, strict=True))
        expert, tensor = self._place(rank)
        return {
            block: replace(
                rows_of(layer.arriving(expert), int(layer.sent_isV[tensor, expert].sum()), tensor, self.chunks),
                relayed=int(relayed(layer.between(tensor), expert, self.nodes).sum()) if self.nodes > 1 else 0,
                lent=layer.plan.lent(expert),
                borrowed=layer.plan.borrowed(expert),
                exchanges=int(bool(layer.plan.loans)),
            )
            for block, layer in zip(self.blocks, self.layers(rank), strict=True)
        }

    def rows_by_expert_rank(self) -> np.ndarray:
        """Returns the rows that each process of the first expert group computes in each MoE layer, (L, E_p)."""
        group = self.degrees.groups(0)["expert"]
        return np.array([[rows.computed for rows in self.rows(rank).values()] for rank in group]).T

    def kinds_by_expert_rank(self) -> list[tuple[object, ...]]:
        """Returns for each process of the first expert group all that it sends, receives and computes by layer.

        Processes that compute the same may receive different numbers of rows, where what travels are pilots.
        """
        return [tuple(self.rows(rank).values()) for rank in self.degrees.groups(0)["expert"]]

    def busiest_rank(self) -> int:
        """Returns the first rank whose experts compute the most rows over all layers."""
        return self.degrees.groups(0)["expert"][int(self.rows_by_expert_rank().sum(0).argmax())]

    def numbers(self, layer: int, rank: int) -> np.ndarray:
        """Returns what a rank's host reads in one layer.

        These are the rows it sends, and those that arrive at each tensor rank: (1 + tensor ranks, processes of the
        expert group, experts of one); or, where experts may be lent, what all senders list. See
        :mod:`tedlab.moe.ragged`.
        """
        if self.pilots:
            moved = PilotSenders(self.layout, rank).moved(self._pilots[layer])
            if self.gathered:
                return moved.arriving_isx[..., :-1].sum((0, 1))
            if moved.relayed is None:
                return np.concatenate((moved.sent[None], moved.arriving_isx))
            return np.concatenate((moved.sent.flatten(), moved.relayed.flatten(), moved.arriving_isx.flatten()))[None]
        simulated = self.layers(rank)[layer]
        expert, tensor = self._place(rank)
        if self.lend.policy != LendPolicy.NONE and self.degrees.expert > 1:
            return simulated.lists_isE
        own = simulated.sent_isV[tensor, expert].reshape(1, self.degrees.expert, self.local_experts)
        if self.nodes == 1:
            return np.concatenate((own, simulated.arriving(expert)))
        sent = simulated.sent_isV[tensor].reshape(self.degrees.expert, self.degrees.expert, self.local_experts)
        return np.concatenate((own, relayed(sent, expert, self.nodes)[None], simulated.arriving(expert)))

    def _place(self, rank: int) -> tuple[int, int]:
        """Returns a rank's index in its expert group, and among those that divide an expert and send their own rows."""
        places = self.degrees.coordinates(rank)
        return places["expert"], places["expert_tensor"] if self.gathers > 1 else 0


class Answers:
    """Answers the host's reads from a device, layer after layer, for the ``Collectives.reader`` of a simulation."""

    def __init__(self, routing: SimulatedRouting, rank: int) -> None:
        self.routing, self.rank = routing, rank
        self._reads = 0

    def __call__(self, values: Tensor) -> list[object]:
        numbers = self.routing.numbers(self._reads % len(self.routing.blocks), self.rank)
        self._reads += 1
        if values.dim() < numbers.ndim == 3:  # where rows do not travel, the host reads only how many each expert has
            numbers = numbers[1:].sum((0, 1))
        assert numbers.shape == values.shape
        return numbers.tolist()


def routing_of(config: TrainConfig, name: str, zipf: float | None, trace: str | None) -> SimulatedRouting | None:
    """Returns the routing that a command line asks for, or None for a configuration with capacity or without experts.

    Args:
        config: A configuration completed by :func:`tedlab.validate.complete_simulated`.
        name: One of :data:`ROUTINGS`.
        zipf: ``sim.zipf``, the exponent, for ``zipf`` only.
        trace: ``sim.trace``, the path of the trace, for ``trace`` only.

    Raises:
        UsageError: If the routing does not exist or has no effect, or the trace is not one of this model.
    """
    if name not in ROUTINGS:
        raise UsageError(f"sim.routing={name} is unknown; valid: {', '.join(ROUTINGS)}")
    for key, value in (("zipf", zipf), ("trace", trace)):
        if (name == key) != (value is not None):
            raise UsageError(f"sim.routing={key} and sim.{key}=… go together; sim.routing is {name}, sim.{key} {value}")
    layers, experts = len(config.moe.routed(config.model.layers)), config.moe.num_experts
    if not layers or not config.moe.ragged:
        if name != "balanced":
            raise UsageError(
                f"sim.routing={name} has no effect: what experts are sent depends on what is chosen "
                "where they have no capacity alone, as with moe.dispatch=dropless"
            )
        return None
    if zipf is not None:
        ranks = np.arange(1, experts + 1, dtype=float)
        return SimulatedRouting(config, np.tile(ranks**-zipf, (layers, 1)))
    return SimulatedRouting(config, None if trace is None else _traced(Path(trace), layers, experts))


def _traced(file: Path, layers: int, experts: int) -> np.ndarray:
    """Returns the choices of the last step of a trace, (L, E). Nothing in the file is executed."""
    wrong = f"sim.trace={file} is not a router_trace.npz of a run"
    if not file.is_file():
        raise UsageError(f"{wrong}: there is no such file")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            load_SLE = arrays["load"]
    except Exception as error:  # NumPy, zipfile and zlib raise a dozen kinds of errors for damaged files
        raise UsageError(f"{wrong}: {error}") from None
    if load_SLE.ndim != 3 or not load_SLE.size or load_SLE.dtype.kind not in "iuf":
        raise UsageError(
            f"{wrong}: its array 'load' has shape {load_SLE.shape} and type {load_SLE.dtype}, and not (steps, layers, "
            "experts) of numbers"
        )
    if load_SLE.shape[1:] != (layers, experts):
        raise UsageError(
            f"sim.trace={file} is of {load_SLE.shape[1]} MoE layers of {load_SLE.shape[2]} experts; this model has "
            f"{layers} of {experts}. Record it with the same blocks of experts and moe.num_experts"
        )
    load_LE = load_SLE[-1].astype(float)
    for layer, load_E in enumerate(load_LE):
        if not np.all(np.isfinite(load_E) & (load_E >= 0)) or not load_E.any():
            raise UsageError(
                f"{wrong}: in its last step, layer {layer}, experts are chosen {np.array2string(load_E, threshold=8)} "
                "times; these must be finite, not negative, and not all 0"
            )
    return load_LE
