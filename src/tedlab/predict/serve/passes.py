"""One forward pass of generation in closed form: its collectives to the byte, its seconds and its memory.

A pass is a prefill, which computes all tokens of the prompts, or a step of decoding, which computes one token of each
text and reads what attention remembers of the others. Layers state what they do in their specifications, as for
training; the collectives are those of ``decode.py``.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import torch

from tedlab.comm.collectives import Collective
from tedlab.comm.rows import Rows, listed
from tedlab.config import TrainConfig, with_values
from tedlab.decode import choosing_sites
from tedlab.degrees import ParallelDegrees
from tedlab.models.block import BlockSpec
from tedlab.moe import MoESpec
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.cost import collective_seconds
from tedlab.predict.serve.load import Load, Replicas, expected_load
from tedlab.predict.sim.roofline import seconds
from tedlab.predict.volumes import ClosedForm
from tedlab.spec import MicroBatch, Spec, Work


@dataclass(frozen=True)
class Tokens:
    """What a pass computes.

    Attributes:
        texts: The number of texts, over all data ranks.
        length: The number of tokens of each that are computed.
        past: The number of tokens of each before these, which attention remembers.
    """

    texts: int
    length: int
    past: int = 0


class Module(NamedTuple):
    """What the layers of a kind take in a pass, together.

    Attributes:
        layers: Their number.
        kernels, exchanges: Seconds.
        sent: Bytes that a process sends, if all experts are chosen equally often.
    """

    layers: int
    kernels: float
    exchanges: float
    sent: float

    @property
    def seconds(self) -> float:
        """The seconds of both."""
        return self.kernels + self.exchanges


class Pass(ClosedForm):
    """A forward pass in one layout.

    Args:
        config: A job with its ``model.vocab_size``, whose mixtures are as :func:`tedlab.decode.generating` says.
        degrees: The degrees of the layout.
        tokens: What is computed.
        shares: (E,) proportions in which experts are chosen; None: all equally often.
        even: Whether every process gets equally many rows; otherwise this is the pass of the busiest one.
    """

    def __init__(
        self,
        config: TrainConfig,
        degrees: ParallelDegrees,
        tokens: Tokens,
        shares: Sequence[float] | None = None,
        even: bool = False,
    ) -> None:
        parallel = {name: getattr(degrees, name) for name in ("world_size", "tensor", "expert", "expert_tensor")}
        texts = -(-tokens.texts // degrees.data)  # of a data rank: decode.py gives each as many
        sizes = {"data.micro_batch_size": texts, "model.sequence_length": tokens.length}
        super().__init__(with_values(config, {f"parallel.{name}": value for name, value in parallel.items()} | sizes))
        self.texts, self.past = texts, tokens.past
        moe = self.config.moe
        self.load = Load(0.0, 0.0, 0.0)
        if moe.num_experts:
            together = -(-texts * tokens.length * degrees.data // degrees.expert_data)  # that share each expert
            waiting = degrees.replicas_together
            layers = sum(block.moe is not None for block in self.blocks)
            replicas = Replicas(waiting, degrees.expert_data // waiting, layers)
            self.load = expected_load(together, moe.top_k, moe.num_experts, degrees.expert, shares, replicas)
            if even:
                mean = self.load.mean
                self.load = Load(mean, mean, min(moe.num_experts / degrees.expert, mean))
        alike = {n: self._moved(self.blocks[n]) for n in set(self.spec.first) if self.blocks[n].moe is not None}
        self.moved = {n: alike[first] for n, first in enumerate(self.spec.first) if first in alike}

    @cached_property
    def blocks(self) -> list[BlockSpec]:
        """The blocks, each of which runs by itself."""
        return self.spec.blocks

    def _moved(self, block: BlockSpec) -> Rows:
        """Returns the rows of an even pass, or those of the busiest process, which sends as many as the others."""
        layer = block.feed_forward
        assert isinstance(layer, MoESpec)
        if not layer.config.ragged:
            return block.rows(self.layout, self.tokens)
        layout = layer.dispatch.obeyed(self.layout)
        sent = listed(self.tokens * layer.config.top_k, layout.deals) // layout.deals
        received = round(sent * self.load.ratio)
        return Rows(sent, received, layout.gathers * received, layout.gathers * received)

    def at(self, block: int | None = None) -> MicroBatch:
        return replace(super().at(block), past=self.past, busy=max(1, round(self.load.busy)))

    # ---- collectives ---------------------------------------------------------------------------------------------

    def collectives(self) -> Iterator[Collective]:
        """Yields all collectives of the pass."""
        yield from self._before()
        for n in range(len(self.blocks)):
            yield from self.calls(self.sites[n].forward, "forward", self._rows[n])
        yield from self._choosing()

    def _before(self) -> Iterator[Collective]:
        yield from self.calls(self.spec.embedding.sites(self.layout).present(self.layout).forward, "forward", Rows())

    def _choosing(self) -> Iterator[Collective]:
        assert self.config.model.vocab_size is not None
        sites = choosing_sites(self.config.model.vocab_size, self.degrees)
        yield from self.calls((site for site in sites if self.groups[site.kind] > 1), "validation", Rows())

    def calls_of(self, layer: Spec, block: int) -> list[Collective]:
        """Returns the collectives of a layer of a block."""
        return [*self.calls(layer.sites(self.layout).present(self.layout).forward, "forward", self._rows[block])]

    # ---- time ----------------------------------------------------------------------------------------------------

    def modules(self, cluster: ClusterConfig, sent: "Pass") -> dict[str, Module]:
        """Returns the times of attention, experts, dense layers between them, and what is before and after blocks.

        Args:
            cluster: The cluster that this is on.
            sent: The even pass, whose bytes are stated.

        Raises:
            ValueError: If the world exceeds the cluster.
        """
        found: dict[str, Module] = {}

        def add(name: str, layers: int, works: Iterable[Work], calls: list[Collective], even: list[Collective]) -> None:
            kernels = sum(seconds(work, cluster) for work in works)
            exchanges, wire = self.exchanging(calls, cluster), sum(call.wire_bytes for call in even)
            before = found.get(name, Module(0, 0.0, 0.0, 0.0))
            new = (layers, layers * kernels, layers * exchanges, layers * wire)
            found[name] = Module(*(a + b for a, b in zip(before, new, strict=True)))  # type: ignore[arg-type]

        alike = Counter(self.spec.first)
        for n, layers in alike.items():
            block, b = self.blocks[n], self.at(n)
            attention = [*block.norm1.forward(b), *block.attention.forward(b)]
            everything = Counter(block.forward(b))
            everything.subtract(attention)  # what is left is that of the feed-forward layer
            of_attention, of_layer = self.calls_of(block.attention, n), self.calls_of(block.feed_forward, n)
            add("attention", layers, attention, of_attention, of_attention)
            name = "dense" if block.moe is None else "experts"
            add(name, layers, everything.elements(), of_layer, sent.calls_of(block.feed_forward, n))
        spec, b = self.spec, self.at()
        ends = chain(*(part.forward(b) for part in (spec.embedding, spec.positions, spec.norm) if part is not None))
        logits = spec.logits.forward(replace(b, tokens=self.texts, length=1))
        calls = [*self._before(), *self._choosing()]
        add("ends", 1, chain(ends, logits), calls, calls)
        return found

    def exchanging(self, calls: Iterable[Collective], cluster: ClusterConfig) -> float:
        """Returns the seconds of collectives, one after the other."""
        members = self.layout.groups(0)
        return sum(collective_seconds(call.op, call.even_payload_bytes, members[call.kind], cluster) for call in calls)

    # ---- memory --------------------------------------------------------------------------------------------------

    @property
    def activations(self) -> int:
        """Bytes of activations at most.

        A layer holds no more at once than its forward pass would keep for a backward pass, rows in three more places,
        and two tensors between layers; then there are the logits.
        """
        blocks = max(self.blocks[n].saved(self.at(n)) + self._copies(n) for n in set(self.spec.first))
        stream = 2 * self.at().outside * self.config.model.hidden * self.compute.itemsize
        logits = self.texts * self.spec.embedding.vocab_size * max(self.precise.itemsize, self.compute.itemsize)
        return int(blocks + stream + logits)

    def _copies(self, block: int) -> int:
        return 3 * self._rows[block].computed * self.config.model.hidden * self.compute.itemsize


def weight_bytes(spec: Spec, degrees: ParallelDegrees, dtype: torch.dtype) -> int:
    """Returns the bytes of the parameters that a process holds."""
    return sum(parameter.elements(degrees) for parameter in spec.parameters()) * dtype.itemsize


def remembered_bytes(blocks: Sequence[BlockSpec], tensor: int, dtype: torch.dtype) -> int:
    """Returns the bytes of keys and values, or of latents, of a token in each of so many tensor ranks."""
    return sum(block.attention.remembered(tensor) for block in blocks) * dtype.itemsize
