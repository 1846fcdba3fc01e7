"""Simulates an optimizer step: runs the model, strategy, optimizer and Trainer of a real run on fake tensors.

At most three micro-batches run, however many a step accumulates: the first, one that adds to gradients, and the last,
after which the optimizer steps. All those in between are like the second, so its counts are multiplied. If they run
beside each other (``comm.interleave``), there are four: the backward pass of the first runs beside the second, and only
from the third on is one like the other.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from tedlab.callbacks.average import averaged, precision_of_averages
from tedlab.comm import GroupKind, Phase
from tedlab.comm.ledger import Count, Entry, Totals, differences
from tedlab.config import CheckpointOptions, Compiler, TrainConfig, with_values
from tedlab.errors import UsageError
from tedlab.optim.bucket import local
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.cost import LinkClass, collective_seconds, link_of
from tedlab.predict.sim.lanes import Span
from tedlab.predict.sim.memory import StorageTracker, Timeline
from tedlab.predict.sim.meter import KERNELS, MATRICES, Counts, Meter
from tedlab.predict.sim.roofline import seconds as kernel_seconds
from tedlab.predict.sim.routing import Answers, SimulatedRouting, routing_of
from tedlab.predict.sim.world import OneOfMany, SimulatedStrategy, fake_process_group
from tedlab.predict.volumes import fused_rows, on_gpu, predict, tile_of, with_rows
from tedlab.report import about
from tedlab.run import language_model, quieten, strategy_of
from tedlab.spec import Work
from tedlab.topology import Topology

_PRECISIONS = {"16-mixed": "bf16-mixed"}  # Lightning has fp16 autocast on GPUs only; bf16 takes as many bytes


@dataclass(frozen=True)
class Simulation:
    """One optimizer step of one rank.

    Attributes:
        rank: The rank.
        groups: The global ranks of its group of each kind.
        ledger: What the rank communicates, with predicted seconds.
        differences: Where the ledger differs from the closed form; unless it is empty, one of them has a bug.
        flops: The FLOPs of this rank by phase, including recomputation.
        kernels: How often each kind of work is done, by phase.
        seconds: Predicted seconds by phase and cause; what overlaps is subtracted as ``hidden by overlap``.
        hidden: Of the ledger's predicted seconds, those that the processor does not wait for, see :class:`Counts`.
        spans: When the processor and the links are busy, over the micro-batches that ran.
        wire: The bytes that the rank sends, by link.
        memory: The memory over the micro-batches that ran.
        micro_batches: For each of these, its start in predicted seconds and how many micro-batches it stands for.
        about: Sizes, layout and versions, as in a run's summary.
    """

    rank: int
    groups: Mapping[GroupKind, Sequence[int]]
    ledger: Mapping[Entry, Count]
    differences: Mapping[Entry, tuple[Count, Count]]
    flops: Mapping[Phase, float]
    kernels: Mapping[tuple[Phase, Work], float]
    seconds: Mapping[tuple[Phase, str], float]
    hidden: Mapping[Entry, float]
    spans: Sequence[Span]
    wire: Mapping[LinkClass, float]
    memory: Timeline
    micro_batches: Sequence[tuple[float, int]]
    about: Mapping[str, Any]

    @property
    def step_seconds(self) -> float:
        """The predicted seconds of the step."""
        return sum(self.seconds.values())

    def seconds_on(self, cluster: ClusterConfig) -> dict[tuple[Phase, str], float]:
        """Returns what :attr:`seconds` would be on another cluster, without another simulation.

        All calls of a collective count with their mean payload, which is exact for rings and for equal payloads.

        Raises:
            ValueError: If anything overlaps, or the cluster has measured host times or waits, since what hides behind
                what then depends on the cluster.
        """
        if cluster.has_clock:
            raise ValueError("a cluster with kernels.dispatch or waits cannot be priced afterwards; simulate on it")
        if self.hidden:
            raise ValueError(
                "a simulation in which collectives are hidden (optim.overlap, comm.overlap_shared, comm.dedup=group) "
                "cannot be priced again; simulate on that cluster"
            )
        return self.alone_on(cluster)

    def alone_on(self, cluster: ClusterConfig) -> dict[tuple[Phase, str], float]:
        """Returns what kernels and collectives take on a cluster without host times, waits, and anything hidden.

        All calls of a collective count with their mean payload, as in :meth:`seconds_on`.
        """
        priced: defaultdict[tuple[Phase, str], float] = defaultdict(float)
        for (phase, work), times in self.kernels.items():
            priced[phase, MATRICES if work.flops else KERNELS] += times * kernel_seconds(work, cluster)
        for entry, count in self.ledger.items():
            members = self.groups[entry.kind]
            taken = collective_seconds(entry.op, count.payload_bytes / count.calls, members, cluster)
            priced[entry.phase, f"{entry.op}, {link_of(members, cluster.gpus_per_node)}"] += count.calls * taken
        return dict(priced)


def simulate(
    config: TrainConfig,
    cluster: ClusterConfig,
    rank: int = 0,
    progress: Callable[[float], None] = lambda share: None,
    routing: SimulatedRouting | None = None,
) -> Simulation:
    """Runs one optimizer step of one rank on fake tensors. The process must not be part of a process group.

    Args:
        config: A configuration completed by :func:`tedlab.validate.complete_simulated`.
        cluster: The cluster that times are predicted for.
        rank: The rank, below ``config.parallel.world_size``.
        progress: Called now and then with the share that is done, from 0 to 1.
        routing: What routers choose, if experts have no capacity; None: all experts equally often.

    Raises:
        UsageError: If there is no such rank, or the cluster has no room for the world.
    """
    world = config.parallel.world_size
    if not 0 <= rank < world:
        raise UsageError(f"sim.rank is {rank}; with parallel.world_size={world} it can be 0 to {world - 1}")
    try:
        collective_seconds("all_reduce", 0, range(world), cluster)
    except ValueError as error:
        raise UsageError(str(error)) from None
    quieten()
    routing = routing or routing_of(config, "balanced", None, None)
    micro_batches = min(config.trainer["accumulate_grad_batches"], _kinds(config))
    # A kernel's inside is invisible: only torch's operations are counted, and kernels that something stands in for (a
    # fused step, norms, rows of experts, what a compiler makes).
    compiler = {} if config.model.compile == Compiler.INDUCTOR else {"model.compile": "none"}
    torch_only = {} if fused_rows(config) else {"moe.kernel": "torch"}
    shorter = with_values(config, {**compiler, **torch_only, "trainer.accumulate_grad_batches": micro_batches})
    expected_calls = max(1, sum(count.calls for count in predict(shorter, rank).values()))
    told = 0

    def one_more() -> None:
        nonlocal told
        told += 1
        progress(min(1.0, told / 2 / expected_calls))  # a collective has a start and an end

    def meter(topology: Topology) -> Meter:
        memory = StorageTracker(lambda: topology.recomputation.kept_bytes)
        made = Meter(cluster, topology.layout.groups(rank), memory, one_more)
        if routing is not None:
            topology.comm.reader = functools.partial(made.on_read, Answers(routing, rank))
        return made

    with fake_process_group(world, rank):
        simulated = _simulated(config, meter)
        observer, module = _Observer(config), language_model(shorter)
        module.seed = None  # fake tensors have no values to fill
        _trainer(shorter, simulated, rank, observer).fit(module, Batches(config))
        described = about(config, module)
    accumulated = int(config.trainer["accumulate_grad_batches"])
    moved = {} if routing is None else {block: rows * accumulated for block, rows in routing.rows(rank).items()}
    expected = with_rows(predict(config, rank), config, moved)
    return _simulation(config, rank, simulated.meter.members, observer, described, expected)


class _Observer(Callback):
    """Prepares the step as if it were not the first of a run, and collects what is known of each micro-batch."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.averages: dict[torch.Tensor, torch.Tensor] = {}  # of the process's parts of parameters, by these
        self.counts: list[Counts] = []
        self.starts: list[float] = []
        self.memory: Timeline
        self.spans: list[Span]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = _strategy(trainer)
        memory, state = strategy.meter.memory, []
        for optimizer in strategy.sharded_optimizers:
            optimizer.initialize_state()
            memory.label((bucket.flat for bucket in optimizer.buckets), "parameters")
            state += [x for values in optimizer.optimizer.state.values() for x in values.values()]
            state += [bucket.master for bucket in optimizer.buckets if bucket.master is not bucket.shard]
        if self.config.average.kind is not None:
            wide = precision_of_averages(self.config.trainer["precision"])
            self.averages = {local(p): torch.empty_like(local(p), dtype=wide) for p in pl_module.parameters()}
        memory.label((x for x in (*state, *self.averages.values()) if isinstance(x, torch.Tensor)), "optimizer")
        memory.label(map(local, pl_module.parameters()), "parameters")  # frozen ones are in no bucket
        strategy.topology.comm.register_hook(strategy.meter.on_collective)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.starts.append(_strategy(trainer).meter.memory.now)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Averages weights as :class:`AverageWeights` does, which would copy the module, as fake tensors cannot be."""
        if batch_idx + 1 == trainer.accumulate_grad_batches:
            for weight, average in self.averages.items():
                average.copy_(averaged(self.config.average, average, weight, 1))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        meter = _strategy(trainer).meter
        self.counts, meter.counts = list(meter.parts.values()), None
        self.memory, self.spans = meter.memory.timeline(), meter.lanes.spans


class Batches:
    """Yields token ids without end; within a fake tensor mode they are fake."""

    def __init__(self, config: TrainConfig) -> None:
        self.shape = config.data.micro_batch_size, config.model.sequence_length + 1

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            yield torch.zeros(self.shape, dtype=torch.int64)


def _simulated(config: TrainConfig, meter: Callable[[Topology], Meter]) -> SimulatedStrategy:
    scale = config.optim.loss_scale
    simulated = strategy_of(
        config,
        functools.partial(SimulatedStrategy, meter, on_gpu(config)),
        sharding=replace(config.optim, tile=tile_of(config)),  # tensors are on this machine's CPU
        checkpoints=CheckpointOptions(),
        process_group_backend="fake",
        check_replicas_every=None,
        loss_scale=scale or 2.0**16 if config.trainer["precision"] == "16-mixed" else scale,
    )
    assert isinstance(simulated, SimulatedStrategy)
    return simulated


def _trainer(config: TrainConfig, strategy: SimulatedStrategy, rank: int, observer: Callback) -> Trainer:
    precision = config.trainer["precision"]
    return Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=config.parallel.world_size,
        strategy=strategy,
        plugins=[OneOfMany(config.parallel.world_size, rank)],
        precision=_PRECISIONS.get(precision, precision),
        max_steps=1,
        gradient_clip_val=config.trainer.get("gradient_clip_val"),
        accumulate_grad_batches=config.trainer["accumulate_grad_batches"],
        callbacks=[observer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )


def _simulation(
    config: TrainConfig,
    rank: int,
    groups: Mapping[GroupKind, Sequence[int]],
    observer: _Observer,
    described: dict[str, Any],
    expected: Totals,
) -> Simulation:
    parts = observer.counts
    times = [1] * len(parts)
    if len(parts) == _kinds(config):
        times[-2] += int(config.trainer["accumulate_grad_batches"]) - len(parts)
    ledger: defaultdict[Entry, Count] = defaultdict(Count)
    for part, n in zip(parts, times, strict=True):
        for entry, count in part.ledger.totals.items():
            ledger[entry] += replace(count, seconds=part.collectives[entry]) * n
    return Simulation(
        rank=rank,
        groups=groups,
        ledger=dict(ledger),
        differences=differences(ledger, expected),
        flops=_summed([part.flops for part in parts], times),
        kernels=_summed([part.kernels for part in parts], times),
        seconds=_summed([part.seconds for part in parts], times),
        hidden=_summed([part.hidden for part in parts], times),
        spans=observer.spans,
        wire=_summed([part.wire for part in parts], times),
        memory=observer.memory,
        micro_batches=list(zip(observer.starts, times, strict=True)),
        about=described,
    )


def _kinds(config: TrainConfig) -> int:
    """Returns how many micro-batches of a step are different; all others are like the last but one of these."""
    return 4 if config.comm.interleave else 3


def _summed(totals: list[Any], times: list[int]) -> dict[Any, float]:
    result: defaultdict[Any, float] = defaultdict(float)
    for part, n in zip(totals, times, strict=True):
        for key, value in part.items():
            result[key] += n * value
    return dict(result)


def _strategy(trainer: Trainer) -> SimulatedStrategy:
    assert isinstance(trainer.strategy, SimulatedStrategy)
    return trainer.strategy
