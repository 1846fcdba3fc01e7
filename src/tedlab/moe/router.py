"""The router: which experts a token goes to, with which weight, and into which slot of the dispatch buffer.

Legend: T tokens of this data rank's micro-batch, H hidden, E experts (all of them), K choices per token, C capacity.
All tensor ranks route the same tokens with the same weights and so decide the same; with sequence parallelism each
routes the tokens of its own positions, and T counts these. A recomputed forward pass decides as the first one did.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tedlab._compat.torch import PreciseBuffers, local_tensor
from tedlab.capacity import group_capacity
from tedlab.comm import evaluating, pin, recomputing, reduce_from
from tedlab.config import (
    BalanceChoices,
    BalanceScope,
    BiasUpdate,
    DropPolicy,
    Gates,
    MoEConfig,
    Noise,
    RouterConfig,
    Scoring,
)
from tedlab.degrees import check_divides
from tedlab.moe.balance import Sums, balance_loss, bias_step
from tedlab.moe.choice import best_experts
from tedlab.moe.precise import PreciseLinear
from tedlab.moe.slots import assign_slots, choices_of_slots, histogram, sort_choices
from tedlab.nn import ShardedModule, replicated
from tedlab.registry import Registry
from tedlab.spec import Init, Layout, MicroBatch, ParameterSpec, RowCount, Site, Sites, Spec, Work
from tedlab.topology import Topology


class RouterReport(NamedTuple):
    """What training wants to know of one MoE layer's routing. Nothing here counts padding.

    Attributes:
        balance_loss: Load-balancing loss of this micro-batch, before its coefficient; scalar, differentiable. With
            ``moe.balance.scope=global_batch`` training uses :func:`tedlab.moe.balance.global_losses` instead.
        z_loss: Router z-loss of this micro-batch, before its coefficient; scalar, differentiable.
        load: (E,) int64, the number of choices of each expert, before capacity.
        dropped: Number of choices that found no slot; int64 scalar.
        sums: What both losses are made of, over the tokens of all tensor ranks, for losses over the global batch.
    """

    balance_loss: Tensor
    z_loss: Tensor
    load: Tensor
    dropped: Tensor
    sums: Sums | None = None

    @classmethod
    def without_losses(cls, load: Tensor) -> "RouterReport":
        """Returns a report of the load alone; losses are no numbers, and drops are not counted."""
        nothing = torch.full((), math.nan, device=load.device)
        return cls(nothing, nothing, load, nothing)

    def detached(self) -> "RouterReport":
        """Returns the values alone, without gradients and sums."""
        return RouterReport(self.balance_loss.detach(), self.z_loss.detach(), self.load, self.dropped)


def stacked(reports: Sequence[RouterReport]) -> RouterReport:
    """Stacks the reports of several layers, which become the first dimension of every tensor."""
    balance, z, load, dropped = (
        torch.stack(values) for values in zip(*(report[:4] for report in reports), strict=True)
    )
    found = [report.sums for report in reports if report.sums is not None]
    sums = Sums(*map(torch.stack, zip(*found, strict=True))) if found else None
    return RouterReport(balance, z, load, dropped, sums)


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
        gate_TK: Weight of each choice in the combination.
        slot_TK: Position of each choice in the dispatch buffer of E·C slots; -1: dropped. Without a capacity, its
            place among all T·K choices, sorted by expert.
        choice_EC: The inverse: which choice (index into T·K) fills each slot; -1: empty. Without a capacity, (T·K,).
        report: Losses and counts.
        rows_E: Choices by expert, including those of padding, if there is padding and no capacity; None: the report's
            load.
    """

    gate_TK: Tensor
    slot_TK: Tensor
    choice_EC: Tensor
    report: RouterReport
    rows_E: Tensor | None = None

    @property
    def counts_E(self) -> Tensor:
        """The number of choices that each expert receives if it takes all."""
        return self.report.load if self.rows_E is None else self.rows_E

    def reordered(self, row_R: Tensor) -> "Routing":
        """Returns it with its choices, of which none is missing, in another order: row r is what ``row_R[r]`` was."""
        place_R = torch.full((len(row_R) + 1,), -1, dtype=row_R.dtype, device=row_R.device)
        place_R.scatter_(0, row_R, torch.arange(len(row_R), device=row_R.device))
        return self._replace(slot_TK=place_R[self.slot_TK], choice_EC=self.choice_EC[row_R])  # -1, the last, stays -1


class Decision(NamedTuple):
    """What a gating rule makes of the logits of one micro-batch.

    Attributes:
        gate_TK, slot_TK, choice_EC: See :class:`Routing`.
        probs_TE: Probability of each expert for each token.
        counted_TE: The choices that the load-balancing loss counts, as shares that sum to one for each token if all of
            its choices count; None: those of the load.
        load: See :class:`RouterReport`.
        rows_E: See :class:`Routing`.
        dropped: See :class:`RouterReport`; None: the choices without a slot.
    """

    gate_TK: Tensor
    slot_TK: Tensor
    choice_EC: Tensor
    probs_TE: Tensor
    counted_TE: Tensor | None
    load: Tensor
    rows_E: Tensor | None = None
    dropped: Tensor | None = None


@dataclass(frozen=True)
class RouterSpec(Spec):
    """Describes a :class:`Router`."""

    hidden: int
    config: MoEConfig
    init: Init

    def own(self) -> Iterator[ParameterSpec]:
        experts = self.config.num_experts
        sliced = self.config.sliced
        yield ParameterSpec("weight", (experts, self.hidden), self.init, own_tokens=True, own_part=sliced, fan_in=1)
        if self.config.router.bias:
            yield ParameterSpec("logit_bias", (experts,), own_tokens=True, own_part=sliced, decayed=False)

    def sites(self, layout: Layout) -> Sites:
        if not layout.sequence:
            return Sites()
        width = 2 * self.config.num_experts + 1
        rows: RowCount = "samples" if self.config.balance.scope == BalanceScope.SEQUENCE else "once"
        return Sites((Site("router.statistics", "all_reduce", "tensor", width, rows, "precise"),))

    def flops(self, length: int) -> Counter[str]:
        return Counter(routers=2 * self.hidden * self.config.num_experts)

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        n, experts = b.outside, self.config.num_experts
        halves = _multiplies_halves(b)
        if b.precise != b.parameter and not halves:
            yield b.moved(n * self.hidden, b.parameter, b.precise)
        yield b.product(n, self.hidden, experts, precise=not halves)
        yield _bytes(b, n * experts * 53)  # softmax, losses, counts
        yield _bytes(b, n * self.config.top_k * 480)  # sorting, slots, and their inverse

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        n, experts = b.outside, self.config.num_experts
        yield _bytes(b, n * experts * 40)
        if _multiplies_halves(b):  # of three parts of the gradient
            yield _bytes(b, n * experts * 42)
            yield b.product(3 * experts, n, self.hidden)
            yield b.product(n, 3 * experts, self.hidden)
        else:
            yield b.product(experts, n, self.hidden, precise=True)
            yield b.product(n, experts, self.hidden, precise=True)
        if b.precise != b.parameter:
            yield b.moved(n * self.hidden, b.parameter, b.precise)

    def saved(self, b: MicroBatch) -> int:
        """Counts its input, and three numbers and an index for each token and expert."""
        scores = self.config.num_experts * (3 * b.precise.itemsize + torch.int64.itemsize)
        return b.outside * (self.hidden * b.parameter.itemsize + scores)


def _multiplies_halves(b: MicroBatch) -> bool:
    """Whether tensor cores multiply the router's inputs and weights as they are, see :class:`PreciseLinear`."""
    return b.gpu and b.parameter == torch.bfloat16


def _bytes(b: MicroBatch, number: int) -> Work:
    """Returns the work of what a router does to vectors and indices, as a rough sum."""
    return Work(0, number, b.precise, "arithmetic")


_NOISE_STREAM, _JITTER_STREAM, CHOICE_STREAM = range(3)  # a router's streams of random numbers
_STREAMS = 4  # for each router

routers: "Registry[type[Router]]" = Registry("moe.gating")


@routers.register("default")
class Router(PreciseBuffers, ShardedModule):
    """Top-k router with a capacity that is first come, first served (GShard, Switch Transformer; the paper uses k = 1).

    Every expert gets a score from its logit; ``moe.router`` says how scores, choices and weights are made. Choices see
    noise, biases and groups; weights and losses see the scores alone.

    To add a gating rule, register a subclass under ``@routers.register(NAME)`` with its own :meth:`scores`,
    :meth:`choose` or :meth:`decide`; see ``baselines.py`` and ``expert_choice.py``.

    Capacity: every expert takes at most C choices of a micro-batch, see ``capacity.py``. First choices of all
    tokens come before second choices; within each, the order is that of the tokens. With ``moe.drop_policy=probs``
    choices of higher scores come first instead. A choice whose expert is full is dropped: it contributes nothing, and
    the token lives on in the residual stream. With several capacity groups all this holds within each group: the tokens
    of S / groups neighbouring positions of every sample. The multiple to which capacity is rounded up is divided among
    the groups.

    If experts take all that choose them, choices are sorted by expert, and for each expert by token.

    Padding, if the caller marks it, takes no slot, is not counted in losses, load or drops, and gets nothing from any
    expert. Capacity still counts it, because what is exchanged must not depend on what the batch holds. For the same
    reason, without a capacity, rows of padding are sent too, to all experts in turn, with weight zero.

    Losses, like all of the routing, are in fp32 or better: load balancing is E·Σ f_e·P_e with f_e the share of the
    counted choices and P_e the mean probability of expert e (Switch Transformer, eq. 4, which counts first choices
    alone; ``moe.balance`` says what is counted, and over which tokens), and the z-loss is the mean of
    logsumexp(logits)² (ST-MoE, eq. 5).

    Attributes:
        spec: Class of its specification.
        needed_top_k: The only ``moe.top_k`` that it accepts; None: any.
        options: Fields of :class:`tedlab.config.MoEConfig` that it uses; other routers need them to be null.
        router_options: Fields of :class:`tedlab.config.RouterConfig` that it uses; others need their defaults.
        weights_learn: Whether the weights of choices have gradients.
        supports: What it does beyond choosing experts for whole micro-batches, with a capacity: ``dropless``
            (``moe.dispatch``), ``groups`` (of positions, as with ``parallel.sequence``), ``compile``, ``balance`` (the
            options of ``moe.balance``), ``replay`` (of recorded choices), ``generate`` (choices for a token that depend
            on earlier tokens alone).
        number: Its place among the routers of the model, which makes their random numbers differ.
        bias: (E,) fp32, what balances choices; only with ``moe.router.bias_update``.

    Raises:
        ValueError: If the tensor ranks of a sequence-sharded layout cannot divide the capacity groups among them.
    """

    spec: ClassVar[type[RouterSpec]] = RouterSpec
    needed_top_k: ClassVar[int | None] = None
    options: ClassVar[tuple[str, ...]] = ("drop_policy",)
    router_options: ClassVar[tuple[str, ...]] = tuple(field.name for field in fields(RouterConfig))
    weights_learn: ClassVar[bool] = True
    supports: ClassVar[tuple[str, ...]] = ("dropless", "groups", "compile", "balance", "replay", "generate")

    bias: DTensor

    def __init__(self, spec: RouterSpec, topology: Topology) -> None:
        super().__init__()
        config = spec.config
        self.config, self.num_experts, self.top_k = config, config.num_experts, config.top_k
        self.comm, self.sharded = topology.comm, topology.sequence_sharded
        self.context, self.number = topology.context, 0
        self.shards = topology.degrees.tensor if topology.sequence_sharded else 1
        groups = config.capacity_groups or self.shards
        if groups % self.shards:
            raise ValueError(f"capacity_groups ({groups}) is not a multiple of the tensor degree ({self.shards})")
        self.groups, self.all_groups = groups // self.shards, groups  # this process's and the data rank's
        self.build(spec, topology)
        if self.biased:
            # In bf16, steps of 0.001 would vanish.
            self.register_precise_buffer("bias", replicated(torch.zeros(self.num_experts), topology))
            self._load_E = torch.zeros(self.num_experts, dtype=torch.int64, device=topology.device)

    def forward(self, x_TH: Tensor, sequence: int | None = None, padding_T: Tensor | None = None) -> Routing:
        """Routes the T tokens of a micro-batch.

        Args:
            x_TH: Tokens of one sample after the other, each of ``sequence`` positions.
            sequence: Number of positions of a sample; None: there is one sample.
            padding_T: Bool, True for padding; None: there is none.
        """
        sequence = sequence or max(1, len(x_TH))
        with torch.autocast(x_TH.device.type, enabled=False):  # a mixed-precision run must not route in bf16
            logits_TE = self.logits(x_TH, sequence)
        decision = self.decide(logits_TE, sequence, padding_T)
        if not self.context.reporting:
            if padding_T is not None:
                decision = _without_padding(decision, padding_T)
            return Routing(*decision[:3], RouterReport.without_losses(decision.load), decision.rows_E)
        z_T = logits_TE.logsumexp(-1).square()
        without_slot_TK = decision.slot_TK < 0
        if padding_T is not None:
            decision = _without_padding(decision, padding_T)
            z_T = z_T.masked_fill(padding_T, 0.0)
            without_slot_TK = without_slot_TK & ~padding_T.unsqueeze(1)
        dropped = without_slot_TK.sum() if decision.dropped is None else decision.dropped
        loss, z_loss, sums = self._losses(decision, z_T, padding_T, sequence)
        report = RouterReport(loss, z_loss, decision.load, dropped, sums)
        return Routing(decision.gate_TK, decision.slot_TK, decision.choice_EC, report, decision.rows_E)

    def capacity(self, tokens: int) -> int:
        """Returns the slots that an expert offers to so many tokens of this process."""
        return self.groups * group_capacity(self.config, tokens // self.groups, self.all_groups)

    @classmethod
    def choices(cls, config: MoEConfig) -> int:
        """Returns the number of choices for which a token has room, K."""
        return config.top_k

    # ---- scores, choices, weights --------------------------------------------------------------------------------

    def logits(self, x_TH: Tensor, sequence: int) -> Tensor:
        """Returns the logits (T, E), in fp32 or better, of tokens to which jitter applies in training."""
        spread = self.config.router.jitter
        if spread and self.training:
            factor_TH = 1 + spread * (2 * self.uniform(x_TH, sequence, x_TH.shape[1], _JITTER_STREAM) - 1)
            x_TH = x_TH * factor_TH.to(x_TH.dtype)
        logits_TE = PreciseLinear.apply(x_TH, self.local("weight"))
        return logits_TE + self.local("logit_bias").to(logits_TE.dtype) if self.config.router.bias else logits_TE

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Returns a positive score of each expert for each token (T, E)."""
        return logits_TE.sigmoid() if self.config.router.scoring == Scoring.SIGMOID else logits_TE.softmax(-1)

    def probabilities(self, scores_TE: Tensor) -> Tensor:
        """Returns the probabilities that the balance loss averages (T, E), from scores; each row sums to one."""
        if self.config.router.scoring == Scoring.SIGMOID:  # as in DeepSeek-V3's loss
            return scores_TE / scores_TE.sum(-1, keepdim=True)
        return scores_TE

    def preferences(self, logits_TE: Tensor, scores_TE: Tensor, sequence: int) -> Tensor:
        """Returns what choices are made by (T, E): scores, with noise in training; no gradient."""
        config = self.config.router
        preferred_TE = scores_TE.detach()
        if config.noise != Noise.NONE and self.training:
            uniform_TE = self.uniform(logits_TE, sequence, self.num_experts, _NOISE_STREAM)
            gumbel = config.noise == Noise.GUMBEL
            noise_TE = -(-uniform_TE.log()).log() if gumbel else torch.special.ndtri(uniform_TE)
            preferred_TE = self.scores(logits_TE.detach() + config.noise_std * noise_TE.to(logits_TE.dtype))
        return preferred_TE

    def choose(self, logits_TE: Tensor, scores_TE: Tensor, sequence: int) -> Tensor:
        """Returns each token's experts (T, K) int64, best first."""
        config, bias_E = self.config.router, local_tensor(self.bias) if self.biased else None
        groups = config.expert_groups, config.chosen_groups, config.group_score
        preferred_TE = self.preferences(logits_TE, scores_TE, sequence)
        expert_TK = best_experts(preferred_TE, bias_E, self.top_k, *groups)
        if self.config.inputs == 1:
            return expert_TK
        first_TK, later_TE = expert_TK.chunk(2)[0], preferred_TE.chunk(2)[1]  # both of the same tokens
        return torch.cat((first_TK, best_experts(later_TE.scatter(1, first_TK, -torch.inf), bias_E, self.top_k)))

    def gates(self, logits_TE: Tensor, scores_TE: Tensor, expert_TK: Tensor) -> Tensor:
        """Returns the weight of each choice (T, K)."""
        config = self.config.router
        rule = config.gates or (Gates.NORMALIZED if self.top_k > 1 else Gates.RAW)
        if rule == Gates.SOFTMAX:
            gate_TK = logits_TE.gather(1, expert_TK).softmax(-1)
        else:
            gate_TK = scores_TE.gather(1, expert_TK)
        if rule == Gates.NORMALIZED:
            gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True)
        return gate_TK if config.gate_scale == 1.0 else gate_TK * config.gate_scale

    def decide(self, logits_TE: Tensor, sequence: int, padding_T: Tensor | None = None) -> Decision:
        """Applies the gating rule to logits in fp32 or better. For padding, only slots and load must account for it."""
        scores_TE = self.scores(logits_TE)
        expert_TK = pin(self._replayed(self.choose(logits_TE, scores_TE, sequence), sequence))
        gate_TK = self.gates(logits_TE, scores_TE, expert_TK)
        probs_TE = self.probabilities(scores_TE)
        decided = partial(Decision, gate_TK, probs_TE=probs_TE)
        if self.config.unlimited:
            counted_TE = self._counted(expert_TK, None, probs_TE)
            if padding_T is None:
                places, choices, load = sort_choices(expert_TK, self.num_experts)
                return decided(places, choices, counted_TE=counted_TE, load=load)
            each_TK = torch.arange(expert_TK.numel(), device=expert_TK.device).view_as(expert_TK) % self.num_experts
            places, choices, rows_E = sort_choices(
                torch.where(padding_T.unsqueeze(1), each_TK, expert_TK), self.num_experts
            )
            load = rows_E - histogram(each_TK.flatten(), self.num_experts, padding_T.repeat_interleave(self.top_k))
            return decided(places, choices, counted_TE=counted_TE, load=load, rows_E=rows_E)
        priority_TK = None
        if self.config.drop_policy == DropPolicy.PROBS:
            priority_TK = scores_TE.detach().gather(1, expert_TK)
        slot_TK, choice_EC, load = self._queue(expert_TK, sequence, padding_T, priority_TK)
        counted_TE = self._counted(expert_TK, slot_TK, probs_TE)
        return decided(slot_TK, choice_EC, counted_TE=counted_TE, load=load)

    def _queue(
        self, expert_TK: Tensor, sequence: int, padding_T: Tensor | None, priority_TK: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Assigns slots within each capacity group; returns slot_TK, choice_EC and load_E."""
        tokens, groups = len(expert_TK), self.groups
        check_divides("sequence length", sequence, "capacity groups", groups)
        capacity = group_capacity(self.config, tokens // groups, self.all_groups)
        # Queues treat group g of expert e as an expert of its own, e·groups + g, so that slots stay sorted by expert.
        group_T = torch.arange(sequence, device=expert_TK.device).div(sequence // groups, rounding_mode="floor")
        queue_TK = expert_TK * groups + group_T.repeat(tokens // sequence).unsqueeze(1)
        queues = served = self.num_experts * groups
        if padding_T is not None:  # padding gets a queue that is not served
            queue_TK, queues = queue_TK.masked_fill(padding_T.unsqueeze(1), served), served + 1
        slot_TK, choice_EC, load = assign_slots(queue_TK, queues, capacity, priority_TK)
        if priority_TK is not None:  # recomputed scores may differ in the last bit and change the order
            slot_TK = pin(slot_TK)
            choice_EC = choices_of_slots(slot_TK, queues * capacity)
        if padding_T is not None:
            slot_TK = slot_TK.masked_fill(padding_T.unsqueeze(1), -1)
        return slot_TK, choice_EC[: served * capacity], load[:served].view(-1, groups).sum(1)

    def _replayed(self, expert_TK: Tensor, sequence: int) -> Tensor:
        """Records choices in training, or returns recorded ones in their place, if the context asks for it."""
        context = self.context
        if not self.training or (context.recorder is None and context.replay is None):
            return expert_TK
        token_T = self.tokens(len(expert_TK), sequence)
        if context.replay is not None:
            expert_TK = context.replay.choices(context.step + 1, self.number, token_T, expert_TK)
        if context.recorder is not None and not evaluating() and not recomputing():
            context.recorder.add(self.number, token_T, expert_TK)
        return expert_TK

    def _counted(self, expert_TK: Tensor, slot_TK: Tensor | None, like_TE: Tensor) -> Tensor | None:
        """Returns the choices that the balance loss counts, see :class:`Decision`."""
        balance = self.config.balance
        everything = balance.choices == BalanceChoices.ALL and (slot_TK is None or balance.dropped)
        if everything and balance.scope != BalanceScope.SEQUENCE:
            return None
        choices = 1 if balance.choices == BalanceChoices.FIRST else expert_TK.shape[1]
        counting_TK = torch.ones_like(expert_TK[:, :choices], dtype=like_TE.dtype)
        if slot_TK is not None and not balance.dropped:
            counting_TK = (slot_TK[:, :choices] >= 0).to(like_TE.dtype)
        counted_TE = torch.zeros_like(like_TE, requires_grad=False)
        return counted_TE.scatter_(1, expert_TK[:, :choices], counting_TK / choices)

    def uniform(self, x_TN: Tensor, sequence: int, columns: int, stream: int) -> Tensor:
        """Draws numbers for each token, the same in every layout and when recomputed; see :class:`BatchContext`."""
        return self.context.uniform(self.stream(stream), self.tokens(len(x_TN), sequence), columns)

    def stream(self, number: int) -> int:
        """Returns the number, in the whole model, of one of this router's streams of random numbers."""
        return _STREAMS * self.number + number

    def tokens(self, tokens: int, sequence: int) -> Tensor:
        """Returns the numbers of this process's tokens within the global batch (T,) int64."""
        shard = self.comm.rank("tensor") if self.sharded else 0
        return self.context.tokens(tokens // sequence, sequence, shard, self.shards)

    # ---- balance -------------------------------------------------------------------------------------------------

    @property
    def biased(self) -> bool:
        """Whether biases balance its choices."""
        return self.config.router.bias_update != BiasUpdate.NONE

    @property
    def moves_biases(self) -> bool:
        """Whether the biases follow the load after each step. Those of a frozen router stay, like its weights."""
        weights = [*self.parameters()]
        return self.biased and (not weights or any(weight.requires_grad for weight in weights))

    def count(self, report: RouterReport) -> None:
        """Counts a micro-batch in the load by which biases move.

        The model that owns the router calls this once for each micro-batch of a training step, outside of whatever is
        recomputed or compiled.
        """
        if self.moves_biases and self.training and not evaluating():
            self._load_E = self._load_E.to(report.load.device) + report.load

    def take_load(self) -> Tensor:
        """Returns the load (E,) that was counted since the last call."""
        load_E, self._load_E = self._load_E, torch.zeros_like(self._load_E)
        return load_E

    def adjust(self, load_E: Tensor) -> None:
        """Moves the biases, given a step's load over all processes."""
        config = self.config.router
        bias_E = local_tensor(self.bias)
        # In its own precision: a step there and one back must end where they began.
        bias_E += bias_step(load_E, config.bias_update, config.bias_rate).to(bias_E.dtype)

    def _losses(
        self, decision: Decision, z_T: Tensor, padding_T: Tensor | None, sequence: int
    ) -> tuple[Tensor, Tensor, Sums | None]:
        """Computes both losses from sums over the tokens of each group: a sample, or the micro-batch.

        Tensor ranks that divide the positions of samples add up their sums.
        """
        scope = self.config.balance.scope
        groups = len(z_T) // sequence if scope == BalanceScope.SEQUENCE else 1
        if decision.counted_TE is None:
            counted_GE = (decision.load.to(z_T.dtype) / self.top_k).unsqueeze(0)
        else:
            counted_GE = decision.counted_TE.to(z_T.dtype).unflatten(0, (groups, -1)).sum(1)
        if scope == BalanceScope.MICRO_BATCH and not self.sharded and padding_T is None:  # few kernels
            return balance_loss(counted_GE[0] / len(z_T), decision.probs_TE.mean(0)), z_T.mean(), None
        parts = [decision.probs_TE, z_T.unsqueeze(1)]
        if padding_T is not None:  # the number of tokens must be summed as well
            parts.append((~padding_T).to(z_T.dtype).unsqueeze(1))
        sums_GX = torch.cat([counted_GE, *(part.unflatten(0, (groups, -1)).sum(1) for part in parts)], 1)
        if self.sharded:
            sums_GX = reduce_from(sums_GX, self.comm, "tensor", "router.statistics")
        experts = self.num_experts
        counted_GE, probs_GE, z_G1, given_G1 = sums_GX.tensor_split([experts, 2 * experts, 2 * experts + 1], 1)
        if padding_T is None:
            tokens_G = z_T.new_full((groups,), len(z_T) // groups * self.shards)
        else:
            tokens_G = given_G1.squeeze(1)
        sums = Sums(counted_GE.sum(0), probs_GE.sum(0), z_G1.sum(), tokens_G.sum())
        divisor_G1 = tokens_G.clamp(min=1).unsqueeze(1)
        loss_G = balance_loss(counted_GE / divisor_G1, probs_GE / divisor_G1)  # 0 where all is padding
        return loss_G.sum() / (tokens_G > 0).sum().clamp(min=1), sums.z / sums.tokens.clamp(min=1), sums


def _without_padding(decision: Decision, padding_T: Tensor) -> Decision:
    """Removes padding from all sums over tokens."""
    padding_T1 = padding_T.unsqueeze(1)
    return decision._replace(
        gate_TK=decision.gate_TK.masked_fill(padding_T1, 0.0),
        probs_TE=decision.probs_TE.masked_fill(padding_T1, 0.0),
        counted_TE=None if decision.counted_TE is None else decision.counted_TE.masked_fill(padding_T1, 0),
    )


def routes_own_tokens(root: nn.Module) -> bool:
    """Tells whether tensor ranks route tokens of their own below ``root``, rather than all the same."""
    return any(module.sharded for module in root.modules() if isinstance(module, Router))
