"""``python -m experiments.scmoe.hiding``: what hides of emulated exchanges, measured on gloo; see README.md."""

import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from experiments.paper import write_json
from tedlab import ParallelDegrees, Topology
from tedlab.comm import Collective
from tedlab.config import CommOptions, ModelConfig, MoEConfig, SharedConfig
from tedlab.models import GPT, GPTSpec
from tedlab.models.shortcut import ShortcutSpec
from tedlab.predict.cluster import Link, load_cluster
from tedlab.predict.emulate import Emulation
from tedlab.predict.estimate.hiding import Sides

HERE = Path(__file__).parent
PROCESSES, STEPS, WARM, PROBED = 2, 13, 1, 4
TIMES = (0.5, 1.0, 2.0)  # an exchange's seconds, as multiples of what runs beside one
MODEL = ModelConfig(2, 256, 4, 1024, 128, vocab_size=512)
MOE = MoEConfig(4, every=2, ffn=1024, shared=SharedConfig(1))
SAMPLES = 10
EXCHANGES = 4  # of a step: there and back, forward and backward


@dataclass
class Measured:
    """What hides of a position's exchanges, each of which takes so many seconds.

    Attributes:
        position: See ``moe.shortcut``.
        exchange_s: Seconds of an exchange on the emulated link.
        predicted: The share that should hide by the closed form, from the seconds of sub-layers that run alone.
        waited: The share for which no process waited.
        gained: The share by which a step is shorter than without overlap.
        spread: The first and the third quartile of that, among steps.
    """

    position: str
    exchange_s: float
    predicted: float
    waited: float
    gained: float
    spread: tuple[float, float]


def main() -> None:
    """The command."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank, (port, folder), PROCESSES)
        found: list[Measured] = torch.load(Path(folder, "found"), weights_only=False)
    write_json(HERE / "hiding.json", {"rows": [vars(one) for one in found]})
    shown = Table("position", "an exchange, ms", "predicted", "not waited for", "step shorter", "half of the steps")
    for one in found:
        shares = (f"{share:.0%}" for share in (one.predicted, one.waited, one.gained))
        shown.add_row(one.position, f"{1e3 * one.exchange_s:.0f}", *shares, "{:.0%} to {:.0%}".format(*one.spread))
    Console().print(shown)


def rank(number: int, port: int, folder: str) -> None:
    """Measures in one of the processes."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=number, world_size=PROCESSES)
    found = [one for position in ("pos1", "pos2", "pos3") for one in measured(position)]
    if number == 0:
        torch.save(found, Path(folder, "found"))
    dist.destroy_process_group()


def measured(position: str) -> list[Measured]:
    """Compares a position's steps with and without overlap, on links of several speeds."""
    moe = replace(MOE, shortcut=position)
    steps: dict[bool, Callable[[], None]] = {}
    hooks: dict[bool, Switch] = {}
    for on in (False, True):
        topology = Topology(ParallelDegrees(PROCESSES, expert=PROCESSES), options=CommOptions(overlap_shortcut=on))
        model = GPT(MODEL, moe, topology, seed=0)
        steps[on], hooks[on] = stepping(model, topology), Switch()
        topology.comm.register_hook(hooks[on])
        steps[on]()
    alone = Alone(model, moe)
    typical = statistics.mean(sum(sides.beside) / 2 for _ in range(PROBED) for sides in alone.sides(0.0))
    return [compared(position, steps, hooks, alone, times * typical) for times in TIMES]


def compared(
    position: str, steps: dict[bool, Callable[[], None]], hooks: dict[bool, "Switch"], alone: "Alone", link: float
) -> Measured:
    """Measures steps whose exchanges take so many seconds each, in turns with sub-layers that run alone.

    What else the machine does is then alike for all.
    """
    seconds = torch.tensor(link)
    dist.all_reduce(seconds)  # the processes agree on it
    each = float(seconds) / PROCESSES
    cluster = replace(load_cluster("one_h200"), gpus_per_node=PROCESSES, in_node=Link(1e30, each))
    groups = ParallelDegrees(PROCESSES, expert=PROCESSES).groups(dist.get_rank())
    waits = Waits(Emulation(cluster, groups))
    hooks[False].now, hooks[True].now = Emulation(cluster, groups), waits
    taken: dict[bool, list[float]] = {False: [], True: []}
    hidden = []
    for _ in range(WARM + STEPS):
        dist.barrier()
        hidden.append(sum(sides.hidden(alone.slot) for sides in alone.sides(each)))
        for on, step in steps.items():
            dist.barrier()
            begin = time.perf_counter()
            step()
            taken[on].append(time.perf_counter() - begin)
    assert len(waits.found) == EXCHANGES * (WARM + STEPS)  # in the steps, and none in sub-layers alone
    total = EXCHANGES * each
    gains = [(off - on) / total for off, on in zip(taken[False][WARM:], taken[True][WARM:], strict=True)]
    first, gained, third = statistics.quantiles(gains, n=4)
    predicted = statistics.median(hidden[WARM:]) / total
    waited = statistics.median(waits.of_steps(WARM + STEPS)[WARM:]) / total
    return Measured(position, each, predicted, 1 - waited, gained, (first, third))


class Alone:
    """The sub-layers beside a model's exchanges, run by themselves: nothing is exchanged, and no experts compute.

    Args:
        model: A model whose last unit has a shortcut.
        moe: The configuration of its experts.

    Attributes:
        slot: The number of the sub-layer beside the exchanges before which experts compute.
    """

    def __init__(self, model: GPT, moe: MoEConfig) -> None:
        unit = GPTSpec(MODEL, moe).units[-1]
        assert isinstance(unit, ShortcutSpec)
        reads = len(unit.sublayers) - unit.beside
        self.slot = unit.slot(CommOptions(overlap_shortcut=True), MODEL.sequence_length) - reads
        layers: list[Any] = []
        blocks: list[Any] = list(model.blocks)[-len(unit.blocks) :]
        last = blocks[-1]
        for block in blocks:
            layers += [(block.norm1, block.attention), (block.norm2, block.feed_forward)]
        layers[-1] = last.norm2, lambda x: last.feed_forward.shared.beside(x)[0]
        self.layers = layers[reads:]
        self.x_BSH = torch.randn(SAMPLES, MODEL.sequence_length, MODEL.hidden)

    def sides(self, exchange: float) -> tuple[Sides, Sides]:
        """Runs each once, and returns the forward and the backward pass with exchanges of so many seconds."""
        there, back = [], []
        for norm, layer in self.layers:
            x_BSH = self.x_BSH.clone().requires_grad_()
            begin = time.perf_counter()
            y_BSH = layer(norm(x_BSH))
            between = time.perf_counter()
            y_BSH.backward(self.x_BSH)
            there.append(between - begin)
            back.append(time.perf_counter() - between)
        return Sides(exchange, exchange, there), Sides(exchange, exchange, back)


class Switch:
    """A hook that another stands behind, which changes."""

    def __init__(self) -> None:
        self.now: Any = None

    def __call__(self, call: Collective, event: Literal["start", "end"]) -> None:
        if self.now is not None:
            self.now(call, event)


def stepping(model: GPT, topology: Topology) -> Callable[[], None]:
    """Returns a function that runs forward and backward."""
    draw = torch.Generator().manual_seed(topology.comm.rank("data"))
    ids = torch.randint(0, MODEL.vocab_size or 1, (SAMPLES, MODEL.sequence_length + 1), generator=draw)

    def step() -> None:
        loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()

    return step


class Waits:
    """An emulation that notes for how long it waits."""

    def __init__(self, emulation: Emulation) -> None:
        self.emulation = emulation
        self.found: list[float] = []

    def __call__(self, call: Collective, event: Literal["start", "end"]) -> None:
        begin = time.perf_counter()
        self.emulation(call, event)
        if event == "end":
            self.found.append(time.perf_counter() - begin)

    def of_steps(self, steps: int) -> list[float]:
        """Returns the seconds waited in each of so many equal steps."""
        each = len(self.found) // steps
        return [sum(self.found[start : start + each]) for start in range(0, len(self.found), each)]


if __name__ == "__main__":
    main()
