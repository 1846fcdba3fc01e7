"""The time of micro-batches that go back and forth between two pools, in closed form and by simulating every event.

A micro-batch passes four places in each layer: attention, the way there, experts, the way back. Each place serves one
micro-batch at a time, in the order of arrival. This is MegaScale-Infer's pipeline (arXiv 2504.02263, §4.1) with its
formula corrected, which holds only where enough micro-batches are under way to keep the slowest place busy.
"""

import heapq
from dataclasses import dataclass
from typing import NamedTuple

PLACES = ("attention", "there", "experts", "back")


@dataclass(frozen=True)
class Stages:
    """What one micro-batch takes in one layer.

    Attributes:
        attention: Seconds in the attention pool.
        experts: Seconds in the expert pool.
        transfer: Seconds on the way, in each direction.
    """

    attention: float
    experts: float
    transfer: float

    @property
    def slowest(self) -> float:
        """Seconds at the slowest place."""
        return max(self.attention, self.experts, self.transfer)

    @property
    def around(self) -> float:
        """Seconds of a layer for a micro-batch that nobody delays."""
        return self.attention + self.experts + 2 * self.transfer

    def full(self, micro_batches: int) -> bool:
        """Tells whether so many micro-batches keep the slowest place busy."""
        return micro_batches * self.slowest >= self.around

    def seconds(self, micro_batches: int, layers: int) -> float:
        """Returns the seconds until the last micro-batch has passed all layers.

        If the slowest place is always busy, it serves each micro-batch once per layer, and the first and the last one
        take the rest of a round. Otherwise the first micro-batch is never delayed, and each of the others follows the
        one before it at a distance of the slowest place. The larger of the two holds.
        """
        busy = self.around + self.slowest * (micro_batches * layers - 1)
        free = layers * self.around + (micro_batches - 1) * self.slowest
        return max(busy, free)


class Visit(NamedTuple):
    """A micro-batch at a place.

    Attributes:
        place: One of :data:`PLACES`.
        micro_batch, layer: Which, and where.
        start, end: Seconds since the beginning.
    """

    place: str
    micro_batch: int
    layer: int
    start: float
    end: float


def simulate(stages: Stages, micro_batches: int, layers: int) -> list[Visit]:
    """Returns all visits, in the order of arrival."""
    seconds = dict(zip(PLACES, (stages.attention, stages.transfer, stages.experts, stages.transfer), strict=True))
    free = dict.fromkeys(PLACES, 0.0)
    arrivals = [(0.0, micro_batch, 0) for micro_batch in range(micro_batches)]  # time, which, visits before
    visits = []
    while arrivals:
        arrival, micro_batch, before = heapq.heappop(arrivals)
        layer, step = divmod(before, len(PLACES))
        place = PLACES[step]
        start = max(arrival, free[place])
        free[place] = start + seconds[place]
        visits.append(Visit(place, micro_batch, layer, start, free[place]))
        if before + 1 < layers * len(PLACES):
            heapq.heappush(arrivals, (free[place], micro_batch, before + 1))
    return visits
