"""The HTML report and its charts: complete, self-contained, escaped, and rendered by a browser without trouble."""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest

from tedlab.compare.page import layout
from tedlab.degrees import ParallelDegrees
from tests.compare.sweep import compare_command, ledger, write_run, write_sweep

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = """</td><script>alert(1)</script>"'&{{ 7 * 7 }}$x$[red]"""

# Run in the page once everything has loaded: what a reader would notice.
PROBE = """<script>addEventListener("load", () => {
  const images = [...document.images].map(image => [image.complete, image.naturalWidth]);
  const page = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const found = {images, overflow: page.scrollWidth - page.clientWidth, dark,
                 sources: [...document.images].map(image => image.currentSrc.length),
                 background: getComputedStyle(document.body).backgroundColor};
  page.setAttribute("data-found", JSON.stringify(found));
});</script>"""


class Tags(HTMLParser):
    """Every tag of a page with its attributes; checks that tags are closed in the order they were opened."""

    VOID = ("meta", "img", "source", "br", "link", "input", "hr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def report(folder: Path, *options: str) -> str:
    """The report on the runs of a folder."""
    compare_command(str(folder), "--out", str(folder / "report.html"), *options)
    return (folder / "report.html").read_text()


def test_the_report_is_one_file_that_asks_for_nothing_else(tmp_path: Path) -> None:
    tags = Tags(report(write_sweep(tmp_path))).found
    names = [name for name, _ in tags]
    assert not {"script", "link", "iframe", "object"} & set(names)
    addresses = [value or "" for _, attributes in tags for key, value in attributes.items() if key in ("src", "srcset")]
    assert len(addresses) == 6, "three charts, light and dark"
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert all(attributes["alt"] for name, attributes in tags if name == "img")


def test_the_report_leads_with_what_differs_and_what_it_saved(tmp_path: Path) -> None:
    page = report(write_sweep(tmp_path))
    text = re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", page.split("</style>")[1])))
    assert text.startswith(" comm.dtd × comm.cac 4 runs")
    for words in (
        "comm.dtd=true, comm.cac=true , run 3 against run 0: bytes sent −33.3 % step time −11.7 %",
        "train/loss: identical to the last digit in all runs (3.1260263919830322)",
        "comm.cac=true 2 −28.6 … −28.2 % −4.2 … −3.9 % +2.0 % identical",
        "3 true true 3.12603 3.00127 8,000 ×1.00 226 ×0.88 28.0 ×0.67 408 ×1.02",
        "recompute all_to_all expert 6 8,388,608 4,194,304 1.000",
        "4 processes: tensor 2 × expert 2 × expert_data 1 (data 2) 841,600 446,464 python 3.11.7 torch 2.13.0",
        "Bytes that rank 0 puts on the wire",
    ):
        assert words in text, words


def test_what_else_runs_measured_is_shown_with_its_definition(tmp_path: Path) -> None:
    """Percentages of shares; and nothing about what was not measured."""
    for number in range(2):
        write_run(tmp_path / str(number), {"seed": number}, {"perf/mfu": 0.412, "router/dead_experts": 0.25 * number})
    page = report(tmp_path)
    assert re.findall(r'<td class="number">([0-9.]+)</td>', page.split("Memory, utilisation, router</h2>")[1])[:3] == [
        *("4.33", "41.2", "0"),
    ]
    assert "Share of experts that got no token." in page
    assert "Share of choices that found no slot." not in page


def test_a_layout_is_written_as_commands_print_it() -> None:
    degrees = ParallelDegrees(8, tensor=2, expert=4, expert_tensor=1, order="expert_data")
    assert layout(degrees.described()) == str(degrees)
    assert layout({"world_size": 4, "tensor": 2, "later": "x"}) == str(ParallelDegrees(4, tensor=2))
    assert layout({"world_size": 4, "tensor": 3}) == "world_size 4, tensor 3"
    assert layout({"world_size": "<b>"}) == "world_size <b>"
    assert layout({}) == ""


def test_charts_lie_beside_the_report_and_fill_a_readme(tmp_path: Path) -> None:
    report(write_sweep(tmp_path / "sweep"), "--by", "comm.dtd")
    charts = sorted((tmp_path / "sweep" / "report_charts").iterdir())
    assert [chart.name for chart in charts] == ["bytes.png", "loss.png", "step_time.png"]
    for chart in charts:
        height, width, _ = matplotlib.image.imread(chart).shape
        assert width == 1260
        assert 400 < height < 1000


def test_runs_without_curves_or_ledger_have_fewer_charts(tmp_path: Path) -> None:
    (write_run(tmp_path / "0") / "metrics.csv").unlink()
    assert Tags(report(tmp_path)).found.count(("picture", {})) == 1
    assert [chart.name for chart in (tmp_path / "report_charts").iterdir()] == ["step_time.png"]


def test_whatever_a_run_says_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    for number, value in enumerate((HOSTILE, "plain")):
        write_run(tmp_path / str(number), {"comm.cac": value}, {"git_revision": HOSTILE})
    page = report(tmp_path)
    assert "script" not in [name for name, _ in Tags(page).found]
    assert "<script" not in page
    assert page.count(unescape("{{ 7 * 7 }}")) >= 2
    assert HOSTILE in unescape(page)


def render(page: Path, width: int, *, dark: bool, profile: Path) -> dict:
    """What a reader of the page would notice, in a window of this width."""
    probed = page.with_name(f"probed_{width}_{dark}.html")
    probed.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    assert CHROMIUM is not None
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
        *(f"--user-data-dir={profile}", f"--window-size={width},1000"),
        *(f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", probed.as_uri()),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
    (found,) = re.findall(r'data-found="([^"]*)"', dom)
    return json.loads(unescape(found))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (500, False)])
def test_a_browser_shows_every_chart_and_nothing_sticks_out(tmp_path: Path, width: int, dark: bool) -> None:
    sweep = tmp_path / "sweep"
    for number in range(3):
        settings = {"comm.cac": "a_value_without_any_place_to_break_it_" * 3 + str(number), "seed": number}
        write_run(sweep / str(number), settings, ledger(dtd=bool(number), cac=False))
    report(sweep)
    found = render(sweep / "report.html", width, dark=dark, profile=tmp_path / "profile")
    assert found["images"] == [[True, 1260]] * 3
    assert found["overflow"] == 0
    assert found["dark"] == dark
    assert found["background"] == ("rgb(13, 17, 23)" if dark else "rgb(246, 248, 250)")
