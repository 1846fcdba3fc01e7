"""Decides how often each expert is chosen in a simulated step, on which shapes depend if there is no capacity.

``balanced`` chooses all equally often. ``zipf`` chooses the r-th expert of every layer, counted from 1, in proportion
to r^-exponent. ``trace`` chooses as in the last step of a real run's ``router_trace.npz``. All data ranks and all
micro-batches choose alike; tensor ranks with tokens of their own divide a data rank's choices evenly.
"""

from pathlib import Path

import numpy as np
from torch import Tensor

from tedlab.comm.rows import Rows, hands, rows_of, rows_of_pilots, sent_as_pilots, spread
from tedlab.config import TrainConfig
from tedlab.degrees import parallel_degrees
from tedlab.errors import UsageError
from tedlab.moe import mixtures
from tedlab.spec import Layout

ROUTINGS = ("balanced", "zipf", "trace")


class SimulatedRouting:
    """The rows that each process of an expert group sends and receives in one micro-batch.

    Args:
        config: A configuration whose experts have no capacity.
        shares_LE: (MoE layers, experts) proportions in which each layer chooses its experts; None: all equally often.
    """

    def __init__(self, config: TrainConfig, shares_LE: np.ndarray | None = None) -> None:
        moe, degrees = config.moe, parallel_degrees(config.parallel)
        self.blocks = moe.routed(config.model.layers)
        self.degrees, self.local_experts = degrees, moe.num_experts // degrees.expert
        spec = mixtures[moe.dispatch].dispatch(config.model.hidden, moe)
        layout = spec.obeyed(Layout(degrees, config.comm))
        sharers, self.pilots = layout.sharers, spec.pilots(layout)
        tokens = config.data.micro_batch_size * config.model.sequence_length
        if shares_LE is None:
            shares_LE = np.ones((len(self.blocks), moe.num_experts))
        # The rows sent in each layer: (tensor ranks that send rows of their own, senders, E). With pilots, their number
        # follows the choices of each process's experts: (…, E + E_p).
        self._sent = []
        if self.pilots:
            for shares_E in shares_LE:
                sent = sent_as_pilots(list(shares_E), tokens, moe.top_k, sharers, degrees.expert)
                self._sent.append(np.repeat(sent.reshape(sharers, 1, -1), degrees.expert, 1))
            shares_LE, self.local_experts = shares_LE[:0], self.local_experts + 1
        for shares_E in shares_LE:
            counts_E = spread(list(shares_E), tokens * moe.top_k, tokens)
            self._sent.append(hands(np.tile(counts_E, (degrees.expert, 1)), sharers))

    def rows(self, rank: int) -> dict[int, Rows]:
        """Returns the rows that a rank of the world moves in one micro-batch, by block."""
        expert, tensor = self._place(rank)
        if self.pilots:
            own = [sent[tensor, expert].reshape(-1, self.local_experts) for sent in self._sent]
            arriving = [self._arriving(sent, expert) for sent in self._sent]
            numbers = zip(self.blocks, own, arriving, strict=True)
            return {block: rows_of_pilots(sent, arrived, tensor) for block, sent, arrived in numbers}
        return {
            block: rows_of(self._arriving(sent, expert), int(sent[tensor, expert].sum()), tensor)
            for block, sent in zip(self.blocks, self._sent, strict=True)
        }

    def rows_by_expert_rank(self) -> np.ndarray:
        """Returns the rows that each process of an expert group computes in each MoE layer, (L, E_p)."""
        experts = range(self.degrees.expert)
        computed = slice(-1 if self.pilots else None)
        arriving = [[self._arriving(sent, expert) for expert in experts] for sent in self._sent]
        return np.array([[rows[..., computed].sum() for rows in layer] for layer in arriving])

    def busiest_rank(self) -> int:
        """Returns the first rank whose experts compute the most rows over all layers."""
        return int(self.rows_by_expert_rank().sum(0).argmax()) * self.degrees.tensor

    def numbers(self, layer: int, rank: int) -> np.ndarray:
        """Returns what a rank's host reads in one layer: the rows it sends, and those that arrive at each tensor rank.

        The shape is (1 + tensor ranks, processes of the expert group, experts of one); see :mod:`tedlab.moe.ragged`.
        """
        sent = self._sent[layer]
        expert, tensor = self._place(rank)
        own = sent[tensor, expert].reshape(1, self.degrees.expert, self.local_experts)
        return np.concatenate((own, self._arriving(sent, expert)))

    def _place(self, rank: int) -> tuple[int, int]:
        """Returns a rank's index in its expert group, and among the tensor ranks that send rows of their own."""
        return rank // self.degrees.tensor % self.degrees.expert, rank % len(self._sent[0])

    def _arriving(self, sent: np.ndarray, expert: int) -> np.ndarray:
        return sent[:, :, expert * self.local_experts : (expert + 1) * self.local_experts]


class Answers:
    """Answers the host's reads from a device, layer after layer, for the ``Collectives.reader`` of a simulation."""

    def __init__(self, routing: SimulatedRouting, rank: int) -> None:
        self.routing, self.rank = routing, rank
        self._reads = 0

    def __call__(self, values: Tensor) -> list[object]:
        numbers = self.routing.numbers(self._reads % len(self.routing.blocks), self.rank)
        self._reads += 1
        if values.dim() == 1:  # where rows do not travel, the host reads only how many each expert has
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
    if not layers or not config.moe.unlimited:
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
