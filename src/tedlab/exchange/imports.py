"""``tedlab checkpoint import``: a folder of a published model becomes a checkpoint that loads under any layout."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tedlab.checkpoint import durable
from tedlab.checkpoint.pieces import Piece, shown, write_pieces
from tedlab.config import BiasUpdate, ModelConfig, MoEConfig, ParallelConfig
from tedlab.data.tokenizers import SAVED, FileTokenizer
from tedlab.degrees import ParallelDegrees, check_divides, parallel_degrees
from tedlab.exchange.folder import CONFIG, Folder
from tedlab.hints import did_you_mean
from tedlab.models.families import Family, Rule, configured, essence, family_of
from tedlab.models.families.family import flat
from tedlab.models.families.gpt_oss import GptOss
from tedlab.models.gpt import GPTSpec
from tedlab.places import check_free
from tedlab.ranges import check_ranges
from tedlab.resume import IMPORTED
from tedlab.untrusted import one_line
from tedlab.validate.attention import check_attention
from tedlab.validate.experts import check_mixture
from tedlab.weights import PREFIX

_MANY = 5


class Opened(NamedTuple):
    """A folder that can be imported.

    Attributes:
        folder: Its files.
        family: Its family.
        model, moe: Its configuration as ours.
        shapes: Global shape of each of our parameters, by name.
        rules: What each of our parameters is made of.
    """

    folder: Folder
    family: Family
    model: ModelConfig
    moe: MoEConfig
    shapes: dict[str, tuple[int, ...]]
    rules: list[Rule]


class Imported(NamedTuple):
    """What an import has done.

    Attributes:
        checkpoint: The checkpoint.
        family: The family's ``model_type``.
        parameters: Number of parameters.
        largest_bytes: Size of the largest piece, which is a tensor or one expert's matrix.
        tokenizer: Whether the folder had one.
    """

    checkpoint: Path
    family: str
    parameters: int
    largest_bytes: int
    tokenizer: bool


def open_folder(path: Path, overrides: Sequence[str] = ()) -> Opened:
    """Reads all of a folder but its numbers, and checks that it is a model that can be imported.

    Args:
        path: The folder.
        overrides: ``model.…=`` and ``moe.…=`` that are of training, such as ``model.sequence_length``, and
            ``parallel.…=``, a layout in which the model must be divisible.

    Raises:
        ValueError: If it cannot be imported; the message says why.
    """
    folder = Folder(path)
    family, model, moe = described(folder.config, path)
    theirs, parallel = essence(model, moe), ParallelConfig(world_size=1)
    model, moe, parallel = _overridden(model, moe, parallel, overrides)
    changed = [name for name, value in essence(model, moe).items() if theirs.get(name) != value]
    if changed:
        raise ValueError(
            f"{changed[0]} is {theirs.get(changed[0])} in {path}, whose weights are of no other model; leave it out"
        )
    check_mixture(moe, model.layers)
    degrees = parallel_degrees(parallel)
    GPTSpec(model, moe).check(degrees)
    assert model.vocab_size is not None
    check_divides("model.vocab_size", model.vocab_size, "parallel.tensor", degrees.tensor)
    opened = Opened(folder, family, model, moe, shapes_of(model, moe), list(family.rules(model, moe)))
    _check_tensors(opened)
    return opened


def described(config: Mapping[str, Any], path: Path) -> tuple[Family, ModelConfig, MoEConfig]:
    """Returns the family and the model that a ``config.json`` says.

    Args:
        config: Its content, which may be anything.
        path: Its folder, for messages.

    Raises:
        ValueError: If it says none that tedlab has; the message says why.
    """
    where = f"{path}/{CONFIG}"
    try:
        family = family_of(config)
        _check_unquantised(config, family)
        model, moe = configured(family.read(config))
        check_ranges(model, "model.")
        check_ranges(moe, "moe.")
        check_attention(model)
        if not moe.routed(model.layers):  # the first blocks of a larger model, say, which are dense
            moe = replace(moe, num_experts=0)
        check_mixture(moe, model.layers)
        if model.vocab_size is None:
            raise ValueError("vocab_size is null")
        GPTSpec(model, moe).check(ParallelDegrees(1))
    except OmegaConfBaseException as error:
        raise ValueError(f"{where} describes a model that tedlab has not: {one_line(error)}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    except (TypeError, AttributeError, KeyError, ArithmeticError) as error:  # a value of another type than its field's
        raise ValueError(f"{where} has a value of the wrong type: {one_line(error)}") from None
    return family, model, moe


def import_folder(path: Path, out: Path, overrides: Sequence[str] = ()) -> Imported:
    """Imports a folder as the run directory ``out``, holding one tensor at a time, or one expert's part of it.

    Raises:
        FileExistsError: If ``out`` exists.
        ValueError: If the folder cannot be imported, or ``out`` not be made. In both cases nothing has been written.
    """
    check_free(out, "an import")
    opened = open_folder(path, overrides)
    tokenizer = _tokenizer(opened)
    largest = 0

    def pieces() -> Iterator[Piece]:
        nonlocal largest
        total = sum(torch.Size(shape).numel() for shape in opened.shapes.values())
        for piece in shown(read_pieces(opened), "importing", total):
            largest = max(largest, piece.values.numel() * piece.values.element_size())
            yield piece._replace(name=PREFIX + piece.name)

    hyper = {"model": asdict(opened.model), "moe": asdict(opened.moe), "seed": 0}
    config: dict[str, Any] = {"model": hyper["model"], "moe": hyper["moe"]}
    config["data"] = {"tokenizer": "byte" if tokenizer is None else str(out / SAVED)}
    place = Path("checkpoints", "last.ckpt")
    with durable.appearing(out) as partial:
        write_pieces(pieces(), {"hyper_parameters": hyper, IMPORTED: opened.family.model_type}, partial / place)
        opened.folder.close()
        if tokenizer is not None:
            shutil.copyfile(tokenizer, partial / SAVED)
        (partial / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    count = parameters_of(opened.model, opened.moe)
    return Imported(out / place, opened.family.model_type, count, largest, tokenizer is not None)


def read_pieces(opened: Opened) -> Iterator[Piece]:
    """Yields our parameters, piece by piece, with their numbers."""
    for rule in opened.rules:
        index = rule.expert if rule.sliced else None
        joined = rule.transform.join([opened.folder.tensor(name, index) for name in rule.theirs])
        yield Piece(rule.ours, opened.shapes[rule.ours], rule.expert, joined)


def parameters_of(model: ModelConfig, moe: MoEConfig) -> int:
    """Returns the number of a model's parameters, of which biases that balance choices are none."""
    return sum(torch.Size(parameter.shape).numel() for parameter in GPTSpec(model, moe).parameters())


def shapes_of(model: ModelConfig, moe: MoEConfig) -> dict[str, tuple[int, ...]]:
    """Returns the global shape of all that a model keeps, by name: its parameters, and biases that balance choices."""
    shapes = {parameter.name: tuple(parameter.shape) for parameter in GPTSpec(model, moe).parameters()}
    if moe.router.bias_update != BiasUpdate.NONE:
        shapes |= {f"blocks.{n}.feed_forward.router.bias": (moe.num_experts,) for n in moe.routed(model.layers)}
    return shapes


def _overridden(
    model: ModelConfig, moe: MoEConfig, parallel: ParallelConfig, overrides: Sequence[str]
) -> tuple[ModelConfig, MoEConfig, ParallelConfig]:
    known = {*flat(model, moe), *(f"parallel.{field.name}" for field in fields(ParallelConfig))}
    groups = ("model.", "moe.", "parallel.")
    for override in overrides:
        name, equals, _ = override.partition("=")
        if not equals or not name.startswith(groups):
            raise ValueError(f"{override!r} is no override of an import: these are model.…=, moe.…= and parallel.…=")
        if name not in known and not any(other.startswith(f"{name}.") for other in known):
            raise ValueError(f"there is no value {name}.{did_you_mean(name, known)}")
    try:
        ours = OmegaConf.create(
            {kind: OmegaConf.structured(value) for kind, value in (("model", model), ("moe", moe))}
            | {"parallel": OmegaConf.structured(parallel)}
        )
        given = OmegaConf.from_dotlist(list(overrides))
        merged: Any = OmegaConf.merge(ours, given)
        degrees = merged.parallel.tensor * merged.parallel.expert
        if "world_size" not in given.get("parallel", {}):
            merged.parallel.world_size = max(1, degrees)  # the range of each degree is checked below
        found = tuple(OmegaConf.to_object(merged[group[:-1]]) for group in groups)
        for group, one in zip(groups, found, strict=True):
            check_ranges(one, group)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(one_line(error)) from None
    return found  # type: ignore[return-value]


def _check_unquantised(config: Mapping[str, Any], family: Family) -> None:
    quantised = config.get("quantization_config")
    if quantised is None:
        return
    method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
    if method == "mxfp4" and isinstance(family, GptOss):
        return  # dequantised while it is read
    kind = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}.get(str(method), "…Config")
    how = f"dtype='bfloat16', quantization_config={kind}(dequantize=True)"
    raise ValueError(
        f"its weights are quantised ({method}). Dequantise them first, with transformers: "
        f"{family.architecture}.from_pretrained(folder, {how}).save_pretrained(other)"
    )


def _check_tensors(opened: Opened) -> None:
    """Refuses missing, unexpected and misshapen tensors, by what the headers of files say."""
    folder, family = opened.folder, opened.family
    expected: dict[str, tuple[int, ...]] = {}
    for rule in opened.rules:
        shape = opened.shapes[rule.ours]
        ours = torch.empty(shape, device="meta")
        parts = rule.transform.split(rule.part(ours))
        for name, part in zip(rule.theirs, parts, strict=True):
            expected[name] = (shape[0], *part.shape) if rule.sliced else tuple(part.shape)
    made = {rule.ours for rule in opened.rules}
    assert made == opened.shapes.keys(), f"without a rule: {sorted(opened.shapes.keys() - made)}"
    left_out = [re.compile(pattern) for pattern in family.left_out_of(opened.model)]
    if opened.model.tie_embeddings:
        left_out.append(re.compile(r"lm_head\.weight"))
    missing = [name for name in expected if name not in folder.tensors]
    extra = [n for n in folder.tensors if n not in expected and not any(p.fullmatch(n) for p in left_out)]
    for what, names in (("lacks", missing), ("has, beside those of the model,", extra)):
        if names:
            more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
            count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
            raise ValueError(f"{folder.path} {what} {count}: {', '.join(names[:_MANY])}{more}")
    for name, shape in expected.items():
        if folder.tensors[name].shape != shape:
            raise ValueError(
                f"{name} in {folder.path} has the shape {folder.tensors[name].shape}; by its config.json it has {shape}"
            )
        folder.dtype(name)


def _tokenizer(opened: Opened) -> Path | None:
    """Returns the folder's tokenizer file, if there is one.

    Raises:
        ValueError: If it has more tokens than the model.
    """
    path = opened.folder.path / SAVED
    if not path.is_file():
        return None
    tokenizer = FileTokenizer(path)
    size = opened.model.vocab_size
    assert size is not None
    if tokenizer.vocab_size > size:
        raise ValueError(f"{path} has {tokenizer.vocab_size} tokens, and the model {size}: it is of another model")
    return path
