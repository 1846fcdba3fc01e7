"""What one pool decodes in the same time, with all layers in each GPU: what two pools have to beat."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tedlab.config import ServeConfig, TrainConfig
from tedlab.degrees import ParallelDegrees
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.serve.plan import Found, Generation, Phase


@dataclass(frozen=True)
class OnePool:
    """The layout of one pool that decodes the most in time.

    Attributes:
        batch: Texts at the same time.
        step: A step of all of them.
    """

    batch: int
    step: Phase

    @property
    def per_gpu(self) -> float:
        """New tokens per second and GPU."""
        return self.batch / self.step.seconds / self.step.degrees.world_size


def one_pool(
    config: TrainConfig,
    request: ServeConfig,
    cluster: ClusterConfig,
    reserve: float,
    shares: Sequence[float] | None = None,
) -> OnePool | None:
    """Returns the best of the layouts whose experts are divided by number as far as can be; None: none is fast enough.

    Their tensor degrees are all that are possible, and experts are whole, or divided like attention. Nothing overlaps.

    Args:
        config: The job, see :func:`tedlab.predict.serve.plan.served`.
        request: The texts, and what a token may take.
        cluster: The cluster.
        reserve: Bytes of each GPU that are left free.
        shares: (E,) proportions in which experts are chosen; None: all equally often.
    """
    best: OnePool | None = None
    one = Generation(config, replace(request, batch=1), cluster, shares)
    for degrees in _layouts(one):

        def step(texts: int, degrees: ParallelDegrees = degrees) -> OnePool | None:
            batch = texts * degrees.data
            generation = one.of(batch)
            phase = generation.phase("decode", degrees)
            held = phase.weights + phase.activations + generation.remembered(degrees.tensor)
            fits = held <= cluster.memory_bytes - reserve and phase.seconds <= request.latency
            return OnePool(batch, phase) if fits else None

        texts, beyond, found = 0, 1, None
        while (served := step(beyond)) is not None:
            texts, beyond, found = beyond, 2 * beyond, served
        while beyond - texts > 1:
            middle = (texts + beyond) // 2
            if (served := step(middle)) is None:
                beyond = middle
            else:
                texts, found = middle, served
        if found is not None and (best is None or found.per_gpu > best.per_gpu):
            best = found
    return best


def _layouts(generation: Generation) -> Iterator[ParallelDegrees]:
    for possible in generation.layouts(Found()):
        widths = {1, possible[0].tensor}
        for width in widths:
            alike = [degrees for degrees in possible if degrees.expert_tensor == width]
            if alike:
                yield max(alike, key=lambda degrees: degrees.expert)
