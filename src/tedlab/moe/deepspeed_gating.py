"""DeepSpeed's gating rules (``deepspeed/moe/sharded_moe.py``), on indices, and how they differ from our own.

``default`` is the rule of :class:`tedlab.moe.Router`. Legend as in ``router.py``.

=====================  ==========================  ======================================================
                       default                     DeepSpeed
=====================  ==========================  ======================================================
capacity               ceil(K·T / E · factor),     max(ceil(T / E · (factor·K)), min_capacity), the product
                       computed exactly            in fp32
who finds no slot      first come, first served:   top1: a full expert keeps a random selection
                       all first choices, then     top2: as default
                       second ones, each in        topk: a full expert keeps the most probable choices, or
                       order of the tokens         (``position``) those of the first tokens
gate, K = 1            the probability             top1: the probability; topk: 1
gates, K > 1           probabilities normalised    probabilities normalised over choices that found a slot:
                       before any is dropped       the others get what a dropped one leaves
balance loss           E·Σ f_e·P_e, f_e of first   top1 and top2: the same
                       choices                     topk: f_e of all K choices, divided by K
second expert          the next probable           top2: drawn from the others by their probabilities
=====================  ==========================  ======================================================

In both, the capacity is rounded up to a multiple of ``capacity_multiple`` (DeepSpeed's own is 1), and load counts
choices before any is dropped. Like DeepSpeed, these rules select and draw at random in evaluation, too.

Two things differ from DeepSpeed. Without drops (``capacity_factor=None``) its capacity is the largest load in the
expert group; ours is the number of tokens, which needs no communication and no wait for the device, and slots and gates
are the same. Its noise for first choices (``noisy_gate_policy``), off there by default, does not exist here.
"""

from typing import ClassVar

import torch
from torch import Tensor

from tedlab.capacity import DEEPSPEED as GATINGS
from tedlab.capacity import group_capacity
from tedlab.comm import pin
from tedlab.config import DropPolicy
from tedlab.moe.router import Decision, Router, RouterSpec, routers
from tedlab.moe.slots import assign_slots, choices_of_slots
from tedlab.topology import Topology


class DeepSpeedRouter(Router):
    """Base of routers that decide as DeepSpeed does; the module docstring says what that means.

    Random numbers follow torch's default CPU generator, which the strategy seeds by data rank and its checkpoints keep.
    The tensor ranks of a data rank therefore decide alike, as long as none draws from that generator alone; data ranks
    decide differently; a recomputed forward pass decides as the first one did. The numbers depend on the number of data
    ranks: D of them select and draw otherwise than one process that accumulates their D micro-batches.

    Raises:
        ValueError: If the gating is not one of DeepSpeed's, or positions are divided into groups or shards.
    """

    options: ClassVar[tuple[str, ...]] = ()
    router_options = ()
    supports = ("generate",)

    def __init__(self, spec: RouterSpec, topology: Topology) -> None:
        config = spec.config
        if config.gating not in GATINGS:
            raise ValueError(f"gating={config.gating} is unknown; valid: default, {', '.join(GATINGS)}")
        if topology.sequence_sharded or config.capacity_groups not in (None, 1):
            raise ValueError(
                f"gating={config.gating} knows one queue per expert: no capacity groups, no sharded sequence"
            )
        super().__init__(spec, topology)
        self.gating = config.gating
        self.random_token_selection = config.random_token_selection is not False  # None: on
        self.second_expert_sampling = config.second_expert_sampling is not False  # None: on
        self.drop_policy = config.drop_policy or DropPolicy.PROBS

    def decide(self, logits_TE: Tensor, sequence: int, padding_T: Tensor | None = None) -> Decision:
        """Applies the configured rule, with random numbers if it uses them.

        Raises:
            ValueError: If there is padding, which DeepSpeed's top2 and topk do not know and its top1 counts in losses.
        """
        if padding_T is not None:
            raise ValueError(f"gating={self.config.gating} takes no padding_mask; moe.gating=default does")
        capacity = group_capacity(self.config, len(logits_TE), groups=1)
        if self.gating == "deepspeed_top1":
            return top1_gating(logits_TE, capacity, self._priorities(logits_TE))
        if self.gating == "deepspeed_top2":
            return top2_gating(logits_TE, capacity, self._gumbel_noise(logits_TE))
        return topk_gating(logits_TE, self.top_k, capacity, self.drop_policy)

    def _priorities(self, logits_TE: Tensor) -> Tensor | None:
        if not self.random_token_selection:
            return None
        # Unlike DeepSpeed's uniform numbers, these are distinct and never zero, which would mean "not chosen".
        device = logits_TE.device
        return torch.randperm(len(logits_TE), generator=self._generator(device), device=device) + 1

    def _gumbel_noise(self, logits_TE: Tensor) -> Tensor | None:
        if not self.second_expert_sampling:
            return None
        return -torch.empty_like(logits_TE).exponential_(generator=self._generator(logits_TE.device)).log()

    def _generator(self, device: torch.device) -> torch.Generator:
        # Drawing a key for every data rank advances the default generator alike in all processes.
        keys = torch.randint(2**62, (self.comm.size("data"),), device="cpu")
        return torch.Generator(device).manual_seed(int(keys[self.comm.rank("data")]))


@routers.register("deepspeed_top1")
class Top1Router(DeepSpeedRouter):
    """The router of ``moe.gating=deepspeed_top1``."""

    needed_top_k = 1
    options = ("min_capacity", "random_token_selection")


@routers.register("deepspeed_top2")
class Top2Router(DeepSpeedRouter):
    """The router of ``moe.gating=deepspeed_top2``."""

    needed_top_k = 2
    options = ("min_capacity", "second_expert_sampling")


@routers.register("deepspeed_topk")
class TopKRouter(DeepSpeedRouter):
    """The router of ``moe.gating=deepspeed_topk``."""

    options = ("min_capacity", "drop_policy")


def top1_gating(logits_TE: Tensor, capacity: int, priority_T: Tensor | None) -> Decision:
    """Chooses one expert per token; a full expert keeps the tokens of highest priority.

    Args:
        logits_TE: Logits in fp32 or better.
        capacity: Slots per expert, C.
        priority_T: Random positive numbers. None: random token selection is off; as in DeepSpeed, ``torch.topk`` then
            decides among equal numbers, and in general does not keep the first tokens.
    """
    probs_TE = logits_TE.softmax(-1)
    expert_TK = pin(probs_TE.argmax(-1, keepdim=True))
    chosen_TE = _mask(expert_TK, probs_TE)
    score_TE = chosen_TE.long() if priority_T is None else chosen_TE * priority_T.unsqueeze(-1)
    slot_TK = _slots_in_order(expert_TK, chosen_TE & _largest(score_TE, capacity), capacity)
    gate_TK = probs_TE.gather(1, expert_TK).masked_fill(slot_TK < 0, 0.0)
    return _decision(gate_TK, slot_TK, probs_TE, chosen_TE, chosen_TE, capacity)


def top2_gating(logits_TE: Tensor, capacity: int, noise_TE: Tensor | None) -> Decision:
    """Chooses two experts per token; slots go first come, first served, to first choices before second ones.

    Args:
        logits_TE: Logits in fp32 or better.
        capacity: Slots per expert, C.
        noise_TE: Gumbel noise that turns the second choice into a draw from the remaining experts by their
            probabilities. None: the second choice is the second most probable expert.
    """
    probs_TE = logits_TE.softmax(-1)
    first_T1 = pin(probs_TE.argmax(-1, keepdim=True))
    noisy_TE = logits_TE if noise_TE is None else logits_TE + noise_TE
    second_T1 = pin(noisy_TE.scatter(1, first_T1, -torch.inf).argmax(-1, keepdim=True))
    expert_TK = torch.cat((first_T1, second_T1), 1)
    slot_TK, choice_EC, load_E = assign_slots(expert_TK, probs_TE.shape[1], capacity)
    gate_TK = _normalised_survivors(probs_TE.gather(1, expert_TK), slot_TK)
    return Decision(gate_TK, slot_TK, choice_EC, probs_TE, _mask(first_T1, probs_TE), load_E)


def topk_gating(logits_TE: Tensor, top_k: int, capacity: int, drop_policy: str) -> Decision:
    """Chooses the K most probable experts per token.

    Args:
        logits_TE: Logits in fp32 or better.
        top_k: Choices per token, K.
        capacity: Slots per expert, C.
        drop_policy: With ``probs`` a full expert keeps the choices of highest probability, with ``position`` the first.
    """
    probs_TE = logits_TE.softmax(-1)
    expert_TK = pin(probs_TE.detach().topk(top_k, dim=-1).indices)
    chosen_TE = _mask(expert_TK, probs_TE)
    kept_TE = chosen_TE
    if drop_policy == DropPolicy.PROBS:
        kept_TE = pin(chosen_TE & _largest(probs_TE.detach() * chosen_TE, capacity))
    slot_TK = _slots_in_order(expert_TK, kept_TE, capacity)
    gate_TK = _normalised_survivors(probs_TE.gather(1, expert_TK), slot_TK)
    return _decision(gate_TK, slot_TK, probs_TE, chosen_TE, chosen_TE / top_k, capacity)


def _decision(
    gate_TK: Tensor, slot_TK: Tensor, probs_TE: Tensor, chosen_TE: Tensor, counted_TE: Tensor, capacity: int
) -> Decision:
    choice_EC = choices_of_slots(slot_TK, chosen_TE.shape[1] * capacity)
    return Decision(gate_TK, slot_TK, choice_EC, probs_TE, counted_TE, chosen_TE.sum(0))


def _mask(expert_TK: Tensor, like_TE: Tensor) -> Tensor:
    """Returns which experts each token has chosen, (T, E) bool."""
    return torch.zeros_like(like_TE, dtype=torch.bool).scatter_(1, expert_TK, True)


def _largest(score_TE: Tensor, capacity: int) -> Tensor:
    """Marks the C largest scores of each expert, (T, E) bool; torch.topk decides among equal ones, as in DeepSpeed."""
    index = score_TE.topk(min(capacity, len(score_TE)), dim=0, sorted=False).indices
    return torch.zeros_like(score_TE, dtype=torch.bool).scatter_(0, index, True)


def _slots_in_order(expert_TK: Tensor, kept_TE: Tensor, capacity: int) -> Tensor:
    """Gives each kept choice its expert's next free slot in order of the tokens; -1 if not kept or none is left.

    ``assign_slots`` differs: there all first choices come before second ones.
    """
    position_TK = (kept_TE.cumsum(0) - 1).gather(1, expert_TK)
    placed_TK = kept_TE.gather(1, expert_TK) & (position_TK < capacity)
    return torch.where(placed_TK, expert_TK * capacity + position_TK, -1)


def _normalised_survivors(gate_TK: Tensor, slot_TK: Tensor) -> Tensor:
    """Normalises the gates of choices that found a slot to sum to one per token; zeros if there is none."""
    gate_TK = gate_TK.masked_fill(slot_TK < 0, 0.0)
    return gate_TK / gate_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(gate_TK.dtype).eps)
