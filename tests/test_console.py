"""What commands print fits the console: widths, whole figures, colours, and names that look like markup."""

import io
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from tedlab import console
from tedlab.certify import show as certify_show
from tedlab.certify.certificate import Certificate
from tedlab.certify.compare import Row
from tedlab.checkpoint.pieces import Piece, write_pieces
from tedlab.comm.collectives import Operation
from tedlab.commands import checkpoint, data, doctor, models, runs, simulate
from tedlab.commands.data import DataCommandConfig
from tedlab.commands.differences import difference_tree
from tedlab.config import AssumedRouting, ServeConfig
from tedlab.data import overview
from tedlab.doctor import Finding, Verdict
from tedlab.evaluation import evaluate
from tedlab.evaluation.sets import SetResult
from tedlab.exchange import verify
from tedlab.predict.calibrate.fit import Series
from tedlab.predict.calibrate.measure import Dispatch, Group, Measured
from tedlab.predict.calibrate.write import fit_table
from tedlab.predict.cluster import load_cluster
from tedlab.predict.plan import show as plan_show
from tedlab.predict.plan.learn import Learned, Seen
from tedlab.predict.serve.show import plan_generation
from tedlab.predict.serve.show_pools import plan_pools
from tedlab.report import _table
from tedlab.tables import FittingTable
from tests.certify.runs import composed
from tests.compare.sweep import SUMMARY, compare_command, write_run, write_sweep
from tests.launch.test_listing import make
from tests.test_conf import compose

H100 = load_cluster("dgx_h100")
SIZES = ["model.layers=2", "model.hidden=64", "model.heads=2", "model.ffn=64", "moe.num_experts=4"]
JOB = [*SIZES, "trainer=gpu", "trainer.precision=bf16-true"]


def train(folder: Path) -> None:
    """Begins with what the command line changes, and ends with the table of the run."""
    out, config = console.output(), composed("logger=none", f"output_dir={folder}/{'a-run-' * 8}")
    out.print(difference_tree(["moe.num_experts=8", "trainer.max_steps=5"], ["moe"], compose()))
    memory = {f"memory/{name}_bytes": 2**37 for name in ("parameters", "gradients", "optimizer", "stash", "before")}
    health = {f"router/{name}": 0.25 for name in ("load_cv", "max_violation", "dead_experts", "dropped_fraction")}
    speed = {"perf/tokens_per_second": 12_345_678.0, "perf/step_time_s": 0.2, "perf/tflops": 123.4, "perf/mfu": 0.41}
    sizes = {
        "parameters/total": 671_026_404_352,
        "parameters/active": 37_552_282_624,
        "memory/activations_bytes": 1,
    }
    bigram = {"baseline/bigram_loss": 2.42, "baseline/bigram_bits_per_byte": 3.49}
    peaks = {"memory/peak_bytes_by_rank": [2**37] * 16, "output_dir": config.output_dir}
    out.print(_table(config, {**SUMMARY, **memory, **health, **speed, **sizes, **bigram, **peaks}, "128 processes"))


def simulated(folder: Path) -> None:
    """With the ranks that differ, lending, and the ways to deal with a routing."""
    job = ["parallel.world_size=2", "parallel.tensor=1", "parallel.expert=2", "logger=none"]
    sim = ["sim.rank=stages", "sim.routing=zipf", "sim.zipf=1", "moe.dispatch=dropless"]
    simulate.task(compose(*JOB, *job, *sim, "cluster=dgx_h100", f"output_dir={folder}", name="simulate"))


def plan(folder: Path) -> None:
    """Of the layouts of a job, where folded ones are tried, too."""
    given = ["parallel.world_size=4", "parallel.tensor=2", "parallel.expert=2", "parallel.sequence=false", "comm=ted"]
    given += ["data.batch_size=32", "model.recompute.granularity=block", "optim.tile=fused"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_show, "worker_processes", lambda: ThreadPoolExecutor(1))  # they would import torch first
        plan_show.plan_visibly(
            *(composed(*JOB, *given, f"output_dir={folder}"), "dgx_h100", H100),
            **{"reserve_gib": 1.2, "simulations": 1, "find_largest": False, "given": given},
            assumed=AssumedRouting(),
        )
    seen = [Seen(f"runs/main/2026-11-29/12-34-56/{n}", 12.345, 23.456, 12.567) for n in range(3)]
    console.output().print(Learned(H100, seen, []).table())


def serve(folder: Path) -> None:
    """Both plans of inference."""
    job = composed(*JOB, "moe=top2", "moe.num_experts=4", "parallel=single", "parallel.world_size=2", "moe.every=1")
    job = replace(job, output_dir=str(folder))
    plan_generation(job, ServeConfig(prompt=96, output=32, batch=64), "dgx_h100", H100, 0.0)
    request = ServeConfig(prompt=96, output=32, latency=0.15, price=2.0, expert_price=3.0)
    plan_pools(job, request, (("dgx_h100", H100), ("dgx_h100", H100)), 0.0)


def calibrate(folder: Path) -> None:
    line = Series("work", "FLOP", "", [1e12, 2e12, 4e12], [0.0123, 0.0211, 0.0402])
    waits = {Group(128, 16): replace(line, unit="s", amounts=[1.0, 2.0, 4.0])}
    calls: dict[tuple[Operation, Group], Series] = {("reduce_scatter", Group(128, 16)): line}
    shown = Measured({"bf16": line}, line, line, line, Dispatch(1e-3, 2e-3, 3e-3), 1e9, calls, waits)
    console.output().print(fit_table(shown, "NVIDIA H100 80GB HBM3, 128 processes"))


def certify(folder: Path) -> None:
    rows = [Row("gradients", 1e-15, 12345, 0, "", "", 1e-10), Row("next weights", 0.5, 7, 3, "up", "twice", 1e-10)]
    layout = "8 processes: tensor 2 × expert 2 × expert_data 2 (data 4)"
    certificate = Certificate(layout, f"1024 of them, {layout}", tuple(rows), "64-true", "cpu", "fae050fdaac06df3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certify_show, "certify", lambda *arguments: certificate)
        certify_show.certify_visibly(replace(composed(), output_dir=str(folder)))


def compared(folder: Path) -> None:
    """A sweep, and a run whose settings have long names."""
    write_sweep(folder / "sweep")
    write_run(folder / "sweep" / "9", {"model.recompute.granularity": "block", "moe.router.bias_update": "sign"})
    compare_command(str(folder / "sweep"), "--force", f"out={folder}/report.html")


def listed(folder: Path) -> None:
    finished = {"state": "finished", "steps": 12345, "train/loss": 2.5}
    make(folder / "[red]a run[/] :warning:\x1b[31m" / ("x" * 60), finished, 3)
    make(folder / "killed", None, losses=2, step=123)
    runs.show([folder], None)


def evaluated(folder: Path) -> None:
    model = SimpleNamespace(path=folder / "checkpoints" / "last.ckpt", degrees="4 processes")
    found: Any = SimpleNamespace(model=model, step=500, sets=[], folder=folder)
    task: Any = SimpleNamespace(values={"acc_norm": 0.4321, "acc_norm_stderr": 0.0123}, documents=10_042, fewshot=5)
    of_sets = {"wikipedia": SetResult(123_456_789, 98_765, 1, 1, 2.345, 4.2)}
    evaluate._print(found, of_sets, {"mmlu_high_school_government_and_politics": task})


def corpora(folder: Path, show: Callable[[DataCommandConfig], None]) -> None:
    corpus: Any = SimpleNamespace(
        source_files=1234, train=range(10**12), validation=range(10**9), bytes_per_token=4.321
    )
    corpus.directory = folder / ("a-corpus-" * 8)
    lengths = (1, 12, 345, 6_789, 123_456, 1_234_567)
    found = overview.Overview(9_876_543, 12, 10**12, lengths, 345_678, 10**9, 45_678, 10**6, 123, ("[word] " * 30,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_prepared", lambda config: ({"web": corpus, "": corpus}, ["web"]))
        patch.setattr(overview, "overview", lambda *arguments: found)
        show(DataCommandConfig(**vars(composed())))


def examined(folder: Path) -> None:
    said = f"{folder}: 12,345.6 GiB free, {'and so on ' * 15}"
    findings = [Finding("disk", said), Finding("speed", said, Verdict.WARNING, f"Look [here]: {said}")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "findings", lambda config: findings)
        doctor.task(composed())


def published(folder: Path) -> None:
    models.main([])


def checkpoints(folder: Path) -> None:
    pieces = [Piece("model.network.blocks.12.feed_forward.experts.up_weight", (8, 4096), None, torch.ones(8, 4096))]
    write_pieces(pieces, {}, folder / "a.ckpt")
    checkpoint.main(["inspect", str(folder / "a.ckpt")])
    rows = [verify.Row("weights after a step of AdamW", 1.2e-11, "blocks.12.feed_forward.experts.up_weight", 1e-10)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "verify", lambda *arguments: verify.Verdict(rows, []))
        checkpoint.main(["verify", f"run={folder / 'a.ckpt'}", "hf=x"])


COMMANDS: dict[str, Callable[[Path], None]] = {
    **{"train": train, "simulate": simulated, "plan": plan, "plan_inference": serve, "calibrate": calibrate},
    **{"certify": certify, "compare": compared, "runs": listed, "eval": evaluated, "doctor": examined},
    **{"models": published, "checkpoint": checkpoints},
    **{"data prepare": partial(corpora, show=data.prepare), "data inspect": partial(corpora, show=data.inspect)},
}
Printed = list[tuple[tuple[Any, ...], dict[str, Any]]]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Printed]:
    """Returns what a command prints, before it is laid out; it runs once."""
    known: dict[str, Printed] = {}

    def of(name: str) -> Printed:
        if name not in known:
            known[name] = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Console, "print", lambda _, *what, **how: known[name].append((what, how)))
                COMMANDS[name](tmp_path_factory.mktemp(name))
        return known[name]

    return of


def laid_out(printed: Printed) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Yields what was printed with its text; without the lines for a shell, which must not be broken."""
    out = console.output()
    for what, how in printed:
        if not how.get("soft_wrap"):
            with out.capture() as shown:
                out.print(*what, **how)
            yield what, shown.get()


@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize("name", COMMANDS)
def test_tables_fit_and_have_every_figure_whole(
    name: str, width: int, printed: Callable[[str], Printed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", f"{width}")
    for variable in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    tables = 0
    for what, text in laid_out(printed(name)):
        lines = text.splitlines()
        assert max(map(cell_len, lines), default=0) <= width, text
        assert not re.search(r"\d…|…\d", text), text
        for table in what:
            if isinstance(table, FittingTable):
                tables += 1
                figures = [cell for column in table.columns if column.justify == "right" for cell in column.cells]
                cells = {cell.strip() for line in lines for cell in re.split(r"[│┃]| {2,}", line)}
                known = cells if table.box is not None else text
                assert [f"{figure}" for figure in figures if f"{figure}".strip() not in known] == [], text
            elif isinstance(table, Table):
                assert not table.show_edge, "only what has no columns of figures may be no such table"
    assert tables or name == "doctor"


@pytest.mark.parametrize("name", COMMANDS)
def test_colours_are_for_terminals_and_for_those_who_want_them(
    name: str, printed: Callable[[str], Printed], monkeypatch: pytest.MonkeyPatch
) -> None:
    def text(**environment: str) -> str:
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in {"TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "", **environment}.items():
                patch.setenv(variable, value)
            return "".join(text for _, text in laid_out(printed(name)))

    monkeypatch.delenv("FORCE_COLOR", raising=False)
    plain = text()
    assert "\x1b" not in plain
    assert "\x1b[" in text(FORCE_COLOR="1"), "they are there to be left out"
    assert text(FORCE_COLOR="1", NO_COLOR="1") == plain
    assert text(FORCE_COLOR="1", TERM="dumb") == plain


def test_folders_are_shown_as_they_are_and_steer_no_terminal(
    printed: Callable[[str], Printed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert "[red]a run[/] :warning:\\x1b[31m/xxx" in "".join(text for _, text in laid_out(printed("runs")))


def test_without_a_terminal_the_width_is_that_of_columns_or_120(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console.output().width == console.errors().width == console.WIDTH
    for said, width in (("93", 93), ("0", console.WIDTH), ("wide", console.WIDTH)):
        monkeypatch.setenv("COLUMNS", said)
        assert console.output().width == console.errors().width == width


def test_a_bar_is_drawn_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(terminal: bool, **environment: str) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
            for variable, value in {"TERM": "xterm", **environment}.items():
                patch.setenv(variable, value)
            return console.animated(console.errors())

    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert drawn(True)
    assert drawn(True, NO_COLOR="1")
    assert not drawn(False, FORCE_COLOR="1"), "a log would be full of what moves a cursor"
    assert not drawn(True, TERM="dumb")


def test_figures_stay_whole_while_words_wrap_and_what_is_too_wide_is_divided() -> None:
    table = FittingTable("name", title="sizes")
    for number in range(6):
        table.add_column(f"a heading of column {number}", justify="right")
    figures = [f"{10**6 + number:,} (1 to 2)" for number in range(6)]  # with words of their own
    table.add_row("words that may be wrapped where there is little room", *figures)
    printed = Console(width=60, record=True, file=io.StringIO())
    printed.print(table)
    text = printed.export_text()
    assert max(map(cell_len, text.splitlines())) <= 60
    assert all(figure in text for figure in figures)
    assert "…" not in text
    assert text.count("name") == text.count("sizes") > 1  # each part says what its rows are
    assert "sizes (continued)" in text


def test_brackets_colons_and_numbers_mean_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console.output().print("[red]run[/] :smile: 12 of [bold]")
    assert capsys.readouterr().out == "[red]run[/] :smile: 12 of [bold]\n"
