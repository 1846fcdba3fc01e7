"""Commands that take long say how far they are and how long they will take, also where output is no terminal."""

import io
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from tedlab import Topology, progress
from tedlab.checkpoint import load_weights, save
from tedlab.config import ModelConfig, MoEConfig
from tedlab.models import GPT
from tedlab.progress import CommandProgress


class Clock:
    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """In the place of the one that says when a line is due, and of rich's."""
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def steps(clock: Clock, seconds: list[float], disable: bool = False) -> None:
    """A command of ten parts, each of which takes so many seconds."""
    with CommandProgress(disable=disable) as bar:
        task = bar.add_task("working", total=10)
        for part in seconds:
            clock.now += part
            bar.update(task, advance=1)


def test_without_a_terminal_lines_come_after_five_seconds_and_then_less_and_less_often(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    steps(clock, [2.0] * 10)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("%")[0] for line in lines] == ["working  30", "working  80"], "at 6 s and 16 s"
    assert all("ETA 0:00:" in line for line in lines)


def test_what_takes_a_moment_or_is_not_the_first_process_says_nothing(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    steps(clock, [0.4] * 10)
    steps(clock, [9.0] * 10, disable=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("colour", [True, False])
def test_on_a_terminal_there_is_a_bar_as_wide_as_fits(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, width: int, colour: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=width)
    monkeypatch.setattr(progress, "errors", lambda: console)
    monkeypatch.setattr(progress, "animated", lambda shown: shown is console)
    steps(clock, [1.0] * 10)
    text = shown.getvalue()
    assert "working" in text
    assert "ETA" in text
    assert bool(re.search(r"\x1b\[(38;5;|3[0-7]m|1;3)", text)) == colour
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
    assert max(map(len, lines)) <= width


def test_reading_weights_and_drawing_them_tell_of_each_element(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, single: Topology
) -> None:
    told: dict[str, list[float]] = {}

    @contextmanager
    def counting(description: str, total: float, disable: bool = False) -> Iterator[Callable[[float], object]]:
        told[description] = [total, 0.0]
        yield lambda amount: told[description].__setitem__(1, told[description][1] + amount)

    monkeypatch.setattr("tedlab.nn.sharded.advancing", counting)
    monkeypatch.setattr("tedlab.checkpoint.directory.advancing", counting)
    shape = ModelConfig(layers=2, hidden=16, heads=2, ffn=16, sequence_length=8, vocab_size=128)
    model = GPT(shape, MoEConfig(num_experts=2), single, seed=0)
    elements = sum(parameter.numel() for parameter in model.parameters())
    assert told["initial weights"] == [elements, elements]
    save({"model": model.state_dict()}, {"global_step": 0}, tmp_path / "last.ckpt")
    load_weights(model, tmp_path / "last.ckpt")
    assert told["loading"] == [elements, elements]
