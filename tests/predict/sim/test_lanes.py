"""The timeline by itself: times worked out by hand, and the trace that Perfetto reads."""

import json
from pathlib import Path

from tedlab.predict.sim.lanes import Lanes, Span, Transfer, write_trace
from tedlab.predict.sim.pictures import draw_lanes


def exchange(lanes: Lanes, at: float, seconds: float, link: str = "in_node") -> Transfer:
    return lanes.issue(link, "forward", "all_to_all a", at, seconds)  # type: ignore[arg-type]


def test_a_link_serves_one_exchange_at_a_time_and_each_link_its_own() -> None:
    lanes = Lanes()
    first, second, elsewhere = exchange(lanes, 1, 4), exchange(lanes, 2, 3), exchange(lanes, 2, 3, "between_nodes")
    assert [lanes.end(t) for t in (second, first, elsewhere)] == [8, 5, 5]  # 1 + 4, 5 + 3, 2 + 3
    assert lanes.end(exchange(lanes, 20, 1)) == 21


def test_reductions_use_a_link_while_no_exchange_does() -> None:
    """One of 10 s from 0 on, and another of 2: exchanges hold the link from 3 to 5 and from 6 to 9."""
    lanes = Lanes()
    long, short = (lanes.issue("in_node", "optimizer", name, 0, s, yields=True) for name, s in (("long", 10), ("s", 2)))
    assert lanes.end(exchange(lanes, 3, 2)) == 5
    assert lanes.end(exchange(lanes, 6, 3)) == 9
    assert lanes.end(short) == 17  # 3 s until 3, 1 until 6, 6 until 15; then the other's 2
    assert lanes.end(long) == 15
    parts = [(span.start, span.end) for span in lanes.spans if span.name == "long"]
    assert parts == [(0, 3), (5, 6), (9, 15)]


def test_a_reduction_that_is_awaited_at_once_takes_its_time() -> None:
    lanes = Lanes()
    assert lanes.end(lanes.issue("in_node", "optimizer", "a", 2, 3, yields=True)) == 5
    assert lanes.end(exchange(lanes, 5, 1)) == 6


def test_consecutive_kernels_of_one_kind_are_one_span() -> None:
    lanes = Lanes()
    for name, start, end in (("k", 0, 1), ("k", 1, 3), ("m", 3, 4), ("k", 4, 5), ("k", 6, 7)):
        lanes.compute("forward", name, start, end)
    spans = [(span.name, span.start, span.end) for span in lanes.spans]
    assert spans == [("k", 0, 3), ("m", 3, 4), ("k", 4, 5), ("k", 6, 7)]


SPANS = [
    Span("compute", "forward", "matrix products", 0.0, 2e-3),
    Span("between_nodes", "backward", "all_to_all a", 1e-3, 4e-3),
]


def test_a_trace_has_each_span_in_microseconds_on_the_thread_of_its_lane(tmp_path: Path) -> None:
    write_trace(SPANS, tmp_path / "trace.json", rank=3)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = [(threads[e["tid"]], e["name"], e["cat"], e["ts"], e["dur"], e["pid"]) for e in events if e["ph"] == "X"]
    assert spans == [
        ("compute", "matrix products", "forward", 0, 2000, 3),
        ("between nodes", "all_to_all a", "backward", 1000, 3000, 3),
    ]


def test_a_picture_of_several_windows_is_drawn(tmp_path: Path) -> None:
    draw_lanes(SPANS, [(0.0, 3e-3), (1e-3, 4e-3)], tmp_path / "lanes.png")
    assert (tmp_path / "lanes.png").read_bytes().startswith(b"\x89PNG")
