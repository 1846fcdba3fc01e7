"""Runs and views on a W&B server, against objects that answer as its API does; nothing goes over a network."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
import yaml

from tedlab.compare.comparison import compare
from tedlab.compare.runs import read_runs
from tedlab.compare.wandb_runs import read_group
from tedlab.compare.workspace import save_workspace
from tedlab.errors import UsageError
from tests.compare.sweep import LOSSES, STEPS, compare_command, write_sweep

EXTRA = {"parameters": {"total": 841600}, "layout": {"tensor": 2}, "certificate": None}


def server_run(directory: Path, identifier: str, state: str = "finished") -> SimpleNamespace:
    """A run of ``wandb.Api`` as ``tedlab train`` logs what lies in this directory."""
    summary = json.loads((directory / "summary.json").read_text())
    history = [
        {"_step": 0, "_runtime": 1.5, "trainer/global_step": 9, "train/loss": LOSSES[0], "val/loss": None},
        {"_step": 1, "_runtime": 2.5, "trainer/global_step": 19, "train/loss": LOSSES[1], "epoch": 0},
        {"_step": 2, "_runtime": 3.5, "trainer/global_step": STEPS, "val/loss": summary["val/loss"]},
        {"_step": 3, "_runtime": 3.6, "system/gpu": 1.0},  # a row that is not of a step
    ]
    if state != "finished":
        summary = {"train/loss": LOSSES[0], "trainer/global_step": 10, "tokens": 10240}

    def scan_history() -> Iterator[dict[str, Any]]:
        return iter(history)

    return SimpleNamespace(
        id=identifier,
        name=f"ablation {directory.name}",
        group="ablation",
        state=state,
        url=f"https://wandb.example/me/tedlab/runs/{identifier}",
        config=yaml.safe_load((directory / "config.yaml").read_text()) | EXTRA,
        summary_metrics=summary | {"_wandb": {"runtime": 4}},
        scan_history=scan_history,
    )


class Server:
    """Stands in for ``wandb.Api()``."""

    def __init__(self, runs: list[SimpleNamespace]) -> None:
        self.everything = runs

    def runs(self, path: str, filters: dict[str, str] | None = None, order: str = "") -> list[SimpleNamespace]:
        if path != "me/tedlab":
            raise ValueError(f"Could not find project {path}")
        assert order == "+created_at" or filters is None
        return [run for run in self.everything if filters is None or run.group == filters["group"]]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """With the four runs of DTD × CAC, and a fifth that is going on."""
    write_sweep(tmp_path)
    runs = [server_run(tmp_path / str(number), f"id{number}") for number in range(4)]
    server = Server([*runs, server_run(tmp_path / "3", "id4", state="running")])
    monkeypatch.setattr(wandb, "Api", lambda: server)
    return server


def test_a_group_on_a_server_is_compared_as_its_directories_would_be(tmp_path: Path, server: Server) -> None:
    theirs, notes = read_group("me/tedlab", "ablation")
    ours, _ = read_runs([tmp_path])
    assert [run.name for run in theirs] == [f"ablation {number}" for number in range(4)]
    for a, b in zip(theirs, ours, strict=True):
        assert a.config == b.config
        assert a.curves == b.curves
        assert {key: value for key, value in a.summary.items() if key != "_wandb"} == b.summary
    assert compare(theirs).loss_statements() == compare(ours).loss_statements()
    assert notes == [
        "https://wandb.example/me/tedlab/runs/id4 is left out: it is running, now at step 10; "
        "force=true compares it as far as it came."
    ]
    assert read_group("me/tedlab", "ablation", stopped=True)[0][-1].name == "ablation 3 (id4) (running at step 10)"


def test_runs_of_one_name_are_told_apart_by_their_identifiers(server: Server) -> None:
    server.everything[1].name = server.everything[0].name
    assert [run.name for run in read_group("me/tedlab", "ablation")[0]][:2] == ["ablation 0 (id0)", "ablation 0 (id1)"]


def test_the_report_links_to_the_server(tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    compare_command("--wandb", "me/tedlab", "--group", "ablation", "--out", str(tmp_path / "r.html"))
    assert '<a href="https://wandb.example/me/tedlab/runs/id2">' in (tmp_path / "r.html").read_text()
    assert "ablation 3" in capsys.readouterr().out


def test_a_group_that_is_not_there_names_those_that_are(server: Server) -> None:
    with pytest.raises(UsageError, match=r"me/tedlab has no finished run in group 'ablatoin'\. Its groups: ablation"):
        read_group("me/tedlab", "ablatoin")


def test_a_server_that_does_not_answer_is_an_error_in_words(server: Server) -> None:
    with pytest.raises(UsageError, match="could not be asked for me/tedlap: Could not find project"):
        read_group("me/tedlap", "ablation")


def test_the_view_on_the_server_shows_the_group_and_the_charts(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request that the real library would send."""
    interface = pytest.importorskip(
        "wandb_workspaces.workspaces.interface", reason="the extra tedlab[wandb] is not installed"
    )
    sent = []

    def upsert(view: Any) -> dict[str, Any]:
        sent.append(view)
        return {"upsertView": {"view": {"id": "1", "name": "nw-abc-v"}}}

    monkeypatch.setattr(interface.internal, "upsert_view2", upsert)
    monkeypatch.setattr(interface, "get_app_url", lambda api: "https://wandb.example")
    comparison = compare(read_group("me/tedlab", "ablation")[0])
    save_workspace(comparison, "me/tedlab", "ablation")
    (view,) = sent
    assert (view.entity, view.project, view.display_name) == ("me", "tedlab", "tedlab compare: ablation")
    section = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))["section"]
    assert '"ablation"' in json.dumps(section["runSets"][0]["filters"])
    assert "config:comm.dtd" in section["runSets"][0]["runFeed"]["columnPinned"]
    panels = {
        panel["config"].get("chartTitle"): panel["config"]["metrics"]
        for bank in section["panelBankConfig"]["sections"]
        for panel in bank["panels"]
    }
    assert panels["train/loss"] == ["train/loss"]
    assert panels["recompute: bytes sent in all steps"] == [
        "comm/recompute/expert/all_to_all/wire_bytes",
        "comm/recompute/tensor/all_gather/wire_bytes",
        "comm/recompute/tensor/all_reduce/wire_bytes",
    ]
    assert "delays of an emulated network, s in all steps" not in panels


def test_a_view_without_the_extra_says_what_to_install(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    comparison = compare(read_group("me/tedlab", "ablation")[0])
    with pytest.raises(UsageError, match=r"pip install 'tedlab\[wandb\]'"):
        save_workspace(comparison, "me/tedlab", "ablation")


@pytest.mark.parametrize(
    ("key", "value"), [("steps", "20"), ("val/loss", "3"), ("state", "\x1b[2J"), ("layout", 3), ("steps", 1e9)]
)
def test_a_damaged_summary_on_a_server_is_left_out_as_one_on_disk_is(server: Server, key: str, value: Any) -> None:
    server.everything[1].summary_metrics[key] = value
    runs, notes = read_group("me/tedlab", "ablation", stopped=True)
    assert len(runs) == 4
    (note,) = notes
    assert note.startswith("https://wandb.example/me/tedlab/runs/id1 is left out: its summary at W&B is damaged")
    assert "\x1b" not in note


def test_a_damaged_history_on_a_server_is_left_out(server: Server) -> None:
    for number, row in enumerate(({"trainer/global_step": "x"}, {"trainer/global_step": math.inf})):
        server.everything[number].scan_history = lambda row=row: iter([row])
    server.everything[4].summary_metrics["trainer/global_step"] = "ten"
    runs, notes = read_group("me/tedlab", "ablation", stopped=True)
    assert [run.name for run in runs] == ["ablation 2", "ablation 3"]
    assert [note.split(" is damaged")[0].split(": ")[1] for note in notes] == [
        "its summary at W&B",
        *["its history at W&B"] * 2,
    ]


def test_what_a_server_holds_besides_numbers_is_no_damage(server: Server) -> None:
    """Tables and histograms are objects there, and losses that are no numbers are texts."""
    summary = server.everything[0].summary_metrics
    summary |= {"router/load": {"_type": "table-file"}, "train/loss": "NaN"}
    server.everything[1].name = "a\x1b[2J"
    runs, _ = read_group("me/tedlab", "ablation")
    assert len(runs) == 4
    assert math.isnan(runs[0].summary["train/loss"])
    assert runs[1].name == r"a\x1b[2J"
