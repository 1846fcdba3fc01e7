"""tedlab beside DeepSpeed: the same model on four processes, what each sends in a step and how long the step takes.

See ``python benchmarks/vs_deepspeed.py --help``, and README.md for what is compared with what.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

if __name__ == "__main__":  # run as a file: its directory is on the path, the repository is not
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.optim import AdamW

from benchmarks.recorder import CollectiveRecorder, Volume
from benchmarks.surroundings import require, surroundings
from tedlab import ParallelDegrees, Topology
from tedlab.config import CommOptions, ModelConfig, MoEConfig, RecomputeConfig
from tedlab.models import GPT
from tedlab.nn import partial_parameters, vocab_parallel_cross_entropy
from tedlab.optim import ShardedOptimizer
from tests.pool import WorkerPool

DEGREES = ParallelDegrees(world_size=4, tensor=2, expert=2)
LR, WEIGHT_DECAY, CLIP, AUX_LOSS = 1e-3, 0.01, 1.0, 0.01
CHECKED = 2  # first steps, in which everybody must agree; they also warm up
TOLERANCE = 1e-5  # relative, of losses and gradient norms in these steps
PHASES = ("forward", "recompute", "backward", "update")
MB = 1e6


@dataclass(frozen=True)
class Problem:
    """What everybody trains."""

    model: ModelConfig
    moe: MoEConfig
    batch: int  # samples of one data rank
    peer_zero: dict[str, Any]  # what to set in DeepSpeed's zero_optimization

    def batches(self, rank: int) -> Iterator[Tensor]:
        """(B, S+1) token ids, the same on the tensor ranks of a data rank."""
        generator = torch.Generator().manual_seed(rank // DEGREES.tensor)
        assert self.model.vocab_size is not None
        while True:
            shape = self.batch, self.model.sequence_length + 1
            yield torch.randint(self.model.vocab_size, shape, generator=generator)


class Contender(Protocol):
    """One way to train."""

    def loss(self, batch: Tensor) -> Tensor:
        """The forward pass."""

    def update(self, loss: Tensor) -> float:
        """Everything else in a step; returns the gradient norm before clipping."""


class Tedlab:
    """GPT and ShardedOptimizer, driven as TEDStrategy drives them, with its defaults."""

    def __init__(self, problem: Problem, comm: CommOptions, recompute: str) -> None:
        self.topology = Topology(DEGREES, "cpu", comm)
        self.network = GPT(
            replace(problem.model, recompute=RecomputeConfig(recompute)), problem.moe, self.topology, seed=0
        )
        names = {p: name for name, p in self.network.named_parameters()}
        self.optimizer = ShardedOptimizer(
            AdamW(names, lr=LR, weight_decay=WEIGHT_DECAY),
            self.topology.comm,
            names,
            partial=partial_parameters(self.network),
            zero=True,
            tile=1_800_000,
        )

    def loss(self, batch: Tensor) -> Tensor:
        logits, reports = self.network(batch[:, :-1])
        losses = vocab_parallel_cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), self.topology.comm)
        return losses.mean() + AUX_LOSS * torch.stack([r.balance_loss for r in reports]).sum()

    def update(self, loss: Tensor) -> float:
        loss.backward()
        self.optimizer.reduce_gradients()
        self.optimizer.clip(CLIP)
        self.optimizer.step()
        assert self.optimizer.last_norm is not None
        return self.optimizer.last_norm


class DeepSpeed:
    """The same model under DeepSpeed's engine."""

    def __init__(self, problem: Problem, recompute: str) -> None:
        from benchmarks.deepspeed_gpt import engine  # imports DeepSpeed, for which the processes must exist

        model, moe = replace(problem.model, recompute=RecomputeConfig(recompute)), problem.moe
        topology = Topology(DEGREES, "cpu", CommOptions())
        ours = GPT(model, moe, topology, seed=0)
        self.engine = engine(
            ours, model, moe, topology, lr=LR, weight_decay=WEIGHT_DECAY, clip=CLIP, zero=problem.peer_zero
        )

    def loss(self, batch: Tensor) -> Tensor:
        loss, balance = self.engine(batch[:, :-1], batch[:, 1:])
        return loss + AUX_LOSS * balance

    def update(self, loss: Tensor) -> float:
        self.engine.backward(loss)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())


PLAIN = CommOptions(dtd=False, fuse_reduce_scatter=False, cac=False)
DTD = CommOptions(dtd=True, fuse_reduce_scatter=True, cac=False)
CAC = CommOptions(dtd=True, fuse_reduce_scatter=True, cac=True)
# Name: how to build it, and with whom it is compared.
CONTENDERS: dict[str, tuple[Any, str]] = {
    "DeepSpeed": (partial(DeepSpeed, recompute="none"), "DeepSpeed"),
    "plain TED": (partial(Tedlab, comm=PLAIN, recompute="none"), "DeepSpeed"),
    "DTD": (partial(Tedlab, comm=DTD, recompute="none"), "DeepSpeed"),
    "DeepSpeed ckpt": (partial(DeepSpeed, recompute="block"), "DeepSpeed ckpt"),
    "DTD+CAC ckpt": (partial(Tedlab, comm=CAC, recompute="block"), "DeepSpeed ckpt"),
}


@dataclass
class Measured:
    """Of one contender in one process."""

    losses: list[float]  # of the checked steps
    norms: list[float]
    volumes: dict[tuple[str, str, str], Volume]  # of one step
    seconds: list[float] = field(default_factory=list)  # of the timed steps
    cpu_seconds: list[float] = field(default_factory=list)  # that this process spent computing in them


def measure(problem: Problem, rounds: int) -> dict[str, Measured]:
    """Runs in every process: all contenders side by side, stepped in turn."""
    rank = dist.get_rank()
    contenders: dict[str, Contender] = {name: build(problem) for name, (build, _) in CONTENDERS.items()}
    batches = {name: problem.batches(rank) for name in CONTENDERS}
    measured = {name: _check(contenders[name], batches[name]) for name in CONTENDERS}
    for turn in track(range(rounds), "Stepping", transient=True, disable=rank > 0):
        # In another order each time, the same in all processes: nobody always follows the same one.
        for name in random.Random(turn).sample(list(CONTENDERS), len(CONTENDERS)):
            _timed_step(contenders[name], next(batches[name]), measured[name])
    return measured


def _check(contender: Contender, batches: Iterator[Tensor]) -> Measured:
    """The first steps, the last of them recorded."""
    tensor_group = dist.get_rank() // DEGREES.tensor * DEGREES.tensor
    recorder = CollectiveRecorder(range(tensor_group, tensor_group + DEGREES.tensor))
    result = Measured([], [], recorder.volumes)
    for step in range(CHECKED):
        with recorder if step == CHECKED - 1 else contextlib.nullcontext():
            recorder.in_forward = True
            loss = contender.loss(next(batches))
            recorder.in_forward = False
            result.norms.append(contender.update(loss))
        result.losses.append(loss.item())
    return result


def _timed_step(contender: Contender, batch: Tensor, measured: Measured) -> None:
    dist.barrier()
    start, cpu_start = time.perf_counter(), time.process_time()
    contender.update(contender.loss(batch))
    measured.seconds.append(time.perf_counter() - start)
    measured.cpu_seconds.append(time.process_time() - cpu_start)


@dataclass
class Row:
    """One contender, all processes together."""

    name: str
    peer: str  # whom it is compared with
    losses: list[float]  # of the checked steps, mean over processes
    gradient_norms: list[float]
    loss_error: float  # largest relative difference from the peer's, over checked steps and processes
    norm_error: float
    collectives: int  # launched by a process in a step
    sent_bytes: float  # by a process in a step
    of_peer: float
    milliseconds: float  # median; a step lasts until the slowest process is done
    time_of_peer: list[float]  # first quartile, median and third quartile of the ratio within a round
    cpu_milliseconds: float  # median; of all processes, without what they wait
    cpu_of_peer: list[float]  # as time_of_peer
    volumes: list[dict[str, Any]]  # by phase, group and operation


def rows(processes: list[dict[str, Measured]]) -> list[Row]:
    """What was measured, compared.

    Raises:
        ValueError: if somebody does not train the same model, or processes do not send alike.
    """
    seconds = {name: [max(s) for s in zip(*(p[name].seconds for p in processes), strict=True)] for name in CONTENDERS}
    cpu = {name: [sum(s) for s in zip(*(p[name].cpu_seconds for p in processes), strict=True)] for name in CONTENDERS}
    sent = {name: sum(v.sent for v in processes[0][name].volumes.values()) for name in CONTENDERS}
    result = []
    for name, (_, peer) in CONTENDERS.items():
        own = [p[name] for p in processes]
        if any(m.volumes != own[0].volumes for m in own):
            raise ValueError(f"{name}: the processes do not send alike: {[dict(m.volumes) for m in own]}")
        row = Row(
            name=name,
            peer=peer,
            losses=[statistics.mean(step) for step in zip(*(m.losses for m in own), strict=True)],
            gradient_norms=own[0].norms,
            loss_error=max(_difference(p[name].losses, p[peer].losses) for p in processes),
            norm_error=max(_difference(p[name].norms, p[peer].norms) for p in processes),
            collectives=sum(v.calls for v in own[0].volumes.values()),
            sent_bytes=sent[name],
            of_peer=sent[name] / sent[peer],
            milliseconds=statistics.median(seconds[name]) * 1e3,
            time_of_peer=_ratios(seconds[name], seconds[peer]),
            cpu_milliseconds=statistics.median(cpu[name]) * 1e3,
            cpu_of_peer=_ratios(cpu[name], cpu[peer]),
            volumes=[
                {"phase": phase, "group": group, "operation": operation, **asdict(volume)}
                for (phase, group, operation), volume in own[0].volumes.items()
            ],
        )
        if max(row.loss_error, row.norm_error) > TOLERANCE:
            raise ValueError(
                f"{name} does not train the model that {peer} trains: losses {row.losses}, gradient norms "
                f"{row.gradient_norms}; the peer's differ by {row.loss_error:.1e} and {row.norm_error:.1e}"
            )
        result.append(row)
    return result


def _difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """First quartile, median and third quartile."""
    return statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4, method="inclusive")


def agreement_table(measured: list[Row]) -> Table:
    """That everybody trains the same model."""
    table = _table("First steps: losses, gradient norm, largest relative difference from the peer")
    for column in (*(f"loss {step + 1}" for step in range(CHECKED)), "differ", f"norm {CHECKED}", "differ"):
        table.add_column(column, justify="right")
    for row in measured:
        losses = [f"{loss:.6f}" for loss in row.losses]
        norm = f"{row.gradient_norms[-1]:.6f}"
        table.add_row(row.name, *losses, f"{row.loss_error:.0e}", norm, f"{row.norm_error:.0e}")
    return table


def comparison_table(measured: list[Row]) -> Table:
    """Who sends how much and takes how long."""
    table = _table("Per step: collectives and MB sent of one process, time, CPU time of all")
    for column in ("calls", "MB", "ratio", "ms", "ratio", "", "CPU ms", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in measured:
        first, median, third = row.time_of_peer
        table.add_row(
            row.name,
            str(row.collectives),
            f"{row.sent_bytes / MB:.2f}",
            f"{row.of_peer:.1%}",
            f"{row.milliseconds:.0f}",
            f"{median:.2f}",
            f"{first:.2f}–{third:.2f}",
            f"{row.cpu_milliseconds:.0f}",
            f"{row.cpu_of_peer[1]:.2f}",
        )
    return table


def volume_table(measured: list[Row]) -> Table:
    """Who sends what."""
    table = _table("MB sent per step and process, by phase, group and operation")
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in measured:
        table.add_column(row.name, justify="right")
        for volume in row.volumes:
            key = volume["phase"], volume["group"], volume["operation"]
            cells.setdefault(key, {})[row.name] = f"{volume['sent'] / MB:.3f}"
    for phase in PHASES:
        table.add_row(phase, style="bold")
        for key in sorted(key for key in cells if key[0] == phase):
            table.add_row("  " + " ".join(key[1:]), *(cells[key].get(row.name, "") for row in measured))
    return table


def _table(title: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True
    )
    table.add_column("", no_wrap=True)
    return table


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python benchmarks/vs_deepspeed.py", description=__doc__)
    parser.add_argument("--layers", type=int, default=8, help="blocks (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="model width (default: %(default)s)")
    parser.add_argument("--sequence", type=int, default=128, help="tokens of a sample (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="samples of a data rank (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=4, help="of a layer (default: %(default)s)")
    parser.add_argument("--every", type=int, default=1, help="experts in every n-th block (default: %(default)s)")
    parser.add_argument(
        "--reduce-to-owners", action="store_true", help="DeepSpeed's use_multi_rank_bucket_allreduce=false"
    )
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    tokens, grain = arguments.batch * arguments.sequence, 8 * arguments.experts
    if tokens % grain:  # ours rounds the capacity up to a multiple of 8, DeepSpeed's does not
        parser.error(f"batch × sequence = {tokens} is not a multiple of 8 × experts = {grain}: capacities would differ")
    if arguments.every > arguments.layers:
        parser.error(f"with every={arguments.every}, none of {arguments.layers} blocks has experts")
    require_deepspeed()
    problem = Problem(
        ModelConfig(
            layers=arguments.layers,
            hidden=arguments.hidden,
            heads=4,
            ffn=4 * arguments.hidden,
            sequence_length=arguments.sequence,
            vocab_size=arguments.vocabulary,
        ),
        # A capacity of what an even load needs, so that tokens are dropped, by a rule that both have.
        MoEConfig(
            num_experts=arguments.experts,
            every=arguments.every,
            capacity_factor=1.0,
            gating="deepspeed_top1",
            random_token_selection=False,
        ),
        arguments.batch,
        {"use_multi_rank_bucket_allreduce": False} if arguments.reduce_to_owners else {},
    )
    measured = rows(WorkerPool().run(DEGREES.world_size, measure, problem, arguments.rounds, timeout=3600))
    console = Console()
    for table in (agreement_table, comparison_table, volume_table):
        console.print(table(measured), "")
    if arguments.out is not None:
        facts = surroundings(torch.device("cpu"), "deepspeed") | {"processes": DEGREES.world_size, "threads": 1}
        settings = asdict(problem) | {"rounds": arguments.rounds}
        everything = facts | settings | {"rows": [asdict(row) for row in measured]}
        arguments.out.write_text(json.dumps(everything, indent=2) + "\n")


def require_deepspeed() -> None:
    """Prepares the environment of the processes to come, in which DeepSpeed will be imported.

    Raises:
        SystemExit: if it, or what it needs, is missing.
    """
    require("deepspeed")
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Its communication backend is compiled when first used. ninja comes with it, but not onto the path.
    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    if shutil.which("c++") is None:
        raise SystemExit("DeepSpeed compiles its communication backend when first used: it needs a C++ compiler (c++)")


if __name__ == "__main__":
    main()
