"""Computes how likely a model finds texts, in every layout.

Data ranks divide windows, and go on together until all are done, as ranks that share experts must. What is left of the
last batches is padding, which no router sees. Every process learns all results.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from tedlab.evaluation.windows import Window
from tedlab.models import GPT
from tedlab.nn import IGNORE_INDEX


class Score(NamedTuple):
    """How likely a model finds the predicted tokens of a window.

    Attributes:
        log_likelihood: The sum of their log-probabilities, in nats.
        tokens: How many there are. If the model masks documents, those that begin a document do not count.
        greedy: Whether each of them is the most probable.
    """

    log_likelihood: float
    tokens: int
    greedy: bool


@torch.no_grad()
def scores(
    model: GPT,
    texts: Sequence[Window],
    batch: int,
    length: int | None = None,
    known: int | None = None,
    advance: Callable[[int], object] = lambda done: None,
) -> list[Score]:
    """Returns the scores of windows, the same in every process.

    Args:
        model: In any layout, as it is: the caller switches it to evaluation.
        texts: The same in every process.
        batch: How many windows each data rank computes at a time.
        length: Every batch has this many windows of this many tokens, filled up with padding, so that it is the same
            in every layout, and compiled once. None: as short as windows are, the longest first, and as evenly divided
            as can be; then experts must have no capacity.
        known: See :meth:`tedlab.models.GPT.token_losses`.
        advance: Called with each number of windows that have been computed.

    Raises:
        ValueError: If a window predicts none of its tokens, or all; or, in all processes, if their windows differ.
    """
    for window in texts:
        if not 0 < window.predicted < len(window.tokens):
            raise ValueError(f"a window of {len(window.tokens)} tokens cannot predict {window.predicted} of them")
    comm, sides = model.comm, model.comm.size("data")
    _check_same(model, texts)
    order = [*range(len(texts))]
    if length is None:
        order.sort(key=lambda number: -len(texts[number].tokens))
    own: list[Tensor] = []
    places: list[list[int]] = [[] for _ in range(sides)]  # by data rank: the windows of its rows, -1 for padding
    for start in range(0, len(order), batch * sides):
        together = order[start : start + batch * sides]
        rows = batch if length is not None else -(-len(together) // sides)
        for side in range(sides):
            mine = together[side * rows : (side + 1) * rows]
            places[side] += [*mine, *[-1] * (rows - len(mine))]
        width = length or max(len(texts[number].tokens) for number in together) - 1
        numbers = places[comm.rank("data")][-rows:]
        model.context.at(0, start // batch + comm.rank("data"))  # some routers look at the place in a run
        own.append(_rows(model, [texts[number] if number >= 0 else None for number in numbers], width, known))
        advance(len(together))
    if not own:
        return []
    everyone = comm.all_gather(torch.cat(own), "data", tag="scores.gather", phase="validation").tolist()
    found = dict(zip((number for side in places for number in side), everyone, strict=True))
    return [Score(-found[number][0], int(found[number][1]), bool(found[number][2])) for number in range(len(texts))]


def _check_same(model: GPT, texts: Sequence[Window]) -> None:
    """Refuses windows of which processes have different ones, which would leave some of them waiting."""
    checksum = 0
    for window in texts:
        checksum = crc32(np.asarray(window.tokens, dtype=np.int64).tobytes(), checksum ^ window.predicted)
    mine = torch.tensor([[len(texts), checksum]], device=next(iter(model.parameters())).device)
    everyone = model.comm.all_gather(mine, "world", tag="scores.same", phase="check").tolist()
    other = next((rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]), None)
    if other is not None:
        raise ValueError(
            f"processes 0 and {other} found different texts to evaluate on ({everyone[0][0]} and {everyone[other][0]} "
            "windows): something writes there; copy the texts to where nothing does"
        )


def _rows(model: GPT, texts: Sequence[Window | None], width: int, known: int | None) -> Tensor:
    """Returns (rows, 3) float64: the loss of each window, how many tokens count, and whether all are most probable."""
    filling = model.separator or 0
    ids_BS = np.full((len(texts), width), filling, dtype=np.int64)
    target_BS = np.full((len(texts), width), IGNORE_INDEX, dtype=np.int64)
    padding_BS = np.ones((len(texts), width), dtype=bool)
    for row, window in enumerate(texts):
        if window is not None:
            end = len(window.tokens) - 1
            ids_BS[row, :end], padding_BS[row, :end] = window.tokens[:-1], False
            target_BS[row, end - window.predicted : end] = window.tokens[-window.predicted :]
    if model.separator is not None:  # what follows is another document's
        target_BS[ids_BS == model.separator] = IGNORE_INDEX
    device = next(iter(model.parameters())).device
    ids, targets, padding = (torch.from_numpy(array).to(device) for array in (ids_BS, target_BS, padding_BS))
    loss_BS, greedy_BS = model.token_losses(ids, targets, padding, known)
    counted_BS = targets != IGNORE_INDEX
    all_B = (greedy_BS | ~counted_BS).all(1)
    return torch.stack([loss_BS.double().sum(1), counted_BS.sum(1).double(), all_B.double()], 1)
