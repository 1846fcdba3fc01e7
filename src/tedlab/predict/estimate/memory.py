"""Computes how much memory a rank needs: what it keeps all the time, and the fullest moments of a step.

Only a few moments can be the fullest: the loss, the backward pass of a block (in its feed-forward layer or attention),
the embedding's gradient, the reduction of gradients, the optimizer's step, and the averaging of weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from tedlab.config import Granularity
from tedlab.models.joined import MergedSpec
from tedlab.optim.blocks import INNER
from tedlab.predict.estimate.beside import Beside
from tedlab.predict.estimate.optimizer import per_element
from tedlab.predict.sim.memory import CATEGORIES, Category
from tedlab.predict.volumes import ClosedForm, tile_of
from tedlab.spec import LENT


@dataclass(frozen=True)
class Moment:
    """A moment of the step.

    Attributes:
        name: The moment's name.
        held: The bytes that the rank holds, by category.
    """

    name: str
    held: dict[Category, int]

    @property
    def total(self) -> int:
        """The bytes of all categories."""
        return sum(self.held.values())


class Memory:
    """The memory of one rank."""

    def __init__(self, form: ClosedForm) -> None:
        self.form = form
        optim = form.config.optim
        self.tile = tile_of(form.config)
        self.accumulated = int(form.config.trainer["accumulate_grad_batches"])
        self.buckets = [(bucket, form.shards(bucket)) for bucket in form.buckets]
        self.shards = [-(-bucket.elements // shards) for bucket, shards in self.buckets]
        self.flat = sum(shards * shard for (_, shards), shard in zip(self.buckets, self.shards, strict=True))
        self.parameter = form.parameter.itemsize
        self.gradients = sum(bucket.elements for bucket, _ in self.buckets) * self.parameter
        self.master = max(4, self.parameter)
        self.of_matrices = [
            shard if bucket.matrix else 0 for (bucket, _), shard in zip(self.buckets, self.shards, strict=True)
        ]
        kinds = {bucket.matrix for bucket, _ in self.buckets}
        sizes = {kind: per_element(optim.optimizer, kind, self.master).kept for kind in kinds}
        self.moments = sum(
            shard * sizes[bucket.matrix] for (bucket, _), shard in zip(self.buckets, self.shards, strict=True)
        )
        self.step = per_element(optim.optimizer, master=self.master)  # of what is no matrix
        self.averages = 0 if form.config.average.kind is None else sum(b.elements for b in form.buckets) * self.master

        # Of blocks: whether they are computed again, the bytes of activations between them, and those of what each
        # saves, of what CAC keeps of it, and of its gradients.
        spec, ends = form.spec, form.at()
        self.recomputed = form.config.model.recompute.granularity == Granularity.BLOCK
        self.stream = ends.outside * form.config.model.hidden * self.parameter
        self.saves, kept, self.own = ([0] * len(spec.blocks) for _ in range(3))
        for first, blocks in form.kinds.items():
            block, batch = spec.units[first], form.at(first)
            for n in blocks:
                self.saves[n], self.own[n] = block.saved(batch), block.gradients(batch)
                kept[n] = form.kept_bytes(first, form.config.comm.cac) if self.recomputed else 0
        # Bytes before each block and after the last, and those that come on top at the loss.
        inputs = [0 if isinstance(unit, MergedSpec) else self.stream for unit in spec.units]
        self.saved = [0, *accumulate(inputs if self.recomputed else self.saves)]
        self.stash = [0, *accumulate(kept)]
        self.last = sum(end.saved(ends) for end in spec.ends) + self.stream

    def peak(self) -> Moment:
        """Returns the fullest moment."""
        return max(self.at_moments(), key=lambda moment: moment.total)

    def at_moments(self) -> Iterator[Moment]:
        """Yields the moments that can be the fullest."""
        form, spec, ends, recomputed, stream = self.form, self.form.spec, self.form.at(), self.recomputed, self.stream
        several = self.accumulated > 1  # then each gradient is added to a sum as soon as it is computed
        before = self.gradients if several else 0
        saves, saved, stash = self.saves, self.saved, self.stash
        if form.moved is not None:  # otherwise no forward pass has so many rows that it is the fullest moment
            for n in form.moved:
                passed = saved[n] + saves[n]
                yield self.moment(f"forward pass of block {n}", before, stash[n], passed, self.passing(n))
        yield self.moment("loss", before, stash[-1], saved[-1] + self.last, spec.at_loss(ends))
        gradients = before + spec.left(ends, several)
        for n in reversed(range(len(spec.blocks))):
            activations = saved[n + 1] + (saves[n] if recomputed else 0)
            for moment in spec.units[n].working_sets(form.at(n), recomputed):
                yield self.moment(
                    f"backward pass of block {n}, {moment.name}",
                    gradients + moment.new + (0 if several else moment.done),
                    stash[n + 1],
                    activations - moment.freed,
                    moment.temporaries + 2 * stream,
                )
            if not several:
                gradients += self.own[n]
        moment = spec.first_moment(ends, several)
        yield self.moment(moment.name, self.gradients + moment.new, 0, 0, moment.temporaries + 2 * stream)
        if form.interleaves:
            yield from Beside(self).moments()
        yield self._reduction()
        yield self._optimizer()
        if self.averages and self.parameter < self.master:  # a copy of a parameter in the precision of averages
            largest = max(p.elements(form.degrees) for p in form.trained)
            yield self.moment("averaging of weights", 0, 0, 0, largest * self.master)

    # ---- parts ---------------------------------------------------------------------------------------------------

    def moment(self, name: str, gradients: float, stash: float, activations: float, temporaries: float) -> Moment:
        """Returns a moment with these bytes, and those of parameters and of the optimizer's state."""
        state = self.averages + self.moments + sum(self.shards) * (self.master if self.parameter < 4 else 0)
        values = (self.flat * self.parameter, state, gradients, stash, activations, temporaries)
        return Moment(name, {c: round(v) for c, v in zip(CATEGORIES, values, strict=True)})

    def passing(self, block: int) -> int:
        """Returns the bytes of a forward pass's temporaries, before results have come back.

        These are rows as they arrived, results in three places, and copies of lent weights.
        """
        batch = self.form.at(block)
        rows = (4 * batch.rows.computed - batch.rows.sent) * self.form.config.model.hidden
        width = max((site.width for site in self.form.sites[block].forward if site.rows in LENT), default=0)
        return (rows + batch.rows.lent * width) * batch.compute.itemsize

    def _reduction(self) -> Moment:
        """Returns the moment of the reduction, which buffers a bucket at a time; with overlap, it holds all shards."""
        form = self.form
        copied = [form.joined(bucket) or form.groups[bucket.kind] > 1 for bucket, _ in self.buckets]
        if form.config.optim.overlap:
            elements = sum(shard for shard, new in zip(self.shards, copied, strict=True) if new)
        else:
            buffers = [
                (shards if form.joined(bucket) else 1) * shard * new
                for (bucket, shards), shard, new in zip(self.buckets, self.shards, copied, strict=True)
            ]
            elements = max(buffers)
        return self.moment("reduction of gradients", self.gradients, 0, 0, elements * self.parameter)

    def _optimizer(self) -> Moment:
        """Returns the moment of the optimizer step, with the shards' gradients and the largest tile's temporaries."""
        largest = max(shard - whole for shard, whole in zip(self.shards, self.of_matrices, strict=True))
        half = self.master if self.parameter < 4 else 0
        if self.tile == "fused":
            temporaries = 0
        else:
            elements = min(self.tile, largest) if isinstance(self.tile, int) else largest
            temporaries = elements * (self.step.temporary + half)
        temporaries = max(temporaries, self._matrices())
        return self.moment("optimizer step", sum(self.shards) * self.parameter, 0, 0, temporaries)

    def _matrices(self) -> int:
        """Returns the bytes of temporaries while matrices are whole: directions, and those of one kind of group's.

        Of the largest block there are the whole, its matrices side by side, and what an iteration makes of one.
        """
        form, most = self.form, 0
        for kind in INNER:
            own, _ = form.place(kind)
            here = sum(block.elements for block, owner in form.owned(kind) if owner.across == own)
            shards = zip(self.buckets, self.of_matrices, strict=True)
            exchanged = sum(shard for ((bucket, parts), shard) in shards if bucket.kind == kind and parts > 1)
            largest = [
                2 * sum(m * n for m, n in shapes) + max(2 * (m * n + min(m, n) ** 2) for m, n in shapes)
                for _, shapes in form.made_whole(kind)
            ]
            most = max(most, here + max([exchanged, *largest]))
        return (sum(self.of_matrices) + most) * form.travelling.itemsize
