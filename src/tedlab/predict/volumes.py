"""The closed form: what a configuration communicates in one optimizer step, from the configuration alone.

With dropless routing the bytes of some collectives depend on what routers choose, wherever an expert group has several
processes: here also on how many rows each layer moved, or on the assumption that all experts are chosen equally often.

Written from the algorithm, not from the code that runs: at the end of every run the ledger is held against it, and a
difference is a bug in one of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch

from tedlab.capacity import group_capacity
from tedlab.comm.collectives import Collective, Operation, Phase
from tedlab.comm.ledger import Count, Entry, Totals, counted
from tedlab.comm.recompute import Second
from tedlab.comm.rows import Rows, hands, listed, rows_of, spread
from tedlab.comm.sites import Buffer, Site, backward_sites, block_sites, kept_tags, plan
from tedlab.config import TrainConfig
from tedlab.degrees import GroupKind, parallel_degrees
from tedlab.models import GPTSpec
from tedlab.optim.bucket import lay_out
from tedlab.spec import ParameterSpec

_OF_ROWS = {  # collectives whose size depends on what routers choose
    *("dispatch.all_to_all", "dispatch.gather", "experts.copy", "experts.reduce", "combine.drop"),
    "combine.all_to_all",
}
_DTYPES = {  # trainer.precision → of parameters, of matrix products
    "32-true": (torch.float32, torch.float32),
    "64-true": (torch.float64, torch.float64),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
    "16-true": (torch.float16, torch.float16),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
}


def predict(config: TrainConfig) -> dict[Entry, Count]:
    """Calls and bytes of one optimizer step, in any process: of ``tedlab train``'s model, strategy and optimizer.

    Args:
        config: completed by :func:`tedlab.validate.check`. With dropless routing every expert is chosen equally often,
            see :func:`with_rows`.
    """
    form = ClosedForm(config)
    micro_batch = counted(form.micro_batch())
    accumulated = int(config.trainer["accumulate_grad_batches"])
    return {entry: count * accumulated for entry, count in micro_batch.items()} | counted(form.optimizer_step())


def with_rows(expected: Totals, config: TrainConfig, moved: Mapping[int, Rows]) -> dict[Entry, Count]:
    """Expected totals, in which dropless layers moved so many rows instead of the same for each expert.

    Args:
        expected: multiples of what :func:`predict` says.
        config: as there.
        moved: rows of all micro-batches, by block; empty without dropless layers.
    """
    if not moved:
        return dict(expected)
    calls = (call for call in ClosedForm(config, moved).micro_batch() if call.tag in _OF_ROWS)
    payload = {entry: count.payload_bytes for entry, count in counted(calls).items()}
    return {
        entry: replace(count, payload_bytes=payload.get(entry, count.payload_bytes))
        for entry, count in expected.items()
    }


class ClosedForm:
    """The collectives of a configuration, part by part. Groups of one process do not communicate.

    Args:
        config: completed by :func:`tedlab.validate.check`.
        rows: that a dropless layer moves in one micro-batch, by block; None: as in the first process when every expert
            is chosen equally often.
    """

    def __init__(self, config: TrainConfig, rows: Mapping[int, Rows] | None = None) -> None:
        degrees, model, moe = parallel_degrees(config.parallel), config.model, config.moe
        self.config, self.degrees, self.spec = config, degrees, GPTSpec(model, moe)
        self.sequence = degrees.sequence and degrees.tensor > 1
        self.groups: Mapping[GroupKind, int] = {
            "tensor": degrees.tensor,
            "data": degrees.data,
            "expert": degrees.expert,
            "expert_data": degrees.expert_data,
            "expert_tensor": degrees.tensor,
            "world": degrees.world_size,
        }
        self.parameter, self.compute = _DTYPES[str(config.trainer["precision"])]
        self.precise = torch.promote_types(self.compute, torch.float32)
        self.tokens = config.data.micro_batch_size * model.sequence_length
        self.sharers = sharers = degrees.tensor if config.comm.dtd or self.sequence else 1
        slots = sharers * -(-self._capacity() // sharers) * moe.num_experts  # grown until each has as many
        self.elements: Mapping[Buffer, int] = {
            "tokens": self.tokens * model.hidden,
            "slots": slots * model.hidden,
            "share": slots * model.hidden // sharers,
            "statistics": 2 * moe.num_experts + 1,
        }
        self.dropless = moe.dispatch == "dropless" and moe.num_experts > 0
        self.listed = listed(self.tokens * moe.top_k, sharers)  # rows of a data rank
        self.rows = rows

    def _capacity(self) -> int:
        """Slots that each expert offers to a data rank's micro-batch."""
        moe = self.config.moe
        if not moe.num_experts:
            return 0
        groups = moe.capacity_groups or (self.degrees.tensor if self.sequence else 1)
        return groups * group_capacity(moe, self.tokens // groups, groups)

    @cached_property
    def balanced(self) -> Rows:
        """What the first process moves in a dropless layer when every expert is chosen equally often."""
        moe, degrees = self.config.moe, self.degrees
        counts = spread([1.0] * moe.num_experts, self.tokens * moe.top_k, self.tokens)
        sent = hands(np.tile(counts, (degrees.expert, 1)), self.sharers)
        return rows_of(sent[:, :, : moe.num_experts // degrees.expert], int(sent[0, 0].sum()), 0)

    # ---- one micro-batch -----------------------------------------------------------------------------------------

    def micro_batch(self) -> Iterator[Collective]:
        """Forward and backward pass of one micro-batch."""
        yield from self.ends()
        for block in range(self.config.model.layers):
            yield from self.block(block)

    def block(self, block: int) -> Iterator[Collective]:
        """A block's passes."""
        for site in self.sites(block):
            yield self._at(site, "forward", block)
        if self.dropless and self.routed(block):
            yield from self._counts()
        if self.config.model.checkpoint == "block":
            yield from self.recompute(block, self.config.comm.cac)
        for site in backward_sites(self.routed(block), self.config.comm, self.sequence, self.groups):
            yield self._at(site, "backward", block)

    def routed(self, block: int) -> bool:
        """Whether a block has experts."""
        return block in self.config.moe.blocks(self.config.model.layers)

    def sites(self, block: int) -> tuple[Site, ...]:
        """Of a block's forward pass."""
        return self._sites[self.routed(block)]

    @cached_property
    def _sites(self) -> dict[bool, tuple[Site, ...]]:
        return {routed: block_sites(routed, self.config.comm, self.sequence, self.groups) for routed in (False, True)}

    def recompute(self, block: int, cac: object) -> Iterator[Collective]:
        """A block's second pass."""
        sites = self.sites(block)
        second = plan(sites, kept_tags(cac, block))
        for site in sites:
            # What is used after the block only is recomputed for nothing.
            if second[site.tag] is Second.AGAIN and not (site.feeds == "end" and self.config.checkpoint.early_stop):
                yield self._at(site, "recompute", block)
            elif second[site.tag] is Second.SLICE:
                result = self._elements(site, block, "result")
                yield self._call("all_gather", "tensor", "recompute", site.tag, result, self._dtype(site))

    def kept_bytes(self, block: int, cac: object) -> int:
        """What CAC keeps of a block between its two passes, in each process."""
        total = 0
        second = plan(self.sites(block), kept_tags(cac, block))
        for site in self.sites(block):
            result = self._elements(site, block, "result") * self._dtype(site).itemsize
            if site.op == "reduce_scatter":
                result //= self.groups[site.kind]
            if second[site.tag] is Second.WHOLE:
                total += result
            elif second[site.tag] is Second.SLICE:
                total += result // self.degrees.tensor
        return total

    def ends(self) -> Iterator[Collective]:
        """Before the first block and after the last."""
        tokens = self.elements["tokens"]
        if self.degrees.tensor == 1:
            return
        if self.sequence:
            yield self._call("reduce_scatter", "tensor", "forward", "embedding.reduce", tokens, self.parameter)
            yield self._call("all_gather", "tensor", "backward", "embedding.reduce", tokens, self.parameter)
            yield self._call("all_gather", "tensor", "forward", "output.gather", tokens, self.compute)
            yield self._call("reduce_scatter", "tensor", "backward", "output.gather", tokens, self.compute)
        else:
            yield self._call("all_reduce", "tensor", "forward", "embedding.reduce", tokens, self.parameter)
            yield self._call("all_reduce", "tensor", "backward", "output.copy", tokens, self.compute)
        chunk = self.config.model.loss_chunk or self.tokens
        for start in range(0, self.tokens, chunk):
            rows = min(chunk, self.tokens - start)
            yield self._call("all_reduce", "tensor", "forward", "loss.max", rows, self.precise)
            yield self._call("all_reduce", "tensor", "forward", "loss.sum", 2 * rows, self.precise)

    # ---- once per step -------------------------------------------------------------------------------------------

    def optimizer_step(self) -> Iterator[Collective]:
        """Reduction of gradients, their norm, and the gathering of parameters."""
        partial = 0
        for bucket in self.buckets:
            shards = self.shards(bucket)
            shard = -(-bucket.elements // shards)
            if bucket.partial:
                partial += shard
            if self.groups[bucket.kind] > 1:
                op: Operation = "reduce_scatter" if shards > 1 else "all_reduce"
                yield self._optimizer(op, bucket.kind, "gradients.reduce", shards * shard, self.parameter)
            if shards > 1:
                yield self._optimizer("all_gather", bucket.kind, "parameters.gather", shards * shard, self.parameter)
        if partial:
            yield self._optimizer("all_reduce", "tensor", "gradients.partial", partial, self.parameter)
        if self.groups["world"] > 1:  # its squares, gradients that are lacking, losses that are not finite
            yield self._optimizer("all_reduce", "world", "gradients.norm", 3, torch.float64)

    def shards(self, bucket: "BucketSize") -> int:
        """How many processes divide a bucket's optimizer state among them."""
        return self.groups[bucket.kind] if self.config.optim.zero else 1

    @cached_property
    def buckets(self) -> list["BucketSize"]:
        """What is reduced together, in the order of reduction groups."""

        def key(p: ParameterSpec) -> tuple[bool, GroupKind, int, bool]:
            partial = p.own_tokens and self.sequence
            return not p.decayed, p.group, self.degrees.world_size // p.parts(self.degrees), partial

        def local(p: ParameterSpec) -> int:
            return p.elements(self.degrees)

        buckets = lay_out(self.spec.parameters(), key, local, self.config.optim.bucket_elements)
        return [
            BucketSize(group, holders, partial, sum(map(local, together)))
            for (_, group, holders, partial), together in buckets
        ]

    # ---- calls ---------------------------------------------------------------------------------------------------

    def _at(self, site: Site, phase: Phase, block: int) -> Collective:
        elements = self._elements(site, block, "backward" if phase == "backward" else "forward")
        return self._call(site.op, site.kind, phase, site.tag, elements, self._dtype(site))

    def _dtype(self, site: Site) -> torch.dtype:
        return self.precise if site.buffer == "statistics" else self.compute

    def _elements(self, site: Site, block: int, of: Literal["forward", "backward", "result"]) -> int:
        """Of the buffer of a call, or of its result."""
        if not self.dropless or site.buffer not in ("slots", "share"):
            return self.elements[site.buffer]
        hidden = self.config.model.hidden
        if site.tag in ("dispatch.drop", "combine.gather"):
            return self.listed * hidden
        rows = self.balanced if self.rows is None else self.rows[block]
        if site.op == "all_to_all":  # what goes out by the first comes back by the second, and each has its way back
            out = (site.tag == "dispatch.all_to_all") == (of == "forward")
            return (rows.sent if out else rows.received) * hidden
        return (rows.computed if site.op == "all_reduce" else rows.gathered) * hidden

    def _counts(self) -> Iterator[Collective]:
        """With dropless routing processes say how many rows they will send; once, whatever is recomputed."""
        experts, tensor = self.config.moe.num_experts, self.degrees.tensor
        if self.groups["expert"] > 1:
            yield self._call("all_to_all", "expert", "forward", "dispatch.counts", experts, torch.int64)
        if self.sharers > 1:
            yield self._call(
                "all_gather", "expert_tensor", "forward", "dispatch.gather_counts", tensor * experts, torch.int64
            )

    def _optimizer(self, op: Operation, kind: GroupKind, tag: str, elements: int, dtype: torch.dtype) -> Collective:
        return self._call(op, kind, "optimizer", tag, elements, dtype)

    def _call(
        self, op: Operation, kind: GroupKind, phase: Phase, tag: str, elements: int, dtype: torch.dtype
    ) -> Collective:
        return Collective(op, kind, self.groups[kind], phase, tag, torch.Size([elements]), dtype)


class BucketSize(NamedTuple):
    """Of parameters that are reduced together.

    Attributes:
        kind: the group over which.
        holders: processes that hold each element.
        partial: whether gradients are partial sums over the tensor group, too.
        elements: in this process.
    """

    kind: GroupKind
    holders: int
    partial: bool
    elements: int
