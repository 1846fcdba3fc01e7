"""Opens a finished run or an imported model, whose model then computes in one process or any layout."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from omegaconf.errors import OmegaConfBaseException
from torch import distributed as dist

from tedlab import checkpoint
from tedlab.config import ModelConfig, MoEConfig
from tedlab.data import load_tokenizer
from tedlab.data.tokenizers import SAVED, Tokenizer
from tedlab.decode import generating
from tedlab.degrees import ParallelDegrees, check_divides
from tedlab.launch.joining import join, local_world_size, own_device
from tedlab.launch.outside import started_outside
from tedlab.models import GPT, GPTSpec, models
from tedlab.renamed import nested
from tedlab.topology import Topology
from tedlab.untrusted import read_yaml, typed


class InLayout(Protocol):
    """What a command says of its processes."""

    processes: int
    tensor: int
    expert: int
    expert_tensor: int | None
    device: str | None


class Opened(NamedTuple):
    """A model that can be loaded.

    Attributes:
        path: The checkpoint.
        model, moe: The model's configuration, as it generates.
        spec: Its specification.
        tokenizer: The run's.
        degrees: The layout.
        device: Type of the device.
    """

    path: Path
    model: ModelConfig
    moe: MoEConfig
    spec: GPTSpec
    tokenizer: Tokenizer
    degrees: ParallelDegrees
    device: str


def opened(path: Path, directory: Path, layout: InLayout) -> Opened:
    """Reads all of a model but its weights, and checks that it can compute in a layout.

    Args:
        path: The checkpoint.
        directory: The run directory that it belongs to.
        layout: The layout, which need not be the run's.

    Raises:
        FileNotFoundError: If there is no checkpoint, or no tokenizer.
        ValueError: If the layout does not fit the model or this machine, or a file of the run is damaged; the message
            says which.
    """
    shape, moe = model_of(path)
    shape, moe = replace(shape, compile="none"), generating(moe, f"{path} was trained with")
    divided = layout.expert_tensor or layout.tensor
    degrees = ParallelDegrees(layout.processes, tensor=layout.tensor, expert=layout.expert, expert_tensor=divided)
    spec = models[shape.architecture].spec(shape, moe)
    spec.check(degrees)
    assert shape.vocab_size is not None
    check_divides("model.vocab_size", shape.vocab_size, "tensor", degrees.tensor)
    gpus, here = torch.cuda.device_count(), processes_here(layout)
    device = layout.device or ("cuda" if gpus and gpus >= here else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device={device} is unknown; valid: cpu, cuda")
    if device == "cuda" and gpus < here:
        raise ValueError(f"device=cuda needs a GPU for each process, but torch sees {gpus} here; use device=cpu")
    return Opened(path, shape, moe, spec, _tokenizer(directory, shape), degrees, device)


def load(given: Opened) -> GPT:
    """Joins the processes of the layout, if there are several, and loads the weights in torch's default dtype."""
    model = models[given.model.architecture](given.model, given.moe, _topology(given.degrees, given.device), seed=0)
    weights = {f"network.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint.load({"model": weights}, given.path)
    return model.eval()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within it, torch makes tensors in another dtype, if nothing else is said."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def processes_here(layout: InLayout) -> int:
    """Returns how many processes there are on this machine."""
    return local_world_size() if started_outside() else layout.processes


def _topology(degrees: ParallelDegrees, device: str) -> Topology:
    """Joins the processes of the layout, if there are several."""
    if degrees.world_size == 1 and not started_outside():
        return Topology.single(device)
    place = own_device(device)
    if not dist.is_initialized():
        join("nccl" if place.type == "cuda" else "gloo")
    return Topology(degrees, place)


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
