"""``comm.cac=auto``: which collectives' results are worth their memory, when there is only so much of it."""

from collections.abc import Callable, Iterable
from itertools import product
from typing import NamedTuple

from tedlab.comm.collectives import Collective
from tedlab.predict.volumes import ClosedForm


class Choice(NamedTuple):
    """Something to keep.

    Attributes:
        size: bytes that each process keeps of one micro-batch.
        seconds: that recomputation still communicates.
        entries: what is kept, as in ``comm.cac``.
    """

    size: int
    seconds: float
    entries: tuple[str, ...]


def within_budget(form: ClosedForm, budget: int, seconds: Callable[[Collective], float]) -> list[str]:
    """What to keep in at most ``budget`` bytes so that recomputation communicates for the shortest time.

    The exact solution of a knapsack with one choice per block: for each of its collectives to keep nothing, a shard or
    the whole. Every sum of choices that another beats in both size and time is dropped on the way.

    Args:
        form: of the configuration.
        budget: bytes of each process.
        seconds: what one collective takes.

    Returns:
        Entries for ``comm.cac``, in the order of blocks.
    """
    best = [Choice(0, 0.0, ())]
    options: dict[int, list[Choice]] = {}  # of the first of blocks that are alike
    for block, first in enumerate(form.spec.first):
        if first == block:
            options[first] = _efficient(_options(form, block, seconds), budget)
        best = _efficient(
            (
                Choice(a.size + b.size, a.seconds + b.seconds, a.entries + tuple(f"{block}/{e}" for e in b.entries))
                for a, b in product(best, options[first])
            ),
            budget,
        )
    return list(min(best, key=lambda choice: (choice.seconds, choice.size)).entries)


def _options(form: ClosedForm, block: int, seconds: Callable[[Collective], float]) -> Iterable[Choice]:
    tags = [site.tag for site in form.sites[block].recomputed]
    for suffixes in product(("", ":shard", None), repeat=len(tags)):
        entries = tuple(f"{tag}{suffix}" for tag, suffix in zip(tags, suffixes, strict=True) if suffix is not None)
        again = sum(seconds(call) for call in form.recompute(block, entries))
        yield Choice(form.kept_bytes(block, entries), again, entries)


def _efficient(choices: Iterable[Choice], budget: int) -> list[Choice]:
    """Those within the budget that no smaller one equals in time; fewest entries first among equals."""
    result: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.size, c.seconds, len(c.entries))):
        if choice.size <= budget and (not result or choice.seconds < result[-1].seconds * (1 - 1e-12)):
            result.append(choice)
    return result
