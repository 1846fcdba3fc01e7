"""Continues texts with a model, in every layout: prefill, then token by token with what attention remembers.

Tensor ranks compute each token together and choose alike. Data ranks divide the texts, and go on together until the
last text has ended, as ranks that share experts must. Every process yields all texts.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tedlab.config import LendConfig, MoEConfig, RotaryScaling, Slicing
from tedlab.degrees import ParallelDegrees
from tedlab.moe import Experts, LocalExperts, routers
from tedlab.moe.grouped import native
from tedlab.nn import Past, Remembers, localised, locals_of, rememberers, remembering
from tedlab.nn.ids import unchecked
from tedlab.sampling import Sampling
from tedlab.spec import Site

_log = logging.getLogger(__name__)
_TAG = "generate.gather"
_WORTH_A_GRAPH = 8  # tokens; a CUDA graph is made in the time of about three

Recording = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
Ended = Callable[[int, Sequence[int]], bool]  # whether a text has ended, by its number and the tokens added so far


@torch.inference_mode()
def continuations(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling,
    ended: Ended = lambda number, added: False,
    vocabulary: int | None = None,
    remember: bool = True,
) -> Iterator[list[int | None]]:
    """Yields the next token of each text, None for one that has ended, until all have or ``tokens`` are added.

    Args:
        model: A :class:`tedlab.models.GPT`, which computes as in evaluation. It must not be compiled, and its layout
            must not divide the positions of a text.
        prompts: Ids of each text's tokens, at least one and no more than the model has positions.
        tokens: How many to add to each at most.
        sampling: How they are chosen.
        ended: Called for each token that was added; every process must give the same answer.
        vocabulary: Only ids below can be chosen, such as those that a tokenizer knows; None: all.
        remember: Whether keys and values of earlier tokens are kept; otherwise all is computed again for each token.
            Beyond the model's positions, texts lose their beginnings, and what remains must be computed again; so must
            texts whose rotary positions depend on their length, and those of models whose attention cannot remember.

    Raises:
        ValueError: If a prompt is empty or too long, or the model is compiled or divides positions, before anything is
            computed; and if logits are not finite.
    """
    room, comm = model.config.sequence_length, model.comm
    if model.sequence_sharded or any(getattr(module, "slices", 1) > 1 for module in model.modules()):
        raise ValueError(
            "parallel.sequence and moe.slice divide the positions of a text, of which one is computed at a time: "
            "switch them off"
        )
    if model.config.compile != "none":
        raise ValueError(f"model.compile={model.config.compile} would compile each length of a text anew: use none")
    check_lengths(prompts, room)
    if not prompts:
        return
    sides, side = comm.size("data"), comm.rank("data")
    padded = [*range(len(prompts)), *[len(prompts) - 1] * (-len(prompts) % sides)]  # each rank has as many texts
    own = padded[side::sides]
    texts, streams = [list(prompts[number]) for number in own], sampling.streams(len(prompts))
    added: list[list[int]] = [[] for _ in prompts]
    going = [True] * len(prompts)
    longest = max(map(len, prompts))
    device = next(iter(model.parameters())).device
    most = min(room, longest + tokens)
    worth = device.type == "cuda" and most - longest >= _WORTH_A_GRAPH
    reason = why_no_graph(model) if worth else None
    steps = _Steps(model, texts, longest, most, device, _cuda_graph if worth and reason is None else None)
    remember = remember and steps.can_remember
    if remember and worth:
        _log.info("the host launches %s", "one CUDA graph a token" if reason is None else f"each kernel: {reason}")
    training = model.training
    model.eval()
    try:
        for step in range(tokens):
            if remember and longest + step <= room:
                logits_BV = steps.remembered()
            else:
                steps.past = Past(0)  # what was remembered is of no use any more
                logits_BV = steps.whole(room, min(room, longest + step))
            logits_BV = _gathered(logits_BV.movedim(1, 0), comm, "tensor").movedim(0, 1)[:, :vocabulary]
            chosen_B = sampling.choose(logits_BV, [streams[number] for number in own])
            chosen_B = _gathered(chosen_B, comm, "tensor")[: len(own)]  # the first tensor rank's
            # By data rank, of which each had every so manieth text.
            everyone = _gathered(chosen_B, comm, "data").view(sides, -1).t().flatten().tolist()
            for text, token in zip(texts, chosen_B.tolist(), strict=True):
                text.append(token)
            news: list[int | None] = []
            for number, token in enumerate(everyone[: len(prompts)]):
                news.append(token if going[number] else None)
                if going[number]:
                    added[number].append(token)
                    going[number] = not ended(number, added[number])
            yield news
            if not any(going):
                return
    finally:
        model.train(training)


def check_lengths(prompts: Sequence[Sequence[int]], room: int) -> None:
    """Refuses a prompt that is empty or has more tokens than the model has positions.

    Raises:
        ValueError: If there is one.
    """
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= room:
            raise ValueError(f"prompt {number} has {len(prompt)} tokens; the model has room for 1 to {room}")


def generating(moe: MoEConfig, whose: str) -> MoEConfig:
    """Returns the mixtures as they generate.

    Capacity enforces balance in training; a text must not change because its tokens crowd one expert or one group of
    positions, nor because a second expert is drawn at random. Then rows are less work than slots. What only changes
    where training computes is left out.

    Args:
        moe: The mixtures as they are trained.
        whose: Begins the message about a router that cannot generate: who has it.

    Raises:
        ValueError: If the router chooses for a token by later ones, or by its place.
    """
    supports = routers[moe.gating].supports
    if "generate" not in supports:
        raise ValueError(
            f"{whose} moe.gating={moe.gating}, which chooses for a token by more than the token and "
            "those before it: it has no probabilities of a next token"
        )
    moe = replace(moe, capacity_factor=None, capacity_groups=None, slice=Slicing.NONE.value, lend=LendConfig())
    if moe.num_experts and "dropless" in supports and moe.dispatch in ("capacity", "packed"):
        moe = replace(moe, dispatch="dropless", kernel="auto")
    return replace(moe, second_expert_sampling=False) if moe.gating == "deepspeed_top2" else moe


def choosing_sites(vocabulary: int, degrees: ParallelDegrees) -> tuple[Site, ...]:
    """Returns the collectives by which all processes learn the next token of each text, in every step.

    Args:
        vocabulary: The number of logits.
        degrees: The degrees of the layout.
    """
    logits = Site(_TAG, "all_gather", "tensor", vocabulary, "samples")
    chosen = replace(logits, width=degrees.tensor, dtype="index")
    return logits, chosen, replace(chosen, kind="data", width=degrees.data)


class _Steps:
    """Computes the logits of the next tokens of some texts, which grow by a token between two calls.

    Args:
        model: The model.
        texts: Ids of the tokens of each.
        longest: How many the longest of all processes has, so that all compute as many.
        room: How many positions there are for each.
        device: Where the model is.
        recording: Given what computes a step after the first, from and into tensors that stay the same, it returns what
            does so again, such as a CUDA graph; None: each step sees slots up to its own alone.
    """

    def __init__(
        self,
        model: Any,
        texts: list[list[int]],
        longest: int,
        room: int,
        device: torch.device,
        recording: "Recording | None" = None,
    ) -> None:
        self.recording = recording
        self.again: Callable[[], Tensor] | None = None
        self.model, self.texts, self.longest, self.device = model, texts, longest, device
        rotary = model.config.rotary
        # Each token that comes may turn those before it more slowly.
        self.stretched = rotary.scaling == RotaryScaling.NTK and room > rotary.original_length
        layers = [getattr(block, "attention", None) for block in model.blocks]
        self.can_remember = not self.stretched and all(isinstance(layer, Remembers) for layer in layers)
        self.rememberers, self.past, self.plain = rememberers(model), Past(room), locals_of(model)

    def remembered(self) -> Tensor:
        """Returns logits (B, V/T), for which only tokens are computed that no call before has computed."""
        lengths = [len(text) for text in self.texts]
        last_B = torch.tensor(lengths, device=self.device) - 1
        if self.past.end == 0:
            position_S = torch.arange(self.longest, device=self.device)
            self.past.enter(position_S.expand(len(lengths), -1), self.longest)
            return self._next_logits(self._right_padded(self.texts, self.longest), last_B)
        ids_B1 = torch.tensor([text[-1:] for text in self.texts], device=self.device)
        if self.recording is not None:
            return self._again(self.recording, ids_B1, last_B.unsqueeze(1))
        return self._grown(ids_B1, last_B.unsqueeze(1), max(lengths), min(lengths) == max(lengths))

    def _again(self, recording: Recording, ids_B1: Tensor, position_B1: Tensor) -> Tensor:
        if self.again is None:
            self.given = ids_B1, position_B1
            # To the room's end, whatever the positions, so that the host decides nothing.
            try:
                self.again = recording(lambda: self._grown(*self.given, self.past.room))
            except RuntimeError as error:
                # torch then leaves its random numbers and its allocator as they are inside a capture.
                warnings.warn(
                    f"a step cannot be recorded, so that each takes longer: {error}; start the process anew if random "
                    "numbers on the GPU fail from now on, or its memory fills",
                    stacklevel=2,
                )
                self.again = lambda: self._grown(*self.given, self.past.room)
        for given, new in zip(self.given, (ids_B1, position_B1), strict=True):
            given.copy_(new)
        return self.again()

    def _grown(self, ids_B1: Tensor, position_B1: Tensor, end: int, last: bool = False) -> Tensor:
        self.past.enter(position_B1, end, last)
        with unchecked():  # the model has chosen them
            return self._next_logits(ids_B1, ids_B1.squeeze(1))  # of one token it need not know which

    def _next_logits(self, ids: Tensor, at_B: Tensor) -> Tensor:
        with remembering(self.rememberers, self.past), localised(self.model, self.plain):
            logits: Tensor = self.model.next_logits(ids, at_B)
        return logits

    def whole(self, room: int, width: int) -> Tensor:
        """Returns logits (B, V/T), for which the ends of texts are computed again.

        Args:
            room: How many tokens of each text at most.
            width: How many the longest of all processes has of these.
        """
        ends = [text[-room:] for text in self.texts]
        if self.stretched:  # as much as each is long
            return torch.cat([self._logits([text], len(text)) for text in ends])
        return self._logits(ends, width)

    def _logits(self, ends: list[list[int]], width: int) -> Tensor:
        at_B = torch.tensor([len(text) - 1 for text in ends], device=self.device)
        logits: Tensor = self.model.next_logits(self._right_padded(ends, width), at_B)
        return logits

    def _right_padded(self, texts: list[list[int]], width: int) -> Tensor:
        """Returns ids (B, S): what follows a text is seen by none of its tokens."""
        return torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=self.device)


def why_no_graph(model: Any) -> str | None:
    """Says why a step cannot be one CUDA graph, whose kernels the host launches at once; None: it can.

    The host must have nothing to decide between kernels, so nothing to read, and no other process to wait for.

    Args:
        model: A :class:`tedlab.models.GPT`.
    """
    if max(model.comm.sizes.values()) > 1:
        return "several processes compute each token together"
    mixtures = [module for module in model.modules() if isinstance(module, Experts)]
    if all(
        isinstance(mixture, LocalExperts) and all(native(w.dtype, *mixture.widths) for w in mixture.parameters())
        for mixture in mixtures
    ):
        return None
    return "the host reads how many rows each expert has, which it need not in bf16 with moe.dispatch=dropless"


def _cuda_graph(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Records what ``compute`` launches, and returns what launches it again, into the same result."""
    current, side, graph = torch.cuda.current_stream(), _side(torch.cuda.current_device()), torch.cuda.CUDAGraph()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        compute()  # compiles kernels, and allocates what stays
        side.synchronize()
        graph.capture_begin()
        try:
            result = compute()
        finally:
            graph.capture_end()
    current.wait_stream(side)

    def again() -> Tensor:
        graph.replay()
        return result

    return again


@cache
def _side(device: int) -> Any:
    """Returns the stream on which graphs of this device are captured: memory that one keeps serves no other stream."""
    return torch.cuda.Stream(device)


def _gathered(x: Tensor, comm: Any, kind: Any) -> Tensor:
    whole: Tensor = comm.all_gather(x.contiguous(), kind, tag=_TAG, phase="validation")
    return whole
