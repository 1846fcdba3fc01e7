"""``tedlab train`` as a user types it: what a run leaves behind, resuming, sweeps, torchrun, own data."""

import csv
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from tedlab.checkpoint import read_meta
from tedlab.comm import TRAINING_PHASES
from tedlab.commands.continued import command_to_continue
from tedlab.compare.runs import read_runs
from tedlab.config import TrainConfig
from tests.commands import forked, run_forked
from tests.launch.test_launch import descendants
from tests.offline_wandb import read_offline_run
from tests.pool import WorkerPool

pytestmark = pytest.mark.slow

STEPS = 6
CHECKPOINT = 4  # step of the one that is kept beside the last
TOLERANCE = 1e-9
WORDS = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "return", "print", "range"]


@dataclass(frozen=True)
class Place:
    """A working directory with two corpora, a cache, and what every command of this file has in common."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Of every command."""
        outside = ("SLURM_", "TORCHELASTIC_", "LOCAL_", "WANDB_", "MASTER_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(outside)}
        return environment | {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "WANDB_SILENT": "true"}

    def python(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """``python <arguments>`` here; stdout and stderr apart."""
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=150,
            env=self.environment,
            check=False,
        )

    def command(self, module: str, *arguments: str, **more: str) -> "subprocess.CompletedProcess[str]":
        """The same for ``python -m <module> <arguments>``, except that Python has started and imported already.

        ``more`` is what else is in the environment.
        """
        return run_forked(module, arguments, self.folder, {**self.environment, **more}, timeout=150)

    def small(self, *overrides: str) -> list[str]:
        values = {
            "data": "text",
            "data.path": "corpus",
            "data.cache_dir": str(self.folder / "cache"),
            "data.batch_size": "8",
            "data.micro_batch_size": "2",
            "data.validation_samples": "8",
            "data.validation_fraction": "0.2",
            "model.hidden": "32",
            "model.ffn": "64",
            "model.sequence_length": "16",
            "optim.warmup_steps": "2",
            "trainer.precision": "64-true",
            "trainer.max_steps": str(STEPS),
            "trainer.log_every_n_steps": "1",
            "checkpoint.every": str(CHECKPOINT),
            "validate_every": "3",
        }
        return [*(f"{key}={value}" for key, value in values.items()), *overrides]

    def train(self, directory: str, *overrides: str) -> "Run":
        return self.finished(
            directory, self.command("tedlab.train", *self.small(f"hydra.run.dir={directory}", *overrides))
        )

    def finished(self, directory: str, done: "subprocess.CompletedProcess[str]") -> "Run":
        assert done.returncode == 0, done.stdout + done.stderr
        run = Run(self.folder / directory, done.stdout, done.stderr)
        run.check_ledger()
        return run

    def generate(self, run: str, *arguments: str) -> str:
        done = self.command("tedlab", "generate", f"run={run}", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@dataclass(frozen=True)
class Run:
    """A finished run."""

    directory: Path
    shown: str = ""
    progress: str = ""

    @property
    def summary(self) -> dict:
        return json.loads((self.directory / "summary.json").read_text())

    @property
    def rows(self) -> list[dict[str, str]]:
        """Of ``metrics.csv``; none before there is one."""
        file = self.directory / "metrics.csv"
        return [*csv.DictReader(file.read_text().splitlines())] if file.exists() else []

    def check_ledger(self) -> None:
        """In every run that a test makes: what was communicated is what the closed form says, in every process."""
        summary = self.summary
        assert summary["comm/predicted_difference_bytes"] == summary["comm/predicted_difference_calls"] == 0
        assert summary["comm/steps"] > 0
        assert summary["router/recompute_flips"] == 0

    def column(self, name: str) -> dict[int, float]:
        """Value by step, which counts the optimizer steps done."""
        return {int(row["step"]): float(row[name]) for row in self.rows if row.get(name)}


def write_words(path: Path, seed: int) -> None:
    draw = random.Random(seed)
    path.write_text("\n".join(" ".join(draw.choices(WORDS, k=8)) for _ in range(60)))


def assert_close(ours: Sequence[float], theirs: Sequence[float], tolerance: float = TOLERANCE) -> None:
    assert len(ours) == len(theirs) > 0
    assert list(ours) == pytest.approx(list(theirs), rel=tolerance, abs=0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, pool: WorkerPool) -> Place:  # commands are forked from its server
    folder = tmp_path_factory.mktemp("place")
    (folder / "corpus").mkdir()
    for number in range(8):
        write_words(folder / "corpus" / f"{number}.txt", number)
    draw = random.Random(0)
    rows = [{"id": n, "content": " ".join(draw.choices(WORDS, k=30))} for n in range(200)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Place(folder)


@pytest.fixture(scope="module")
def run(place: Place) -> Run:
    """The run that most claims are about: two tensor ranks, uninterrupted, with W&B and TensorBoard if there is."""
    loggers = "logger=many" if find_spec("tensorboard") else "logger=wandb"
    settings = ("hydra.run.dir=run", "parallel=tp2", loggers, "validate_every=4", "comm.ledger.every=2")
    settings += ("logger.wandb.references=true",)
    return place.finished("run", place.command("tedlab.train", *place.small(*settings)))


# ---- what is left behind --------------------------------------------------------------------------------------------


def test_the_run_directory_is_complete(run: Run) -> None:
    names = {path.name for path in run.directory.iterdir()}
    assert names >= {"config.yaml", "metrics.csv", "summary.json", "loss.png", "checkpoints", "wandb"}
    assert names >= {"router_load.png", "router_load.json", "router_trace.npz"}
    assert len(list((run.directory / "wandb").glob("offline-run-*"))) == 1
    assert len(list((run.directory / "wandb").glob("offline-run-*/files/media/images/router/*.png"))) == 1
    kept = {path.name for path in (run.directory / "checkpoints").iterdir()}
    assert kept == {"last.ckpt", f"step_{CHECKPOINT}.ckpt"}  # nothing left over from replacing the last one
    assert read_meta(run.directory / "checkpoints" / "last.ckpt")["global_step"] == STEPS
    assert read_meta(run.directory / "checkpoints" / f"step_{CHECKPOINT}.ckpt")["global_step"] == CHECKPOINT


def test_the_configuration_loads_back(run: Run) -> None:
    config = OmegaConf.to_object(OmegaConf.merge(TrainConfig, OmegaConf.load(run.directory / "config.yaml")))
    assert isinstance(config, TrainConfig)
    assert config.model.hidden == 32
    assert config.model.vocab_size == 256
    assert config.trainer["accumulate_grad_batches"] == 4
    assert config.output_dir == str(run.directory)
    assert "${" not in (run.directory / "config.yaml").read_text()


def test_metrics_hold_every_logged_step_and_every_validation(run: Run) -> None:
    losses = run.column("train/loss")
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] - 0.2  # it learns
    assert losses[1] == pytest.approx(5.6, abs=0.4)  # about ln 256
    assert all(0 < norm < 100 for norm in run.column("train/gradient_norm").values())
    assert list(run.column("val/loss")) == [4, 6]  # and the closing one, after the same steps as the last of training
    assert run.column("tokens") == {step: step * 8 * 16 for step in range(1, STEPS + 1)}
    assert all(value > 0 for value in run.column("perf/tokens_per_second").values())


def test_wandb_knows_the_run_before_its_first_step_and_how_it_ended(run: Run) -> None:
    logged = read_offline_run(run.directory)
    kinds = [kind for kind, _ in logged.events]
    assert "config" not in kinds[kinds.index("history") :]
    config = yaml.safe_load((run.directory / "config.yaml").read_text())
    del config["certificate"]  # there the verdict stands in its place
    assert {key: logged.config[key] for key in config} == config
    assert logged.config["layout"] == run.summary["layout"]
    assert logged.config["parameters"]["total"] == run.summary["parameters/total"]
    assert {"versions", "git_revision"} <= logged.config.keys()
    assert logged.name.startswith("tp2 ")
    assert logged.name == logged.name.strip()
    assert len(logged.name) <= 128
    assert re.fullmatch(r"runs/main/20\d\d-\d\d-\d\d_\d\d-\d\d-\d\d", logged.group)
    assert set(logged.tags) == {"model=gpt_tiny", "parallel=tp2", "comm=none"}
    assert logged.exit_code == 0
    assert not logged.preempting
    assert logged.summary["state"] == run.summary["state"] == "finished"


def test_wandb_draws_the_loads_of_experts_and_what_was_sent(run: Run) -> None:
    """As charts of its own: a preset and a table. The table of loads is what ``router_load.json`` holds."""
    logged = read_offline_run(run.directory)
    assert logged.charts == {
        "router/load_map": "wandb/confusion_matrix/v1",
        "charts/sent": "wandb/bar/v0",
        "charts/memory": "wandb/bar/v0",
    }
    files = (run.directory / "wandb").glob("offline-run-*/files/media/table/**/*.table.json")
    tables = {file.name.partition("_table_")[0]: json.loads(file.read_text()) for file in files}
    loads = json.loads((run.directory / "router_load.json").read_text())
    assert [load for _, _, load in tables["load_map"]["data"]] == [x for row in loads["relative_load"] for x in row]
    sent = sum(size for _, size in tables["sent"]["data"])
    training = r"comm/(forward|recompute|backward|optimizer)/\w+/\w+/wire_bytes"
    keys = [key for key in run.summary if re.fullmatch(training, key)]
    assert sent == pytest.approx(sum(run.summary[key] for key in keys) / STEPS / 2**20)


def test_wandb_knows_where_each_checkpoint_lies_and_has_no_copy(run: Run) -> None:
    identifier = next((run.directory / "wandb").glob("offline-run-*")).name.rpartition("-")[2]
    logged = [entries for name, entries in read_offline_run(run.directory).artifacts if name.startswith("checkpoint")]
    kept = [run.directory / "checkpoints" / name for name in (f"step_{CHECKPOINT}.ckpt", "last.ckpt")]
    files = [[path for path in folder.rglob("*") if path.is_file()] for folder in kept]
    assert logged == [
        {str(path.relative_to(folder)): path.as_uri() for path in paths}
        for folder, paths in zip(kept, files, strict=True)
    ]
    names = {name for name, _ in read_offline_run(run.directory).artifacts if name.startswith("checkpoint")}
    assert names == {f"checkpoint-{identifier}"}


def test_wandb_and_metrics_have_one_row_for_a_step_with_the_same_values(run: Run) -> None:
    logged = read_offline_run(run.directory)
    rows = [(row["trainer/global_step"], row) for row in logged.rows]
    trained = [(step, row["tokens"], row["train/loss"]) for step, row in rows if "train/loss" in row]
    assert [step for step, _, _ in trained] == [*range(1, STEPS + 1)]
    assert {step: tokens for step, tokens, _ in trained} == run.column("tokens")
    assert {step: loss for step, _, loss in trained} == run.column("train/loss")
    assert {step: row["val/loss"] for step, row in rows if "val/loss" in row} == run.column("val/loss")
    assert "tokens" in logged.axes


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tedlab[tensorboard]")
def test_tensorboard_and_metrics_have_the_same_values(run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.directory / "tensorboard")).Reload()
    for name in ("train/loss", "val/loss"):
        logged = {event.step: event.value for event in events.Scalars(name)}
        assert logged == pytest.approx(run.column(name), rel=1e-6)  # it keeps fp32


def test_communication_of_a_step_is_logged_when_it_changes(run: Run) -> None:
    """Here it never does: one row, of the average step, and in the summary the totals."""
    logged = read_offline_run(run.directory)
    totals = {name: v for name, v in run.summary.items() if name.startswith("comm/") and name.count("/") == 4}
    training = {name: value for name, value in totals.items() if name.split("/")[1] in TRAINING_PHASES}
    assert len(training) >= 9
    for name, total in training.items():
        assert run.column(name) == {2: total / STEPS}, name
        assert [row["trainer/global_step"] for row in logged.rows if name in row] == [2], name
        assert logged.summary[name] == total


def test_the_summary_is_flat_and_says_everything(run: Run) -> None:
    summary = run.summary
    for key in ("train/loss", "val/loss", "val/bits_per_byte", "baseline/bigram_loss", "perf/tokens_per_second"):
        assert isinstance(summary[key], float), key
        assert summary[key] > 0, key
    assert summary["train/loss"] == run.column("train/loss")[STEPS]
    assert summary["val/loss"] == pytest.approx(run.column("val/loss")[STEPS])
    assert summary["parameters/total"] > summary["parameters/active"] > 0
    assert summary["optim/tile"] == 1_800_000  # and config.yaml says auto
    assert "tile: auto" in (run.directory / "config.yaml").read_text()
    assert summary["flops/per_token"] > 6 * 32 * 256  # of the output alone
    flops_per_second = summary["flops/per_token"] * summary["perf/tokens_per_second"]
    assert summary["perf/tflops"] == pytest.approx(flops_per_second / 2 / 1e12)  # of each of two processes
    for value in ("load_cv", "max_violation", "entropy", "dead_experts", "dropped_fraction", "balance_loss", "z_loss"):
        assert summary[f"router/{value}"] == pytest.approx(run.column(f"router/{value}")[STEPS]), value
    for category in ("parameters", "gradients", "optimizer"):
        assert 0 < summary[f"memory/{category}_bytes"] < summary["memory/peak_bytes"]
    assert summary["memory/peak_bytes"] == max(summary["memory/peak_bytes_by_rank"]) > 2**20
    assert len(summary["memory/peak_bytes_by_rank"]) == 2
    degrees = {"world_size": 2, "tensor": 2, "expert": 1, "expert_tensor": 2, "data": 1, "expert_data": 1}
    assert summary["layout"] == degrees | {"sequence": False, "order": "expert"}
    assert summary["comm/steps"] == STEPS
    assert summary["comm/forward/tensor/all_reduce/calls"] > STEPS
    assert summary["versions"].keys() >= {"python", "torch", "lightning", "tedlab"}
    assert summary["choices"]["parallel"] == "tp2"
    assert summary["steps"] == STEPS


def test_the_loss_curve_is_a_picture(run: Run) -> None:
    from matplotlib.image import imread

    assert (run.directory / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(run.directory / "loss.png")
    assert min(pixels.shape[:2]) > 400
    assert pixels[..., :3].std() > 0.05  # something is drawn


def test_the_closing_table_and_the_progress(run: Run) -> None:
    for text in ("validation loss", "bigram model", "2 processes: tensor 2", "tedlab generate run="):
        assert text in run.shown
    for text in ("tokens/s", "TFLOP/s per process", "expert load", "gradients"):
        assert text in run.shown
    assert f"{run.summary['val/loss']:.4f} nats/token" in run.shown
    assert "equal to the closed form, call for call and byte for byte" in run.shown
    assert len(run.shown.splitlines()) < 40, run.shown
    assert all(f"step {step}/{STEPS}  loss" in run.progress for step in range(1, STEPS + 1))
    for noise in ("Warning", "Traceback", "wandb:"):
        assert noise not in run.shown + run.progress, run.shown + run.progress


def test_text_is_generated_from_the_run(place: Place, run: Run) -> None:
    text = place.generate(str(run.directory), "prompt=alpha beta", "tokens=20", "temperature=0")
    assert text.startswith("alpha beta")
    assert len(text) > len("alpha beta") + 10


# ---- other ways to the same losses ----------------------------------------------------------------------------------


def test_a_run_resumed_in_another_layout_goes_on_with_the_same_losses(place: Place, run: Run) -> None:
    """From two tensor ranks to two expert ranks, which read different samples and accumulate half as often."""
    checkpoint = run.directory / "checkpoints" / f"step_{CHECKPOINT}.ckpt"
    resumed = place.train("resumed", "parallel=ep2", "logger=none", f"ckpt_path={checkpoint}")
    losses, expected = resumed.column("train/loss"), run.column("train/loss")
    assert list(losses) == [CHECKPOINT + 1, CHECKPOINT + 2]
    assert_close([*losses.values()], [expected[step] for step in losses])
    assert_close([resumed.summary["val/loss"]], [run.summary["val/loss"]])
    rates, expected_rates = resumed.column("train/learning_rate"), run.column("train/learning_rate")
    assert_close([*rates.values()], [expected_rates[step] for step in rates])


@pytest.mark.exhaustive
def test_torchrun_runs_in_place(place: Place, run: Run) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend=c10d"]
    arguments = place.small("parallel=tp2", "logger=none", "hydra.run.dir=torchrun")
    done = place.python(*torchrun, "--rdzv-endpoint=localhost:0", "-m", "tedlab.train", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_close([*Run(place.folder / "torchrun").column("train/loss").values()], [*run.column("train/loss").values()])
    assert done.stdout.count("validation loss") == 1  # one process reports


@pytest.fixture(scope="module")
def sweep(place: Place) -> "subprocess.CompletedProcess[str]":
    """Three jobs, the first of which is wrong: four expert ranks cannot share two experts."""
    overrides = ["parallel=ep4,single,tp2", "moe.num_experts=2", "experiment_name=my sweep", "hydra.sweep.dir=sweep"]
    return place.command("tedlab.train", "-m", *place.small(*overrides))


def test_a_sweep_goes_on_after_a_wrong_job_and_fails_in_the_end(
    place: Place, sweep: "subprocess.CompletedProcess[str]"
) -> None:
    assert sweep.returncode not in (0, None)
    assert "moe.num_experts (2) is not divisible by parallel.expert (4)" in sweep.stdout + sweep.stderr
    finished = [(place.folder / "sweep" / job / "summary.json").exists() for job in "012"]
    assert finished == [False, True, True]


def test_the_jobs_of_a_sweep_are_runs_of_their_own_with_equal_losses(
    place: Place, sweep: "subprocess.CompletedProcess[str]"
) -> None:
    single, tensor = (Run(place.folder / "sweep" / job) for job in "12")
    assert (single.summary["choices"]["parallel"], tensor.summary["choices"]["parallel"]) == ("single", "tp2")
    assert_close([*tensor.column("train/loss").values()], [*single.column("train/loss").values()])
    assert len(single.column("train/loss")) == STEPS


def test_the_jobs_of_a_sweep_are_wandb_runs_of_one_group(
    place: Place, sweep: "subprocess.CompletedProcess[str]"
) -> None:
    files = [list((place.folder / "sweep" / job).glob("wandb/offline-run-*/run-*.wandb")) for job in "12"]
    assert [len(found) for found in files] == [1, 1]
    assert len({file.name for (file,) in files}) == 2
    runs = [read_offline_run(place.folder / "sweep" / job) for job in "12"]
    assert [run.group for run in runs] == ["sweep", "sweep"]  # its directory: of this sweep, and of no other
    assert [run.config["experiment_name"] for run in runs] == ["my sweep", "my sweep"]


# ---- interrupted -----------------------------------------------------------------------------------------------------


def test_an_interrupted_run_says_so_in_its_summary_and_to_wandb(place: Place) -> None:
    arguments = place.small("parallel=tp2", "hydra.run.dir=interrupted", "trainer.max_steps=100000")
    directory = place.folder / "interrupted"
    with forked("tedlab.train", arguments, place.folder, place.environment) as (process, shown):
        deadline = time.monotonic() + 100
        while len(Run(directory).rows) < 2 * CHECKPOINT:
            assert time.monotonic() < deadline
            assert process.exitcode is None
            time.sleep(0.2)
        assert process.pid is not None
        workers = descendants(process.pid)
        assert len(workers) >= 2
        process.terminate()  # the command alone, as a scheduler does
        process.join(40)
        assert process.exitcode == 128 + signal.SIGTERM
        while workers & descendants(1):
            assert time.monotonic() < deadline + 60
            time.sleep(0.2)
        told = (shown / "stdout").read_text() + (shown / "stderr").read_text()
    assert "Traceback" not in told, told
    assert f"ckpt_path={directory / 'checkpoints' / 'last.ckpt'}" in told
    assert read_meta(directory / "checkpoints" / "last.ckpt")["global_step"] % CHECKPOINT == 0
    run = Run(directory)
    summary, logged = run.summary, read_offline_run(directory)
    assert (summary["state"], summary["reason"]) == ("interrupted", "SIGTERM")
    assert summary["steps"] >= max(run.column("train/loss"))
    assert summary["train/loss"] == [*run.column("train/loss").values()][-1]
    assert summary["parameters/total"] > 0
    assert logged.exit_code == 1
    assert logged.preempting
    assert logged.summary["state"] == "interrupted"
    ((compared,), _) = read_runs([directory], stopped=True)
    assert compared.name == f"interrupted (interrupted at step {summary['steps']})"
    assert dict(compared.curves["train/loss"]) == run.column("train/loss")


# ---- own data -------------------------------------------------------------------------------------------------------


JSONL = ["data.path=rows.jsonl", "data.field=content", "data.tokenizer=bpe", "data.bpe_vocab_size=300"]


@pytest.fixture(scope="module")
def jsonl(place: Place) -> Run:
    return place.train("jsonl", *JSONL, "parallel=single", "logger=none", "data.batch_size=4")


def test_jsonl_with_a_bpe_tokenizer_trains_and_generates(place: Place, jsonl: Run) -> None:
    assert (jsonl.directory / "tokenizer.json").is_file()
    losses = jsonl.column("train/loss")
    assert losses[STEPS] < losses[1]
    # Bits per byte know how long a token is.
    assert jsonl.summary["val/bits_per_byte"] < jsonl.summary["val/loss"] / 0.6931
    text = place.generate("jsonl", "prompt=alpha beta", "tokens=10", "temperature=0")
    assert text.startswith("alpha beta")
    assert len(text) > len("alpha beta") + 5


def test_a_run_resumed_in_its_own_directory_adds_to_what_is_there(place: Place, jsonl: Run) -> None:
    """``last.ckpt`` is what the table names and what generate reads. This one ends on a step that is kept anyway."""
    checkpoints = jsonl.directory / "checkpoints"
    before = jsonl.column("train/loss")
    resume = ["trainer.max_steps=8", f"ckpt_path={checkpoints}/step_{CHECKPOINT}.ckpt"]
    place.train("jsonl", *JSONL, "parallel=single", "logger=none", "data.batch_size=4", *resume)
    assert read_meta(checkpoints / "last.ckpt")["global_step"] == 8
    after = jsonl.column("train/loss")
    assert list(after) == list(range(1, 9))  # the rows of the steps before the checkpoint stay
    assert_close([after[step] for step in before if step <= CHECKPOINT], [*before.values()][:CHECKPOINT])
    assert not list(checkpoints.glob("last-*")) + list(checkpoints.glob("*.partial")) + list(checkpoints.glob("*.old"))


def test_auto_goes_on_in_its_directory_with_what_is_named_and_in_the_same_wandb_run(place: Place) -> None:
    """The second run names a learning rate; the seed, the batch and the weight decay are as in the checkpoint."""
    every = [
        "parallel=single",
        "resume=auto",
        "optim.schedule=constant",
        "optim.warmup_steps=0",
        "+trainer.limit_val_batches=0",
    ]
    before = ["seed=7", "optim.optimizer.weight_decay=0.25", "optim.lr=0.02"]
    first = place.train("auto", *every, *before, "trainer.max_steps=2")
    assert "Going on" not in first.shown
    second = place.train("auto", *every, "optim.lr=1e-4", "trainer.max_steps=4")
    assert "Going on from" in second.shown
    assert "Other than so far: optim.lr=0.0001 (so far 0.02), trainer.max_steps=4 (so far 2)." in second.shown
    assert_close([*second.column("train/learning_rate").values()], [0.02, 0.02, 1e-4, 1e-4], 1e-6)
    config = OmegaConf.load(second.directory / "config.yaml")
    assert (config.optim.lr, config.optim.optimizer.weight_decay, config.seed) == (1e-4, 0.25, 7)
    runs = [folder.name for folder in (second.directory / "wandb").glob("offline-run-*")]
    assert len(runs) == 2
    assert len({name.rpartition("-")[2] for name in runs}) == 1
    assert config.logger.wandb.id == runs[0].rpartition("-")[2]
    forgotten = place.command("tedlab.train", "resume=auto", "hydra.run.dir=auto")
    assert "is of a run with data.path=corpus" in forgotten.stderr
    line = command_to_continue(second.directory)
    assert line is not None
    _, train, *again = shlex.split(line.partition(" && ")[2])
    third = place.finished("auto", place.command(f"tedlab.{train}", *again, "trainer.max_steps=5"))
    assert list(third.column("train/loss")) == [1, 2, 3, 4, 5]
    assert third.column("train/learning_rate")[5] == pytest.approx(1e-4)


# ---- ablations -------------------------------------------------------------------------------------------------------


def test_the_communication_ablation_tells_its_story(place: Place) -> None:
    """Four runs, one after another: the same losses to the last digit, other bytes; ``compare`` puts them together."""
    settings = [
        "experiment=ablation_comm",
        "hydra.sweep.dir=ablation",
        "trainer.max_steps=2",
        "data.batch_size=4",
        "comm.emulate_dilation=1",
    ]
    done = place.command("tedlab.train", "-m", *place.small(*settings), WANDB_MODE="disabled")
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [Run(place.folder / "ablation" / str(number)) for number in range(4)]
    for run in runs:
        run.check_ledger()
    none, dtd, cac, ted = (run.summary for run in runs)
    assert len({summary["train/loss"] for summary in (none, dtd, cac, ted)}) == 1
    assert len({summary["val/loss"] for summary in (none, dtd, cac, ted)}) == 1
    exchanged = [s["comm/forward/expert/all_to_all/wire_bytes"] for s in (none, dtd, cac, ted)]
    assert exchanged == [exchanged[0], exchanged[0] / 2, exchanged[0], exchanged[0] / 2]
    assert [any("/recompute/" in key for key in s) for s in (none, dtd, cac, ted)] == [True, True, False, False]
    between = [s["comm/link/between_nodes/wire_bytes"] for s in (none, dtd, cac, ted)]
    assert between[0] > max(between[1:3])
    assert min(between[1:3]) > between[3]
    assert ted["memory/stash_bytes"] > 0 == none["memory/stash_bytes"]
    report = place.command("tedlab", "compare", "ablation", "out=report.html")
    assert report.returncode == 0, report.stdout + report.stderr
    assert "identical to the last digit in all runs" in report.stdout
    assert (place.folder / "report.html").stat().st_size > 10_000


COMPILED = ["model.compile=aot_eager", "model.layers=1", "moe.every=1"]  # a block takes a second in each process


def test_compiled_and_low_precision_runs_are_counted_to_the_byte(place: Place) -> None:
    settings = ["parallel=tp2", "trainer.precision=bf16-mixed", "model.recompute.granularity=block", "comm=cac"]
    quiet = ["+trainer.limit_val_batches=0", "+trainer.enable_progress_bar=false"]
    run = place.train("compiled", *settings, *quiet, *COMPILED, "trainer.max_steps=2", "logger=none")
    assert "val/loss" not in run.summary
    assert "objective, val/loss, will be nan" in run.shown
    assert "step 1/2" not in run.progress
    budget = ["comm.cac=auto", "comm.cac_budget_bytes=3000", "parallel.sequence=true", "optim.overlap=true"]
    run = place.train("sequence", *settings, *budget, "trainer.max_steps=2", "logger=none")
    assert 0 < run.summary["memory/stash_bytes"] <= 3000


@pytest.mark.exhaustive  # comm/test_ledger.py has compiled steps like its
def test_so_are_compiled_runs_of_today_s_models(place: Place) -> None:
    today = ["model.activation=swiglu", "model.bias=false", "model.norm=rms", "model.positions=rotary"]
    today += ["moe.dispatch=dropless", *COMPILED, "model.loss_chunk=50", "optim.tile=fused"]
    place.train("today", "parallel=ep2", "trainer.precision=bf16-true", *today, "trainer.max_steps=2", "logger=none")
