"""The hardware that predictions are made for: a cluster's GPUs, links and network, typed and read from YAML.

``conf/cluster/`` has one file per cluster, which gives each figure's source or the word *assumed*. ``cost.py`` says
what the figures mean for a collective.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tedlab.cli import CONF
from tedlab.errors import UsageError
from tedlab.hints import did_you_mean
from tedlab.untrusted import interpolation, read_yaml

_OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
_BY_WORK = {  # kernels that compute, with what their size is
    "attention": "keys",
    "attention_backward": "keys",
    "grouped": "rows of a group",
    "grouped_weights": "rows of a group",  # gradients of weights, which sum over rows
}
KERNELS = (  # of which a cluster may have rates by size; the size of these others is the bytes that they move
    *_BY_WORK,
    *("take", "hidden", "hidden_backward", "combine", "combine_backward"),  # the functions of moe/row_kernels.py
    *("norm", "norm_backward"),
    *("narrowing", "widening"),  # copies to a dtype of fewer or more bytes
    "strided",  # operations on elements that do not lie one behind the other in all operands, and concatenations
    "promoted",  # such operations on operands in several dtypes
    *("topk", "scatter_add"),  # what routers do to scores and indices
    "adam",  # the fused step
    "compiled",  # what a compiler makes of all operations between two products, attentions or collectives
)
_DTYPES = ("fp64", "fp32", "fp16", "bf16")
_DIVISORS = ("bandwidth", "bytes", "size", "nodes", "rate", "width")
_LARGEST_FILE = 1 << 20


@dataclass
class MeasuredRate:
    """What collectives of one size reach, latency included."""

    bytes: float = MISSING  # sent at the same time
    bandwidth: float = MISSING  # bytes/s

    @property
    def size(self) -> float:
        """The bytes."""
        return self.bytes

    @property
    def seconds(self) -> float:
        """The seconds that this size takes."""
        return self.bytes / self.bandwidth


@dataclass
class KernelRate:
    """What a kernel reaches at one size."""

    size: float = MISSING  # see KernelTable
    rate: float = MISSING  # FLOP/s, or bytes/s

    @property
    def seconds(self) -> float:
        """The seconds of this size: of a kernel that computes, those of as many FLOPs as its size is."""
        return self.size / self.rate


class MeasuredSize(Protocol):
    """A size that was measured."""

    @property
    def size(self) -> float: ...

    @property
    def seconds(self) -> float: ...


def seconds_through(sizes: Sequence[MeasuredSize], latency: float, size: float) -> float:
    """Returns the seconds of a size where some are measured.

    It lies on lines through their seconds, from the latency of nothing on, and larger ones reach the rate of the
    largest.

    Args:
        sizes: One at least, by growing size and seconds.
        latency: Seconds of the size 0.
        size: The size.
    """
    first, last = sizes[0], sizes[-1]
    if size > last.size:
        return last.seconds * (size / last.size)
    below, before = 0.0, min(latency, first.seconds)
    for measured in sizes:
        if size <= measured.size:
            break
        below, before = measured.size, measured.seconds
    return before + (measured.seconds - before) * (size - below) / (measured.size - below)


@dataclass
class Link:
    """A kind of connection between GPUs."""

    bandwidth: float = MISSING  # bytes/s in each direction, as the maker states it
    latency: float = MISSING  # fixed seconds per step of a collective over this link
    all_to_all: list[MeasuredRate] = field(default_factory=list)  # by growing bytes; none: the efficiency, at any size

    def exchanging(self, sent: float, efficiency: float) -> float:
        """Returns the seconds of an all-to-all that sends so many bytes over this link.

        They go by measured rates, or where there are none, by the latency and the bandwidth × ``efficiency``.
        """
        if not self.all_to_all:
            return self.latency + sent / (self.bandwidth * efficiency)
        return seconds_through(self.all_to_all, self.latency, sent)

    def exchange_rate(self, efficiency: float) -> float:
        """Returns the bytes/s that a large all-to-all reaches over this link."""
        return self.all_to_all[-1].bandwidth if self.all_to_all else self.bandwidth * efficiency


@dataclass
class PeakFlops:
    """Floating-point operations per second of one GPU in dense matrix products, by dtype."""

    fp64: float = MISSING
    fp32: float = MISSING  # without TF32, as in torch's default
    fp16: float = MISSING
    bf16: float = MISSING


@dataclass
class Efficiency:
    """The share of a stated peak that programs reach: above 0, at most 1."""

    gemm: float = MISSING  # share of the peak FLOP/s in large matrix products
    memory: float = MISSING  # share of the memory bandwidth
    in_node: float = MISSING  # share of the bandwidth between the GPUs of a node
    between_nodes: float = MISSING  # share of the node's network bandwidth in a ring
    all_to_all: float = MISSING  # share of the node's network bandwidth in an all-to-all whose rates are not measured
    attention: float | None = None  # share of the peak FLOP/s in fused attention; None: that of gemm


@dataclass
class Dispatch:
    """Seconds that the host spends on one operation in Python, autograd, the dispatcher and the kernel launch."""

    forward: float = 0.0  # recomputation included
    backward: float = 0.0
    optimizer: float = 0.0
    views: bool = False  # whether what does no work counts as an operation, too: views, and memory without values
    collective: float = 0.0  # of launching a collective, in any phase; a host that computes takes part in it instead


@dataclass
class KernelTable:
    """What one kernel reaches by size: keys that a query may see, rows of a group, or bytes that it moves."""

    kernel: str = MISSING  # a name of KERNELS
    rates: list[KernelRate] = field(default_factory=list)  # by growing size
    width: int | None = None  # features of a head, narrower side of an expert's matrix; the nearest counts; None: any
    dtype: str | None = None  # fp64, fp32, fp16 or bf16; None: any

    def seconds_per_flop(self, size: float) -> float:
        """Returns the seconds of a FLOP at this size; smaller ones than any that were measured reach as much."""
        size = max(size, self.rates[0].size)
        return seconds_through(self.rates, 0.0, size) / size


@dataclass
class Kernels:
    """Costs that keep operations from the roofline. They default to none; ``tedlab calibrate`` measures them."""

    dispatch: Dispatch = field(default_factory=Dispatch)
    asynchronous: bool = True  # whether the host continues while a kernel runs, as with a GPU
    gemm_latency: float = 0.0  # fixed seconds per matrix product
    attention_latency: float = 0.0  # fixed seconds per fused attention
    memory_latency: float = 0.0  # fixed seconds per kernel of any other kind
    arithmetic_latency: float | None = None  # fixed seconds per norm, softmax or GELU; None: memory_latency
    arithmetic_bandwidth: float | None = None  # bytes/s of norms, softmax and GELU; None: that of the memory
    fresh_bandwidth: float | None = None  # bytes/s of writing 32 MiB or more of new CPU memory; None: that of any other
    tables: list[KernelTable] = field(default_factory=list)  # replace rates above for their kernels, not latencies

    def table(self, kernel: str, width: int | None, dtype: str) -> KernelTable | None:
        """Returns the table of a kernel, or None if there is none.

        Of several it is that of the nearest width, and of two such that of this dtype before that of any.
        """

        def fit(table: KernelTable) -> tuple[float, bool]:
            return abs(math.log((table.width or 1) / (width or 1))), table.dtype is None

        return min(
            (it for it in self.tables if it.kernel == kernel and it.dtype in (None, dtype)), key=fit, default=None
        )


@dataclass
class MeasuredCollective:
    """The seconds of a collective in all groups of one kind at the same time, by the bytes that a rank sends."""

    op: str = MISSING  # all_reduce, all_gather, reduce_scatter or all_to_all
    size: int = MISSING  # ranks of the group
    nodes: int = MISSING  # nodes that the group is on
    latency: float = MISSING  # seconds of sending nothing
    bandwidth: float | None = None  # bytes/s that a rank sends at any size; None: rates has them
    rates: list[MeasuredRate] = field(default_factory=list)  # by growing bytes that a rank sends

    def seconds(self, sent: float) -> float:
        """Returns the seconds in which each rank sends so many bytes."""
        if self.bandwidth is not None:
            return self.latency + sent / self.bandwidth
        return seconds_through(self.rates, self.latency, sent)


@dataclass
class MeasuredWait:
    """Seconds that a rank waits for the slowest of its group: latency + share × seconds since the last collective."""

    size: int = MISSING  # ranks of the group
    nodes: int = MISSING  # nodes that the group is on
    latency: float = MISSING  # fixed seconds per wait
    share: float = MISSING  # share of the time since then


@dataclass
class Slower:
    """Factors by which measured steps correct predicted times; ``tedlab plan plan.from=…`` finds them."""

    kernels: float = 1.0
    collectives: float = 1.0


@dataclass
class ClusterConfig:
    """A cluster of equal nodes of equal GPUs.

    Raises:
        ValueError: If a figure is impossible: not positive, an efficiency above 1, a link missing or superfluous.
    """

    gpus_per_node: int = MISSING
    memory_bytes: float = MISSING  # of one GPU, as the driver reports it
    memory_bandwidth: float = MISSING  # bytes/s of one GPU
    peak_flops: PeakFlops = MISSING
    in_node: Link | None = MISSING  # bandwidth of one GPU towards the others of its node; None: it is alone
    between_nodes: Link | None = MISSING  # bandwidth of a whole node, shared by its GPUs; None: there is one node
    efficiency: Efficiency = MISSING
    kernels: Kernels = field(default_factory=Kernels)
    collectives: list[MeasuredCollective] = field(default_factory=list)  # replace the formulas for their groups
    waits: list[MeasuredWait] = field(default_factory=list)  # in groups of other kinds all ranks are equally fast
    device: str | None = None  # how the name that torch gives its GPUs begins; None: not known
    spread: float | None = None  # by which factor a predicted time may be off; None: as of published runs (spread.py)
    slower: Slower = field(default_factory=Slower)  # how many times longer steps took than the rest of this file says

    def __post_init__(self) -> None:
        for name, value in _numbers(asdict(self)).items():
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value:g}; it must be a finite number")
            if value < 0 or (value == 0 and not _may_be_zero(name)):
                least = "at least 0" if _may_be_zero(name) else "positive"
                raise ValueError(f"{name} is {value:g}; it must be {least}")
            if name.startswith("efficiency.") and value > 1:
                raise ValueError(f"{name} is {value:g}; it is a share of a peak: above 0, at most 1")
        if self.spread is not None and self.spread < 1:
            raise ValueError(f"spread is {self.spread:g}; it is a factor of at least 1")
        for number, collective in enumerate(self.collectives):
            if collective.op not in _OPS:
                raise ValueError(f"collectives.{number}.op is {collective.op}; valid: {', '.join(_OPS)}")
            if (collective.bandwidth is None) != bool(collective.rates):
                has = "neither" if collective.bandwidth is None else "both"
                raise ValueError(
                    f"collectives.{number} has {has} of bandwidth and rates; give a bandwidth if it is the same at any "
                    "size, otherwise rates by growing bytes"
                )
            _check_rates(f"collectives.{number}.rates", collective.rates)
        groups: dict[str, Sequence[MeasuredCollective | MeasuredWait]] = {
            "collectives": self.collectives,
            "waits": self.waits,
        }
        for kind, measured in groups.items():
            for number, group in enumerate(measured):
                if group.nodes > group.size:
                    raise ValueError(
                        f"{kind}.{number}.nodes is {group.nodes}, but a group of {group.size} ranks is on no more nodes"
                    )
        kinds = [(table.kernel, table.width, table.dtype) for table in self.kernels.tables]
        for number, table in enumerate(self.kernels.tables):
            _check_table(f"kernels.tables.{number}", table)
            if (first := kinds.index(kinds[number])) < number:
                raise ValueError(f"kernels.tables.{number} is of the same kernel as kernels.tables.{first}; keep one")
        for name, link in (("in_node", self.in_node), ("between_nodes", self.between_nodes)):
            _check_rates(f"{name}.all_to_all", [] if link is None else link.all_to_all)
        if (self.in_node is None) != (self.gpus_per_node == 1):
            raise ValueError(
                f"gpus_per_node is {self.gpus_per_node}, but in_node is {'null' if self.in_node is None else 'given'}: "
                "a node of several GPUs has a link between them, a single GPU has none (in_node: null)"
            )

    @property
    def of_gpus(self) -> bool:
        """Whether it computes on GPUs: the host of a CPU computes itself."""
        return self.kernels.asynchronous

    @property
    def has_clock(self) -> bool:
        """Whether it has host times or waits, which only simulations add to a step: closed forms have no clock."""
        return bool(self.waits) or self.kernels.dispatch != Dispatch()

    def peak(self, precision: str) -> float:
        """Returns the peak FLOP/s of one GPU for a value of Lightning's ``trainer.precision``."""
        short = {"64": "fp64", "32": "fp32", "16": "fp16", "bf16": "bf16"}
        peak: float = getattr(self.peak_flops, short[precision.split("-")[0]])
        return peak


def cluster_names() -> list[str]:
    """Returns the names of the clusters in ``conf/cluster/``."""
    return sorted(path.stem for path in (CONF / "cluster").glob("*.yaml"))


def load_cluster(name_or_path: str | Path) -> ClusterConfig:
    """Loads a cluster by its name in ``conf/cluster/``, or from the user's file if the path ends in ``.yaml``.

    Raises:
        UsageError: If there is no such cluster, or its file has unknown, missing or impossible values; the message
            says what would be valid.
    """
    path = Path(name_or_path)
    if path.suffix != ".yaml":
        names = cluster_names()
        if str(name_or_path) not in names:
            raise UsageError(
                f"There is no cluster '{name_or_path}'.{did_you_mean(str(name_or_path), names)}\n"
                f"Valid: {', '.join(names)}, or the path of a .yaml file like those in {CONF / 'cluster'}"
            )
        path = CONF / "cluster" / f"{name_or_path}.yaml"
    if not path.is_file():
        raise UsageError(f"{path} is not a file. Clusters known by name: {', '.join(cluster_names())}")
    try:
        config = OmegaConf.merge(OmegaConf.structured(ClusterConfig), _plain(path))
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ValueError(f"no value for {', '.join(missing)}")
        cluster = OmegaConf.to_object(config)
        assert isinstance(cluster, ClusterConfig)
        return cluster
    except OmegaConfBaseException as error:
        known = ", ".join(field.name for field in fields(error.object_type or ClusterConfig))
        what = str(error).splitlines()[0]
        raise UsageError(f"{path}: {error.full_key}: {what}\nThere is: {known}") from None
    except (ValueError, OSError) as error:
        raise UsageError(f"{path}: {error}") from None


def _plain(path: Path) -> dict[str, Any]:
    """Reads a YAML file, which may come from others; refuses large files and interpolations."""
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError(f"it has {path.stat().st_size:,} bytes; a cluster takes no {_LARGEST_FILE:,}")
    tree = read_yaml(path)
    if interpolation(tree) is not None:
        raise ValueError("it has an interpolation (${…}); write the figure itself")
    return tree


def _check_table(name: str, table: KernelTable) -> None:
    """Raises a ValueError if nothing can be looked up in a table."""
    if table.kernel not in KERNELS:
        hint = did_you_mean(table.kernel, KERNELS)
        raise ValueError(f"{name}.kernel is {table.kernel}.{hint} Valid: {', '.join(KERNELS)}")
    if table.dtype not in (None, *_DTYPES):
        raise ValueError(f"{name}.dtype is {table.dtype}; valid: {', '.join(_DTYPES)}, or none for any")
    if not table.rates:
        raise ValueError(f"{name}.rates is empty; list what {table.kernel} reaches by size, or leave the table out")
    for number, (one, larger) in enumerate(pairwise(table.rates), 1):
        if larger.size <= one.size or larger.seconds <= one.seconds:
            what = _BY_WORK.get(table.kernel, "bytes")
            raise ValueError(
                f"{name}.rates.{number}: {larger.size:g} {what} at {larger.rate:.4g}/s take no longer than the "
                f"{one.size:g} before them at {one.rate:.4g}/s; list rates by growing size, which takes growing times"
            )


def _check_rates(name: str, rates: Sequence[MeasuredRate]) -> None:
    """Raises a ValueError if more bytes would take no longer."""
    for number, (rate, larger) in enumerate(pairwise(rates), 1):
        if larger.bytes <= rate.bytes or larger.seconds <= rate.seconds:
            raise ValueError(
                f"{name}.{number}: {larger.bytes:g} bytes take {larger.seconds:.4g} s, and the {rate.bytes:g} before "
                f"them {rate.seconds:.4g} s; list rates by growing bytes, which take growing times"
            )


def _may_be_zero(name: str) -> bool:
    """Returns whether a figure may be 0, as measured times and shares may, but nothing that is a divisor."""
    group, _, last = name.partition(".")
    return group in ("kernels", "collectives", "waits") and not last.endswith(_DIVISORS)


def _numbers(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Returns the numbers in nested dictionaries and lists, by dotted name."""
    flat: dict[str, float] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            flat |= _numbers({str(i): entry for i, entry in enumerate(value)}, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            flat[prefix + name] = value
    return flat
