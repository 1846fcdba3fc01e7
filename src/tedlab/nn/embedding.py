"""Embedding tables: one divided by vocabulary over the tensor group, one replicated (for positions)."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from tedlab._compat.torch import require
from tedlab.comm import evaluating
from tedlab.nn.ids import check_ids
from tedlab.nn.region import leave_sites, tensor_region
from tedlab.nn.sharded import ShardedModule
from tedlab.spec import Init, Layout, MicroBatch, ParameterSpec, Sites, Spec, Work
from tedlab.topology import Topology


@dataclass(frozen=True)
class VocabParallelEmbeddingSpec(Spec):
    """Describes a :class:`VocabParallelEmbedding`."""

    vocab_size: int
    hidden: int
    init: Init

    def own(self) -> Iterator[ParameterSpec]:
        yield ParameterSpec("weight", (self.vocab_size, self.hidden), self.init, {"tensor": 0})

    def sites(self, layout: Layout) -> Sites:
        return leave_sites("embedding", self.hidden, layout, dtype="parameter")

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        yield b.moved(2 * b.tokens * self.hidden, b.parameter)
        yield b.moved(2 * b.tokens * self.hidden, b.parameter, kernel="strided")  # the mask

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        yield b.moved(2 * b.tokens * self.hidden, b.parameter, kernel="strided")
        yield b.moved((self.vocab_size // b.tensor + b.tokens) * self.hidden, b.parameter)


class VocabParallelEmbedding(ShardedModule):
    """Token embedding with the vocabulary, a multiple of the tensor degree, divided over its group.

    It also serves as a tied output projection.
    """

    def __init__(self, spec: VocabParallelEmbeddingSpec, topology: Topology) -> None:
        super().__init__()
        self.region, self.output_region = tensor_region(topology, "embedding"), tensor_region(topology, "output")
        comm = topology.comm
        self.vocab_size = spec.vocab_size
        self.start = comm.rank("tensor") * (spec.vocab_size // comm.size("tensor"))
        self.build(spec, topology)

    def forward(self, ids: Tensor) -> Tensor:
        """Maps token ids (B, S) int64 to activations (B, S, H), the sum of what each rank looks up for the ids it owns.

        Raises:
            IndexError: If an id is outside the vocabulary, on a CPU; on a GPU the device asserts.
        """
        check_ids(ids, self.vocab_size, "a token id")
        weight = self.local("weight")  # (V/T, H)
        if len(weight) == self.vocab_size and evaluating():
            return F.embedding(ids, weight)  # none is elsewhere
        row = ids - self.start
        elsewhere = (row < 0) | (row >= weight.shape[0])
        found = F.embedding(row.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return self.region.leave(found)

    def logits(self, x: Tensor) -> Tensor:
        """Maps activations (B, S, H) to this rank's part of the logits (B, S, V/T), with the embedding's weights."""
        return F.linear(self.output_region.enter(x), self.local("weight"))


@dataclass(frozen=True)
class EmbeddingSpec(Spec):
    """Describes an :class:`Embedding`."""

    length: int
    hidden: int
    init: Init

    def own(self) -> Iterator[ParameterSpec]:
        yield ParameterSpec("weight", (self.length, self.hidden), self.init, own_tokens=True)

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        yield b.moved(2 * b.outside * self.hidden, b.parameter)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        yield b.moved(b.outside * self.hidden, b.parameter)


class Embedding(ShardedModule):
    """A table of learned position embeddings that is replicated over the tensor group."""

    def __init__(self, spec: EmbeddingSpec, topology: Topology) -> None:
        super().__init__()
        self.slices = topology.degrees.tensor if topology.sequence_sharded else 1
        self.slice = topology.comm.rank("tensor") % self.slices
        self.build(spec, topology)

    def at(self, position: Tensor) -> Tensor:
        """Returns the embeddings of any positions (…,) int64: (…, H)."""
        return F.embedding(position, self.local("weight"))

    def forward(self, length: int) -> Tensor:
        """Returns the embeddings of positions 0 … length-1 (length, H), or this tensor rank's slice if it has one."""
        weight = self.local("weight")
        require(length <= weight.shape[0], lambda: f"{length} positions, but the table has {weight.shape[0]}")
        return weight[:length].chunk(self.slices)[self.slice]
