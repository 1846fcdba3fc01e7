"""A decoder with experts: the paper's (§2), GPT-3-style with experts in every second block, or one like OLMoE."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tedlab.comm import evaluating
from tedlab.comm.keep import kept_tags, recompute_plan, unread_tags
from tedlab.comm.rows import Rows
from tedlab.config import (
    AttentionConfig,
    CommOptions,
    Dedup,
    Granularity,
    LatentConfig,
    LendConfig,
    LendPolicy,
    ModelConfig,
    MoEConfig,
    Positions,
    QKNorm,
    SharedConfig,
    Slicing,
)
from tedlab.degrees import ParallelDegrees
from tedlab.models.block import Block, BlockSpec
from tedlab.models.joined import JoinedSpec, MergedSpec
from tedlab.models.units import Unit, joined, units
from tedlab.models.wiring import check_wiring
from tedlab.models.wrap import wrap
from tedlab.moe import Experts, MoELayer, Router, RouterReport, mixtures
from tedlab.nn import (
    IGNORE_INDEX,
    ColumnParallelLinear,
    ColumnParallelSpec,
    CrossEntropySpec,
    Embedding,
    EmbeddingSpec,
    NormSpec,
    Past,
    SampleDocuments,
    VocabParallelEmbedding,
    VocabParallelEmbeddingSpec,
    documents_of,
    initialize,
    linear_cross_entropy,
    mean_over_counted,
    norm_layer,
    rotation,
    vocab_parallel_argmax,
    vocab_parallel_cross_entropy,
)
from tedlab.nn.region import TensorRegion
from tedlab.parametrization import scales
from tedlab.registry import Registry
from tedlab.spec import Init, Layout, MicroBatch, Spec, Work, WorkingSet
from tedlab.topology import Topology

_tags: dict[str, tuple[str, ...]] = {}  # by the settings that they depend on; a plan asks thousands of times


@dataclass(frozen=True)
class LogitsSpec(ColumnParallelSpec):
    """Describes the product that makes logits, with its own weights or, if ``tied``, those of the embedding."""

    tied: bool = False

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        k, n = self.widths(b)
        yield from b.product_backward(b.tokens, k, n)
        if self.tied:
            yield b.moved(3 * k * n, b.parameter)  # sums both gradients

    def saved(self, b: MicroBatch) -> int:
        return b.tokens * self.in_features * b.compute.itemsize


@dataclass(frozen=True)
class ChunkedLossSpec(Spec):
    """Describes :func:`linear_cross_entropy`, whose logits are those of ``loss.chunk`` tokens at a time."""

    parts: ClassVar[tuple[str, ...]] = ("logits", "loss")

    logits: LogitsSpec
    loss: CrossEntropySpec

    def _rows(self, b: MicroBatch) -> list[int]:
        """Returns the number of tokens of each chunk."""
        chunk = self.loss.chunk or b.tokens
        return [min(chunk, b.tokens - start) for start in range(0, b.tokens, chunk)]

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        k, n = self.logits.widths(b)
        if b.mixed:
            yield b.moved(k * n, b.parameter, b.compute)
        yield b.moved(k * n, b.precise)  # zeros, to which each chunk adds
        for rows in self._rows(b):
            for sizes in ((rows, k, n), (rows, n, k), (k, rows, n)):  # logits, and both gradients
                yield b.product(*sizes)
            yield b.moved(k * n, b.precise, b.precise, b.compute)
            if b.compiled:
                yield b.moved(3 * rows * n)  # one kernel reads logits, another makes probabilities of them
                continue
            if b.precise != b.compute:
                yield b.moved(rows * n, b.precise, b.compute)
            for passes in (1, 2, 2, 1):  # maximum, difference, exp, sum
                yield b.moved(passes * rows * n, b.precise)
            yield b.moved(rows * n, b.precise, b.compute)
            for passes in (2, 2):  # exp, quotient
                yield b.moved(passes * rows * n, b.precise)
            yield b.moved(rows * n, b.precise, b.compute)

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        k, n = self.logits.widths(b)
        yield b.moved(2 * b.tokens * k)
        yield b.moved(2 * k * n, b.precise)
        if b.parameter != b.precise:
            yield b.moved(k * n, b.precise, b.parameter)
        if self.logits.tied:
            yield b.moved(3 * k * n, b.parameter)  # sums both gradients

    def saved(self, b: MicroBatch) -> int:
        k, n = self.logits.widths(b)
        return b.tokens * k * b.compute.itemsize + k * n * b.precise.itemsize

    def temporaries(self, b: MicroBatch) -> int:
        """Returns the most bytes that there are for a while beside what is saved."""
        k, n = self.logits.widths(b)
        x, logits, weights = b.tokens * k * b.compute.itemsize, self._rows(b)[0] * n, k * n
        of_logits = 0 if b.compiled else (2 + (b.precise != b.compute)) * logits * b.precise.itemsize
        making = max(of_logits, weights * b.compute.itemsize) + logits * b.compute.itemsize
        cast = weights * b.compute.itemsize if b.mixed else 0
        scaled = weights * (b.precise.itemsize + (b.parameter.itemsize if b.parameter != b.precise else 0))
        return x + max(making + cast, scaled)


@dataclass(frozen=True)
class GPTSpec(Spec):
    """Describes a :class:`GPT` by its configuration."""

    model: ModelConfig
    moe: MoEConfig

    @property
    def embedding(self) -> VocabParallelEmbeddingSpec:
        assert self.model.vocab_size is not None
        return VocabParallelEmbeddingSpec(self.model.vocab_size, self.model.hidden, Init(std=self.model.init_std))

    @property
    def positions(self) -> EmbeddingSpec | None:
        if self.model.positions != Positions.LEARNED:
            return None
        return EmbeddingSpec(self.model.sequence_length, self.model.hidden, Init(std=self.model.init_std))

    @cached_property
    def blocks(self) -> list[BlockSpec]:
        routed = self.moe.routed(self.model.layers)
        windows = map(self.model.attention.window_of, range(self.model.layers))
        return [BlockSpec(self.model, self.moe if n in routed else None, window) for n, window in enumerate(windows)]

    @property
    def norm(self) -> NormSpec:
        return NormSpec(self.model.hidden, self.model.norm, self.model.norm_eps)

    @property
    def output(self) -> ColumnParallelSpec | None:
        """The output projection; None: its weights are the embedding's."""
        table = self.embedding
        if self.model.tie_embeddings:
            return None
        return ColumnParallelSpec(table.hidden, table.vocab_size, "output", table.init, bias=False)

    @property
    def logits(self) -> LogitsSpec:
        """The product that makes logits."""
        table = self.embedding
        return LogitsSpec(table.hidden, table.vocab_size, "output", table.init, False, self.model.tie_embeddings)

    @property
    def ends(self) -> Sequence[Spec]:
        """The layers before the first block and after the last."""
        table = self.embedding
        loss = CrossEntropySpec(table.vocab_size, self.model.loss_chunk)
        last = [self.logits, loss] if loss.chunk is None else [ChunkedLossSpec(self.logits, loss)]
        return [part for part in (table, self.positions, self.norm, *last) if part is not None]

    @cached_property
    def units(self) -> list[Unit]:
        """For each block what runs as a whole: itself, or a pair, which stands at its second block."""
        return units(self.blocks)

    @cached_property
    def first(self) -> list[int]:
        """For each unit, the index of the first that equals it."""
        return [self.units.index(unit) for unit in self.units]

    def kept(self, cac: object, block: int) -> Mapping[str, str]:
        """Returns what CAC keeps of the unit at a block, see :func:`tedlab.comm.keep.kept_tags`.

        What is said of either block of a pair holds for both.
        """
        unit = self.units[block]
        blocks = len(unit.blocks) if isinstance(unit, JoinedSpec) else 1
        return dict(chain.from_iterable(kept_tags(cac, self.tags, block - n).items() for n in range(blocks)))

    def check(self, degrees: ParallelDegrees) -> None:
        for first in sorted(set(self.first)):
            self.units[first].check(degrees)

    @cached_property
    def tags(self) -> tuple[str, ...]:
        """Tags of blocks' collectives that a second pass may reach in any layout, with or without experts."""
        attention = AttentionConfig(latent=replace(self.model.attention.latent, q_rank=None))
        model = ModelConfig(2, 1, 1, 1, 1, vocab_size=1, qk_norm=self.model.qk_norm, attention=attention)
        its = {name: getattr(self.moe, name) for name in ("dispatch", "shared", "lend", "slice")}
        moe = MoEConfig(num_experts=1, **its)
        key = repr((type(self), model, moe))
        if key not in _tags:
            _tags[key] = self._tags_of(model, moe)
        return _tags[key]

    def _tags_of(self, model: ModelConfig, moe: MoEConfig) -> tuple[str, ...]:
        blocks = type(self)(model, moe).blocks
        direct, by_node = CommOptions(), CommOptions(hierarchical=True, ranks_per_node=4)
        layouts = (
            Layout(ParallelDegrees(2 * expert, 2, expert, sequence=on), replace(options, dtd=not on))
            for expert, options in (
                *((1, direct), (2, direct), (2, replace(direct, dedup=Dedup.RANK))),
                (2, replace(direct, dedup=Dedup.GROUP)),
                *((4, by_node), (4, replace(by_node, dedup=Dedup.NODE))),
            )
            for on in (True, False)
        )
        sites = (site for layout in layouts for block in blocks for site in block.sites(layout).recomputed)
        return tuple(dict.fromkeys(site.tag for site in sites))

    def at_loss(self, b: MicroBatch) -> int:
        """Returns the most bytes that the loss has for a while beside what it saves."""
        loss = self.ends[-1]
        return loss.temporaries(b) if isinstance(loss, ChunkedLossSpec) else 0

    def freed_after_loss(self, b: MicroBatch) -> int:
        """Returns the bytes that count as saved by the loss, but are free once it is known: the logits themselves."""
        loss = self.ends[-1]
        return loss.logits(b) * b.compute.itemsize if isinstance(loss, CrossEntropySpec) else 0

    def left(self, b: MicroBatch, several: bool) -> int:
        """Returns the bytes of gradients that the logits leave, beside the sums if there are ``several`` batches."""
        table = self.embedding.gradients(b)
        return table if self.model.tie_embeddings else 0 if several else 2 * table

    def first_moment(self, b: MicroBatch, several: bool) -> WorkingSet:
        """Returns the end of the backward pass: the table's gradient, what the logits left of it, and their sum."""
        table, tables = self.embedding.gradients(b), 2 if self.model.tie_embeddings else 1
        return WorkingSet("gradient of the embedding", table if several else 0, temporaries=tables * table)

    def flops(self, length: int) -> Counter[str]:
        parts = Counter(self.first)
        total = sum((end.flops(length) for end in self.ends), Counter[str]())
        for first, alike in parts.items():
            total.update({name: alike * flops for name, flops in self.units[first].flops(length).items()})
        return total

    def children(self) -> Iterator[tuple[str, Spec]]:
        before = (("embedding", self.embedding), ("positions", self.positions))
        blocks = ((f"blocks.{index}", block) for index, block in enumerate(self.blocks))
        for name, part in (*before, *blocks, ("norm", self.norm), ("output", self.output)):
            if part is not None:
                yield name, part


models: "Registry[type[GPT]]" = Registry("model.architecture")


def known_tags() -> tuple[str, ...]:
    """Returns the tags of all registered models with all registered mixtures, for a strategy that knows neither."""
    shapes = [ModelConfig(1, 1, 1, 1, 1, qk_norm=norm) for norm in QKNorm]
    shapes.append(ModelConfig(1, 1, 1, 1, 1, attention=AttentionConfig(latent=LatentConfig(kv_rank=1))))
    more: dict[str, Any] = {"lend": LendConfig(LendPolicy.LLEP.value), "slice": Slicing.TOKENS.value}
    kinds = [MoEConfig(1, dispatch=dispatch, shared=SharedConfig(1), **more) for dispatch in mixtures.names]
    specs = (models[m].spec(shape, moe) for m in models.names for shape in shapes for moe in kinds)
    return tuple(dict.fromkeys(tag for spec in specs for tag in spec.tags))


@models.register("gpt")
class GPT(nn.Module):
    """Decoder-only language model, built as this process's shard, with initial weights.

    Another model is a subclass under ``@models.register(NAME)``.

    Args:
        model: Architecture; ``vocab_size`` must be set.
        moe: Experts; ``num_experts = 0`` makes a dense model.
        topology: The process's place in the meshes.
        seed: Seed of the initial weights, which depend on nothing else; None: parameters are left to be filled.

    Raises:
        ValueError: If ``moe.shortcut`` needs other blocks or options, or sizes cannot be divided as the topology says.

    Attributes:
        separator: The token that ends a document of several in a sample, which do not see each other, and of which each
            begins at position 0; None: a sample is one document.
        spec: Class of its specification; a model with the same layers keeps it.
        block: Class of its blocks.
    """

    spec: ClassVar[type[GPTSpec]] = GPTSpec
    block: ClassVar[type[Block]] = Block

    def __init__(self, model: ModelConfig, moe: MoEConfig, topology: Topology, seed: int | None) -> None:
        super().__init__()
        check_wiring(model, moe, topology.options, self.block)
        spec = self.spec(model, moe)
        self.embedding = VocabParallelEmbedding(spec.embedding, topology)
        self.config, self.comm, self.sequence_sharded = model, topology.comm, topology.sequence_sharded
        self.context = topology.context
        self.past: Past | None = None
        self.positions = None if spec.positions is None else Embedding(spec.positions, topology)
        self.blocks = nn.ModuleList(self.block(block, topology) for block in spec.blocks)
        self.separator: int | None = None
        self.attention = spec.blocks[0].attention
        self.windows = {block.window for block in spec.blocks}
        self.norm = norm_layer(spec.norm, topology)
        self.output = None if spec.output is None else ColumnParallelLinear(spec.output, topology)
        self._routers = [module for module in self.blocks.modules() if isinstance(module, Router)]
        if seed is not None:
            initialize(self, seed, {name: scale.init for name, scale in scales(self.spec, model, moe).items()})
        # What runs in place of a block, if not the block: a pair, or nothing, if the pair is run later. Not registered,
        # because their parameters are those of the blocks.
        self._joined: dict[int, nn.Module | None] = {}
        for index, (block, of) in enumerate(zip(self.blocks, spec.units, strict=True)):
            if isinstance(of, MergedSpec):
                self._joined[index] = None
                continue
            unit = block
            if isinstance(of, JoinedSpec):
                its: Any = self.blocks[index + 1 - len(of.blocks) : index + 1]
                unit = self._joined[index] = joined(of, its, topology, model.sequence_length)
            sites, early_stop = of.sites(topology.layout), model.recompute.early_stop
            unread = unread_tags(sites.recomputed) if early_stop else ()
            kept = spec.kept(topology.options.cac, index)
            second = recompute_plan(sites.present(topology.layout).recomputed, kept, unread)
            recomputed = model.recompute.granularity == Granularity.BLOCK
            wrap(unit, topology, second if recomputed else None, model.compile, early_stop)

    @property
    def moved(self) -> dict[int, Rows]:
        """Rows that mixtures have moved in training so far, by block, for mixtures whose routers decide how many."""
        layers = {index: block.feed_forward for index, block in enumerate(self.blocks)}
        found = {index: layer.experts for index, layer in layers.items() if isinstance(layer, MoELayer)}
        return {index: mixture.moved for index, mixture in found.items() if mixture.moved is not None}

    def forward(self, ids: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, list[RouterReport]]:
        """Maps token ids (B, S) to this tensor rank's logits (B, S, V/T), and returns one report per MoE layer.

        Args:
            ids: (B, S) int64.
            padding_mask: (B, S) bool, the same on every tensor rank: True where routers must see no token. Attention
                ignores it and is causal, so put padding after a sample's tokens.
        """
        x, reports = self._hidden(ids, padding_mask)
        return self.embedding.logits(x) if self.output is None else self.output(x), reports

    def next_logits(self, ids: Tensor, at_B: Tensor) -> Tensor:
        """Returns this tensor rank's logits (B, V/T) of the tokens that follow one token of each sample.

        Args:
            ids: (B, S) int64.
            at_B: (B,) int64, which of a sample's S tokens that is.
        """
        with self.context.unreported():
            x, _ = self._hidden(ids, None)
        if x.shape[1] > 1:
            x = x[torch.arange(len(x), device=x.device), at_B.to(x.device)].unsqueeze(1)
        return (self.embedding.logits(x) if self.output is None else self.output(x)).squeeze(1)

    def loss(
        self, ids: Tensor, targets: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, list[RouterReport]]:
        """Returns the mean cross-entropy of the next tokens, and one report per MoE layer.

        Args:
            ids: (B, S) int64.
            targets: (B, S) int64, the tokens to predict; -100 where there is none and the position does not count.
            padding_mask: See :meth:`forward`; it does not affect targets.

        Returns:
            The mean over this micro-batch's targets that count (0 if none does), and the reports. A step's loss is the
            mean of its micro-batches' losses, over data ranks too, however many targets each of them counts.

        Raises:
            IndexError: If an id or a target is outside the vocabulary, on a CPU; on a GPU the device asserts.
        """
        chunk = self.config.loss_chunk
        if chunk is None:
            logits, reports = self(ids, padding_mask)
            losses = vocab_parallel_cross_entropy(logits.flatten(0, 1), targets.flatten(), self.comm)
            return mean_over_counted(losses, targets), reports
        x, reports = self._hidden(ids, padding_mask)
        region, weight = self._projection()
        x_NH = region.enter(x).flatten(0, 1)
        loss = linear_cross_entropy(x_NH, weight, targets.flatten(), self.comm, chunk, self.config.compile)
        return loss, reports

    @torch.no_grad()
    def token_losses(
        self, ids: Tensor, targets: Tensor, padding_mask: Tensor | None = None, known: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss of each target, and whether no token is more probable.

        Logits are computed of counted targets alone, of at most ``loss_chunk`` of them at a time, or S.

        Args:
            ids: (B, S) int64.
            targets: (B, S) int64, the same on every tensor rank; -100 where there is none.
            padding_mask: See :meth:`forward`.
            known: The most probable token is sought among ids below, such as those that a tokenizer knows; None: all.

        Returns:
            (B, S) losses in nats, in fp32 or better, 0 where there is no target; and (B, S) bool, whether the target is
            the most probable token, the first of equals. Both are the same on every tensor rank.

        Raises:
            IndexError: If an id or a target is outside the vocabulary, on a CPU; on a GPU the device asserts.
        """
        with self.context.unreported():
            x, _ = self._hidden(ids, padding_mask)
        region, weight = self._projection()
        x_NH, target_N = region.enter(x).flatten(0, 1), targets.flatten()
        place_R = (target_N != IGNORE_INDEX).nonzero().squeeze(1)
        precise = torch.promote_types(x_NH.dtype, torch.float32)
        loss_N = torch.zeros(target_N.shape, dtype=precise, device=x_NH.device)
        greedy_N = torch.zeros_like(target_N, dtype=torch.bool)
        chunk = self.config.loss_chunk or ids.shape[1]
        for start in range(0, len(place_R), chunk):
            place_C = place_R[start : start + chunk]
            logits_CV = x_NH[place_C] @ weight.to(x_NH.dtype).mT
            loss_N[place_C] = vocab_parallel_cross_entropy(logits_CV, target_N[place_C], self.comm).to(precise)
            greedy_N[place_C] = vocab_parallel_argmax(logits_CV, self.comm, known) == target_N[place_C]
        return loss_N.view(targets.shape), greedy_N.view(targets.shape)

    def _projection(self) -> tuple[TensorRegion, Tensor]:
        """Returns the region of the product that makes logits, and its weights (V/T, H)."""
        if self.output is None:
            return self.embedding.output_region, self.embedding.local("weight")
        return self.output.region, self.output.local("weight")

    def _hidden(self, ids: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, list[RouterReport]]:
        """Returns what logits are computed from (B, S, H), as activations outside layers, and the reports."""
        self.context.ids = ids
        x = self.embedding(ids)
        turns, past = None, self.past
        documents = None
        if self.separator is not None and past is None:
            path = self.attention.path(x.device.type, x.dtype, ids.shape[1], documents=True)
            documents = documents_of(ids, self.separator, self.windows, path == "flex")
        self.context.documents = documents
        if self.positions is not None:
            x = x + self._positions(self.positions, ids.shape[1], documents)
        elif past is None:
            turns = self._turns(ids.shape[1], x)
            turns = turns if documents is None else turns[:, documents.position_BS]
        else:
            turns = past.turns(lambda room: self._turns(room, x))
        if padding_mask is not None and self.sequence_sharded:
            padding_mask = padding_mask.chunk(self.comm.size("tensor"), 1)[self.comm.rank("tensor")]
        reports: list[RouterReport] = []
        for index, block in enumerate(self.blocks):
            unit = self._joined.get(index, block)
            if unit is None:
                continue
            x, report = unit(_entered(x, unit), turns, padding_mask)
            if report is not None:
                self._routers[len(reports)].count(report)
                reports.append(report)
        ends = [self.norm] if self.output is None else [self.norm, self.output]
        return self.norm(_entered(x, *ends)), reports

    def _positions(self, table: Embedding, length: int, documents: SampleDocuments | None) -> Tensor:
        """Returns the embeddings of this process's positions."""
        if self.past is not None:
            return table.at(self.past.position_BS)
        if documents is None:
            return table(length)
        position_BS = documents.position_BS
        return table.at(position_BS.chunk(table.slices, 1)[table.slice])

    def _turns(self, length: int, x: Tensor) -> Tensor:
        """Returns the rotation of so many positions (2, length, rotary_dim/2), for activations like ``x``."""
        base, rotary = self.config.rotary_base, self.config.rotary
        return rotation(length, self.attention.rotary_dim, base, x.device, x.dtype, rotary)

    def route(self, ids: Tensor, padding_mask: Tensor | None = None) -> list[RouterReport]:
        """Runs the blocks for the sake of their routers' reports, see :meth:`forward`."""
        return self._hidden(ids, padding_mask)[1]


def _entered(x: Tensor, *layers: nn.Module) -> Tensor:
    """Returns what layers take, as a leaf of the graph if they train and everything before them is frozen.

    The backward pass then ends there. Without a gradient of their input, layers would communicate less than others of
    their kind, by an amount that depends on which of their parameters train.
    """
    if x.requires_grad or evaluating():
        return x
    trains = any(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    return x.detach().requires_grad_() if trains else x


class ParameterCount(NamedTuple):
    """The number of parameters of the whole model, over all processes.

    Attributes:
        total: All parameters.
        active: Parameters that one token uses, which are only top_k experts of each MoE layer.
    """

    total: int
    active: int


def count_parameters(module: nn.Module, top_k: int) -> ParameterCount:
    """Counts parameters globally, sharded ones by their global shape."""
    total = sum(p.numel() for p in module.parameters())
    idle: int = 0
    for experts in module.modules():
        if isinstance(experts, Experts):
            count = experts.num_experts
            idle += sum(p.numel() for p in experts.parameters()) * (count - top_k) // count
    return ParameterCount(total, total - idle)
