"""Checks the model without its experts: its kinds of layers, the sizes that degrees must divide, and its vocabulary."""

from tedlab.config import Positions, TrainConfig
from tedlab.degrees import ParallelDegrees
from tedlab.models import models
from tedlab.validate.words import check_divides

_VOCAB_MULTIPLE = 128  # a power of two, so that usual tensor degrees divide the rounded vocabulary


def check_model(config: TrainConfig, degrees: ParallelDegrees) -> None:
    """Checks the architecture and the sizes of the model.

    Raises:
        ValueError: If they are invalid; the message says what would do.
    """
    model = config.model
    models[model.architecture]  # raises if it is unknown
    if model.hidden % model.heads:
        raise ValueError(f"model.hidden ({model.hidden}) is not a multiple of model.heads ({model.heads})")
    if model.positions == Positions.ROTARY and model.hidden // model.heads % 2:
        raise ValueError(
            f"model.positions=rotary turns pairs of features, but model.hidden / model.heads = {model.hidden} / "
            f"{model.heads} is odd; choose heads of even width, or model.positions=learned"
        )
    for name in ("heads", "ffn"):
        check_divides(f"model.{name}", getattr(model, name), "parallel.tensor", degrees.tensor)


def vocabulary(config: TrainConfig, tokens: int) -> int:
    """Returns ``model.vocab_size``, or if it is not given, the tokenizer's number of tokens, rounded up.

    Raises:
        ValueError: If it is too small, or the tensor degree does not divide it.
    """
    size = config.model.vocab_size
    if size is None:
        size = -(-tokens // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    if size < tokens:
        raise ValueError(f"model.vocab_size ({size}) is smaller than the tokenizer's {tokens}")
    check_divides("model.vocab_size", size, "parallel.tensor", config.parallel.tensor)
    return size
