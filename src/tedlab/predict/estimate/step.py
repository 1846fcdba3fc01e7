"""Estimates a step's time and a rank's memory in closed form, within milliseconds, to choose among layouts.

``tedlab.predict.sim.simulate`` runs the real code instead, and tests compare the two.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tedlab.comm import Collective, GroupKind
from tedlab.comm.rows import Rows
from tedlab.config import Dedup, Granularity, TrainConfig
from tedlab.optim.blocks import INNER
from tedlab.optim.muon import NS_STEPS
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.cost import LinkClass, collective_seconds, link_of, wire_bytes_by_link
from tedlab.predict.estimate.hiding import Hiding
from tedlab.predict.estimate.memory import Memory, Moment
from tedlab.predict.flops import training_flops
from tedlab.predict.sim.roofline import seconds
from tedlab.predict.spread import Spread, spread_on
from tedlab.predict.volumes import ClosedForm, fused_rows
from tedlab.spec import Kernel, Work

COMPUTE, OPTIMIZER, HIDDEN = "kernels", "optimizer", "hidden by overlap"


@dataclass(frozen=True)
class Estimate:
    """The estimate for one optimizer step of one rank.

    Attributes:
        memory: The fullest moment, with its bytes by category.
        seconds: Seconds by cause: ``kernels`` (of the passes, accumulation included), ``optimizer`` (kernels of its
            step), ``gradient sync`` (reductions, parameter gathers), ``<operation>, <link>`` (the passes' collectives).
        wire: The bytes that the rank sends, by link.
        tokens: The tokens of the step, over all ranks.
        flops: Model FLOPs per rank (see ``flops.py``).
        peak_flops: The peak of a GPU in the configuration's precision, in FLOP/s.
        spread: How far the seconds may be from those of a real step.
    """

    memory: Moment
    seconds: Mapping[str, float]
    wire: Mapping[LinkClass, float]
    tokens: int
    flops: float
    peak_flops: float
    spread: Spread

    def __str__(self) -> str:
        return f"{self.spread.said(self.step_seconds)}, {self.memory.total / 2**30:.2f} GiB"

    @property
    def step_seconds(self) -> float:
        """The seconds that the step takes."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """The throughput of all ranks together."""
        return self.tokens / self.step_seconds

    @property
    def mfu(self) -> float:
        """The model FLOPs utilisation, a share of the peak."""
        return self.flops / self.step_seconds / self.peak_flops


def estimate(
    config: TrainConfig, cluster: ClusterConfig, rank: int = 0, rows: Mapping[int, Rows] | None = None
) -> Estimate:
    """Estimates one optimizer step of a job.

    Args:
        config: The job's configuration, completed by :func:`tedlab.validate.complete_simulated`.
        cluster: The cluster that the job runs on.
        rank: The rank whose groups' places on the nodes count; everything else is the same for all ranks.
        rows: The rows that its experts without a capacity move in a micro-batch, by block; None: all experts are chosen
            equally often.

    Raises:
        ValueError: If the optimizer's state or a layer's kernels are not known, parameters are frozen, tokens are sent
            once but not by a GPU's kernels, or the world exceeds the cluster.
    """
    if any(group.frozen for group in config.optim.groups):
        raise ValueError(
            "optim.groups freezes parameters: the closed form of memory and time is that of a model that trains whole; "
            "`tedlab simulate` runs any"
        )
    if config.comm.dedup != Dedup.NONE and not fused_rows(config):
        raise ValueError(
            f"comm.dedup={config.comm.dedup} without a GPU's kernels (trainer.accelerator="
            f"{config.trainer['accelerator']}, moe.kernel={config.moe.kernel}, trainer.precision="
            f"{config.trainer['precision']}): the closed form of memory and time is that of these kernels, which "
            "trainer=gpu has with moe.kernel=auto and any precision but 64-true; `tedlab simulate` runs any"
        )
    form = ClosedForm(config, rows, rank)
    memory, links = Memory(form), _Links(form, cluster, rank)
    hiding, hidden, hidden_backward = Hiding(form, cluster, rank), 0.0, 0.0
    accumulated, ends = memory.accumulated, form.at()
    alone = 1 if form.interleaves else accumulated  # how many pairs of passes run by themselves
    taken: defaultdict[str, float] = defaultdict(float)
    wire: defaultdict[LinkClass, float] = defaultdict(float)
    links.add(form.ends(), accumulated, taken, wire)
    links.add(form.counting(), accumulated, taken, wire)
    passes = _total((work for part in form.spec.ends for work in part.forward(ends)), cluster)
    backward = _total((work for part in reversed(form.spec.ends) for work in part.backward(ends)), cluster)
    for first, blocks in form.kinds.items():
        links.add(form.block(first), len(blocks) * accumulated, taken, wire)
        hidden += len(blocks) * alone * hiding.seconds(first)
        hidden_backward += len(blocks) * hiding.seconds(first, ["backward"])
        of_passes, of_backward = _kernels(form, first, cluster)
        passes += len(blocks) * of_passes
        backward += len(blocks) * of_backward
    if form.interleaves:
        hidden += hiding.beside(accumulated)
    adding = seconds(Work(0, 3 * memory.gradients, form.precise, "arithmetic"), cluster)  # to add up gradients
    taken[COMPUTE] = accumulated * (passes + backward) + (accumulated - 1) * adding
    taken[OPTIMIZER] = _total(_optimizer(memory), cluster)
    links.add(form.optimizer_step(), 1, taken, wire)
    if config.optim.overlap:
        # The kernels that hide an exchange keep a link busy that way, so they hide no reduction on the same link.
        beside = backward + (adding if accumulated > 1 else 0)
        waiting = sum(each for kind, each in links.reductions.items() if hiding.shares_link(kind))
        others = sum(links.reductions.values()) - waiting
        hidden += min(others + min(waiting, max(beside - hidden_backward, 0)), beside)
    if hidden:
        taken[HIDDEN] = -hidden
    tokens = config.data.batch_size * config.model.sequence_length
    return Estimate(
        memory=memory.peak(),
        seconds=dict(taken),
        wire=dict(wire),
        tokens=tokens,
        flops=tokens * training_flops(config.model, config.moe, config.optim.groups) / config.parallel.world_size,
        peak_flops=cluster.peak(str(config.trainer["precision"])),
        spread=spread_on(cluster),
    )


def block_seconds(form: ClosedForm, block: int, cluster: ClusterConfig, rank: int) -> float:
    """Returns the seconds that a block takes in one micro-batch, with its collectives and its second pass if any."""
    taken: defaultdict[str, float] = defaultdict(float)
    _Links(form, cluster, rank).add(form.block(block), 1, taken, defaultdict(float))
    return sum(taken.values()) + sum(_kernels(form, block, cluster))


def _kernels(form: ClosedForm, block: int, cluster: ClusterConfig) -> tuple[float, float]:
    """Returns the seconds of a block's kernels in all its forward passes, and in its backward pass."""
    spec, batch, recompute = form.spec.units[block], form.at(block), form.config.model.recompute
    passes = _total(spec.forward(batch), cluster) * (2 if form.counts_ahead else 1)
    if recompute.granularity == Granularity.BLOCK:
        passes += _total(spec.forward(batch, form.dead(block), stop=recompute.early_stop), cluster)
    return passes, _total(spec.backward(batch), cluster)


class _Links:
    """Adds up the time and bytes of a rank's collectives on a cluster."""

    def __init__(self, form: ClosedForm, cluster: ClusterConfig, rank: int) -> None:
        self.cluster, self.members = cluster, form.layout.groups(rank)
        self.reductions: defaultdict[GroupKind, float] = defaultdict(float)

    def add(
        self,
        calls: Iterable[Collective],
        times: int,
        taken: defaultdict[str, float],
        wire: defaultdict[LinkClass, float],
    ) -> None:
        for call, alike in Counter(calls).items():
            members, per_node = self.members[call.kind], self.cluster.gpus_per_node
            once = collective_seconds(call.op, call.even_payload_bytes, members, self.cluster)
            in_step = call.phase == "optimizer"
            taken["gradient sync" if in_step else f"{call.op}, {link_of(members, per_node)}"] += times * alike * once
            if call.tag == "gradients.reduce":
                self.reductions[call.kind] += alike * once
            for link, sent in wire_bytes_by_link(call.op, call.even_payload_bytes, members, per_node).items():
                wire[link] += times * alike * sent


def _total(works: Iterable[Work], cluster: ClusterConfig) -> float:
    return sum(seconds(work, cluster) for work in works)


def _optimizer(memory: Memory) -> Iterable[Work]:
    """Yields the work of filling the reduction buffers and of updating this rank's shards."""
    form, p, master = memory.form, memory.form.parameter.itemsize, memory.master
    joined, every = sum(bucket.elements for bucket in form.buckets if form.joined(bucket)), sum(memory.shards)
    whole = sum(memory.of_matrices)
    shard = every - whole

    def moved(size: float) -> Work:
        return Work(0, size, form.precise, "arithmetic")

    if joined:
        yield moved(2 * joined * p)
    yield moved(every * p)  # the norm
    half = master + p if p < master else 0
    if memory.tile == "fused":
        size = shard * (p + 6 * master + (p if half else 0))
        yield Work(0, size, form.precise, "movement", kernel=Kernel("adam"))
    else:  # gradients are scaled before
        yield moved(shard * (2 * master + memory.step.moved + 2 * half))
    if memory.averages:  # the mean with the weights, and a copy of that
        yield moved(memory.averages // master * (5 * master + (master + p if p < master else 0)))
    travelling = form.travelling.itemsize
    if whole:  # the momentum and the direction, then decay and the update
        yield moved(whole * (11 * master + 5 * travelling + 2 * half))
    for kind in INNER:
        yield from _orthogonalised(form, kind)


def _orthogonalised(form: ClosedForm, kind: GroupKind) -> Iterable[Work]:
    """Yields the work of making this rank's matrices of one kind of group orthogonal, and of moving them about."""
    steps, size = int(form.config.optim.optimizer.get("ns_steps", NS_STEPS)), form.travelling.itemsize
    for block, shapes in form.made_whole(kind):
        for shape in shapes:
            m, n = sorted(shape)
            yield Work(0, 5 * m * n * size, form.precise, "arithmetic")  # the norm, the quotient, the factor
            for a, b, c in ((m, n, m), (m, m, m), (m, m, n)) * steps:
                yield Work(2 * a * b * c, (a * b + b * c + a * c) * size, form.travelling, "gemm")
        yield Work(0, 8 * block.elements * size, form.precise, "arithmetic")
