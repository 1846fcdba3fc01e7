"""Continues a text with the model of a finished run.

It needs one process, whatever layout the run had, and reads the sharded checkpoint into an unsharded model.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf.errors import OmegaConfBaseException

from tedlab import checkpoint
from tedlab.config import GenerateConfig, ModelConfig, MoEConfig
from tedlab.data import load_tokenizer
from tedlab.data.tokenizers import SAVED, Tokenizer
from tedlab.models import models
from tedlab.moe import routers
from tedlab.ranges import check_ranges
from tedlab.renamed import nested
from tedlab.topology import Topology
from tedlab.untrusted import read_yaml, typed


@torch.inference_mode()
def generate(config: GenerateConfig) -> str:
    """Returns the prompt and its continuation.

    Raises:
        FileNotFoundError: If the run or its checkpoint does not exist.
        ValueError: If a number is out of range, or a file of the run is damaged; the message says which.
    """
    check_ranges(config)
    directory = Path(config.run)
    if not (directory / "config.yaml").is_file():
        raise FileNotFoundError(f"{directory} is not a run directory: it has no config.yaml")
    path = directory / "checkpoints" / config.checkpoint
    shape, experts = model_of(path)
    tokenizer = _tokenizer(directory, shape)
    # Capacity enforces balance in training; a text must not change because its tokens crowd one expert or one group of
    # positions, nor because a second expert is drawn at random.
    moe = replace(experts, capacity_factor=None, capacity_groups=None)
    if "generate" not in routers[moe.gating].supports:
        raise ValueError(
            f"{path} was trained with moe.gating={moe.gating}, whose choices for a token depend on tokens after it: it "
            "cannot generate text"
        )
    if moe.gating == "deepspeed_top2":
        moe = replace(moe, second_expert_sampling=False)
    model = models[shape.architecture](replace(shape, compile="none"), moe, Topology.single(), seed=0)
    weights = {f"network.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint.load({"model": weights}, path)
    model.eval()

    ids = tokenizer.encode(config.prompt).tolist() or [tokenizer.separator]
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.tokens):
        window = torch.tensor([ids[-shape.sequence_length :]])
        logits = model(window)[0][0, -1, : tokenizer.vocab_size].float()  # the vocabulary's padding contains no tokens
        if config.temperature == 0:
            ids.append(int(logits.argmax()))
        else:
            probabilities = (logits / config.temperature).softmax(-1)
            ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return tokenizer.decode(ids)


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
