"""Kills, stops and cuts off processes of real runs at random moments; nothing may be lost, hang, or be left over.

``TEDLAB_CHAOS_MOMENTS`` (4) says how many, ``TEDLAB_CHAOS_SEED`` (drawn, and printed) which. What a dead network link
does is emulated: from then on one process's next collective never starts, and its peers wait for it.
"""

import contextlib
import csv
import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tedlab import checkpoint
from tedlab.config import TrainConfig
from tedlab.launch.locks import RUN_LOCK, Lock, run_directory
from tedlab.validate import complete
from tests.certify.runs import composed
from tests.pool import WorkerPool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MOMENTS = int(os.environ.get("TEDLAB_CHAOS_MOMENTS", "4"))
SEED = int(os.environ.get("TEDLAB_CHAOS_SEED", random.SystemRandom().randrange(10**6)))
TIMEOUT_S = 4
GRACE_S = 30  # after the timeout everything has to be over
RANKS = 2
STEPS = 120
EVERY = 4
LATEST = 60  # no run is disturbed from this step on: it might end of itself before
KINDS = ("kill", "stop", "cut", "kill the launcher")


# ---- what runs in the launcher's process, and in its workers ---------------------------------------------------------


def start(config: TrainConfig, control: Path) -> None:
    """``tedlab train`` without the start of Python: forked, it takes a fraction of the time."""
    from tedlab.launch.launcher import launch

    # The server that this process comes from is the launcher's, too, which asks for one, as does every new process.
    for server in (multiprocessing.forkserver, multiprocessing.forkserver._forkserver):
        server.ensure_running = lambda: None
    shown = (control / "shown").open("w")
    for stream in (sys.stdout, sys.stderr):
        os.dup2(shown.fileno(), stream.fileno())
    tempfile.tempdir = str(control / "tmp")
    (control / "launcher.pid").write_text(str(os.getpid()))
    try:
        with run_directory(Path(config.output_dir)) as lock:
            launch(train, config, RANKS, lock)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def train(config: TrainConfig) -> dict[str, Any]:
    """A run, in each of its processes."""
    from tedlab.run import run
    from tedlab.strategy import TEDStrategy

    control, rank = Path(config.output_dir).with_suffix(".control"), os.environ["RANK"]
    (control / f"{rank}.pid").write_text(str(os.getpid()))
    setup_environment = TEDStrategy.setup_environment

    def with_link(strategy: TEDStrategy) -> None:
        setup_environment(strategy)
        strategy.topology.comm.register_hook(lambda call, event: link())

    def link() -> None:
        while (control / f"{rank}.cut").exists():
            time.sleep(0.1)

    TEDStrategy.setup_environment = with_link  # type: ignore[method-assign]
    return run(config)


# ---- what disturbs it ------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What was tried and compared."""

    moments: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    while_training: int = 0
    finished: int = 0
    checkpoints: int = 0
    losses: int = 0
    slowest_s: float = 0.0


class Chaos:
    """One run after another in one directory, each disturbed and then resumed, until it is done; then the next.

    Args:
        config: of the run.
        draw: everything random.
        expected: losses and checkpoints of the run that nobody disturbs.
    """

    def __init__(self, config: TrainConfig, draw: random.Random, expected: "Expected") -> None:
        self.config, self.draw, self.expected = config, draw, expected
        self.directory = Path(config.output_dir)
        self.control = self.directory.with_suffix(".control")
        self.tally = Tally()
        self._seen: set[tuple[str, int]] = set()

    def disturb(self, kind: str) -> None:
        """One moment of one run, and what must be true after it."""
        if self._last_step() >= LATEST:
            self.finish()
        process = self._start()
        victim = self.draw.randrange(RANKS)
        trains = self.draw.random() < 0.8
        if trains:
            step = self._last_step()
            self._wait(lambda: self._last_step() > step or not process.is_alive(), 60)
            time.sleep(self.draw.uniform(0, 0.8))
        else:
            self._wait(lambda: len(self._pids()) == RANKS, 60)
            time.sleep(self.draw.uniform(0, 2))
        ended = not process.is_alive()
        began = time.monotonic()
        pids = self._pids()
        target = process.pid if kind == "kill the launcher" else pids.get(victim)
        if kind == "cut":
            (self.control / f"{victim}.cut").touch()
        elif target is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(target, signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
        self._wait(lambda: not process.is_alive() and not self._alive(), TIMEOUT_S + GRACE_S, kind)
        process.join()
        self.tally.slowest_s = max(self.tally.slowest_s, time.monotonic() - began)
        self.tally.moments[kind] += 1
        self.tally.while_training += trains and not ended
        shown = (self.control / "shown").read_text()
        if kind in ("stop", "cut") and trains and not ended and process.exitcode:
            message = f"process {1 - victim}: waits for process {victim} in "
            assert message in shown, f"{kind} {victim}: {shown}"
        self._check(done=process.exitcode == 0)

    def finish(self) -> None:
        """Lets the run end undisturbed, after which nothing is left over."""
        process = self._start()
        process.join(120)
        assert process.exitcode == 0, (self.control / "shown").read_text()
        self._check(done=True)

    def _start(self) -> Any:
        self.control.mkdir(exist_ok=True)
        (self.control / "tmp").mkdir(exist_ok=True)
        for file in self.control.glob("*.*"):
            file.unlink()
        last = self.directory / "checkpoints" / "last.ckpt"
        config = replace(self.config, ckpt_path=str(last) if last.exists() else None)
        process = multiprocessing.get_context("forkserver").Process(target=start, args=(config, self.control))
        process.start()
        return process

    def _check(self, done: bool) -> None:
        """Everything on disk is as if nobody had disturbed it; a run that is done has left nothing else."""
        lock = Lock.on(self.directory / RUN_LOCK)
        assert lock is not None, "the directory is held by nobody's process"
        lock.close()
        (self.directory / RUN_LOCK).unlink()
        losses = losses_in(self.directory)
        assert losses == {step: self.expected.losses[step] for step in losses}
        self.tally.losses += len(losses)
        self._check_checkpoints()
        if done:
            assert losses.keys() == self.expected.losses.keys()
            left = [
                *(self.directory / "checkpoints").glob("*.partial"),
                *(self.directory / "checkpoints").glob("*.old"),
            ]
            left += (self.control / "tmp").glob("tedlab-*")
            assert left == []
            assert (self.directory / "summary.json").exists()
            self.tally.finished += 1
            self.directory.rename(self.directory.with_name(f"{self.directory.name}.{self.tally.finished}"))
            self._seen.clear()

    def _check_checkpoints(self) -> None:
        folder = self.directory / "checkpoints"
        for path in [*folder.glob("step_*.ckpt"), *folder.glob("last.ckpt")]:
            key = path.name, path.stat().st_mtime_ns
            if key in self._seen:
                continue
            self._seen.add(key)
            step = checkpoint.read_meta(path)["global_step"]
            assert self.expected.differing(path, step) == []
            self.tally.checkpoints += 1

    def _last_step(self) -> int:
        return max(losses_in(self.directory), default=-1)

    def _pids(self) -> dict[int, int]:
        found = {}
        for file in self.control.glob("*.pid"):
            if file.stem.isdigit() and (text := file.read_text()):
                found[int(file.stem)] = int(text)
        return found

    def _alive(self) -> list[int]:
        return [pid for pid in self._pids().values() if Path(f"/proc/{pid}").exists()]

    def end_all(self) -> None:
        """Ends what should have ended."""
        for file in self.control.glob("*.pid"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(file.read_text()), signal.SIGKILL)

    def _wait(self, condition: Any, seconds: float, what: str = "a step") -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                shown = (self.control / "shown").read_text()
                self.end_all()
                raise AssertionError(f"waited {seconds} s in vain after: {what}\n{shown}")
            time.sleep(0.05)


@dataclass
class Expected:
    """The run that nobody disturbs."""

    losses: dict[int, str]
    directory: Path
    tensors: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def differing(self, path: Path, step: int) -> list[str]:
        """Tensors of a checkpoint that are not, to the bit, those of the same step here. It is verified, too."""
        if step not in self.tensors:
            self.tensors[step] = tensors_in(self.directory / "checkpoints" / f"step_{step}.ckpt")
        ours, theirs = tensors_in(path), self.tensors[step]
        assert len(ours) > 10
        return [name for name in ours.keys() | theirs.keys() if not torch.equal(ours[name], theirs[name])]


def tensors_in(path: Path) -> dict[str, Tensor]:
    checkpoint.verify(path)
    stored = checkpoint.stored_tensors(path)
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    checkpoint.read(tensors, path)
    return tensors


def losses_in(directory: Path) -> dict[int, str]:
    """By step, with every digit; a line that is being written does not count."""
    try:
        lines = (directory / "metrics.csv").read_text().rpartition("\n")[0].splitlines()
    except FileNotFoundError:
        return {}
    return {int(row["step"]): row["train/loss"] for row in csv.DictReader(lines) if row.get("train/loss")}


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    (tmp_path / "corpus.txt").write_text("".join(f"line {n} of the corpus\n" for n in range(400)))
    config = composed(
        *("data=text", f"data.path={tmp_path}/corpus.txt", f"data.cache_dir={tmp_path}/cache"),
        *("model.layers=2", "model.hidden=16", "model.ffn=32", "model.heads=2", "model.sequence_length=16"),
        *("moe.num_experts=2", "data.batch_size=4", "data.micro_batch_size=2", "data.validation_samples=4"),
        *("data.validation_fraction=0.2", "parallel=ep2", f"trainer.max_steps={STEPS}", f"validate_every={STEPS}"),
        *("trainer.log_every_n_steps=1", f"checkpoint.every={EVERY}", "checkpoint.keep=-1", "seed=1"),
        *(f"comm.timeout_s={TIMEOUT_S}", f"router_picture_every={STEPS}"),
    )
    return complete(replace(config, output_dir=str(tmp_path / "undisturbed")))


def test_nothing_is_lost_hangs_or_is_left_over_whenever_a_process_is_killed_stopped_or_cut_off(
    pool: WorkerPool, config: TrainConfig, tmp_path: Path
) -> None:
    undisturbed = Chaos(config, random.Random(SEED), Expected({}, Path(config.output_dir)))
    process = undisturbed._start()
    process.join(200)
    assert process.exitcode == 0, (undisturbed.control / "shown").read_text()
    expected = Expected(losses_in(undisturbed.directory), undisturbed.directory)
    assert len(expected.losses) == STEPS
    draw = random.Random(SEED)
    kinds = [KINDS[n % len(KINDS)] for n in range(MOMENTS)]
    draw.shuffle(kinds)
    lines = []
    for name in ("sync", "async"):
        settings = replace(config.checkpoint, async_save=name == "async")
        ours = replace(config, output_dir=str(tmp_path / name), checkpoint=settings)
        lines.append(Chaos(ours, random.Random(draw.random()), expected))

    def follow(line: Chaos, kinds: list[str]) -> None:
        for kind in kinds:
            line.disturb(kind)
        line.finish()

    print(f"TEDLAB_CHAOS_SEED={SEED}")
    with ThreadPoolExecutor(2) as threads:  # hung runs sleep: two lines share the cores well
        work = [threads.submit(follow, line, kinds[n::2]) for n, line in enumerate(lines)]
        try:
            for future in work:
                future.result()
        except BaseException:
            for line in lines:
                line.end_all()
            raise
    for line in lines:
        print(line.directory.name, line.tally)
