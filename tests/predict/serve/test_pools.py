"""A plan of two pools serves the most texts in time and memory, of stages that are worked out by hand."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tedlab.config import ServeConfig, TrainConfig, with_values
from tedlab.errors import UsageError
from tedlab.predict.cluster import ClusterConfig, Efficiency, Kernels, Link, PeakFlops
from tedlab.predict.serve.plan import served
from tedlab.predict.serve.pools import Disaggregation, Shape
from tedlab.predict.serve.show_pools import plan_pools
from tests.certify.runs import composed

# Round numbers, all reached: 1 TB/s of memory, 100 TFLOP/s, links of 100 and 10 GB/s for each of two GPUs.
CLUSTER = ClusterConfig(
    gpus_per_node=2,
    memory_bytes=1e9,
    memory_bandwidth=1e12,
    peak_flops=PeakFlops(fp64=1e14, fp32=1e14, fp16=1e14, bf16=1e14),
    in_node=Link(bandwidth=100e9, latency=1e-6),
    between_nodes=Link(bandwidth=20e9, latency=2e-6),
    efficiency=Efficiency(gemm=1.0, memory=1.0, in_node=1.0, between_nodes=1.0, all_to_all=1.0),
    kernels=Kernels(),
)
REQUEST = ServeConfig(prompt=96, output=32, latency=0.01)


def job(*overrides: str) -> TrainConfig:
    sizes = ["model.layers=2", "model.hidden=256", "model.heads=4", "model.ffn=512", "model.sequence_length=128"]
    mixture = ["moe=top2", "moe.num_experts=4", "moe.every=1", "trainer=gpu", "trainer.precision=bf16-true"]
    plain = ["model.bias=false", "model.positions=rotary", "model.vocab_size=1024"]
    return composed(*sizes, *mixture, *plain, "parallel=single", "parallel.world_size=8", *overrides)


def plan(request: ServeConfig = REQUEST, cluster: ClusterConfig = CLUSTER, *overrides: str) -> Disaggregation:
    return Disaggregation(served(job(*overrides), request), request, cluster, cluster)


def test_stages_and_memory_of_a_shape_are_worked_out_by_hand() -> None:
    found = plan().serve(Shape(2, 2, 4, 1, 3), 8)
    assert found.batch == 8 * 3 * 2
    # Rows: 16 tokens choose two of four experts, one in each node: 8 in the mean, and more in the busiest. All move
    # only the experts' weights and rows: (k·m + k·n + m·n) · 2 bytes for both products, and the GELU between them.
    _, most, _ = plan().expert_side(4, 1, 16)
    rows = round(most)
    assert 8 < most < 12
    up = 2 * (rows * 256 + 256 * 512 + rows * 512)
    moved = 2 * up + 2 * 2 * rows * 512 + 2 * (2 * 2 * rows * 256)
    assert found.stages.experts == pytest.approx(moved / 1e12, rel=1e-9)
    # The way: an attention node sends 8 · 2 rows of 512 bytes, half from each GPU, both over one link of 20 GB/s; an
    # expert node gets `rows` on its GPU, and its node as many again.
    assert found.stages.transfer == pytest.approx(2e-6 + max(8 * 2 * 512, 2 * most * 512) / 20e9)
    # Memory: embedding, attention, router and norms of two layers; keys and values of 24 texts of 128 positions.
    dense = (1024 * 256 // 2 + 2 * (4 * 256 * 256 // 2 + 256 * 4 + 4 * 256) + 2 * 256) * 2
    remembered = 3 * 8 * 128 * 2 * 2 * 128 * 2
    assert found.attention_bytes == dense + remembered + 3 * 8 * 2 * 256 * 2 + 8 * 1024 * 4
    experts = 2 * (2 * 256 * 512) * 2
    assert found.expert_bytes == experts + rows * (2 * 256 + 512 + 512) * 2 + 2 * rows * 256 * 2
    assert found.seconds == found.stages.seconds(3, 2) + found.beside
    assert found.per_gpu == 48 / found.seconds / 8


def test_tensor_ranks_of_a_node_divide_rows_and_gather_the_results() -> None:
    of_plan = plan(REQUEST, CLUSTER, "model.positions=learned")
    (one, _), (two, _) = (of_plan.attention(tensor, 8) for tensor in (1, 2))
    # An all-reduce after attention and an all-gather of experts' results: 8 tokens of 256 features, two bytes each.
    exchanges = (2e-6 + 8 * 256 * 2 / 100e9) + (1e-6 + 8 * 256 * 2 / 2 / 100e9)
    # Kernels move half of what is divided; norms, router and residuals are whole in both. For queries, keys and values:
    products = 2 * (256 * 384 + 8 * 384) + 2 * (128 * 256 + 8 * 128)  # … and for the output
    remembered = 2 * 8 * (2 * 113 + 2) * 128
    rows = (3 * 2 + 1) * 8 * 128 * 2  # read and written to be sent, read again and written in the sum
    assert two == pytest.approx(one + exchanges - (products + remembered + rows) / 1e12, rel=1e-9)


def test_pools_in_one_node_need_no_network() -> None:
    inside, outside = (plan(REQUEST, replace(CLUSTER, gpus_per_node=n)) for n in (8, 4))
    shape = Shape(2, 2, 4, 1, 3)
    _, most, _ = inside.expert_side(4, 1, 16)
    busiest = max(8 * 2 * 512 / 2, most * 512)
    assert inside.serve(shape, 8).stages.transfer == pytest.approx(1e-6 + busiest / 100e9)
    assert outside.serve(shape, 8).stages.transfer == pytest.approx(2e-6 + 4 * busiest / 20e9)
    # Two clusters are never one node.
    faster = replace(inside.attention_on, memory_bandwidth=2e12)
    apart = Disaggregation(inside.config, REQUEST, inside.attention_on, faster)
    assert apart.serve(shape, 8).stages.transfer == pytest.approx(2e-6 + 8 * busiest / 20e9)


def test_pools_without_a_network_between_them_are_refused() -> None:
    alone = replace(CLUSTER, gpus_per_node=8, between_nodes=None)
    assert plan(REQUEST, alone).serve(Shape(2, 2, 4, 1, 3), 8).stages.transfer < 1e-5
    with pytest.raises(UsageError, match="world_size is 16, but the cluster is one node of 8 GPUs"):
        plan(REQUEST, alone, "parallel.world_size=16")
    for clusters, named in (((alone, CLUSTER), "attention"), ((CLUSTER, alone), "experts")):
        with pytest.raises(UsageError, match=f"the cluster for {named} is one node of 8 GPUs"):
            Disaggregation(served(job(), REQUEST), REQUEST, *clusters)


def test_attention_takes_the_longer_the_more_it_remembers() -> None:
    few, many = (plan(replace(REQUEST, prompt=prompt)).attention(1, 64)[0] for prompt in (32, 96))
    # 64 more tokens of 64 texts: keys and values of 256 features, two bytes each.
    assert many - few == pytest.approx(64 * 64 * 2 * 256 * 2 / 1e12, rel=1e-6)


def test_each_shape_serves_the_most_texts_in_time_and_memory() -> None:
    tight = replace(CLUSTER, memory_bytes=2.2e6)
    of_plan = plan(replace(REQUEST, latency=1e-3), tight)
    found = of_plan.search(0.0)
    assert found.served
    assert found.large
    limits = set()
    for each in found.served:
        assert each.seconds <= 1e-3
        assert max(each.attention_bytes, each.expert_bytes) <= 2.2e6
        more = of_plan.serve(each.shape, each.texts + 1)
        slow, large = more.seconds > 1e-3, max(more.attention_bytes, more.expert_bytes) > 2.2e6
        assert slow or large
        limits.add("time" if slow else "memory")
        assert each.shape.attention_gpus + each.shape.expert_gpus <= 8
    assert "memory" in limits
    shapes = list(of_plan.shapes())
    assert len(set(shapes)) == len(shapes) == len(found.served) + found.large + found.slow
    fixed = plan(replace(REQUEST, attention_gpus=4, expert_gpus=4))
    assert {(s.attention_gpus, s.expert_gpus) for s in fixed.shapes()} == {(4, 4)}


def test_what_no_pools_can_do_is_refused_with_the_nearest(tmp_path: Path) -> None:
    def planned(request: ServeConfig, cluster: ClusterConfig = CLUSTER, *overrides: str) -> None:
        config = with_values(job(*overrides), {"output_dir": str(tmp_path)})
        plan_pools(config, request, (("one", cluster), ("one", cluster)), 0.0)

    with pytest.raises(UsageError, match=r"in latency=1e-06 s: the nearest \(.*\) takes [\d.e-]+ s with \d+ texts?"):
        planned(replace(REQUEST, latency=1e-6))
    with pytest.raises(UsageError, match=r"has memory for one text .* needs 0\.00 GiB more in a GPU"):
        planned(REQUEST, replace(CLUSTER, memory_bytes=1e6))
    with pytest.raises(UsageError, match="the pools need 2 GPUs at least, but world_size is 1"):
        planned(REQUEST, CLUSTER, "parallel.world_size=1")
    with pytest.raises(UsageError, match=r"no shape of up to 8 GPUs is possible with .* expert_gpus=3"):
        planned(replace(REQUEST, expert_gpus=3))
    with pytest.raises(UsageError, match=r"needs experts that take rows: moe\.num_experts is 0"):
        planned(REQUEST, CLUSTER, "moe.num_experts=0")
    slow = replace(CLUSTER, between_nodes=Link(bandwidth=1e6, latency=1e-3))
    with pytest.raises(UsageError, match=r"1 attention node of 1 GPU, 4 expert nodes of 1, 1 micro-batch\).* 1 text$"):
        planned(replace(REQUEST, latency=1e-6, attention_gpus=1, expert_gpus=4), slow)
    assert not list(tmp_path.iterdir())


def test_the_plan_shows_shapes_one_pool_and_what_speaks_against_it(tmp_path: Path) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    config = with_values(job(), {"output_dir": str(tmp_path)})
    cheap = replace(CLUSTER, memory_bandwidth=2e12)
    request = replace(REQUEST, price=4.0, expert_price=1.0)
    best = plan_pools(config, request, (("one", CLUSTER), ("other", cheap)), 0.0, console=console)
    text = console.export_text()
    assert "attention on one, experts on other" in " ".join(text.split())
    assert f"{1e3 * best.seconds:.4g}" in text
    for part in ("predicted, none was measured", "2602.09721", "One pool of 8 GPUs of one", "m = 4", "by simulation"):
        assert part in " ".join(text.split())
    assert "…" not in text  # no number is cut off
    assert "per GPU, per cost: new tokens" in " ".join(text.split())
    assert (tmp_path / "pingpong.png").stat().st_size > 5000
    console = Console(width=120, record=True, file=io.StringIO())
    plan_pools(config, REQUEST, (("one", CLUSTER), ("one", CLUSTER)), 0.0, console=console)
    assert "cost" not in console.export_text()  # it would be that per GPU
