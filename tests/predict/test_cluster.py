"""The clusters in ``conf/cluster/``: complete, sane, documented, and refused with a helpful word when they are not."""

import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tedlab.cli import CONF
from tedlab.errors import UsageError
from tedlab.predict.cluster import ClusterConfig, cluster_names, load_cluster

NAMES = cluster_names()
DOCUMENT = Path(__file__).parents[2] / "docs" / "cost-model.md"


RATES = "  latency: 3.4e-6\n  all_to_all: "


def table() -> str:
    """The table of clusters in ``docs/cost-model.md``, from the YAML files."""

    def row(name: str) -> str:
        c = load_cluster(name)
        cells = [
            f"`{name}`",
            c.gpus_per_node,
            f"{c.memory_bytes / 2**30:.1f}",
            f"{c.memory_bandwidth / 1e9:g}",
            f"{c.peak_flops.fp32 / 1e12:g}",
            f"{c.peak_flops.fp16 / 1e12:g}",
            "–" if c.in_node is None else f"{c.in_node.bandwidth / 1e9:g}",
            "–" if c.between_nodes is None else f"{c.between_nodes.bandwidth / 1e9:g}",
            "–" if c.between_nodes is None else f"{c.between_nodes.bandwidth / c.gpus_per_node / 1e9:.3g}",
        ]
        return f"| {' | '.join(map(str, cells))} |"

    head = (
        "| cluster | GPUs per node | memory, GiB | memory, GB/s | fp32, TFLOP/s | fp16, TFLOP/s "
        "| in a node, GB/s per GPU | between nodes, GB/s per node | … and per GPU |"
    )
    return "\n".join([head, "|---" + "|---:" * 8 + "|", *map(row, NAMES)])


def test_the_documented_table_is_that_of_the_files() -> None:
    assert table() in DOCUMENT.read_text(), f"docs/cost-model.md should have this table:\n{table()}"


def test_the_clusters_that_scripts_rely_on_are_there() -> None:
    promised = {"summit", "thetagpu", "dgx_a100", "dgx_h100", "dgx_h200", "gb200_nvl72", "frontier", "one_h200"}
    assert promised | {"this_machine"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_in_the_order_that_hardware_has(name: str) -> None:
    cluster = load_cluster(name)
    peak = cluster.peak_flops
    assert peak.fp64 <= peak.fp32 <= peak.bf16
    assert cluster.memory_bandwidth < peak.fp32  # more than one operation for each byte
    assert 1e9 < cluster.memory_bytes < 1e12
    if cluster.in_node is not None:
        assert cluster.in_node.bandwidth < cluster.memory_bandwidth
        assert 1e-7 < cluster.in_node.latency < 1e-3
        assert all(rate.bandwidth < cluster.in_node.bandwidth for rate in cluster.in_node.all_to_all)
    if cluster.between_nodes is not None:
        assert cluster.in_node is not None
        assert cluster.between_nodes.bandwidth / cluster.gpus_per_node < cluster.in_node.bandwidth
        assert cluster.in_node.latency < cluster.between_nodes.latency < 1e-3
        assert cluster.efficiency.all_to_all <= cluster.efficiency.between_nodes


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_a_source_or_is_called_assumed(name: str) -> None:
    lines = (CONF / "cluster" / f"{name}.yaml").read_text().splitlines()
    figures = [line for line in lines if re.match(r" *\w+: *[\d.]", line)]
    assert len(figures) >= 12
    assert [line for line in figures if not re.search(r"# .*\w{3}", line)] == []


def test_the_machines_of_the_paper() -> None:
    summit, thetagpu = load_cluster("summit"), load_cluster("thetagpu")
    assert (summit.gpus_per_node, thetagpu.gpus_per_node) == (6, 8)
    assert (round(summit.memory_bytes / 2**30), round(thetagpu.memory_bytes / 2**30)) == (16, 39)
    assert (summit.peak_flops.fp16, thetagpu.peak_flops.fp16) == (125e12, 312e12)


def test_a_file_of_ones_own_is_loaded_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((CONF / "cluster" / "summit.yaml").read_text().replace("gpus_per_node: 6", "gpus_per_node: 5"))
    assert load_cluster(path) == load_cluster(str(path)) == replace(load_cluster("summit"), gpus_per_node=5)


def test_a_misspelt_cluster_is_refused_with_the_nearest_and_all_names() -> None:
    with pytest.raises(UsageError, match=r"no cluster 'sumit'. Did you mean 'summit'\?") as error:
        load_cluster("sumit")
    assert all(name in str(error.value) for name in NAMES)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match=r"/nowhere/x.yaml is not a file.*summit"):
        load_cluster("/nowhere/x.yaml")


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("gpus_per_node: 6", "gpu_per_node: 6", "(?s)gpu_per_node.*There is: gpus_per_node"),
        ("latency: 3.4e-6", "latencyy: 3.4e-6", "(?s)in_node.latencyy.*There is: bandwidth, latency"),
        ("gpus_per_node: 6", "gpus_per_node: six", "gpus_per_node.*'six'"),
        ("memory_bandwidth: 900e9", "", "no value for memory_bandwidth"),
        ("fp64: 7.8e12", "", "no value for peak_flops.fp64"),
        ("fp64: 7.8e12", "fp64: -1", "peak_flops.fp64 is -1; it must be positive"),
        (
            "gpus_per_node: 6",
            "kernels: {dispatch: {collective: -1}}\ngpus_per_node: 6",
            "kernels.dispatch.collective is -1; it must be at least 0",
        ),
        ("gemm: 0.6", "gemm: 60", "efficiency.gemm is 60; it is a share"),
        ("gpus_per_node: 6", "gpus_per_node: 1", "gpus_per_node is 1, but in_node is given"),
        ("gpus_per_node: 6", "gpus_per_node: [", "flow sequence"),
        (
            "  latency: 3.4e-6",
            f"{RATES}[{{bytes: 2, bandwidth: 1}}, {{bytes: 1, bandwidth: 0.1}}]",
            "all_to_all.1: 1 b",
        ),
        ("  latency: 3.4e-6", f"{RATES}[{{bytes: 1, bandwidth: 1}}, {{bytes: 2, bandwidth: 2}}]", "growing times"),
        ("  latency: 3.4e-6", f"{RATES}[{{bytes: 1}}]", "no value for in_node.all_to_all"),
        ("  latency: 3.4e-6", f"{RATES}[{{bytes: 1, bandwidth: 0}}]", "all_to_all.0.bandwidth is 0; it must be pos"),
    ],
)
def test_a_file_with_a_mistake_is_refused_with_the_place(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    source = (CONF / "cluster" / "summit.yaml").read_text()
    assert old in source
    path = tmp_path / "mine.yaml"
    path.write_text(source.replace(old, new, 1))
    with pytest.raises(UsageError, match=complaint) as error:
        load_cluster(path)
    assert str(path) in str(error.value)


def test_a_node_of_several_gpus_needs_a_link() -> None:
    cluster: ClusterConfig = load_cluster("summit")
    with pytest.raises(ValueError, match="gpus_per_node is 6, but in_node is null"):
        replace(cluster, in_node=None)


def full() -> dict[str, Any]:
    """A cluster whose every figure has a value."""
    tree = asdict(load_cluster("summit"))
    tree["efficiency"]["attention"] = 0.5
    tree["kernels"] |= dict.fromkeys(("arithmetic_latency", "arithmetic_bandwidth", "fresh_bandwidth"), 1.0)
    by_keys = {"kernel": "attention", "width": 64, "dtype": "bf16", "rates": [{"size": 512, "rate": 1e14}]}
    tree["kernels"]["tables"] = [by_keys]
    tree["collectives"] = [{"op": "all_reduce", "size": 4, "nodes": 2, "latency": 1e-5, "bandwidth": 1e9}]
    by_size = {"latency": 1e-5, "rates": [{"bytes": 1e6, "bandwidth": 1e9}]}
    tree["collectives"].append({"op": "all_gather", "size": 4, "nodes": 2, **by_size})
    tree["waits"] = [{"size": 4, "nodes": 2, "latency": 1e-5, "share": 0.1}]
    tree["in_node"]["all_to_all"] = [{"bytes": 1e6, "bandwidth": 1e9}]
    tree["spread"] = 1.2
    del tree["device"]  # no figure
    return tree


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of nested dictionaries and lists are."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


PLACES = [*places(full())]
NULL = ("attention", "arithmetic_latency", "arithmetic_bandwidth", "fresh_bandwidth", "spread", "width", "dtype")
# Beside latencies of measured things.
ZERO = ("forward", "backward", "optimizer", "views", "collective", "share", "asynchronous")


def accepted(tmp_path: Path, place: tuple[Any, ...], value: Any) -> str | None:
    """The complaint about a cluster with another value at one place; None if there is none."""
    tree = full()
    node = tree
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    try:
        load_cluster(tmp_path / "c.yaml")
    except UsageError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "value",
    [
        *(float("nan"), -1, "fast"),
        *(pytest.param(v, marks=pytest.mark.slow) for v in (float("inf"), 0, None, [1])),
    ],
)
def test_no_figure_may_be_what_no_figure_can_be(tmp_path: Path, value: Any) -> None:
    """Whatever fields there are: a new one is tried, too."""
    assert accepted(tmp_path, ("gpus_per_node",), 6) is None
    for place in PLACES:
        old, last = full(), place[-1]
        for key in place:
            old = old[key]
        if isinstance(old, dict | list):
            continue  # the figures in it are tried
        below = place[0] in ("kernels", "collectives", "waits")
        fine = (
            (value is None and last in NULL)
            or (value == 0 and below and (last in ZERO or str(last).endswith("latency")))
            or (value == -1 and last in ("asynchronous", "views"))  # as true as any number but 0
        )
        complaint = accepted(tmp_path, place, value)
        assert (complaint is None) == fine, (place, value, complaint)
        if complaint:
            assert str(last) in complaint, complaint
            assert len(complaint.splitlines()) <= 2


@pytest.mark.parametrize("value", [None, [], 1, "x", {}, {"a": 1}])
@pytest.mark.parametrize("group", ["peak_flops", "efficiency", "in_node", "kernels", "collectives", "waits"])
def test_a_group_of_figures_is_a_group_of_figures(tmp_path: Path, group: str, value: Any) -> None:
    fine = value == [] if group in ("collectives", "waits") else value == {} and group == "kernels"
    complaint = accepted(tmp_path, (group,), value)
    assert (complaint is None) == fine, complaint
    if complaint:
        assert group in complaint


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no keys"),
        ("- 1", "holds no keys"),
        ("just words", "holds no keys"),
        ("a: {b", "flow mapping"),
        ("gpus_per_node: 6\ngpus_per_node: 8", "duplicate key"),
        ("a: &a 1\nb: *a", "it has an alias"),
        ("gpus_per_node: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("gpus_per_node: ${oc.env:HOME}", "it has an interpolation"),
        ("? [1, 2]\n: 3", "unhashable|no values|Key"),
        ("a: \0", "special characters are not allowed"),
        ("[" * 5000, "nested too deeply"),
        ("# " + "x" * (1 << 20), "bytes; a cluster takes no"),
        (b"\xff\xfe\xfa", "codec can't decode"),
        ("? 1\n: 2", "1"),
    ],
    ids=range(14),
)
def test_a_file_that_is_no_cluster_is_refused_and_executes_nothing(
    tmp_path: Path, text: str | bytes, complaint: str
) -> None:
    (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=complaint) as error:
        load_cluster(tmp_path / "c.yaml")
    assert "c.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("group", "key", "value", "complaint"),
    [
        ("collectives", "op", "allreduce", "collectives.0.op is allreduce; valid: all_reduce, all_gather"),
        ("collectives", "nodes", 5, "collectives.0.nodes is 5, but a group of 4 ranks"),
        ("waits", "nodes", 5, "waits.0.nodes is 5, but a group of 4 ranks"),
        ("collectives", "speed", 5, "speed"),
        ("collectives", "bandwidth", None, "collectives.0 has neither of bandwidth and rates"),
        ("collectives", "rates", [{"bytes": 1, "bandwidth": 1}], "collectives.0 has both of bandwidth and rates"),
    ],
)
def test_what_was_measured_belongs_to_groups_that_there_are(
    tmp_path: Path, group: str, key: str, value: Any, complaint: str
) -> None:
    assert complaint in str(accepted(tmp_path, (group, 0, key), value))


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        (
            "kernel",
            "atention",
            "kernels.tables.0.kernel is atention. Did you mean 'attention'? Valid: attention, attention_b",
        ),
        ("dtype", "fp8", "kernels.tables.0.dtype is fp8; valid: fp64, fp32, fp16, bf16, or none for any"),
        ("rates", [], "kernels.tables.0.rates is empty; list what attention reaches by size"),
        (
            "rates",
            [{"size": 2, "rate": 1}, {"size": 1, "rate": 1}],
            "tables.0.rates.1: 1 keys at 1/s take no longer than",
        ),
        ("rates", [{"size": 1, "rate": 1}, {"size": 2, "rate": 2}], "list rates by growing size, which takes growing"),
        ("rates", [{"size": 1, "rates": 1}], "rates"),
        ("widths", [64], "widths"),
    ],
)
def test_a_table_of_a_kernel_can_be_looked_up_in(tmp_path: Path, key: str, value: Any, complaint: str) -> None:
    assert complaint in str(accepted(tmp_path, ("kernels", "tables", 0, key), value))


def test_a_kernel_has_one_table_for_each_width_and_dtype(tmp_path: Path) -> None:
    one, wide, other, again = (full()["kernels"]["tables"][0] for _ in range(4))
    wide["width"], other["dtype"] = 128, "fp32"
    assert accepted(tmp_path, ("kernels", "tables"), [one, wide, other]) is None
    complaint = accepted(tmp_path, ("kernels", "tables"), [one, wide, again])
    assert "kernels.tables.2 is of the same kernel as kernels.tables.0; keep one" in str(complaint)
