"""Chooses layouts for generation by trying all (after HAP, arXiv 2508.19373): prefill and decoding apart.

Attention has the same tensor degree in both phases, because it fixes where keys and values are remembered. Experts may
have one layout in the prefill and another in decoding, at the cost of a switch. Of all choices that fit in memory, the
one is the best whose texts are finished first. Nothing here prints.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

from tedlab.config import (
    CommConfig,
    ParallelConfig,
    RecomputeConfig,
    ServeConfig,
    Shortcut,
    Slicing,
    TrainConfig,
    with_values,
)
from tedlab.decode import generating
from tedlab.degrees import ParallelDegrees, check_divides
from tedlab.errors import UsageError
from tedlab.models import GPTSpec, models
from tedlab.moe import MoESpec
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.serve.load import Load
from tedlab.predict.serve.passes import Module, Pass, Tokens, remembered_bytes, weight_bytes
from tedlab.predict.serve.switch import Switch, switches
from tedlab.validate import complete_simulated


class Phase(NamedTuple):
    """A pass in one layout.

    Attributes:
        degrees: The layout.
        modules: What its modules take.
        load: The load of the processes that share experts.
        weights: Bytes of the weights of a process.
        activations: Bytes of its activations at most.
    """

    degrees: ParallelDegrees
    modules: dict[str, Module]
    load: Load
    weights: int
    activations: int

    @property
    def seconds(self) -> float:
        """The seconds of the pass."""
        return sum(module.seconds for module in self.modules.values())


@dataclass(frozen=True)
class Choice:
    """A layout for each phase, and what it costs.

    Attributes:
        prefill, decode: The phases; ``decode`` is the step at the middle of the output.
        steps: The number of steps after the prefill.
        switch: The change of the experts' layout.
        remembered: Bytes of keys and values in a process.
    """

    prefill: Phase
    decode: Phase
    steps: int
    switch: Switch
    remembered: int

    @property
    def first_seconds(self) -> float:
        """Seconds to the first new token."""
        return self.prefill.seconds

    @property
    def seconds(self) -> float:
        """Seconds until all texts are finished."""
        return self.prefill.seconds + self.switch.seconds + self.steps * self.decode.seconds

    @property
    def bytes(self) -> int:
        """Bytes of the fullest process at its fullest moment."""
        # Each layer's new experts take the place of its old ones; from the host they come while the prefill computes.
        under = self.prefill.activations if self.switch.way == "int4" else 0
        working = max(
            self.prefill.weights + self.prefill.activations,
            self.decode.weights + self.decode.activations,
            max(self.prefill.weights, self.decode.weights) + under + round(self.switch.beside),
        )
        return self.remembered + working

    @property
    def size(self) -> tuple[int, int]:
        """The order of sizes: bytes, and where these are equal, because the prefill's count, weights of both phases."""
        return self.bytes, self.prefill.weights + self.decode.weights

    @property
    def same(self) -> bool:
        """Whether experts have one layout in both phases."""
        return self.prefill.degrees == self.decode.degrees


@dataclass
class Found:
    """What a search has found.

    Attributes:
        choices: Those that fit, the fastest first.
        refused: How many layouts are not possible, by reason.
        too_large: How many choices do not fit.
        nearest: Of these the smallest.
    """

    choices: list[Choice] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    too_large: int = 0
    nearest: Choice | None = None


class Generation:
    """Texts that a model is to generate on a cluster.

    Args:
        config: The job, see :func:`served`.
        request: The texts.
        cluster: The cluster.
        shares: (E,) proportions in which experts are chosen; None: all equally often.

    Raises:
        UsageError: If it is not said how many texts there are.
    """

    def __init__(
        self, config: TrainConfig, request: ServeConfig, cluster: ClusterConfig, shares: Sequence[float] | None = None
    ) -> None:
        self.config, self.request, self.cluster, self.shares = config, request, cluster, shares
        self.world = config.parallel.world_size
        self.spec: GPTSpec = models[config.model.architecture].spec(config.model, config.moe)
        self.mixtures = [layer for block in self.spec.blocks if isinstance(layer := block.feed_forward, MoESpec)]
        if request.batch is None:
            raise UsageError("batch says how many texts there are at the same time: for example batch=8")
        prompt, output = lengths(request)
        self.positions, self.steps = prompt + output, output - 1  # the prefill makes the first token
        # Steps read more and more of what is remembered; the middle one takes what they take in the mean.
        middle = prompt + max(0, output - 2) // 2
        self.tokens = {"prefill": Tokens(request.batch, prompt), "decode": Tokens(request.batch, 1, middle)}
        self.dtype = Pass(config, ParallelDegrees(self.world), self.tokens["decode"]).compute
        self._weights = cache(lambda degrees: weight_bytes(self.spec, degrees, self.dtype))

    def of(self, batch: int) -> "Generation":
        """Returns the same generation of another number of texts."""
        other = copy(self)
        other.request = replace(self.request, batch=batch)
        other.tokens = {name: replace(tokens, texts=batch) for name, tokens in self.tokens.items()}
        return other

    def layouts(self, found: Found) -> Iterator[list[ParallelDegrees]]:
        """Yields the layouts that experts may have, for each tensor degree that is possible."""
        divisors = [n for n in range(1, self.world + 1) if self.world % n == 0]
        for tensor in divisors:
            ways = [(n, e) for n in divisors for e in divisors if self.world % (n * e) == 0]
            possible = []
            for width, expert in ways if self.mixtures else [(tensor, 1)]:
                degrees = ParallelDegrees(self.world, tensor, expert, expert_tensor=width)
                try:
                    self.spec.check(degrees)
                    check_divides("model.vocab_size", self.spec.embedding.vocab_size, "parallel.tensor", tensor)
                    possible.append(degrees)
                except ValueError as error:
                    found.refused[str(error).partition(". ")[0]] += 1
            if possible:
                yield possible

    def phase(self, name: str, degrees: ParallelDegrees) -> Phase:
        """Returns the ``prefill``, or a step of ``decode``, in a layout.

        Raises:
            ValueError: If the world exceeds the cluster.
        """
        given = self.config, degrees, self.tokens[name], self.shares
        busiest, even = Pass(*given), Pass(*given, even=True)
        modules = busiest.modules(self.cluster, even)
        return Phase(degrees, modules, busiest.load, self._weights(degrees), busiest.activations)

    def remembered(self, tensor: int) -> int:
        """Returns the bytes of keys and values in a process."""
        data = self.world // tensor
        texts = -(-self.tokens["prefill"].texts // data)
        return texts * self.positions * remembered_bytes(self.spec.blocks, tensor, self.dtype)

    def choice(self, prefill: Phase, decode: Phase, capacity: float = math.inf) -> Choice:
        """Returns two phases with the fastest switch between them that fits, or the smallest if none does.

        Args:
            prefill, decode: The phases.
            capacity: The bytes of a GPU that may be used.
        """
        ways = [Switch("none", 0.0, 0.0, 0.0)]
        if prefill.degrees != decode.degrees:
            parameters = list(self.mixtures[0].experts.parameters())
            layer = prefill.seconds / len(self.spec.blocks)
            upload = self.request.upload if self.request.int4 else None
            layouts = prefill.degrees, decode.degrees
            ways = switches(parameters, len(self.mixtures), *layouts, self.dtype, self.cluster, upload, layer)
        remembered = self.remembered(prefill.degrees.tensor)
        choices = [Choice(prefill, decode, self.steps, way, remembered) for way in ways]
        fitting = [choice for choice in choices if choice.bytes <= capacity]
        return (
            min(fitting, key=lambda choice: choice.seconds) if fitting else min(choices, key=lambda choice: choice.size)
        )

    def search(self, capacity: float) -> Found:
        """Evaluates every choice.

        Args:
            capacity: The bytes of a GPU that may be used.

        Raises:
            ValueError: If the world exceeds the cluster.
        """
        found = Found()
        for layouts in self.layouts(found):
            phases = {name: [self.phase(name, degrees) for degrees in layouts] for name in self.tokens}
            for prefill in phases["prefill"]:
                for decode in phases["decode"]:
                    choice = self.choice(prefill, decode, capacity)
                    if choice.bytes <= capacity:
                        found.choices.append(choice)
                        continue
                    found.too_large += 1
                    if found.nearest is None or choice.size < found.nearest.size:
                        found.nearest = choice
        found.choices.sort(key=lambda choice: choice.seconds)
        return found

    def largest_batch(self, capacity: float) -> tuple[int, ParallelDegrees | None]:
        """Returns the most texts that fit with one layout in both phases, fewer than are asked for, and that layout.

        Args:
            capacity: The bytes of a GPU that may be used.
        """
        most, where = 0, None
        for degrees in (degrees for possible in self.layouts(Found()) for degrees in possible):
            if not self._fits(degrees, most + 1, capacity):  # no better than others before
                continue
            most, beyond, where = most + 1, self.tokens["prefill"].texts, degrees
            while beyond - most > 1:
                middle = (most + beyond) // 2
                most, beyond = (middle, beyond) if self._fits(degrees, middle, capacity) else (most, middle)
        return most, where

    def _fits(self, degrees: ParallelDegrees, batch: int, capacity: float) -> bool:
        other = self.of(batch)
        return other.choice(other.phase("prefill", degrees), other.phase("decode", degrees)).bytes <= capacity


def lengths(request: ServeConfig) -> tuple[int, int]:
    """Returns the tokens of a prompt, and those that are added.

    Raises:
        UsageError: If one of them is not given.
    """
    if request.prompt is None or request.output is None:
        raise UsageError("prompt and output say how long texts are: for example prompt=4096 output=64")
    return request.prompt, request.output


def served(config: TrainConfig, request: ServeConfig) -> TrainConfig:
    """Returns a job's model as it generates: in the dtype of its products, with what it needs not to drop tokens.

    Of the rest of the job only ``comm.dtd``, ``comm.fuse_reduce_scatter`` and ``parallel.world_size`` matter.

    Raises:
        UsageError: If the model is not valid or cannot generate, or texts do not fit into its positions.
    """
    prompt, output = lengths(request)
    room = config.model.sequence_length
    if prompt + output > room:
        raise UsageError(
            f"prompt={prompt} and output={output} are {prompt + output} tokens, but the model has "
            f"model.sequence_length={room} positions: shorten texts, or use model.sequence_length={prompt + output}"
        )
    if config.moe.shortcut != Shortcut.NONE:
        raise UsageError(
            f"moe.shortcut={config.moe.shortcut}: blocks run in pairs, which this plan does not know: use none"
        )
    precision = str(config.trainer["precision"]).replace("-mixed", "-true")
    alone = {
        "trainer": {**config.trainer, "precision": precision},
        "parallel": ParallelConfig(1),
        "comm": CommConfig(),
        "data.batch_size": 1,
        "data.micro_batch_size": 1,
        "model.compile": "none",
        "model.recompute": RecomputeConfig(),
        "moe.slice": Slicing.NONE.value,
    }
    model = complete_simulated(with_values(config, alone))
    try:
        moe = generating(model.moe, "the job has")
    except ValueError as error:
        raise UsageError(str(error)) from None
    comm = CommConfig(dtd=config.comm.dtd, fuse_reduce_scatter=config.comm.dtd and config.comm.fuse_reduce_scatter)
    served = with_values(model, {"moe": moe, "comm": comm, "parallel": config.parallel})
    blocks = models[served.model.architecture].spec(served.model, served.moe).blocks
    if not all(hasattr(block.attention, "remembered") for block in blocks):
        raise UsageError("this model's attention does not say what it remembers of a token (docs/guests.md)")
    return served
