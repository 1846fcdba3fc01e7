"""Chooses for ``comm.cac=auto`` which collectives' results are worth the memory that keeping them takes."""

from collections.abc import Callable, Iterable
from itertools import product
from typing import NamedTuple

from tedlab.comm.collectives import Collective
from tedlab.comm.keep import WEIGHTS
from tedlab.predict.volumes import ClosedForm


class Choice(NamedTuple):
    """A choice of what to keep.

    Attributes:
        size: The bytes that each process keeps for one micro-batch.
        seconds: The seconds for which recomputation still communicates.
        entries: What is kept, as entries of ``comm.cac``.
    """

    size: int
    seconds: float
    entries: tuple[str, ...]


def within_budget(form: ClosedForm, budget: int, seconds: Callable[[Collective], float]) -> list[str]:
    """Chooses what to keep in at most ``budget`` bytes so that recomputation communicates for the shortest time.

    This solves a knapsack exactly. Each block makes one choice: for each of its collectives it keeps nothing, a shard
    or the whole result. Sums of choices that another beats in both size and time are dropped on the way.

    Args:
        form: The closed form of the configuration.
        budget: The bytes that each process may keep.
        seconds: Maps a collective to the seconds that it takes.

    Returns:
        Entries for ``comm.cac``, in the order of blocks.
    """
    best = [Choice(0, 0.0, ())]
    options: dict[tuple[int, bool], list[Choice]] = {}  # of the first of several equal blocks
    for block, first in enumerate(form.spec.first):
        kind = first, form.has_backward(block)
        if kind not in options:
            options[kind] = _efficient(_options(form, block, seconds), budget)
        best = _efficient(
            (
                Choice(a.size + b.size, a.seconds + b.seconds, a.entries + tuple(f"{block}/{e}" for e in b.entries))
                for a, b in product(best, options[kind])
            ),
            budget,
        )
    return list(min(best, key=lambda choice: (choice.seconds, choice.size)).entries)


def _options(form: ClosedForm, block: int, seconds: Callable[[Collective], float]) -> Iterable[Choice]:
    unread = form.unread(block)  # neither kept nor repeated in any case
    tags = [site.tag for site in form.sites[block].recomputed if site.tag not in (*unread, WEIGHTS)]
    for suffixes in product(("", ":shard", None), repeat=len(tags)):
        entries = tuple(f"{tag}{suffix}" for tag, suffix in zip(tags, suffixes, strict=True) if suffix is not None)
        again = sum(seconds(call) for call in form.recompute(block, entries))
        yield Choice(form.kept_bytes(block, entries), again, entries)


def _efficient(choices: Iterable[Choice], budget: int) -> list[Choice]:
    """Returns the choices within the budget that no smaller one equals in time; fewer entries win among equals."""
    result: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.size, c.seconds, len(c.entries))):
        if choice.size <= budget and (not result or choice.seconds < result[-1].seconds * (1 - 1e-12)):
            result.append(choice)
    return result
