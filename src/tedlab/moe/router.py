"""The router: which experts a token goes to, with which weight, and into which slot of the dispatch buffer.

Legend: T tokens of this data rank's micro-batch, H hidden, E experts (all of them), K choices per token, C capacity.
All tensor ranks route the same tokens with the same weights and so decide the same; with sequence parallelism each
routes the tokens of its own positions, and T counts these. A recomputed forward pass decides as the first one did.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from tedlab.capacity import group_capacity
from tedlab.comm import pin, reduce_from
from tedlab.config import MoEConfig
from tedlab.nn import ShardedModule
from tedlab.registry import Registry
from tedlab.spec import Init, Layout, MicroBatch, ParameterSpec, Site, Sites, Spec, Work
from tedlab.topology import Topology


class RouterReport(NamedTuple):
    """What training wants to know of one MoE layer's routing. Nothing here counts padding.

    Attributes:
        balance_loss: Load-balancing loss of this micro-batch, before its coefficient; scalar, differentiable.
        z_loss: Router z-loss of this micro-batch, before its coefficient; scalar, differentiable.
        load: (E,) int64, the number of choices of each expert, before capacity.
        dropped: Number of choices that found no slot; int64 scalar.
    """

    balance_loss: Tensor
    z_loss: Tensor
    load: Tensor
    dropped: Tensor


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


class Decision(NamedTuple):
    """What a gating rule makes of the logits of one micro-batch.

    Attributes:
        gate_TK, slot_TK, choice_EC: See :class:`Routing`.
        probs_TE: Probability of each expert for each token.
        counted_TE: The choices that the load-balancing loss counts.
        load: See :class:`RouterReport`.
        rows_E: See :class:`Routing`.
    """

    gate_TK: Tensor
    slot_TK: Tensor
    choice_EC: Tensor
    probs_TE: Tensor
    counted_TE: Tensor
    load: Tensor
    rows_E: Tensor | None = None

    @property
    def balance_loss(self) -> Tensor:
        """The load-balancing loss of these tokens; scalar, differentiable."""
        return balance_loss(self.counted_TE.to(self.probs_TE.dtype).mean(0), self.probs_TE.mean(0))


@dataclass(frozen=True)
class RouterSpec(Spec):
    """Describes a :class:`Router`."""

    hidden: int
    config: MoEConfig
    init: Init

    def own(self) -> Iterator[ParameterSpec]:
        yield ParameterSpec("weight", (self.config.num_experts, self.hidden), self.init, own_tokens=True)

    def sites(self, layout: Layout) -> Sites:
        if not layout.sequence:
            return Sites()
        width = 2 * self.config.num_experts + 1
        return Sites((Site("router.statistics", "all_reduce", "tensor", width, "once", "precise"),))

    def flops(self, length: int) -> Counter[str]:
        return Counter(routers=2 * self.hidden * self.config.num_experts)

    def forward(self, b: MicroBatch, dead: Collection[str] = (), stop: bool = False) -> Iterator[Work]:
        n, experts = b.outside, self.config.num_experts
        if b.precise != b.parameter:
            yield b.moved(n * self.hidden, b.parameter, b.precise)
        yield b.product(n, self.hidden, experts, precise=True)
        yield _bytes(b, n * experts * 53)  # softmax, losses, counts
        yield _bytes(b, n * self.config.top_k * 480)  # sorting, slots, and their inverse

    def backward(self, b: MicroBatch) -> Iterator[Work]:
        n, experts = b.outside, self.config.num_experts
        yield _bytes(b, n * experts * 40)
        yield b.product(experts, n, self.hidden, precise=True)
        yield b.product(n, experts, self.hidden, precise=True)
        if b.precise != b.parameter:
            yield b.moved(n * self.hidden, b.parameter, b.precise)

    def saved(self, b: MicroBatch) -> int:
        """Counts its input, and three numbers and an index for each token and expert."""
        scores = self.config.num_experts * (3 * b.precise.itemsize + torch.int64.itemsize)
        return b.outside * (self.hidden * b.parameter.itemsize + scores)


def _bytes(b: MicroBatch, number: int) -> Work:
    """Returns the work of what a router does to vectors and indices, as a rough sum."""
    return Work(0, number, b.precise, "arithmetic")


routers: "Registry[type[Router]]" = Registry("moe.gating")


@routers.register("default")
class Router(ShardedModule):
    """Top-k softmax router with first-come capacity (GShard, Switch Transformer; the paper uses k = 1).

    To add a gating rule, register a subclass with its own :meth:`decide` or :meth:`probabilities` under
    ``@routers.register(NAME)``, as ``deepspeed_gating.py`` does.

    Gate weights: for k = 1 the softmax probability of the expert; for k > 1 the probabilities of the k choices,
    normalised to sum to one before any is dropped.

    Capacity: every expert takes at most C choices of a micro-batch, see ``capacity.py``. First choices of all
    tokens come before second choices; within each, the order is that of the tokens. A choice whose expert is full is
    dropped: it contributes nothing, and the token lives on in the residual stream. With several capacity groups
    all this holds within each group: the tokens of S / groups neighbouring positions of every sample. The multiple
    to which capacity is rounded up is divided among the groups.

    If experts take all that choose them, choices are sorted by expert, and for each expert by token.

    Padding, if the caller marks it, takes no slot, is not counted in losses, load or drops, and gets nothing from any
    expert. Capacity still counts it, because what is exchanged must not depend on what the batch holds. For the same
    reason, without a capacity, rows of padding are sent too, to all experts in turn, with weight zero.

    Losses, like all of the routing, are in fp32 or better: load balancing is E·Σ f_e·P_e with f_e the share of first
    choices and P_e the mean probability of expert e over this micro-batch (Switch Transformer, eq. 4), and the z-loss
    is the mean of logsumexp(logits)² (ST-MoE, eq. 5).

    Attributes:
        spec: Class of its specification.
        needed_top_k: The only ``moe.top_k`` that it accepts; None: any.
        options: Fields of :class:`tedlab.config.MoEConfig` that it uses; other routers need them to be null.
        supports: What it does beyond choosing experts for whole micro-batches, with a capacity: ``dropless``
            (``moe.dispatch``), ``groups`` (of positions, as with ``parallel.sequence``), ``compile``.

    Raises:
        ValueError: If the tensor ranks of a sequence-sharded layout cannot divide the capacity groups among them.
    """

    spec: ClassVar[type[RouterSpec]] = RouterSpec
    needed_top_k: ClassVar[int | None] = None
    options: ClassVar[tuple[str, ...]] = ()
    supports: ClassVar[tuple[str, ...]] = ("dropless", "groups", "compile")

    def __init__(self, spec: RouterSpec, topology: Topology) -> None:
        super().__init__()
        config = spec.config
        self.config, self.num_experts, self.top_k = config, config.num_experts, config.top_k
        self.comm, self.sharded = topology.comm, topology.sequence_sharded
        shards = topology.degrees.tensor if topology.sequence_sharded else 1
        groups = config.capacity_groups or shards
        if groups % shards:
            raise ValueError(f"capacity_groups ({groups}) is not a multiple of the tensor degree ({shards})")
        self.groups, self.all_groups = groups // shards, groups  # this process's and the data rank's
        self.build(spec, topology)

    def forward(self, x_TH: Tensor, sequence: int | None = None, padding_T: Tensor | None = None) -> Routing:
        """Routes the T tokens of a micro-batch.

        Args:
            x_TH: Tokens of one sample after the other, each of ``sequence`` positions.
            sequence: Number of positions of a sample; None: there is one sample.
            padding_T: Bool, True for padding; None: there is none.
        """
        with torch.autocast(x_TH.device.type, enabled=False):  # a mixed-precision run must not route in bf16
            logits_TE = _PreciseLinear.apply(x_TH, self.local("weight"))
        decision = self.decide(logits_TE, sequence or max(1, len(x_TH)), padding_T)
        z_T = logits_TE.logsumexp(-1).square()
        without_slot_TK = decision.slot_TK < 0
        if padding_T is not None:
            decision = _without_padding(decision, padding_T)
            z_T = z_T.masked_fill(padding_T, 0.0)
            without_slot_TK = without_slot_TK & ~padding_T.unsqueeze(1)
        if self.sharded or padding_T is not None:
            loss, z_loss = self._losses_of_sums(decision, z_T, padding_T)
        else:
            loss, z_loss = decision.balance_loss, z_T.mean()
        report = RouterReport(loss, z_loss, decision.load, without_slot_TK.sum())
        return Routing(decision.gate_TK, decision.slot_TK, decision.choice_EC, report, decision.rows_E)

    def capacity(self, tokens: int) -> int:
        """Returns the slots that an expert offers to so many tokens of this process."""
        return self.groups * group_capacity(self.config, tokens // self.groups, self.all_groups)

    def _losses_of_sums(self, decision: Decision, z_T: Tensor, padding_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """Computes both losses if the tensor group divides the micro-batch's tokens, or if some are padding."""
        counted_E, probs_E = decision.counted_TE.to(z_T.dtype).sum(0), decision.probs_TE.sum(0)
        parts = [counted_E, probs_E, z_T.sum().unsqueeze(0)]
        if padding_T is not None:  # the number of tokens must be summed as well
            parts.append((~padding_T).sum().to(z_T.dtype).unsqueeze(0))
        sums = torch.cat(parts)
        if self.sharded:
            sums = reduce_from(sums, self.comm, "tensor", "router.statistics")
        counted_E, probs_E, rest = sums.tensor_split([self.num_experts, 2 * self.num_experts])
        tokens: Tensor | int = len(z_T) * self.comm.size("tensor") if padding_T is None else rest[1].clamp(min=1)
        return balance_loss(counted_E / tokens, probs_E / tokens), rest[0] / tokens

    def probabilities(self, logits_TE: Tensor) -> Tensor:
        """Returns the probability of each expert for each token (T, E); each row sums to one."""
        return logits_TE.softmax(-1)

    def decide(self, logits_TE: Tensor, sequence: int, padding_T: Tensor | None = None) -> Decision:
        """Applies the gating rule to logits in fp32 or better. For padding, only slots and load must account for it."""
        probs_TE = self.probabilities(logits_TE)
        expert_TK = pin(probs_TE.detach().topk(self.top_k, dim=-1).indices)
        gate_TK = probs_TE.gather(1, expert_TK)
        if self.top_k > 1:
            gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True)

        first_TE = F.one_hot(expert_TK[:, 0], self.num_experts)
        if self.config.unlimited:
            if padding_T is None:
                places, choices, load = sort_choices(expert_TK, self.num_experts)
                return Decision(gate_TK, places, choices, probs_TE, first_TE, load)
            each_TK = torch.arange(expert_TK.numel(), device=expert_TK.device).view_as(expert_TK) % self.num_experts
            places, choices, rows_E = sort_choices(
                torch.where(padding_T.unsqueeze(1), each_TK, expert_TK), self.num_experts
            )
            load = rows_E - _histogram(each_TK.flatten(), self.num_experts, padding_T.repeat_interleave(self.top_k))
            return Decision(gate_TK, places, choices, probs_TE, first_TE, load, rows_E)
        tokens, groups = len(logits_TE), self.groups
        capacity = group_capacity(self.config, tokens // groups, self.all_groups)
        # Queues treat group g of expert e as an expert of its own, e·groups + g, so that slots stay sorted by expert.
        group_T = torch.arange(sequence, device=expert_TK.device).div(sequence // groups, rounding_mode="floor")
        queue_TK = expert_TK * groups + group_T.repeat(tokens // sequence).unsqueeze(1)
        queues = self.num_experts * groups
        if padding_T is None:
            slot_TK, choice_EC, load = assign_slots(queue_TK, queues, capacity)
        else:  # padding gets a queue that is not served
            queue_TK = queue_TK.masked_fill(padding_T.unsqueeze(1), queues)
            slot_TK, choice_EC, load = assign_slots(queue_TK, queues + 1, capacity)
            slot_TK = slot_TK.masked_fill(padding_T.unsqueeze(1), -1)
            choice_EC, load = choice_EC[: queues * capacity], load[:-1]
        return Decision(gate_TK, slot_TK, choice_EC, probs_TE, first_TE, load.view(-1, groups).sum(1))


def _without_padding(decision: Decision, padding_T: Tensor) -> Decision:
    """Removes padding from all sums over tokens."""
    padding_T1 = padding_T.unsqueeze(1)
    return decision._replace(
        gate_TK=decision.gate_TK.masked_fill(padding_T1, 0.0),
        probs_TE=decision.probs_TE.masked_fill(padding_T1, 0.0),
        counted_TE=decision.counted_TE.masked_fill(padding_T1, 0),
    )


class _PreciseLinear(Function):
    """``F.linear`` in fp32 or better that keeps its input in its own dtype.

    Tensor cores multiply two bf16 numbers exactly and sum in fp32, so nothing needs to be converted. The gradient,
    which is fp32, is split into a sum of three bf16 numbers.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if _on_tensor_cores(x, weight):
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        precise = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(precise), weight.to(precise))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grads[0]
        if _on_tensor_cores(x, weight):
            parts = torch.cat(bf16_parts(grad), -1)  # (T, 3·E)
            of_x = torch.mm(parts, weight.repeat(3, 1), out_dtype=torch.float32)
            of_weight = torch.mm(parts.t(), x, out_dtype=torch.float32).unflatten(0, (3, -1)).sum(0)
            return of_x.to(x.dtype), of_weight.to(weight.dtype)
        return (grad @ weight.to(grad.dtype)).to(x.dtype), (grad.mT @ x.to(grad.dtype)).to(weight.dtype)


def _on_tensor_cores(x: Tensor, weight: Tensor) -> bool:
    return x.is_cuda and x.dtype == weight.dtype == torch.bfloat16


def bf16_parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Splits fp32 numbers, of 24 bits, into three bf16 numbers of 8 bits whose sum they are (unless near 1e-38)."""
    first = _first_bits(x)
    rest = x - first
    second = _first_bits(rest)
    return first.to(torch.bfloat16), second.to(torch.bfloat16), (rest - second).to(torch.bfloat16)


def _first_bits(x: Tensor) -> Tensor:
    """Clears the last 16 bits. torch.compile would optimise a conversion to bf16 and back away."""
    return (x.view(torch.int32) & -0x10000).view(torch.float32)


def balance_loss(counted_E: Tensor, probs_E: Tensor) -> Tensor:
    """Returns E·Σ f_e·P_e: f_e counted choices of expert e per token, P_e its mean probability (both without drops)."""
    return len(probs_E) * (counted_E * probs_E).sum()


def assign_slots(expert_TK: Tensor, num_experts: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gives each choice its expert's next free slot, first choices first, then in order of the tokens.

    Args:
        expert_TK: (T, K) int64, the chosen experts.
        num_experts: Number of experts E.
        capacity: Slots per expert, C.

    Returns:
        slot_TK (T, K), choice_EC (E·C,), load_E (E,): see :class:`Routing` and :class:`RouterReport`. All shapes are
        known beforehand, so nothing waits for the device.
    """
    tokens, top_k = expert_TK.shape
    expert = expert_TK.t().flatten()  # (K·T,): all first choices, then all second ones
    load_E = _histogram(expert, num_experts)

    # After a stable sort by expert, a choice's position is its distance to its expert's first choice.
    order = expert.argsort(stable=True)
    first_E = load_E.cumsum(0) - load_E
    place = torch.arange(tokens * top_k, device=expert.device)
    position = torch.empty_like(expert).scatter_(0, order, place - first_E[expert[order]])
    slot = torch.where(position < capacity, expert * capacity + position, -1)
    slot_TK = slot.view(top_k, tokens).t().contiguous()
    return slot_TK, choices_of_slots(slot_TK, num_experts * capacity), load_E


def sort_choices(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts all choices by expert, and for each expert by token.

    Args:
        expert_TK: (T, K) int64, the chosen experts.
        num_experts: Number of experts E.

    Returns:
        The place of each choice (T, K), the choice in each place (T·K,), and load_E.
    """
    expert = expert_TK.flatten()
    # Narrow keys sort faster: a radix sort passes over them once per byte.
    choice = expert.to(_narrowest(num_experts - 1)).argsort(stable=True)
    place = torch.empty_like(choice).scatter_(0, choice, torch.arange(len(choice), device=choice.device))
    return place.view_as(expert_TK), choice, _histogram(expert, num_experts)


def _narrowest(largest: int) -> torch.dtype:
    """Returns the smallest dtype of integers from 0 to ``largest``."""
    return next(dtype for dtype in (torch.uint8, torch.int16, torch.int32) if largest <= torch.iinfo(dtype).max)


def _histogram(expert: Tensor, num_experts: int, counting: Tensor | None = None) -> Tensor:
    load_E = torch.zeros(num_experts, dtype=torch.int64, device=expert.device)
    return load_E.scatter_add_(0, expert, torch.ones_like(expert) if counting is None else counting.to(expert.dtype))


def choices_of_slots(slot_TK: Tensor, slots: int) -> Tensor:
    """Inverts ``slot_TK``: returns which choice fills each of E·C slots, see :class:`Routing`."""
    # Dropped choices are written to one slot past the end, which is cut off.
    slot = slot_TK.flatten()
    choice_EC = torch.full((slots + 1,), -1, dtype=torch.int64, device=slot.device)
    choice_EC.scatter_(0, slot.masked_fill(slot < 0, slots), torch.arange(len(slot), device=slot.device))
    return choice_EC[:slots]
