"""``tedlab runs`` says how runs stand, from files alone, whoever wrote them."""

import errno
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig

from tedlab.checkpoint.manifest import MANIFEST
from tedlab.commands import runs
from tedlab.commands.continued import COMMAND, command_to_continue, keep_command
from tedlab.launch import listing
from tedlab.launch.listing import Listed, list_runs
from tedlab.launch.locks import is_in_use, run_directory
from tests.test_conf import compose


def make(directory: Path, summary: dict | str | None, losses: int = 0, step: int | None = None) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("trainer: {max_steps: 100}\n")
    if summary is not None:
        (directory / "summary.json").write_text(summary if isinstance(summary, str) else json.dumps(summary))
    if losses:
        rows = [f"{n},{n * 8},{5 - n}\n" for n in range(1, losses + 1)]
        (directory / "metrics.csv").write_text("step,tokens,train/loss\n" + "".join(rows))
    if step is not None:
        (directory / "checkpoints" / "last.ckpt").mkdir(parents=True)
        (directory / "checkpoints" / "last.ckpt" / MANIFEST).write_text(json.dumps({"step": step}))
    return directory


def only(place: Path) -> Listed:
    (run,) = list_runs([place])
    return run


def test_checkpoints_state_their_step_where_it_is_read() -> None:
    assert listing.MANIFEST == MANIFEST


def test_a_finished_run_is_as_its_summary_says(tmp_path: Path) -> None:
    make(tmp_path / "main" / "date", {"state": "finished", "steps": 100, "train/loss": 2.5, "val/loss": 3.0}, 3)
    run = only(tmp_path)
    assert (run.state, run.steps, run.max_steps, run.train_loss, run.val_loss) == ("finished", 100, 100, 2.5, 3.0)


def test_a_run_that_left_no_summary_was_killed_and_goes_on_at_its_checkpoint(tmp_path: Path) -> None:
    make(tmp_path / "a", None, losses=3, step=2)
    run = only(tmp_path)
    assert (run.state, run.steps, run.train_loss, run.resumable) == ("killed", 3, 2.0, 2)


def test_a_run_at_work_is_running_and_stays_undisturbed(tmp_path: Path) -> None:
    with run_directory(make(tmp_path / "a", None, losses=1)):
        assert only(tmp_path).state == "running"
        assert is_in_use(tmp_path / "a")
    assert not is_in_use(tmp_path / "a")
    assert only(tmp_path).state == "killed"


def test_jobs_of_sweeps_are_found_and_hidden_folders_are_not(tmp_path: Path) -> None:
    for number in range(3):
        make(tmp_path / "main" / "date" / str(number), {"state": "finished", "steps": 1})
    make(tmp_path / ".hidden", {"state": "finished", "steps": 1})
    assert {run.directory.name for run in list_runs([tmp_path])} == {"0", "1", "2"}
    assert len(list_runs([tmp_path, tmp_path / "main"])) == 3


@pytest.mark.parametrize(
    "summary",
    [
        "{",
        "[]",
        "[" * 99999,
        '{"steps": 1' + 400 * "0" + "}",
        '{"steps": "many", "train/loss": [1]}',
        '{"steps": 1e999}',
    ],
)
def test_damaged_files_are_no_reason_to_fail(tmp_path: Path, summary: str) -> None:
    directory = make(tmp_path / "a", summary)
    (directory / "config.yaml").write_text("!!python/object:os.system x")
    (directory / "checkpoints" / "last.ckpt").mkdir(parents=True)
    (directory / "checkpoints" / "last.ckpt" / MANIFEST).write_text("[]")
    run = only(tmp_path)
    assert (run.max_steps, run.train_loss, run.resumable) == (None, None, None)


DAMAGED_METRICS = {
    "no_step": b"tokens,train/loss\n8,4.0\n",
    "step_of_a_fraction": b"step,tokens\n1.0,8\n",
    "no_utf_8": b"step,tokens\n\xff\xfe,8\n",
    "zeros": b"step,tokens\n" + bytes(64) + b"\n",
    "a_row_cut_short": b"tokens,step\n8\n",
}


@pytest.mark.parametrize("metrics", DAMAGED_METRICS.values(), ids=DAMAGED_METRICS)
def test_damaged_metrics_of_one_run_are_told_and_hide_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], metrics: bytes
) -> None:
    damaged = make(tmp_path / "damaged", None, step=5)
    (damaged / "metrics.csv").write_bytes(metrics)
    make(tmp_path / "whole", None, losses=3)
    runs.main([str(tmp_path)])
    shown = capsys.readouterr().out
    assert f"{damaged} damaged (metrics.csv cannot be read: move it away)" in shown
    assert "goes on at step 5" in shown
    assert {run.directory.name: run.steps for run in list_runs([tmp_path])} == {"damaged": 0, "whole": 3}


def test_a_folder_that_may_not_be_read_is_told_and_hides_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "whole", None, losses=3)
    closed, is_file, stat = tmp_path / "closed", Path.is_file, Path.stat
    closed.mkdir()

    def refuse(path: Path) -> None:
        if path.parent == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    # Written so since the superuser may read everything.
    monkeypatch.setattr(Path, "is_file", lambda path: refuse(path) or is_file(path))
    monkeypatch.setattr(Path, "stat", lambda path, **options: refuse(path) or stat(path, **options))
    states = {run.directory.name: (run.state, run.reason.partition(":")[0]) for run in list_runs([tmp_path])}
    assert states == {"closed": ("damaged", "Permission denied"), "whole": ("killed", "")}


def test_a_finished_run_that_is_trained_further_shows_the_steps_of_now(tmp_path: Path) -> None:
    directory = make(tmp_path / "a", {"state": "finished", "steps": 2, "train/loss": 3.0}, losses=3)
    with run_directory(directory):
        run = only(tmp_path)
    assert (run.state, run.steps, run.train_loss) == ("running", 3, 2.0)


def test_the_table_has_the_newest_and_says_how_unfinished_ones_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(runs.ROWS + 2):
        make(tmp_path / f"{number:02}", {"state": "finished", "steps": number})
    failed = make(tmp_path / "failed", {"state": "failed", "reason": "no space left", "steps": 7}, step=5)
    runs.main([str(tmp_path)])
    shown = capsys.readouterr().out
    assert "… and 3 older ones (--all)" in shown
    assert f"{failed} failed (no space left)\n  It goes on at step 5 with its own overrides" in shown
    (failed / COMMAND).write_text(json.dumps({"cwd": str(Path.cwd()), "arguments": ["parallel=ep4", "seed=2"]}))
    runs.main([str(tmp_path)])
    line = f"  tedlab train parallel=ep4 seed=2 resume=auto hydra.run.dir={failed}   # goes on at step 5"
    assert line in capsys.readouterr().out
    runs.main([str(tmp_path), "--all"])
    assert "older" not in capsys.readouterr().out


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="There is no folder"):
        runs.main([str(tmp_path / "none")])


# ---- the command that continues a run -------------------------------------------------------------------------------


@pytest.fixture
def _no_hydra_left_behind() -> Iterator[None]:
    yield
    HydraConfig.instance().cfg = None


@pytest.mark.usefixtures("_no_hydra_left_behind")
def test_what_is_printed_composes_to_the_configuration_of_the_run_in_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "a run's, $HOME"
    directory.mkdir()
    overrides = ["data=text", "data.path='my text, $1/*.txt'", "model.hidden=64", "parallel=ep4", "optim.lr=0.01"]
    settings = [*overrides, "trainer.max_steps=7", "+trainer.benchmark=true", "moe=top2", "comm=ted", "logger=none"]
    before = compose(*settings, "resume=auto", "ckpt_path=elsewhere")
    hydra = HydraConfig.get()
    keep_command(directory, hydra)
    line = command_to_continue(directory)
    assert line is not None
    tedlab, train, *again = shlex.split(line)
    assert (tedlab, train) == ("tedlab", "train")
    after = compose(*again)
    assert HydraConfig.get().run.dir == str(directory)
    assert (after.resume, after.ckpt_path) == ("auto", None)
    for name in ("model", "moe", "parallel", "comm", "data", "optim", "trainer", "logger", "seed", "checkpoint"):
        assert getattr(after, name) == getattr(before, name), name
    assert after.data.path == "my text, $1/*.txt"
    monkeypatch.chdir(tmp_path)
    assert command_to_continue(Path(directory.name)) == f"cd {shlex.quote(hydra.runtime.cwd)} && {line}"


@pytest.mark.usefixtures("_no_hydra_left_behind")
def test_a_job_of_a_sweep_goes_on_alone(tmp_path: Path) -> None:
    compose("experiment=ablation_comm", "comm=dtd", "hydra.searchpath=[file:///mine]", "optim.loss_scale=8")
    keep_command(tmp_path, HydraConfig.get())
    line = command_to_continue(tmp_path)
    assert line is not None
    assert shlex.split(line)[2:-1] == [
        "experiment=ablation_comm",
        "comm=dtd",
        "hydra.searchpath=[file:///mine]",
        "hydra.mode=RUN",
        "resume=auto",
    ]


@pytest.mark.parametrize(
    "kept", ["{", "[]", '{"cwd": 1, "arguments": []}', '{"cwd": "/", "arguments": ["\\u001b[2J"]}', "[" * 9999]
)
def test_a_damaged_command_is_not_shown(tmp_path: Path, kept: str) -> None:
    (tmp_path / COMMAND).write_text(kept)
    assert command_to_continue(tmp_path) is None
