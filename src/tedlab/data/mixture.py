"""Mixes sources: from which of them the next sample is, and which of its samples that is.

The order is a function of the seed and the number of samples read, never of the layout. Each source is read in
permutations of its own, so that it goes on where it was when the mixture is another one.
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tedlab.config import DataConfig, Mixing
from tedlab.data.position import Position
from tedlab.data.sampler import MicroBatchSampler
from tedlab.data.stream import check_stream
from tedlab.ranges import check_ranges

_ROUNDING = 1e-9  # of shares times samples
_SUM = 1e-6  # by which weights may miss a sum of 1


@dataclass
class Place:
    """How far a source has been read.

    Attributes:
        read: How many samples, over all epochs: sample ``read % size`` of permutation ``read // size`` is next.
        taken: How many of them since the present shares are in force.
    """

    read: int = 0
    taken: int = 0


@dataclass(frozen=True)
class Share:
    """What a mixture has of a source.

    Attributes:
        size: Number of its samples.
        weight: Its share of all samples, as long as no source is exhausted; those of all sources sum to 1.
        most: How many of its samples may be read, over all epochs; None: any number.
        digest: Hash of its tokens; empty: unknown.
    """

    size: int
    weight: float
    most: int | None = None
    digest: str = ""


class Mixture:
    """Takes samples from sources so that each has had its share of them at any time, to less than one sample.

    Among the sources that are behind their share by enough, the next is the one that would first be behind by too much.
    With k sources, none is ever further from its share than 1 - 1/(2k - 2) samples. (To take the source that is
    furthest behind would let errors exceed one.) Where a source is exhausted, the others share what follows in
    proportion to their weights.

    Args:
        shares: The sources by name.
        places: How far they have been read; those that are missing begin.

    Source: Tijdeman 1980, "The chairman assignment problem".
    """

    def __init__(self, shares: Mapping[str, Share], places: Mapping[str, Place] | None = None) -> None:
        self.shares = dict(shares)
        self.places = {name: replace((places or {}).get(name, Place())) for name in shares}
        self._open: dict[str, float] = {}  # shares of the sources that are not exhausted
        self._reopen()

    @property
    def exhausted(self) -> set[str]:
        """The sources of which no sample may be read any more."""
        return self.shares.keys() - self._open

    @property
    def left(self) -> float:
        """How many samples may still be read; infinitely many if a source has no limit."""
        return sum(
            math.inf if share.most is None else max(0, share.most - self.places[name].read)
            for name, share in self.shares.items()
        )

    def copy(self) -> "Mixture":
        """Returns a mixture that goes on independently from here."""
        other = copy(self)
        other.places = {name: replace(place) for name, place in self.places.items()}
        return other

    def take(self, samples: int) -> Iterator[tuple[str, int]]:
        """Takes samples; yields the source of each, and how many were read of it before.

        Raises:
            ValueError: If all sources are exhausted.
        """
        for _ in range(samples):
            if not self._open:
                raise ValueError("All of data.sources have been read as often as their epochs allow.")
            name = self._next()
            place = self.places[name]
            yield name, place.read
            place.read, place.taken = place.read + 1, place.taken + 1
            if place.read == self.shares[name].most:
                self._reopen(anew=True)

    def _next(self) -> str:
        slack = 1 / (2 * max(2, len(self._open)) - 2)
        total = 1 + sum(self.places[name].taken for name in self._open)
        best, soonest = "", math.inf
        for name, share in self._open.items():
            behind = share * total - self.places[name].taken
            if behind >= slack - _ROUNDING and (1 - slack - behind) / share < soonest:
                best, soonest = name, (1 - slack - behind) / share
        return best

    def _reopen(self, anew: bool = False) -> None:
        """Divides what follows among the sources that are not exhausted."""
        left = {
            name: share.weight
            for name, share in sorted(self.shares.items())  # ties fall to the first by name, in whatever order all are
            if share.most is None or self.places[name].read < share.most
        }
        self._open = {name: weight / sum(left.values()) for name, weight in left.items()}
        if anew:
            for place in self.places.values():
                place.taken = 0


class MixedOrder:
    """The samples of a run in order, from where it began.

    Args:
        start: The mixture there.
        seed: Decides the permutations, together with a source's name and epoch.
    """

    def __init__(self, start: Mixture, seed: int) -> None:
        self._start, self._seed = start, seed
        self._now, self._passed = start.copy(), 0
        self._permutations: dict[str, tuple[int, np.ndarray]] = {}
        sizes = [share.size for share in start.shares.values()]
        self._before = dict(zip(start.shares, np.cumsum([0, *sizes]).tolist(), strict=False))

    def after(self, samples: int) -> Mixture:
        """Returns the mixture after so many samples; what is returned changes with the next call."""
        if samples < self._passed:
            self._now, self._passed = self._start.copy(), 0
        for _ in self._now.take(samples - self._passed):
            pass
        self._passed = samples
        return self._now

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Returns the samples ``start`` to ``stop`` of the run as indices into all sources' samples laid end to end."""
        mixture = self.after(start)
        self._passed = stop
        return np.array([self._before[name] + self._permuted(name, read) for name, read in mixture.take(stop - start)])

    def _permuted(self, name: str, read: int) -> int:
        epoch, offset = divmod(read, self._start.shares[name].size)
        if name not in self._permutations or self._permutations[name][0] != epoch:
            random = np.random.default_rng([self._seed, zlib.crc32(name.encode()), epoch])
            self._permutations[name] = epoch, random.permutation(self._start.shares[name].size)
        return int(self._permutations[name][1][offset])


class MixedSampler(MicroBatchSampler):
    """Deals the micro-batches of a mixture to the data ranks in turn, see :class:`MicroBatchSampler`.

    An epoch has as many samples as all sources together, or as may still be read. It ends no permutation: the next goes
    on where it ended.
    """

    order: MixedOrder

    def __iter__(self) -> Iterator[int]:
        """Yields this rank's sample indices of the current epoch, micro-batch by micro-batch.

        Raises:
            ValueError: If the sources have not even a step's samples left.
        """
        count, start, first = len(self.dataset), self._start, self._step  # type: ignore[arg-type]
        for epoch in range(start.epoch, self.epoch):
            first, start = self.ramp.epoch_ends(start, first, count), Position(epoch + 1)
        begun = read = self.ramp.samples(self._step, first)
        for stage, steps in self.ramp.between(first, self.ramp.epoch_ends(start, first, count)):
            for _ in range(steps):
                if read > begun and self.order.after(read).left < stage.batch_size:
                    return  # workers ask for batches that come after the run's last
                samples = self.order.indices(read, read + stage.batch_size)
                yield from samples.reshape(-1, self.micro_batch_size)[self.rank :: self.num_replicas].ravel().tolist()
                read += stage.batch_size


def shares_of(data: DataConfig, sizes: Mapping[str, int], digests: Mapping[str, str] | None = None) -> dict[str, Share]:
    """Returns what a mixture has of each source.

    Args:
        data: Its sources, which :func:`check_sources` has checked, and how they are mixed.
        sizes: The number of samples of each.
        digests: The hash of the tokens of each, where it is known.
    """
    match data.mixing:
        case Mixing.WEIGHTS:
            weights = {name: source.weight or 0.0 for name, source in data.sources.items()}
        case Mixing.TOKENS:
            weights = {name: float(sizes[name]) for name in data.sources}
        case _:
            weights = {name: sizes[name] ** (1 / data.temperature) for name in data.sources}
    total = math.fsum(weights.values())
    shares = {}
    for name, source in data.sources.items():
        most = None if source.epochs is None else int(source.epochs * sizes[name])
        if sizes[name] == 0 or most == 0:
            raise ValueError(
                f"data.sources.{name} has {sizes[name]} training samples, of which epochs={source.epochs} leaves none."
                if sizes[name]
                else f"data.sources.{name} has too little text for a training sample."
            )
        shares[name] = Share(sizes[name], weights[name] / total, most, (digests or {}).get(name, ""))
    return shares


def check_sources(data: DataConfig) -> None:
    """Checks what can be known of sources without reading them.

    Raises:
        ValueError: If there is another path as well, or if weights are missing, given in vain, or do not sum to 1.
    """
    check_stream(data.stream)
    ways = {
        f"data.path={data.path!r}": data.path is not None,
        f"data.stream.dataset={data.stream.dataset}": data.stream.dataset is not None,
        f"data.sources ({', '.join(data.sources)})": bool(data.sources),
    }
    given = [way for way, is_given in ways.items() if is_given]
    if len(given) > 1:
        hint = "" if data.path is None else " (data.path=null)"
        raise ValueError(f"{' and '.join(given)} both say what to train on; give one of them{hint}")
    if not data.sources:
        return
    for name, source in data.sources.items():
        check_ranges(source, f"data.sources.{name}.")
        check_stream(source.stream, f"data.sources.{name}.")
        if source.stream.dataset is not None and source.path:
            raise ValueError(
                f"data.sources.{name} has a path ({source.path}) and a stream ({source.stream.dataset}); give one of "
                "them"
            )
        if source.stream.dataset is None and source.path == "":
            raise ValueError(f"data.sources.{name} has neither a path nor a stream")
    if data.training_batches is not None:
        raise ValueError(
            f"data.training_batches={data.training_batches} repeats the first batches of one source; leave it out, or "
            "limit each of data.sources by its epochs"
        )
    weights = {name: source.weight for name, source in data.sources.items() if source.weight is not None}
    if data.mixing != Mixing.WEIGHTS:
        if weights:
            raise ValueError(
                f"data.mixing={data.mixing} takes weights from the sizes of sources, but {', '.join(weights)} of "
                "data.sources have weights; leave them out, or use data.mixing=weights"
            )
        return
    missing = [name for name in data.sources if name not in weights]
    if missing:
        raise ValueError(
            f"data.sources.{missing[0]} has no weight; with data.mixing=weights each source needs one "
            "(or use data.mixing=tokens or temperature)"
        )
    total = math.fsum(weights.values())
    if abs(total - 1) > _SUM:
        listed = " + ".join(f"{weight:g}" for weight in weights.values())
        raise ValueError(f"the weights of data.sources must sum to 1, but {listed} = {total:g}")


def check_enough(mixture: Mixture, samples: int) -> None:
    """Checks that sources last.

    Args:
        mixture: The mixture where a run begins.
        samples: How many it will take.

    Raises:
        ValueError: If they may not be read as often as that takes.
    """
    left = mixture.left
    if left < samples:
        limits = ", ".join(f"{name} {share.most:,}" for name, share in mixture.shares.items())
        raise ValueError(
            f"The run takes {samples:,} samples, but the epochs of data.sources leave {left:,} to be read (of each at "
            f"most: {limits}). Raise epochs of one of them, leave it out, or lower trainer.max_steps."
        )


def state_of(mixture: Mixture) -> dict[str, Any]:
    """Returns how far each source has been read, by name, in plain values for a checkpoint."""
    return {
        name: {
            "epoch": place.read // mixture.shares[name].size,
            "offset": place.read % mixture.shares[name].size,
            "of": mixture.shares[name].size,
            "weight": mixture.shares[name].weight,
            "digest": mixture.shares[name].digest,
            "exhausted": name in mixture.exhausted,
            "taken": place.taken,
        }
        for name, place in mixture.places.items()
    }


def continued(shares: Mapping[str, Share], saved: Mapping[str, Mapping[str, Any]]) -> tuple[Mixture, list[str]]:
    """Makes a mixture go on where a checkpoint's was.

    Args:
        shares: The sources of now.
        saved: What :func:`state_of` returned then.

    Returns:
        The mixture, and sentences about sources that are new, gone, or hold something else.
    """
    same = {name: share.weight for name, share in shares.items()} == {name: s["weight"] for name, s in saved.items()}
    places, said = {}, []
    for name, share in shares.items():
        if name not in saved:
            said.append(f"data.sources.{name} is new: it begins with its first sample.")
            continue
        before = saved[name]
        digests = {share.digest, before.get("digest", "")} - {""}  # an older checkpoint has none
        if before["of"] != share.size:
            other = f"has {share.size:,} samples, and had {before['of']:,}"
        else:
            other = "holds other text than it did" if len(digests) > 1 else ""
        if other:
            said.append(f"data.sources.{name} {other}: it begins with a new epoch.")
            read = (before["epoch"] + 1) * share.size
        else:
            read = before["epoch"] * share.size + before["offset"]
        places[name] = Place(read, before["taken"])
    said += [f"data.sources.{name} is gone: how far it was read is forgotten." for name in saved if name not in shares]
    mixture = Mixture(shares, places)
    # Other shares are of what follows; else a source would first catch up on what it never was to have.
    if not same or mixture.exhausted != {name for name in saved if saved[name]["exhausted"]}:
        mixture = Mixture(shares, {name: Place(place.read) for name, place in places.items()})
    return mixture, said
