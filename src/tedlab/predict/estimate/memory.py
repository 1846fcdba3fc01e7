"""How much memory a rank needs: what it keeps all the time, and the fullest moments of a step.

The moments that can be fullest are few: the loss, the backward pass of a block (by its feed-forward layer or
attention), the embedding's gradient, the reduction of gradients, the optimizer's step. Letters as in ``sizes.py``.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tedlab.config import Granularity
from tedlab.predict.estimate.sizes import Sizes
from tedlab.predict.sim.memory import CATEGORIES, Category

_MOMENTS = {"Adam": 2, "AdamW": 2, "SGD": 0}
_INDEX = 8  # bytes
_TILE_TEMPORARIES = 2  # of Adam, beside the gradient: the root of the second moment, and its quotient


@dataclass(frozen=True)
class Moment:
    """A moment of the step.

    Attributes:
        name: of it.
        held: bytes by category.
    """

    name: str
    held: dict[Category, int]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.held.values())


class Memory:
    """Of one rank.

    Raises:
        ValueError: for an optimizer whose state is not known here.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        form, optim = sizes.form, sizes.config.optim
        self.buckets = [(bucket, form.shards(bucket)) for bucket in form.buckets]
        self.shards = [-(-bucket.elements // shards) for bucket, shards in self.buckets]
        self.flat = sum(shards * shard for (_, shards), shard in zip(self.buckets, self.shards, strict=True))
        self.gradients = sum(bucket.elements for bucket, _ in self.buckets) * sizes.parameter
        self.experts = sizes.config.moe.num_experts // form.degrees.expert
        self.master = max(4, sizes.parameter)
        name = str(optim.optimizer["_target_"]).rpartition(".")[2]
        if name not in _MOMENTS:
            raise ValueError(
                f"optim.optimizer._target_={optim.optimizer['_target_']}: how much state it has is known for "
                f"{', '.join(_MOMENTS)} only"
            )
        self.moments = 1 if optim.optimizer.get("momentum") else _MOMENTS[name]
        self.adam = name != "SGD"

    def peak(self) -> Moment:
        """The fullest moment."""
        return max(self.at_moments(), key=lambda moment: moment.total)

    def at_moments(self) -> Iterator[Moment]:
        """Those that can be fullest."""
        s, model = self.sizes, self.sizes.config.model
        recomputed = model.recompute.granularity == Granularity.BLOCK
        stream = s.outside * s.hidden * s.parameter
        table = s.vocabulary_part * s.hidden * s.parameter
        logits = s.tokens * s.vocabulary_part * (s.compute + s.precise)
        several = s.accumulated > 1  # then there are sums of all, to which each gradient is added as it comes
        before = self.gradients if several else 0

        kept: dict[int, int] = {}
        for first, blocks in s.kinds.items():
            kept |= dict.fromkeys(blocks, s.form.kept_bytes(first, s.config.comm.cac) if recomputed else 0)
        saved, stash = [0.0], [0.0]  # before each block, and after the last
        for block in range(model.layers):
            saved.append(saved[-1] + (stream if recomputed else self._saved(block)))
            stash.append(stash[-1] + kept[block])
        last = 2 * stream + s.tokens * s.hidden * s.compute  # of the last norm
        yield self._moment("loss", before, stash[-1], saved[-1] + last + logits, temporaries=0)
        gradients = before + (table if model.tie_embeddings else 0 if several else 2 * table)
        for block in reversed(range(model.layers)):
            routed = s.form.spec.blocks[block].moe is not None
            activations = saved[block + 1] + (self._saved(block) if recomputed else 0)
            for name, new, done, freed, temporaries in self._working_sets(block):
                yield self._moment(
                    f"backward pass of block {block}, {name}",
                    gradients + new + (0 if several else done),
                    stash[block + 1],
                    activations - freed,
                    temporaries + 2 * stream,
                )
            if not several:
                gradients += self._attention_gradients + self._feed_forward_gradients(routed)
        tables = 2 if model.tie_embeddings else 1  # from the logits, and summed
        gradients = self.gradients + (table if several else 0)
        yield self._moment("gradient of the embedding", gradients, 0, 0, 2 * stream + tables * table)
        yield self._reduction()
        yield self._optimizer()

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _moment(self, name: str, gradients: float, stash: float, activations: float, temporaries: float) -> Moment:
        state = sum(self.shards) * (self.moments * self.master + (self.master if self.sizes.parameter < 4 else 0))
        values = (self.flat * self.sizes.parameter, state, gradients, stash, activations, temporaries)
        return Moment(name, {c: round(v) for c, v in zip(CATEGORIES, values, strict=True)})

    @property
    def _attention_gradients(self) -> int:
        """Bytes of a block's gradients, but for its feed-forward layer."""
        s = self.sizes
        return ((4 * s.hidden**2 + 3 * s.hidden) // s.tensor + 5 * s.hidden) * s.parameter

    def _feed_forward_gradients(self, routed: bool) -> int:
        s, moe = self.sizes, self.sizes.config.moe
        layer = 2 * s.hidden * s.ffn_part + s.ffn_part + s.hidden
        return (self.experts * layer + moe.num_experts * s.hidden if routed else layer) * s.parameter

    def _saved_attention(self) -> float:
        """What the backward pass of attention needs of the forward pass, the block's input included."""
        s = self.sizes
        part = s.hidden // s.tensor
        saved = s.outside * s.hidden * s.parameter  # input of the norm
        saved += s.tokens * s.hidden * s.compute  # of the first product
        saved += 4 * s.tokens * part * s.compute  # queries, keys, values, result
        saved += s.tokens * (s.config.model.heads // s.tensor) * 4
        if s.mixed:
            saved += 4 * s.hidden * part * s.compute  # weights as they were multiplied
        return saved

    def _saved_feed_forward(self, block: int) -> float:
        """Likewise of the feed-forward layer, from the attention's result on."""
        s, moe = self.sizes, self.sizes.config.moe
        stream = s.outside * s.hidden * s.parameter
        inside = s.tokens * s.hidden * s.compute
        if not (s.form.spec.blocks[block].moe is not None):
            weights = 2 * s.hidden * s.ffn_part * s.compute if s.mixed else 0
            return stream + inside + 2 * s.tokens * s.ffn_part * s.compute + weights
        chosen = s.outside * moe.top_k
        router = s.outside * s.hidden * s.parameter + s.outside * moe.num_experts * (3 * s.precise + _INDEX)
        indices = (4 * chosen + 2 * s.slots) * _INDEX
        weights = 2 * self.experts * s.hidden * s.ffn_part * s.compute if s.mixed else 0
        slots = s.slots * (s.hidden + 2 * s.ffn_part) * s.compute
        return stream + router + indices + slots + chosen * s.hidden * s.compute + weights

    def _saved(self, block: int) -> float:
        return self._saved_attention() + self._saved_feed_forward(block)

    def _working_sets(self, block: int) -> Iterator[tuple[str, float, float, float, float]]:
        """Fullest moments of a block's backward pass.

        Yields name; bytes of gradients just made, of those of the block before them, of freed activations, temporaries.
        """
        s, moe, routed = self.sizes, self.sizes.config.moe, (self.sizes.form.spec.blocks[block].moe is not None)
        part = s.hidden // s.tensor
        matrix = s.hidden * s.ffn_part * s.parameter
        if routed:
            # The results that gates weighted are gone, and the gradient of tokens is that of the block's result alone.
            weighted, stream = (s.outside * s.hidden * size for size in (moe.top_k * s.compute, s.parameter))
            held = s.slots * (s.hidden + s.ffn_part) * s.compute - stream
            yield "experts", self.experts * matrix, 0, weighted, held
            if moe.unlimited and s.config.model.recompute.granularity == Granularity.BLOCK:
                # Product, each row's bias, their sum; where tensor ranks share rows, as they came, and all tokens'.
                copies = 5 if s.form.layout.sharers > 1 else 3
                yield "end of recomputing", 0, 0, 0, copies * s.slots * s.hidden * s.compute - stream
        else:
            yield "feed-forward layer", matrix, 0, 0, matrix + s.tokens * s.ffn_part * s.compute  # transposed
        done = self._attention_gradients + self._feed_forward_gradients(routed)
        yield "attention", 0, done, self._saved_feed_forward(block), 6 * s.tokens * part * s.compute

    def _reduction(self) -> Moment:
        """A bucket at a time leaves the parameters' gradients and becomes a shard's; with overlap all do at once."""
        if self.sizes.config.optim.overlap:
            elements = sum(self.shards)
        else:
            elements = max(shards * shard for (_, shards), shard in zip(self.buckets, self.shards, strict=True))
        return self._moment("reduction of gradients", self.gradients, 0, 0, elements * self.sizes.parameter)

    def _optimizer(self) -> Moment:
        """The gradient of the shards, and temporaries of the largest tile."""
        tile = self.sizes.config.optim.tile
        largest = max(self.shards)
        half = self.master if self.sizes.parameter < 4 else 0
        if tile == "fused":
            temporaries = 0
        else:
            elements = largest if tile is None else min(tile, largest)
            temporaries = elements * ((_TILE_TEMPORARIES * self.master if self.adam else 0) + half)
        return self._moment("optimizer step", sum(self.shards) * self.sizes.parameter, 0, 0, temporaries)
