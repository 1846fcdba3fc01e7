"""Continues texts with the model of a finished run, in one process or any layout, whatever layout the run had."""

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf.errors import OmegaConfBaseException
from torch import distributed as dist

from tedlab import checkpoint
from tedlab.config import GenerateConfig, ModelConfig, MoEConfig
from tedlab.data import load_tokenizer
from tedlab.data.tokenizers import SAVED, Tokenizer
from tedlab.decode import check_lengths, continuations, generating
from tedlab.degrees import ParallelDegrees, check_divides
from tedlab.doctor.machine import available_memory
from tedlab.launch.joining import join, own_device
from tedlab.launch.outside import started_outside
from tedlab.models import models
from tedlab.ranges import check_ranges
from tedlab.renamed import nested
from tedlab.sampling import Sampling
from tedlab.topology import Topology
from tedlab.untrusted import read_yaml, typed

Show = Callable[[str], None]  # gets each piece of a text as soon as it is known


class Given(NamedTuple):
    """What there is to continue texts with.

    Attributes:
        path: The checkpoint.
        model, moe: The model's configuration, as it generates.
        tokenizer: The run's.
        prompts: Ids of the tokens of what to continue.
        degrees: The layout.
        device: Type of the device.
    """

    path: Path
    model: ModelConfig
    moe: MoEConfig
    tokenizer: Tokenizer
    prompts: list[list[int]]
    degrees: ParallelDegrees
    device: str


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
    shape, moe = model_of(path)
    shape, moe = replace(shape, compile="none"), generating(moe, f"{path} was trained with")
    divided = config.expert_tensor or config.tensor
    degrees = ParallelDegrees(config.processes, tensor=config.tensor, expert=config.expert, expert_tensor=divided)
    spec = models[shape.architecture].spec(shape, moe)
    spec.check(degrees)
    assert shape.vocab_size is not None
    check_divides("model.vocab_size", shape.vocab_size, "tensor", degrees.tensor)
    if "" in config.stop:
        raise ValueError("stop has an empty text, which would end every continuation before it begins: leave it out")
    gpus, here = torch.cuda.device_count(), _processes_here(config)
    device = config.device or ("cuda" if gpus and gpus >= here else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device={device} is unknown; valid: cpu, cuda")
    if device == "cuda" and gpus < here:
        raise ValueError(f"device=cuda needs a GPU for each process, but torch sees {gpus} here; use device=cpu")
    tokenizer = _tokenizer(directory, shape)
    prompts = [tokenizer.encode(prompt).tolist() or [tokenizer.separator] for prompt in _prompts(config)]
    check_lengths(prompts, shape.sequence_length)
    if config.cache and not in_worker:
        _check_memory(config, spec, degrees, prompts, device)
    return Given(path, shape, moe, tokenizer, prompts, degrees, device)


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
        room = int(available_memory()) // _processes_here(config)
    missing = -(-texts // data) * text - room
    if missing > 0:
        over = f"{missing / 2**30:.1f} GiB"
        raise ValueError(
            f"attention to {texts} texts of up to {positions} tokens needs {over} more than there are in each process: "
            f"{room // text * data} texts would fit, or use cache=false"
        )


def _processes_here(config: GenerateConfig) -> int:
    """Returns how many processes there are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", config.processes)))


def generate(config: GenerateConfig, show: Show | None = None) -> list[str]:
    """Returns each prompt and its continuation, in every process of the layout.

    Args:
        config: What to continue, and how.
        show: Gets the first text, piece by piece; None: nobody sees it before it is whole.

    Raises:
        FileNotFoundError, ValueError: See :func:`given`.
    """
    path, shape, moe, tokenizer, prompts, degrees, device = given(config, in_worker=True)
    model = models[shape.architecture](shape, moe, _topology(degrees, device), seed=0)
    weights = {f"network.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint.load({"model": weights}, path)
    model.eval()

    texts = [_Text(tokenizer, prompt, config.stop) for prompt in prompts]
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.seed)
    vocabulary = tokenizer.vocab_size  # padding contains no tokens
    steps = continuations(
        *(model, prompts, config.tokens, sampling),
        ended=lambda number, added: texts[number].ends(added),
        vocabulary=vocabulary,
        remember=config.cache,
    )
    shown = 0
    for _ in itertools.chain([None], steps):
        if show and len(known := texts[0].known()) > shown:
            show(known[shown:])
            shown = len(known)
    if show:
        show(texts[0].text[shown:])
    return [text.text for text in texts]


def _topology(degrees: ParallelDegrees, device: str) -> Topology:
    """Joins the processes of the layout, if there are several."""
    if degrees.world_size == 1 and not started_outside():
        return Topology.single(device)
    place = own_device(device)
    if not dist.is_initialized():
        join("nccl" if place.type == "cuda" else "gloo")
    return Topology(degrees, place)


class _Text:
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
        beginnings = [stop[:length] for stop in self.stop for length in range(1, len(stop))]
        beginnings.append("\N{REPLACEMENT CHARACTER}")
        kept = len(self.text) - max((len(part) for part in beginnings if self.text.endswith(part)), default=0)
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


def _tokenizer(directory: Path, shape: ModelConfig) -> Tokenizer:
    """Loads the run's tokenizer. If its file is missing, the run must have used bytes, which are the default."""
    if not (directory / SAVED).is_file():
        try:
            data = read_yaml(directory / "config.yaml").get("data")
        except ValueError as error:
            raise ValueError(f"{directory / 'config.yaml'} cannot be read: {error}") from None
        named = data.get("tokenizer", "byte") if isinstance(data, dict) else "byte"
        if named != "byte":
            raise FileNotFoundError(f"{directory / SAVED} is missing, and the run has data.tokenizer={named}")
    tokenizer = load_tokenizer(directory)
    assert shape.vocab_size is not None
    if tokenizer.vocab_size > shape.vocab_size:
        raise ValueError(
            f"{directory} has a tokenizer of {tokenizer.vocab_size} tokens, and a model of {shape.vocab_size}: "
            "one of them is not this run's"
        )
    return tokenizer


def model_of(path: Path) -> tuple[ModelConfig, MoEConfig]:
    """Reads the model's configuration from a checkpoint, since the run's config.yaml has no checksum.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it is damaged or holds no model of this command.
    """
    stored: Any = checkpoint.read_meta(path).get("hyper_parameters")
    try:
        stored = nested(stored)
        shape, moe = typed(ModelConfig, stored["model"]), typed(MoEConfig, stored["moe"])
        if shape.vocab_size is None:
            raise ValueError("it has no vocabulary")
        return shape, moe
    except (OmegaConfBaseException, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} says nothing of a model of this command: {error}") from None
