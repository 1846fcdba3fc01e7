"""``python -m experiments.scmoe.hiding``: what hides of emulated exchanges, measured on gloo; see README.md."""

import os
import socket
import statistics
import tempfile
import time
from collections import defaultdict
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
from tedlab.models import GPT
from tedlab.predict.cluster import Link, load_cluster
from tedlab.predict.emulate import Emulation

HERE = Path(__file__).parent
PROCESSES, STEPS, WARM, PROBED = 2, 9, 1, 4
TIMES = (0.5, 1.0, 2.0)  # an exchange's seconds, as multiples of what runs beside one
MODEL = ModelConfig(2, 256, 4, 1024, 128, vocab_size=512)
MOE = MoEConfig(4, every=2, ffn=1024, shared=SharedConfig(1))
SAMPLES = 10


@dataclass
class Measured:
    """What hides of a position's exchanges, each of which takes so many seconds.

    Attributes:
        position: See ``moe.shortcut``.
        exchange_s: Seconds of an exchange on the emulated link.
        predicted: The share that could hide: of each exchange as much as ran beside it on links without
            delay, in steps in turn with the others.
        waited: The share for which no process waited.
        gained: The share by which a step is shorter than without overlap.
    """

    position: str
    exchange_s: float
    predicted: float
    waited: float
    gained: float


def main() -> None:
    """The command."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank, (port, folder), PROCESSES)
        found: list[Measured] = torch.load(Path(folder, "found"), weights_only=False)
    write_json(HERE / "hiding.json", {"rows": [vars(one) for one in found]})
    shown = Table("position", "an exchange, ms", "could hide", "not waited for", "step shorter")
    for one in found:
        shares = (f"{share:.0%}" for share in (one.predicted, one.waited, one.gained))
        shown.add_row(one.position, f"{1e3 * one.exchange_s:.0f}", *shares)
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
    clock = hooks[True].now = Clock()
    for _ in range(WARM + PROBED):
        steps[True]()
    typical = statistics.mean(statistics.median(beside) for beside in zip(*clock.of_steps()[WARM:], strict=True))
    return [compared(position, steps, hooks, times * typical) for times in TIMES]


def compared(
    position: str, steps: dict[bool, Callable[[], None]], hooks: dict[bool, "Switch"], link: float
) -> Measured:
    """Measures steps whose exchanges take so many seconds each, in turns with those of links without delay.

    What else the machine does is then in all three kinds of step alike.
    """
    seconds = torch.tensor(link)
    dist.all_reduce(seconds)  # the processes agree on it
    each = float(seconds) / PROCESSES
    cluster = replace(load_cluster("one_h200"), gpus_per_node=PROCESSES, in_node=Link(1e30, each))
    groups = ParallelDegrees(PROCESSES, expert=PROCESSES).groups(dist.get_rank())
    clock, waits, delay = Clock(), Waits(Emulation(cluster, groups)), Emulation(cluster, groups)
    kinds: tuple[tuple[bool, Any], ...] = ((True, clock), (False, delay), (True, waits))
    taken: defaultdict[Any, list[float]] = defaultdict(list)
    for _ in range(WARM + STEPS):
        for on, hook in kinds:
            hooks[on].now = hook
            dist.barrier()
            begin = time.perf_counter()
            steps[on]()
            taken[hook].append(time.perf_counter() - begin)
    beside = clock.of_steps()[WARM:]
    total = each * len(beside[0])
    predicted = statistics.median(sum(min(each, other) for other in of_step) for of_step in beside)
    gained = statistics.median(off - on for off, on in zip(taken[delay][WARM:], taken[waits][WARM:], strict=True))
    waited = statistics.median(waits.of_steps(WARM + STEPS)[WARM:])
    return Measured(position, each, predicted / total, 1 - waited / total, gained / total)


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


class Clock:
    """A hook that measures what runs between the start and the end of each exchange of a step."""

    def __init__(self) -> None:
        self.began: dict[tuple[str, str], float] = {}
        self.found: defaultdict[tuple[str, str], list[float]] = defaultdict(list)

    def __call__(self, call: Collective, event: Literal["start", "end"]) -> None:
        if call.op != "all_to_all":
            return
        key = call.tag, call.phase
        if event == "start":
            self.began[key] = time.perf_counter()
        else:
            self.found[key].append(time.perf_counter() - self.began[key])

    def of_steps(self) -> list[tuple[float, ...]]:
        """Returns the seconds beside each exchange, step by step."""
        return list(zip(*self.found.values(), strict=True))


if __name__ == "__main__":
    main()
