"""A step's time and a rank's memory in closed form: within milliseconds, for choosing among layouts.

``tedlab.predict.sim.simulate`` runs the real code instead, and tests hold the one against the other.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tedlab.comm import Collective
from tedlab.config import Granularity, ModelConfig, TrainConfig
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.cost import LinkClass, collective_seconds, link_of, wire_bytes_by_link
from tedlab.predict.estimate.kernels import Kernels
from tedlab.predict.estimate.memory import Memory, Moment
from tedlab.predict.estimate.sizes import Sizes
from tedlab.predict.flops import training_flops
from tedlab.predict.sim.roofline import Work, seconds

COMPUTE, OPTIMIZER, HIDDEN = "kernels", "optimizer", "hidden by overlap"


@dataclass(frozen=True)
class Estimate:
    """Of one optimizer step and one rank.

    Attributes:
        memory: at the fullest moment, by category, in bytes.
        seconds: by cause: ``kernels`` (of the passes, accumulation included), ``optimizer`` (kernels of its step),
            ``gradient sync`` (reductions, parameter gathers), and ``<operation>, <link>`` for the passes' collectives.
        wire: bytes that the rank sends, by link.
        tokens: of the step, over all ranks.
        flops: of the model, per rank (see ``flops.py``).
        peak_flops: of a GPU in the configuration's precision.
    """

    memory: Moment
    seconds: Mapping[str, float]
    wire: Mapping[LinkClass, float]
    tokens: int
    flops: float
    peak_flops: float

    @property
    def step_seconds(self) -> float:
        """Time of the step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together."""
        return self.tokens / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation."""
        return self.flops / self.step_seconds / self.peak_flops


def estimate(config: TrainConfig, cluster: ClusterConfig, rank: int = 0) -> Estimate:
    """The closed form of a configuration completed by :func:`tedlab.validate.complete_simulated`.

    Args:
        config: of the job.
        cluster: that it runs on.
        rank: whose groups' places on the nodes count; all else is alike in all ranks.

    Raises:
        ValueError: for an optimizer whose state is not known, another model than GPT-3's, or a world larger than the
            cluster.
    """
    _check_known(config)
    sizes = Sizes(config)
    memory, kernels, links = Memory(sizes), Kernels(sizes), _Links(sizes, cluster, rank)
    taken: defaultdict[str, float] = defaultdict(float)
    wire: defaultdict[LinkClass, float] = defaultdict(float)
    links.add(sizes.form.ends(), sizes.accumulated, taken, wire)
    passes = _total(kernels.ends_forward(), cluster)
    backward = _total(kernels.ends_backward(), cluster)
    for first, blocks in sizes.kinds.items():
        links.add(sizes.form.block(first), len(blocks) * sizes.accumulated, taken, wire)
        passes += len(blocks) * _total(kernels.forward(first), cluster)
        backward += len(blocks) * _total(kernels.backward(first), cluster)
        if config.model.recompute.granularity == Granularity.BLOCK:
            passes += len(blocks) * _total(kernels.recompute(first), cluster)
    adding = seconds(Work(0, 3 * memory.gradients, sizes.form.precise, "arithmetic"), cluster)  # to earlier gradients
    taken[COMPUTE] = sizes.accumulated * (passes + backward) + (sizes.accumulated - 1) * adding
    taken[OPTIMIZER] = _total(_optimizer(memory), cluster)
    links.add(sizes.form.optimizer_step(), 1, taken, wire)
    if config.optim.overlap:
        taken[HIDDEN] = -min(links.reductions, backward + (adding if sizes.accumulated > 1 else 0))
    tokens = config.data.batch_size * config.model.sequence_length
    return Estimate(
        memory=memory.peak(),
        seconds=dict(taken),
        wire=dict(wire),
        tokens=tokens,
        flops=tokens * training_flops(config.model, config.moe) / config.parallel.world_size,
        peak_flops=cluster.peak(str(config.trainer["precision"])),
    )


def _check_known(config: TrainConfig) -> None:
    known = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    for name in ("activation", "bias", "norm", "positions", "loss_chunk"):
        value = getattr(config.model, name)
        if value != known[name]:
            raise ValueError(
                f"model.{name}={value}: the closed form of memory and time is that of model.{name}={known[name]} only; "
                "`tedlab simulate` runs any model"
            )


class _Links:
    """Collectives of a rank on a cluster."""

    def __init__(self, sizes: Sizes, cluster: ClusterConfig, rank: int) -> None:
        self.cluster, self.members = cluster, sizes.form.degrees.groups(rank)
        self.reductions = 0.0

    def add(
        self,
        calls: Iterable[Collective],
        times: int,
        taken: defaultdict[str, float],
        wire: defaultdict[LinkClass, float],
    ) -> None:
        for call, alike in Counter(calls).items():
            members, per_node = self.members[call.kind], self.cluster.gpus_per_node
            once = collective_seconds(call.op, call.payload_bytes, members, self.cluster)
            in_step = call.phase == "optimizer"
            taken["gradient sync" if in_step else f"{call.op}, {link_of(members, per_node)}"] += times * alike * once
            if call.tag == "gradients.reduce":
                self.reductions += alike * once
            for link, sent in wire_bytes_by_link(call.op, call.payload_bytes, members, per_node).items():
                wire[link] += times * alike * sent


def _total(works: Iterable[Work], cluster: ClusterConfig) -> float:
    return sum(seconds(work, cluster) for work in works)


def _optimizer(memory: Memory) -> Iterable[Work]:
    """Reduction buffers, and the update of this rank's shards."""
    s = memory.sizes
    whole, shard, form = memory.gradients / s.parameter, sum(memory.shards), s.form
    p, master = s.parameter, memory.master

    def moved(size: float) -> Work:
        return Work(0, size, form.precise, "arithmetic")

    yield moved(3 * whole * p)  # zeros, and gradients copied into them
    if form.degrees.data > 1:
        yield moved(2 * shard * p)  # the mean
    yield moved(shard * p)  # the norm
    half = master + p if p < master else 0
    if s.config.optim.tile == "fused":
        yield Work(0, shard * (p + 6 * master + (p if half else 0)), form.precise, "movement")
    elif memory.adam:
        yield moved(shard * (23 * master + 2 * half))
    else:
        yield moved(shard * (5 * master + 2 * half))
