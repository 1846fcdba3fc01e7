"""Computes in closed form what a configuration communicates in one optimizer step.

If experts have no capacity and an expert group has several processes, the bytes of some collectives depend on the
routers' choices. The closed form then needs the number of rows that each layer moved, or assumes balanced routing.

It follows the algorithm, not the code that runs. Every run ends by comparing its ledger with the closed form, and a
difference is a bug in one of them.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, reduce
from itertools import chain
from typing import NamedTuple

import hydra
import torch

from tedlab.comm.collectives import Collective, Operation, Phase
from tedlab.comm.keep import recompute_plan, unread_tags
from tedlab.comm.ledger import Count, Entry, Totals, counted
from tedlab.comm.recompute import RecomputePlan, Second
from tedlab.comm.rows import Rows, split_evenly
from tedlab.config import BalanceScope, BiasUpdate, Compiler, ExpertKernel, Granularity, TrainConfig, with_values
from tedlab.data.ramp import Ramp
from tedlab.degrees import GroupKind, parallel_degrees
from tedlab.models import models
from tedlab.optim.blocks import INNER, Block, Owner, blocks_of, overlap, owners
from tedlab.optim.bucket import lay_out
from tedlab.optim.fused import chosen_tile
from tedlab.optim.groups import Grouping
from tedlab.optim.muon import DTYPES
from tedlab.parametrization import scales
from tedlab.predict.flops import first_with_backward
from tedlab.spec import LENT, ROUTED, Layout, MicroBatch, ParameterSpec, RowCount, Site, Sites

# Tags of what a step exchanges beside gradients, and leaves out if these overflowed.
STEPPING = ("parameters.gather", "matrices.to_owner", "matrices.to_shards", "matrices.join", "matrices.part")
_DTYPES = {  # trainer.precision → dtype of parameters, dtype of matrix products
    "32-true": (torch.float32, torch.float32),
    "64-true": (torch.float64, torch.float64),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
    "16-true": (torch.float16, torch.float16),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
}


def predict(config: TrainConfig, rank: int = 0) -> dict[Entry, Count]:
    """Returns the calls and bytes of one optimizer step of ``tedlab train``.

    Args:
        config: A configuration completed by :func:`tedlab.validate.complete`. If its experts have no capacity, all are
            assumed to be chosen equally often; see :func:`with_rows`.
        rank: The process. Processes differ only if an optimizer needs matrices whole, of which each has its own.
    """
    form = ClosedForm(config, rank=rank)
    micro_batch = counted(form.micro_batch())
    accumulated = int(config.trainer["accumulate_grad_batches"])
    return {entry: count * accumulated for entry, count in micro_batch.items()} | counted(form.optimizer_step())


def stages(config: TrainConfig, first: int, last: int) -> Iterator[tuple[TrainConfig, int]]:
    """Yields, for each stage of the steps from ``first`` up to, without, ``last``, its configuration and their number.

    A stage without a ramp of its own has its sizes in ``data.batch_size`` and what follows from it. The length of rows
    changes no collective, since a micro-batch has as many tokens.

    Args:
        config: A configuration completed by :func:`tedlab.validate.complete`.
        first: The first step.
        last: The step after the last.
    """
    together = config.data.micro_batch_size * parallel_degrees(config.parallel).data
    for stage, steps in Ramp.of(config.data, config.model.sequence_length).between(first, last):
        accumulated = {"trainer.accumulate_grad_batches": stage.batch_size // together}
        yield with_values(config, {"data.batch_size": stage.batch_size, **accumulated}), steps


def with_rows(expected: Totals, config: TrainConfig, moved: Mapping[int, Rows]) -> dict[Entry, Count]:
    """Returns expected totals in which mixtures without a capacity move the given rows instead of balanced ones.

    Args:
        expected: A multiple of what :func:`predict` returns.
        config: The configuration given to :func:`predict`.
        moved: The rows that all micro-batches moved, by block; empty if there is no such mixture.
    """
    if not moved:
        return dict(expected)
    form = ClosedForm(config, moved)
    rows = {site.tag: site.rows for block in moved for site in chain(*form.sites[block]) if site.rows in ROUTED}
    totals = counted(call for call in form.micro_batch() if call.tag in rows)
    # How often experts are lent depends on what is chosen, too.
    lent = {entry: count for entry, count in totals.items() if rows[entry.tag] in LENT}
    payload = {entry: count.payload_bytes for entry, count in totals.items()}
    return {
        entry: replace(count, payload_bytes=payload.get(entry, count.payload_bytes))
        for entry, count in expected.items()
        if rows.get(entry.tag) not in LENT
    } | lent


class ClosedForm:
    """The collectives of a configuration, part by part. Groups of one process do not communicate.

    Args:
        config: A configuration completed by :func:`tedlab.validate.complete`.
        rows: The rows that mixtures without a capacity move in one micro-batch, by block; None: those of the first
            process when every expert is chosen equally often.
        rank: The process whose matrices count, if the optimizer needs them whole.

    Attributes:
        spec: The specification of the model.
        layout: The layout of its processes.
        parameter, compute, precise: The dtypes, see :class:`tedlab.spec.MicroBatch`.
        sites: The collective sites of each block, of a pair that runs as one at its second block.
    """

    def __init__(self, config: TrainConfig, rows: Mapping[int, Rows] | None = None, rank: int = 0) -> None:
        self.rank = rank
        self.config, self.spec = config, models[config.model.architecture].spec(config.model, config.moe)
        self.degrees = parallel_degrees(config.parallel)
        self.layout = Layout(self.degrees, config.comm)
        self.groups = self.layout.sizes
        self.parameter, self.compute = _DTYPES[str(config.trainer["precision"])]
        self.precise = torch.promote_types(self.compute, torch.float32)
        self.tokens = config.data.micro_batch_size * config.model.sequence_length
        units, first = self.spec.units, self.spec.first
        alike = {n: units[n].sites(self.layout).present(self.layout) for n in set(first)}
        self.sites = [alike[n] for n in first]
        self.moved = rows
        self._grouping = Grouping.under(config.optim, scales(type(self.spec), config.model, config.moe))
        self._owned: dict[GroupKind, list[tuple[Block, Owner]]] = {}

    @cached_property
    def _rows(self) -> list[Rows]:
        """The rows that each block moves between experts and other processes; none for a block without experts."""
        if self.moved is not None:
            return [self.moved.get(block, Rows()) for block in range(len(self.sites))]
        alike = {n: self.spec.units[n].rows(self.layout, self.tokens) for n in set(self.spec.first)}
        return [alike[n] for n in self.spec.first]

    def at(self, block: int | None = None) -> MicroBatch:
        """Returns what a block computes with, or, for None, what the layers before and after the blocks do."""
        rows = Rows() if block is None else self._rows[block]
        length = self.config.model.sequence_length
        kernels = fused_rows(self.config), on_gpu(self.config), self.config.model.compile == Compiler.INDUCTOR
        return MicroBatch(self.layout, self.tokens, length, self.parameter, self.compute, self.precise, rows, *kernels)

    @cached_property
    def kinds(self) -> dict[int, list[int]]:
        """The blocks that are equal, move as many rows, train alike, and for which CAC keeps the same, by the first."""
        alike: dict[tuple[object, ...], list[int]] = {}
        for block, first in enumerate(self.spec.first):
            kept = self.spec.kept(self.config.comm.cac, block)
            key = first, self.has_backward(block), self._rows[block], *sorted(kept.items())
            alike.setdefault(key, []).append(block)
        return {blocks[0]: blocks for blocks in alike.values()}

    @cached_property
    def firsts(self) -> list[int]:
        """For each block, the first that is like it."""
        of = {block: first for first, blocks in self.kinds.items() for block in blocks}
        return [of[block] for block in sorted(of)]

    # ---- what trains ---------------------------------------------------------------------------------------------

    @cached_property
    def trained(self) -> list[ParameterSpec]:
        """The parameters that are not frozen, in the order of the model."""
        return [p for p in self.spec.parameters() if self._grouping.trains(p.name)]

    @cached_property
    def _first_with_backward(self) -> int:
        return first_with_backward(self.spec, self._grouping)

    def has_backward(self, block: int) -> bool:
        """Tells whether the backward pass reaches a block: not if it and everything before it are frozen."""
        return block >= self._first_with_backward

    # ---- one micro-batch -----------------------------------------------------------------------------------------

    def micro_batch(self) -> Iterator[Collective]:
        """Yields the collectives of the forward and backward pass of one micro-batch."""
        yield from self.ends()
        for block in range(len(self.sites)):
            yield from self.block(block)
        yield from self.counting()

    @cached_property
    def counts_ahead(self) -> bool:
        """Whether each micro-batch is routed twice, the first time to count the choices of the whole step."""
        over_all = self.config.moe.balance.scope == BalanceScope.GLOBAL_BATCH and self.config.moe.num_experts > 0
        return over_all and int(self.config.trainer["accumulate_grad_batches"]) > 1

    @property
    def interleaves(self) -> bool:
        """Whether the backward pass of each micro-batch but the last runs beside the forward pass of the next."""
        several = int(self.config.trainer["accumulate_grad_batches"]) > 1
        return self.config.comm.interleave and several and self.groups["expert"] > 1

    def counting(self) -> Iterator[Collective]:
        """Yields the collectives of a micro-batch's forward pass that only counts choices."""
        if self.counts_ahead:
            yield from self.calls(
                self.spec.embedding.sites(self.layout).present(self.layout).forward, "forward", Rows()
            )
            for sites, rows in zip(self.sites, self._rows, strict=True):
                yield from self.calls(sites.forward, "forward", rows)

    def block(self, block: int) -> Iterator[Collective]:
        """Yields the collectives of a block, recomputation included."""
        yield from self.calls(self.sites[block].forward, "forward", self._rows[block])
        if not self.has_backward(block):
            return
        if self.config.model.recompute.granularity == Granularity.BLOCK:
            yield from self.recompute(block, self.config.comm.cac)
        lends = self._trains(f"blocks.{block}.feed_forward.experts.")
        sites = (site for site in self.sites[block].backward if lends or site.rows not in LENT)
        yield from self.calls(sites, "backward", self._rows[block])

    def ends(self) -> Iterator[Collective]:
        """Yields the collectives before the first block and after the last."""
        parts = [part.sites(self.layout) for part in self.spec.ends]
        if not self._grouping.trains("embedding.weight"):  # the first of them; the others have a backward pass anyway
            parts[0] = Sites(parts[0].forward)
        sites = reduce(Sites.then, parts).present(self.layout)
        yield from self.calls(sites.forward, "forward", Rows())
        yield from self.calls(sites.backward, "backward", Rows())

    def second_pass(self, block: int, cac: object) -> RecomputePlan:
        """Returns what recomputation does at each collective of a block."""
        return recompute_plan(self.sites[block].recomputed, self.spec.kept(cac, block), self.unread(block))

    def unread(self, block: int) -> Collection[str]:
        """Returns the collectives that early stopping skips: only the code behind the block reads their results."""
        return unread_tags(self.sites[block].recomputed) if self.config.model.recompute.early_stop else ()

    def dead(self, block: int) -> set[str]:
        """Returns the tags of a block's collectives whose input recomputation does not compute."""
        second = self.second_pass(block, self.config.comm.cac) if self.config.comm.skip_dead_gemm else {}
        return {tag for tag, what in second.items() if what is not Second.AGAIN}

    def recompute(self, block: int, cac: object) -> Iterator[Collective]:
        """Yields the collectives of a block's second pass."""
        if not self.has_backward(block):
            return
        second = self.second_pass(block, cac)
        for site in self.sites[block].recomputed:
            if second[site.tag] is Second.AGAIN:
                yield from self.calls([site], "recompute", self._rows[block])
            elif second[site.tag] is Second.SLICE:
                gathered = replace(site, op="all_gather", kind="tensor", rows=site.result or site.rows)
                yield from self.calls([gathered], "recompute", self._rows[block])

    def kept_bytes(self, block: int, cac: object) -> int:
        """Returns the bytes that CAC keeps of a block between its two passes, in each process."""
        total = 0
        if not self.has_backward(block):
            return total
        second = self.second_pass(block, cac)
        for site in self.sites[block].recomputed:
            result = self._count(site.result or site.rows, self._rows[block]) * site.width * self._dtype(site).itemsize
            if site.op == "reduce_scatter":
                result //= self.groups[site.kind]
            if second[site.tag] is Second.WHOLE:
                total += result
            elif second[site.tag] is Second.SLICE:
                total += result // self.degrees.tensor
        return total

    # ---- once per step -------------------------------------------------------------------------------------------

    def optimizer_step(self) -> Iterator[Collective]:
        """Yields the collectives that reduce gradients, take their norm and gather parameters."""
        partial = 0
        for bucket in self.buckets:
            shards = self.shards(bucket)
            shard = -(-bucket.elements // shards)
            whole = shards * shard
            if bucket.partial:
                partial += shard
            if self.groups[bucket.kind] > 1:
                op: Operation = "reduce_scatter" if shards > 1 else "all_reduce"
                yield self._call(op, bucket.kind, "optimizer", "gradients.reduce", whole, self.parameter)
            if shards > 1:
                yield self._call("all_gather", bucket.kind, "optimizer", "parameters.gather", whole, self.parameter)
        if partial:
            yield self._call("all_reduce", "tensor", "optimizer", "gradients.partial", partial, self.parameter)
        for kind in INNER:
            yield from self.matrix_exchanges(kind)
        yield from self.balancing()
        if self.groups["world"] > 1:  # sum of squares, missing gradients, non-finite losses
            yield self._call("all_reduce", "world", "optimizer", "gradients.norm", 3, torch.float64)

    # ---- matrices ------------------------------------------------------------------------------------------------

    def matrix_exchanges(self, kind: GroupKind) -> Iterator[Collective]:
        """Yields the collectives that make the matrices of one kind of group whole, and those that bring them back."""
        buckets = [bucket for bucket in self.buckets if bucket.matrix and bucket.kind == kind]
        if not buckets:
            return
        across, inner, (own, own_inner) = self.shards(buckets[0]), INNER[kind], self.place(kind)
        mine = [(block, owner) for block, owner in self.owned(kind) if owner.across == own]
        here = sum(block.elements for block, _ in mine)
        if across > 1:
            its = iter(self.owned(kind))
            shard = kept = 0
            for bucket in buckets:
                size, start = -(-bucket.elements // across), 0
                while start < bucket.elements:
                    block, owner = next(its)
                    part = overlap(start, block.elements, own, size)
                    shard += part.stop - part.start
                    kept += (part.stop - part.start) * (owner.across == own)
                    start += block.elements
            yield self._swap(kind, "matrices.to_owner", shard, here, kept)
            yield self._swap(kind, "matrices.to_shards", here, shard, kept)
        divided = [(block.elements, owner.inner) for block, owner in mine if block.divided is not None]
        if self.groups[inner] > 1 and divided:
            parts, kept = sum(n for n, _ in divided), sum(n for n, t in divided if t == own_inner)
            yield self._swap(inner, "matrices.join", parts, kept * self.groups[inner], kept)
            yield self._swap(inner, "matrices.part", kept * self.groups[inner], parts, kept)

    def _swap(self, kind: GroupKind, tag: str, sent: int, received: int, kept: int) -> Collective:
        """Returns an exchange of so many elements, of which this process keeps some to itself."""
        size = self.travelling.itemsize
        call = self._call("all_to_all", kind, "optimizer", tag, sent, self.travelling)
        return replace(call, exchanged_bytes=((sent - kept) * size, (received - kept) * size))

    def owned(self, kind: GroupKind) -> list[tuple[Block, Owner]]:
        """Returns the blocks of one kind of group's matrices, and who makes each whole."""
        if kind not in self._owned:
            buckets = [bucket for bucket in self.buckets if bucket.matrix and bucket.kind == kind]
            blocks = [block for bucket in buckets for p in bucket.parameters for block in self._blocks(p)]
            across = self.shards(buckets[0]) if buckets else 1
            self._owned[kind] = list(zip(blocks, owners(blocks, across, self.groups[INNER[kind]]), strict=True))
        return self._owned[kind]

    def made_whole(self, kind: GroupKind) -> Iterator[tuple[Block, list[tuple[int, int]]]]:
        """Yields the blocks that this process makes whole, each with the shapes of its matrices."""
        own, inner = self.place(kind)
        for block, owner in self.owned(kind):
            if owner.across == own and owner.inner in (None, inner):
                yield block, list(block.shapes(self.groups[INNER[kind]]))

    def place(self, kind: GroupKind) -> tuple[int, int]:
        """Returns this process's rank in the group that divides state, 0 if it does not, and in the tensor group."""
        members = self.layout.groups(self.rank)
        own, inner = (members[its].index(self.rank) for its in (kind, INNER[kind]))
        return own if self.config.optim.zero else 0, inner

    def _blocks(self, parameter: ParameterSpec) -> list[Block]:
        placed = parameter.placed(self.degrees)
        divided = next((placed[axis] for axis in INNER.values() if axis in placed), None)
        return blocks_of(parameter.local_shape(self.degrees), divided, parameter.fused)

    @property
    def travelling(self) -> torch.dtype:
        """The dtype in which matrices travel between processes and become orthogonal."""
        if self.parameter == torch.float64:
            return torch.float64
        named: torch.dtype = getattr(torch, str(self.config.optim.optimizer.get("dtype", DTYPES[0])))
        return named

    # ---- what routers count --------------------------------------------------------------------------------------

    def balancing(self) -> Iterator[Collective]:
        """Yields the collectives that count the choices of the whole step."""
        moe = self.config.moe
        layers = sum(block.moe is not None for block in self.spec.blocks)
        if layers and moe.balance.scope == BalanceScope.GLOBAL_BATCH and self.groups["data"] > 1:
            yield self._call(
                "all_reduce", "data", "forward", "router.totals", layers * (moe.num_experts + 1), torch.float64
            )
        kind: GroupKind = "world" if self.layout.inside(moe).sequence else "data"
        moving = sum(self._moves_biases(n) for n, block in enumerate(self.spec.blocks) if block.moe is not None)
        if moving and moe.router.bias_update != BiasUpdate.NONE and self.groups[kind] > 1:
            yield self._call("all_reduce", kind, "optimizer", "router.bias", moving * moe.num_experts, torch.int64)

    def _moves_biases(self, block: int) -> bool:
        """Tells whether the biases of a block's router, if it has any, follow its load: not if it is frozen."""
        if not self.config.optim.groups:
            return True
        return self._trains(f"blocks.{block}.feed_forward.router.")

    def _trains(self, prefix: str) -> bool:
        """Tells whether any parameter whose name begins so is trained, or there is none."""
        weights = [p.name for p in self.spec.parameters() if p.name.startswith(prefix)]
        return not weights or any(map(self._grouping.trains, weights))

    def shards(self, bucket: "BucketSize") -> int:
        """Returns how many processes divide a bucket's optimizer state among them."""
        return self.groups[bucket.kind] if self.config.optim.zero else 1

    def joined(self, bucket: "BucketSize") -> bool:
        """Tells whether the gradients of a bucket are copied to new memory: all but the only one of a full bucket."""
        return len(bucket.parameters) > 1 or bucket.elements % self.shards(bucket) > 0

    @cached_property
    def buckets(self) -> list["BucketSize"]:
        """The buckets into which the optimizer lays out the parameters, in its order."""

        def key(p: ParameterSpec) -> tuple[int, GroupKind, int, bool]:
            index = self._grouping.index(p.name, len(p.shape), p.decayed)
            return index, p.group, self.degrees.world_size // p.parts(self.degrees), p.partial(self.layout)

        def matrix(p: ParameterSpec) -> bool:
            return self._grouping.matrix(p.name, len(p.shape), p.decayed)

        def local(p: ParameterSpec) -> int:
            return p.elements(self.degrees)

        buckets = lay_out(self.trained, key, local, self.config.optim.bucket_elements)
        return [
            BucketSize(group, holders, partial, sum(map(local, together)), tuple(together), matrix(together[0]))
            for (_, group, holders, partial), together in buckets
        ]

    # ---- calls ---------------------------------------------------------------------------------------------------

    def calls(self, sites: Iterable[Site], phase: Phase, moved: Rows) -> Iterator[Collective]:
        """Yields the collectives of sites, of which a mixture's move so many rows."""
        for site in sites:
            rows = self._count(site.rows, moved)
            if site.rows in LENT:
                for number in range(moved.exchanges):  # how many of these each has makes no difference
                    of_call = Rows() if number else moved
                    elements = self._count(site.rows, of_call) * site.width
                    call = self._call(site.op, site.kind, phase, site.tag, elements, self._dtype(site))
                    yield replace(call, exchanged_bytes=self._exchanged(site, of_call))
                continue
            if self.moved is not None and site.op == "all_to_all" and site.result is not None:
                numbers = (rows, *self._exchanged(site, moved))
                for number, *exchanged in zip(*(split_evenly(n, site.parts) for n in numbers), strict=True):
                    call = self._call(site.op, site.kind, phase, site.tag, number * site.width, self._dtype(site))
                    yield replace(call, exchanged_bytes=tuple(exchanged))
                continue
            chunk = site.chunk or rows
            at_a_time = [min(chunk, rows - start) for start in range(0, rows, chunk)] if chunk else [0]
            if site.parts > 1:
                at_a_time = split_evenly(rows, site.parts)
            for number in at_a_time:
                yield self._call(site.op, site.kind, phase, site.tag, number * site.width, self._dtype(site))

    def _exchanged(self, site: Site, moved: Rows) -> tuple[int, int]:
        """Returns the bytes that go to and come from other processes: of rows, an equal part to and from each."""
        each = site.width * self._dtype(site).itemsize
        others = 1.0 if site.rows in LENT else 1 - 1 / self.groups[site.kind]
        there, back = (self._count(rows, moved) for rows in (site.rows, site.result or site.rows))
        return round(there * each * others), round(back * each * others)

    def _count(self, rows: RowCount, moved: Rows) -> int:
        if rows == "tokens":
            return self.tokens
        if rows == "dealt":
            return -(-self.tokens // self.degrees.tensor)
        if rows == "samples":
            return self.config.data.micro_batch_size
        return 1 if rows == "once" else int(getattr(moved, rows))

    def _dtype(self, site: Site) -> torch.dtype:
        return torch.int64 if site.dtype == "index" else getattr(self, site.dtype)

    def _call(
        self, op: Operation, kind: GroupKind, phase: Phase, tag: str, elements: int, dtype: torch.dtype
    ) -> Collective:
        return Collective(op, kind, self.groups[kind], phase, tag, torch.Size([elements]), dtype)


def fused_rows(config: TrainConfig) -> bool:
    """Tells whether a GPU's kernels gather, activate and weight rows of experts, in one pass over memory each."""
    fits = on_gpu(config) and config.trainer["precision"] != "64-true"
    return fits and config.moe.kernel != ExpertKernel.TORCH


def on_gpu(config: TrainConfig) -> bool:
    """Tells whether processes have a GPU each."""
    return config.trainer["accelerator"] == "gpu"


def tile_of(config: TrainConfig) -> int | str | None:
    """Returns ``optim.tile``, with what a run of this configuration has for ``auto``."""
    options = config.optim.optimizer
    kind = hydra.utils.get_class(str(options["_target_"]))
    return chosen_tile(config.optim.tile, kind, [options], on_gpu(config))


class BucketSize(NamedTuple):
    """The size of a bucket, whose parameters are reduced together.

    Attributes:
        kind: The group that the bucket is reduced over.
        holders: The number of processes that hold each element.
        partial: Whether gradients are partial sums over the tensor group, too.
        elements: The number of elements in this process.
        parameters: The parameters.
        matrix: Whether the optimizer needs them whole.
    """

    kind: GroupKind
    holders: int
    partial: bool
    elements: int
    parameters: tuple[ParameterSpec, ...]
    matrix: bool
