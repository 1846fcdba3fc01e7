"""Cuts texts that are longer than a model's context into windows that together predict each token once."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """Tokens of which the last ones are predicted, each from all before it.

    Attributes:
        tokens: Token ids, shape (tokens,).
        predicted: How many of the last are predicted, fewer than there are.
    """

    tokens: np.ndarray
    predicted: int


def windows(tokens: np.ndarray, context: int, stride: int) -> Iterator[Window]:
    """Yields windows that together predict every token but the first, each once.

    Args:
        tokens: Token ids, shape (tokens,).
        context: How many tokens a model reads at a time.
        stride: How many tokens each window after the first predicts: the fewer, the more of its context lies before
            each. No more than ``context``.
    """
    end = min(context + 1, len(tokens))
    predicted = end - 1
    while predicted > 0:
        yield Window(tokens[max(0, end - 1 - context) : end], predicted)
        predicted = min(stride, len(tokens) - end)
        end += predicted
