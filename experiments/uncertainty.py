"""What a step takes, and what optimisations gain, when the machine's constants are known only within ranges.

A step is simulated once; what it computes and communicates does not depend on the machine, and is priced again under
each draw of the constants (:meth:`tedlab.predict.sim.Simulation.seconds_on`).
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from experiments.paper import MODES, progress
from tedlab.config import TrainConfig
from tedlab.predict.cluster import ClusterConfig, Efficiency
from tedlab.predict.sim import Simulation

BASELINE, BOTH = "baseline", "+ both"
CLAIM = 0.26  # the paper's abstract: "a speedup of 26% over a baseline"
READINGS = {"26 % faster: ×1.26": 1 + CLAIM, "26 % less time: ×1.35": 1 / (1 - CLAIM)}
QUANTILES = (5, 25, 50, 75, 95)


@dataclass(frozen=True)
class Unknown:
    """A constant that is drawn.

    Attributes:
        label: for people.
        values: lowest and highest, or all that it may be.
        why: these.
        choice: whether it takes only these values; otherwise it is uniform between them.
    """

    label: str
    values: tuple[float, ...]
    why: str
    choice: bool = False

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """So many values."""
        return (
            random.choice(self.values, count) if self.choice else random.uniform(self.values[0], self.values[-1], count)
        )


def with_constants(cluster: ClusterConfig, constants: Mapping[str, float]) -> ClusterConfig:
    """The cluster with ``gpus_per_node``, the fields of ``efficiency``, and ``latency`` times its own."""
    assert cluster.in_node is not None
    assert cluster.between_nodes is not None
    slower = constants["latency"]
    return replace(
        cluster,
        gpus_per_node=int(constants["gpus_per_node"]),
        in_node=replace(cluster.in_node, latency=slower * cluster.in_node.latency),
        between_nodes=replace(cluster.between_nodes, latency=slower * cluster.between_nodes.latency),
        efficiency=Efficiency(
            **{n: constants[n] for n in ("gemm", "memory", "in_node", "between_nodes", "all_to_all")}
        ),
    )


def einsum_flops(config: TrainConfig) -> float:
    """What dispatching tokens to experts by products with one-hot masks adds to a rank's step, as DeepSpeed's MoE does.

    A product takes 2·S·(E·C)·H: S tokens of a micro-batch, E·C slots, H channels, on each tensor rank. There are two in
    the forward pass (to experts and back), the same in recomputation, and three in the backward pass: masks have a
    gradient on the way back only.
    """
    model, data = config.model, config.data
    tokens = data.micro_batch_size * model.sequence_length
    slots = tokens * config.moe.top_k * (config.moe.capacity_factor or 1.0)
    layers = len(config.moe.routed(model.layers))
    return 7 * 2.0 * tokens * slots * model.hidden * layers * int(config.trainer["accumulate_grad_batches"])


@dataclass(frozen=True)
class Draws:
    """Constants and what followed from them.

    Attributes:
        constants: by name, one value a draw.
        seconds: of a step, by mode.
    """

    constants: Mapping[str, np.ndarray]
    seconds: Mapping[str, np.ndarray]

    def speedup(self, mode: str = BOTH) -> np.ndarray:
        """Time of the baseline ÷ time of a mode."""
        return self.seconds[BASELINE] / self.seconds[mode]

    def summary(self) -> dict[str, object]:
        """Quantiles, how the claim lies among the draws, and which constants matter."""
        speedup = self.speedup()
        near = np.abs(speedup - READINGS["26 % faster: ×1.26"]) < 0.03
        return {
            "draws": len(speedup),
            "baseline_seconds": _quantiles(self.seconds[BASELINE]),
            "speedup": {mode: _quantiles(self.speedup(mode)) for mode in self.seconds if mode != BASELINE},
            "speedup_by_gpus_per_node": {
                f"{int(gpus)}": _quantiles(speedup[self.constants["gpus_per_node"] == gpus])
                for gpus in np.unique(self.constants["gpus_per_node"])
            },
            "share_of_draws_in_which_dtd_gains_more_than_cac": float(
                (self.seconds["+ DTD"] < self.seconds["+ CAC"]).mean()
            ),
            "share_of_draws_below": {reading: float((speedup < value).mean()) for reading, value in READINGS.items()},
            "rank_correlation": {
                name: rank_correlation(values, speedup) for name, values in self.constants.items() if np.ptp(values) > 0
            },
            "means": {name: float(values.mean()) for name, values in self.constants.items()},
            "draws_within_0.03_of_1.26": int(near.sum()),
            "means_there": {name: float(values[near].mean()) for name, values in self.constants.items() if near.any()},
        }

    def write(self, path: Path) -> None:
        """As CSV."""
        columns = {**self.constants, **{f"seconds, {mode}": values for mode, values in self.seconds.items()}}
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for row in zip(*columns.values(), strict=True):
                writer.writerow(f"{value:.4g}" for value in row)


def read_draws(path: Path) -> Draws:
    """What :meth:`Draws.write` wrote."""
    with path.open() as file:
        names = next(csv.reader(file))
    columns = dict(zip(names, np.loadtxt(path, delimiter=",", skiprows=1, unpack=True), strict=True))
    return Draws(
        {name: values for name, values in columns.items() if not name.startswith("seconds")},
        {mode: columns[f"seconds, {mode}"] for mode in MODES},
    )


def step_seconds(
    simulation: Simulation, einsum: float, cluster: ClusterConfig, constants: Mapping[str, float]
) -> float:
    """Of a step under these constants; ``einsum`` FLOPs are added if the constants say so."""
    drawn = with_constants(cluster, constants)
    added = constants["einsum"] * einsum / (drawn.peak_flops.fp16 * drawn.efficiency.gemm)
    return sum(simulation.seconds_on(drawn).values()) + added


def monte_carlo(
    simulations: Mapping[tuple[str, int], Simulation],
    einsums: Mapping[int, float],
    cluster: ClusterConfig,
    unknowns: Mapping[str, Unknown],
    count: int,
) -> Draws:
    """Prices all modes under each of ``count`` draws.

    Args:
        simulations: by mode and micro-batch size.
        einsums: FLOPs of dispatching by products, by micro-batch size.
        cluster: whose constants are drawn; its peaks and bandwidths stay.
        unknowns: by name; ``micro_batch`` and ``einsum`` (0 or 1) beside those of :func:`with_constants`.
        count: of draws.
    """
    random = np.random.default_rng(0)
    constants = {name: unknown.draw(random, count) for name, unknown in unknowns.items()}
    seconds = {mode: np.zeros(count) for mode in MODES}
    with progress("pricing   ", count) as bar:
        for index in range(count):
            drawn = {name: float(values[index]) for name, values in constants.items()}
            size = int(drawn["micro_batch"])
            for mode in MODES:
                seconds[mode][index] = step_seconds(simulations[mode, size], einsums[size], cluster, drawn)
            bar.advance(bar.task_ids[0])
    return Draws(constants, seconds)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's: of ranks, equal values sharing theirs."""
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _quantiles(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    return {f"{q} %": float(np.percentile(values, q)) for q in QUANTILES}
