"""Continues texts with the model of a finished run, in one process or any layout, whatever layout the run had."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tedlab.config import GenerateConfig
from tedlab.data.tokenizers import Tokenizer
from tedlab.decode import check_lengths, continuations
from tedlab.degrees import ParallelDegrees
from tedlab.doctor.machine import available_memory
from tedlab.opened import Opened, load, opened, processes_here
from tedlab.ranges import check_ranges
from tedlab.sampling import Sampling

Show = Callable[[str], None]  # gets each piece of a text as soon as it is known


class Given(NamedTuple):
    """What there is to continue texts with.

    Attributes:
        model: The run's model and tokenizer.
        prompts: Ids of the tokens of what to continue.
    """

    model: Opened
    prompts: list[list[int]]


def given(config: GenerateConfig, in_worker: bool = False) -> Given:
    """Reads what a configuration names, and checks all that can be checked before processes are launched.

    Args:
        config: What to continue, and how.
        in_worker: Whether the launching process has checked that there is memory.

    Raises:
        FileNotFoundError: If the run, its checkpoint or the file of prompts does not exist.
        ValueError: If a number is out of range, a layout does not fit the model, a prompt has more tokens than the
            model has positions, there is no memory for all texts, or a file of the run is damaged; the message says
            which.
    """
    check_ranges(config)
    directory = Path(config.run)
    if not (directory / "config.yaml").is_file():
        raise FileNotFoundError(f"{directory} is not a run directory: it has no config.yaml")
    path = directory / "checkpoints" / config.checkpoint
    if "" in config.stop:
        raise ValueError("stop has an empty text, which would end every continuation before it begins: leave it out")
    model = opened(path, directory, config)
    tokenizer = model.tokenizer
    prompts = [tokenizer.encode(prompt).tolist() or [tokenizer.separator] for prompt in _prompts(config)]
    check_lengths(prompts, model.model.sequence_length)
    if config.cache and not in_worker:
        _check_memory(config, model.spec, model.degrees, prompts, model.device)
    return Given(model, prompts)


def _check_memory(
    config: GenerateConfig, spec: Any, degrees: ParallelDegrees, prompts: list[list[int]], device: str
) -> None:
    """Refuses more texts than there is memory for what attention remembers of them."""
    layers = [getattr(block, "attention", None) for block in spec.blocks]
    if not all(hasattr(layer, "remembered") for layer in layers):  # then nothing is
        return
    positions = min(spec.model.sequence_length, max(map(len, prompts)) + config.tokens)
    each = sum(layer.remembered(degrees.tensor) for layer in layers if layer is not None)
    text = positions * each * torch.get_default_dtype().itemsize
    texts, data = len(prompts), degrees.world_size // degrees.tensor
    if device == "cuda":
        room = torch.cuda.get_device_properties(0).total_memory
    else:
        room = int(available_memory()) // processes_here(config)
    missing = -(-texts // data) * text - room
    if missing > 0:
        over = f"{missing / 2**30:.1f} GiB"
        raise ValueError(
            f"attention to {texts} texts of up to {positions} tokens needs {over} more than there are in each process: "
            f"{room // text * data} texts would fit, or use cache=false"
        )


def generate(
    config: GenerateConfig, show: Show | None = None, advance: Callable[[int], object] = lambda tokens: None
) -> list[str]:
    """Returns each prompt and its continuation, in every process of the layout.

    Args:
        config: What to continue, and how.
        show: Gets the first text, piece by piece; None: nobody sees it before it is whole.
        advance: Called with 1 whenever all texts have grown by a token.

    Raises:
        FileNotFoundError, ValueError: See :func:`given`.
    """
    whose, prompts = given(config, in_worker=True)
    model, tokenizer = load(whose), whose.tokenizer
    texts = [Continued(tokenizer, prompt, config.stop) for prompt in prompts]
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.seed)
    vocabulary = tokenizer.vocab_size  # padding contains no tokens
    steps = continuations(
        *(model, prompts, config.tokens, sampling),
        ended=lambda number, added: texts[number].ends(added),
        vocabulary=vocabulary,
        remember=config.cache,
    )
    shown = 0
    for step in itertools.chain([None], steps):
        if step is not None:
            advance(1)
        if show and len(known := texts[0].known()) > shown:
            show(known[shown:])
            shown = len(known)
    if show:
        show(texts[0].text[shown:])
    return [text.text for text in texts]


class Continued:
    """A prompt and what was added to it.

    Args:
        tokenizer: Knows its tokens.
        prompt: Ids of the prompt's tokens.
        stop: What ends it, and is no part of it.

    Attributes:
        text: What is written so far.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stop: Sequence[str]) -> None:
        self.tokenizer, self.prompt, self.stop = tokenizer, prompt, stop
        self.text = tokenizer.decode(prompt)
        self.begins = len(self.text)

    def ends(self, added: Sequence[int]) -> bool:
        """Takes the tokens that were added so far, and tells whether a stop ends the text."""
        self.text = self.tokenizer.decode([*self.prompt, *added])
        found = [at for stop in self.stop if (at := self.text.find(stop, self.begins)) >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)

    def known(self) -> str:
        """Returns the part of the text that no further token changes: not half a character, nor what begins a stop."""
        whole = self.text.removesuffix("\N{REPLACEMENT CHARACTER}")
        beginnings = [stop[:length] for stop in self.stop for length in range(1, len(stop))]
        kept = len(whole) - max((len(part) for part in beginnings if whole.endswith(part)), default=0)
        return self.text[: max(kept, self.begins)]


def _prompts(config: GenerateConfig) -> list[str]:
    if config.prompts is None:
        return [config.prompt]
    if config.prompt:
        raise ValueError(f"both prompt and prompts={config.prompts} are given: use one of the two")
    try:
        lines = Path(config.prompts).read_text("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{config.prompts} is not a text in UTF-8: {error}") from None
    if lines == [""]:
        raise ValueError(f"{config.prompts} has no lines: each would be a prompt")
    return lines
