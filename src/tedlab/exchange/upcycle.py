"""``tedlab checkpoint upcycle``: a dense model becomes a mixture whose experts are copies of its feed-forward layers.

With F the width of the dense layer and f that of an expert, the layer is split into G = F/f pieces by its features, and
each expert is a copy of one piece. The E experts are E/G virtual groups, of one copy of every piece each (He et al.,
"Upcycling Large Language Models into Mixture of Experts", arXiv 2410.07524). The router's rows are equal within a
group, so that a token chooses whole groups. Its output is then the dense layer's times the sum of its weights, over G,
which one constant scale undoes if that sum is a constant: see :func:`scale_of`.
"""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from tedlab.checkpoint import durable
from tedlab.checkpoint.pieces import Piece, PieceReader, shown, write_pieces
from tedlab.config import BiasUpdate, Gates, ModelConfig, MoEConfig, Noise, Scoring, Shortcut
from tedlab.data.tokenizers import SAVED
from tedlab.exchange.imports import PREFIX
from tedlab.models import models
from tedlab.nn.sharded import seed_of
from tedlab.opened import model_of
from tedlab.parametrization import scales
from tedlab.places import check_free
from tedlab.ranges import check_ranges, real, whole, word
from tedlab.resume import UPCYCLED
from tedlab.spec import ParameterSpec
from tedlab.untrusted import read_yaml

_FEED_FORWARD = "feed_forward"
_NEARLY_EQUAL = 0.01  # standard deviation of logits whose softmax is still nearly even

Scale = StrEnum("Scale", "WEIGHTS GATES")


@dataclass(frozen=True)
class Recipe:
    """How experts and routers begin.

    Attributes:
        scale: What is scaled so that the mixture's output has the size of the dense layer's: ``weights`` (the experts'
            second projection) or ``gates`` (``moe.router.gate_scale`` of the new configuration).
        noise: Standard deviation of noise on each expert's matrices, as a share of that of the matrix.
        reinit: Share of each expert's inner features that are drawn anew, with mean and standard deviation of what they
            replace (Nakamura et al., "Drop-Upcycling", arXiv 2502.19261).
        router_std: Standard deviation of the router's weights. None: ``model.init_std``; with raw weights of choices so
            little that these are nearly equal.
        seed: Seed of all that is drawn.
    """

    scale: str = word(Scale.WEIGHTS)
    noise: float = real(0.0, least=0)
    reinit: float = real(0.0, least=0, most=1)
    router_std: float | None = real(None, above=0)
    seed: int = whole(0, least=0)


class Upcycled(NamedTuple):
    """What an upcycling has done.

    Attributes:
        checkpoint: The checkpoint.
        parameters: Number of parameters.
        pieces: Number of experts that a dense layer is split into.
        groups: Number of copies of the whole dense layer.
        scale: What the experts' results are multiplied by.
        exact: Whether the model computes what the dense one does, before anything is trained and but for rounding.
    """

    checkpoint: Path
    parameters: int
    pieces: int
    groups: int
    scale: float
    exact: bool


def upcycle(source: Path, out: Path, moe: MoEConfig, recipe: Recipe) -> Upcycled:
    """Makes a run directory ``out`` with a mixture made of a dense model, holding one matrix of it at a time.

    Args:
        source: The checkpoint of the dense model; a tokenizer in its run directory is copied.
        out: The folder, which must not exist.
        moe: The experts.
        recipe: How they begin.

    Raises:
        FileExistsError: If ``out`` exists, or what a process that was killed left of it.
        FileNotFoundError: If ``source`` is no checkpoint.
        ValueError: If the model has experts already, or cannot be divided into these, or a number is out of range; the
            message says what would do. Nothing has been written then.
    """
    check_free(out, "an upcycled model")
    model, dense = model_of(source)
    if dense.num_experts:
        raise ValueError(f"{source} is of a model with {dense.num_experts} experts; only a dense model is upcycled")
    check_ranges(recipe)
    pieces = _pieces(model, moe)
    scale = scale_of(moe, pieces)
    in_gates = recipe.scale == Scale.GATES
    made = replace(moe, router=replace(moe.router, gate_scale=scale)) if in_gates else moe
    factor = 1.0 if in_gates else scale / moe.router.gate_scale
    making = _Making(PieceReader(source), model, made, recipe, pieces, factor)
    parameters = list(models[model.architecture].spec(model, made).parameters())
    count = sum(torch.Size(parameter.shape).numel() for parameter in parameters)
    making.check(parameters)
    place = Path("checkpoints", "last.ckpt")
    stored = {"model": asdict(model), "moe": asdict(made)}
    meta = {"hyper_parameters": {**stored, "seed": 0}, UPCYCLED: {**asdict(recipe), "from": str(source)}}
    run = source.absolute().parents[1]
    with durable.appearing(out) as partial:
        write_pieces(shown(making.all(parameters), "upcycling", count), meta, partial / place)
        if (run / SAVED).is_file():
            shutil.copyfile(run / SAVED, partial / SAVED)
        data = {"tokenizer": str(out / SAVED) if (run / SAVED).is_file() else _named_tokenizer(run)}
        (partial / "config.yaml").write_text(yaml.safe_dump({**stored, "data": data}))
    torn = pieces > 1 and moe.router.noise != Noise.NONE  # a token may choose parts of sets
    exact = _sum_is_constant(moe) and not (recipe.noise or recipe.reinit or torn)
    return Upcycled(out / place, count, pieces, moe.num_experts // pieces, scale, exact)


def scale_of(moe: MoEConfig, pieces: int) -> float:
    """Returns the factor on the weights of choices that makes the mixture's output the dense layer's.

    It is G over the sum of a token's weights. That sum is 1 for ``normalized`` and ``softmax`` weights, whatever the
    router chooses. For ``raw`` ones it is K/E (softmax scores) or K/2 (sigmoid) where the scores of all experts are
    equal, as they nearly are at first: the output then differs from the dense layer's as little as scores differ.

    Args:
        moe: The experts.
        pieces: G, the number of experts that a dense layer is split into.
    """
    if _sum_is_constant(moe):
        return float(pieces)
    each = 1 / moe.num_experts if moe.router.scoring == Scoring.SOFTMAX else 1 / 2
    return pieces / (moe.top_k * each)


def _sum_is_constant(moe: MoEConfig) -> bool:
    """Tells whether a token's weights have the sum 1, see ``moe.router.gates``."""
    return (moe.router.gates or (Gates.NORMALIZED if moe.top_k > 1 else Gates.RAW)) != Gates.RAW


def _pieces(model: ModelConfig, moe: MoEConfig) -> int:
    """Refuses what cannot be made, and returns the number of pieces of a dense layer."""
    if not moe.num_experts:
        raise ValueError("moe.num_experts is 0: the upcycled model would be dense; choose moe=… with experts")
    if moe.gating != "default":
        raise ValueError(f"moe.gating={moe.gating}: upcycling knows the weights of choices of moe.gating=default only")
    if moe.shared.experts:
        raise ValueError(f"moe.shared.experts={moe.shared.experts}: upcycling makes routed experts only; set it to 0")
    if moe.shortcut != Shortcut.NONE:
        raise ValueError(
            f"moe.shortcut={moe.shortcut}: experts would not read what the dense layers read of which they are made; "
            "use moe.shortcut=none"
        )
    width = moe.ffn or model.ffn
    if model.ffn % width:
        raise ValueError(
            f"moe.ffn={width} does not divide the dense layers' model.ffn={model.ffn}: choose model.ffn / G, where G "
            "is the number of pieces"
        )
    pieces = model.ffn // width
    for name, number in (("moe.num_experts", moe.num_experts), ("moe.top_k", moe.top_k)):
        if number % pieces:
            below, above = number // pieces * pieces, -(-number // pieces) * pieces
            near = f"{below} or {above}" if below else f"{above}"
            raise ValueError(
                f"{name} is {number}, but moe.ffn={width} splits dense layers of {model.ffn} features into {pieces} "
                f"pieces, and a token must choose whole sets of them: use a multiple of {pieces}, such as {near}"
            )
    if moe.num_experts // moe.router.expert_groups % pieces:
        raise ValueError(
            f"moe.router.expert_groups={moe.router.expert_groups} divides sets of {pieces} pieces among groups: use "
            f"one that leaves each group a multiple of {pieces} of the {moe.num_experts} experts"
        )
    return pieces


class _Making:
    """Makes the parameters of the mixture, one after the other.

    Args:
        reader: The dense checkpoint.
        model, moe: The configuration of the mixture.
        recipe: How experts begin.
        pieces: The number of pieces of a dense layer.
        factor: Factor on the experts' second projection.
    """

    def __init__(
        self, reader: PieceReader, model: ModelConfig, moe: MoEConfig, recipe: Recipe, pieces: int, factor: float
    ) -> None:
        self.reader, self.model, self.moe, self.recipe = reader, model, moe, recipe
        self.pieces, self.factor = pieces, factor
        self.scales = scales(models[model.architecture].spec, model, moe)
        self.dense = {name.removeprefix(PREFIX): entry for name, entry in reader.tensors.items()}

    def check(self, parameters: list[ParameterSpec]) -> None:
        """Refuses a checkpoint that does not hold the model that it describes."""
        for parameter in parameters:
            name = self._origin(parameter.name)
            if name is not None and name not in self.dense:
                raise ValueError(f"{self.reader.path} does not hold the dense model that it describes: it lacks {name}")

    def all(self, parameters: list[ParameterSpec]) -> Iterator[Piece]:
        """Yields everything, by the names of a checkpoint."""
        for parameter in parameters:
            for piece in self._made(parameter):
                yield piece._replace(name=PREFIX + piece.name)
        if self.moe.router.bias_update != BiasUpdate.NONE:
            for block in self.moe.routed(self.model.layers):
                name = f"{PREFIX}blocks.{block}.{_FEED_FORWARD}.router.bias"
                yield Piece(name, (self.moe.num_experts,), None, torch.zeros(self.moe.num_experts))

    def _made(self, parameter: ParameterSpec) -> Iterator[Piece]:
        origin, name = self._origin(parameter.name), parameter.name
        if ".experts." in name:
            assert origin is not None
            block, dense = int(name.split(".")[1]), self._read(origin)
            for expert in range(self.moe.num_experts):
                yield Piece(name, parameter.shape, expert, self._expert(dense, name.rpartition(".")[2], block, expert))
        elif origin is not None:
            yield Piece(name, parameter.shape, None, self._read(origin))
        else:
            yield Piece(name, parameter.shape, None, self._router(parameter))

    def _origin(self, name: str) -> str | None:
        """Returns the parameter of the dense model that one is made of; None for those of routers."""
        before, inside, which = name.partition(f".{_FEED_FORWARD}.experts.")
        if inside:
            layer, bias, _ = which.partition("_bias")
            return f"{before}.{_FEED_FORWARD}.{layer}.{'bias' if bias else 'weight'}"
        return None if f".{_FEED_FORWARD}.router." in name else name

    def _read(self, name: str) -> Tensor:
        return self.reader.read(PREFIX + name)

    def _router(self, parameter: ParameterSpec) -> Tensor:
        """Returns a router's weights, equal within each virtual group, or its other parameters, which begin at 0."""
        dtype = self.dense["embedding.weight"].properties.dtype
        if not parameter.name.endswith(".weight"):
            return torch.zeros(parameter.shape, dtype=dtype)
        std = self.recipe.router_std
        if std is None:
            std = self.model.init_std * self.scales[parameter.name].init if self.scales else self.model.init_std
            if not _sum_is_constant(self.moe):
                std = min(std, _NEARLY_EQUAL / self.model.hidden**0.5)
        experts, hidden = parameter.shape
        groups_VH = torch.randn(experts // self.pieces, hidden, generator=self._draws("router", parameter.name))
        return (groups_VH * std).repeat_interleave(self.pieces, 0).to(dtype)

    def _expert(self, dense: Tensor, which: str, block: int, expert: int) -> Tensor:
        """Returns an expert's part of a parameter: its piece of the dense layer's, changed as the recipe says.

        Args:
            dense: The dense layer's ``up.weight`` (inner, H), ``up.bias``, ``down.weight`` (H, F) or ``down.bias``.
            which: ``up``, ``up_bias``, ``down`` or ``down_bias``.
            block: Index of the block.
            expert: Index of the expert.
        """
        if which == "down_bias":  # of the sum over pieces, each of which adds it
            return (dense * (self.factor / self.pieces)).unsqueeze(0)
        width, features = self.moe.ffn or self.model.ffn, self.model.ffn
        first = expert % self.pieces * width
        by_feature = dense.mT if which == "down" else dense  # features first; SwiGLU has two rows of each in ``up``
        rows_FMX = by_feature.unflatten(0, (features, -1))[first : first + width].clone()
        if self.recipe.reinit:
            # The same features in all matrices of the expert.
            draws = self._draws("features", block, expert)
            chosen = torch.randperm(width, generator=draws)[: round(self.recipe.reinit * width)]
            replaced = rows_FMX[chosen].float()
            over = [0, *range(2, replaced.dim())]  # gate and linear part have their own mean and deviation
            mean, deviation = replaced.mean(over, keepdim=True), replaced.std(over, correction=0, keepdim=True)
            new = torch.randn(replaced.shape, generator=self._draws(which, block, expert)) * deviation + mean
            rows_FMX[chosen] = new.to(dense.dtype)
        if self.recipe.noise:
            noise = torch.randn(rows_FMX.shape, generator=self._draws("noise", which, block, expert))
            rows_FMX += (noise * (self.recipe.noise * rows_FMX.float().std(correction=0))).to(dense.dtype)
        rows = rows_FMX.flatten(0, 1)
        if which == "up_bias":
            return rows.unsqueeze(0)
        return rows.mT if which == "up" else rows * self.factor

    def _draws(self, *key: Any) -> torch.Generator:
        """Returns a generator of its own for each use, so that nothing depends on the order in which it is made."""
        return torch.Generator().manual_seed(seed_of("/".join(map(str, (self.recipe.seed, *key)))))


def _named_tokenizer(run: Path) -> str:
    """Returns what names the tokenizer in the configuration of a run that has no file of it."""
    data = read_yaml(run / "config.yaml").get("data") if (run / "config.yaml").is_file() else None
    return str(data.get("tokenizer", "byte")) if isinstance(data, dict) else "byte"
