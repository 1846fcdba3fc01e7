"""Checks the model: its layers, and its vocabulary."""

from tedlab.config import Activation, ModelConfig, TrainConfig
from tedlab.degrees import ParallelDegrees, check_divides
from tedlab.models import models
from tedlab.validate.attention import check_attention

_VOCAB_MULTIPLE = 128  # a power of two, so that usual tensor degrees divide the rounded vocabulary


def check_model(config: TrainConfig, degrees: ParallelDegrees) -> None:
    """Checks the architecture and, as its layers state them, the sizes of the model.

    Raises:
        ValueError: If they are invalid; the message says what would do.
    """
    check_attention(config.model)
    model = config.model
    if model.swiglu_limit != ModelConfig.swiglu_limit and model.activation != Activation.CLAMPED_SWIGLU:
        raise ValueError(
            f"model.swiglu_limit={model.swiglu_limit} would have no effect with model.activation={model.activation}; "
            f"leave it {ModelConfig.swiglu_limit}, or use model.activation=clamped_swiglu"
        )
    models[config.model.architecture].spec(config.model, config.moe).check(degrees)


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
