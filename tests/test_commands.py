"""Every command refuses a value that makes no sense with a sentence that names it, before it does anything."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException

from tedlab.cli import CONF
from tedlab.commands import calibrate, certify, plan, simulate
from tedlab.commands.application import hydra_entry
from tedlab.commands.on_cluster import doubts, job_alone, on_cluster, on_gpus_of, prepare
from tedlab.config import GenerateConfig
from tedlab.errors import UsageError
from tedlab.generate import generate
from tedlab.predict.cluster import cluster_names, load_cluster
from tedlab.predict.volumes import on_gpu
from tedlab.ranges import check_ranges
from tedlab.validate import complete_simulated
from tests.commands import run_command
from tests.test_conf import compose

SCREEN = 25  # lines


@pytest.fixture(autouse=True)
def _no_hydra_left_behind() -> Iterator[None]:
    yield
    HydraConfig.instance().cfg = None
    GlobalHydra.instance().clear()


SIMULATED = {
    "no_cluster": ([], "cluster=NAME"),
    "negative_rank": (["cluster=summit", "sim.rank=-1"], "sim.rank=-1"),
    "rank_beyond_the_world": (["cluster=summit", "sim.rank=4"], "sim.rank=4 is no rank of 4 processes"),
    "rank_of_words": (["cluster=summit", "sim.rank=first"], "sim.rank=first"),
    "unknown_routing": (["cluster=summit", "sim.routing=random"], "sim.routing=random"),
    "zipf_without_routing": (["cluster=summit", "sim.zipf=1"], "sim.zipf"),
    "no_trace": (["cluster=summit", "sim.routing=trace", "sim.trace=/nowhere.npz"], "sim.trace=/nowhere.npz"),
    "unknown_values": (["sim.values=complex"], "sim.values=complex"),
    "a_rank_of_real_values": (["sim.values=real", "sim.rank=0"], "sim.rank"),
}


@pytest.mark.parametrize(("own", "said"), SIMULATED.values(), ids=SIMULATED)
def test_simulate_refuses(own: list[str], said: str) -> None:
    config = compose("logger=none", "moe.dispatch=dropless", *own, name="simulate")
    with pytest.raises(UsageError) as caught:
        simulate.task(config)
    assert said in str(caught.value)


def test_plan_needs_a_cluster() -> None:
    with pytest.raises(UsageError, match="cluster=NAME"):
        plan.task(compose("logger=none", name="plan"))


OUT_OF_RANGE = {
    **{f"zipf_{value}": ("simulate", f"sim.zipf={value}", f"sim.zipf is {value}") for value in ("nan", "inf", "-1")},
    **{
        f"reserve_{value}": ("plan", f"plan.reserve_gib={value}", f"plan.reserve_gib is {value}")
        for value in ("nan", "inf", "-1.0")
    },
    **{
        f"simulate_{value}": ("plan", f"plan.simulate={value}", f"plan.simulate is {value}")
        for value in ("0", "-1", "100000000000")
    },
    **{
        f"processes_{value}": ("calibrate", f"processes={value}", f"processes is {value}")
        for value in ("-1", "1000000000000")
    },
}


@pytest.mark.parametrize(("name", "override", "said"), OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_a_number_of_a_command_has_a_range(name: str, override: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_ranges(compose(override, *(["out=x.yaml"] if name == "calibrate" else []), name=name))


OF_ANOTHER_KIND = ["plan.reserve_gib=much", "plan.simulate=1.5", "plan.largest=maybe", "cluster.gpus_per_node=few"]


@pytest.mark.parametrize("override", OF_ANOTHER_KIND)
def test_a_value_of_another_kind_is_refused(override: str) -> None:
    with pytest.raises(HydraException, match=override.partition("=")[2]):
        compose("cluster=summit", override, name="plan")


def test_a_clusters_figures_can_be_overridden(tmp_path: Path) -> None:
    whole = load_cluster("summit")
    config = compose("cluster=summit", "cluster.efficiency.gemm=0.25", name="simulate")
    assert on_cluster(config) == ("summit", replace(whole, efficiency=replace(whole.efficiency, gemm=0.25)))
    with pytest.raises(ValueError, match=r"efficiency.gemm is 2; it is a share of a peak"):
        compose("cluster=summit", "cluster.efficiency.gemm=2", name="simulate")


def test_on_a_cluster_of_gpus_kernels_are_those_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the trainer's setting, which is about this machine; a line says so where it differs."""
    here, there = (compose(f"trainer={kind}", "cluster=dgx_a100", name="simulate") for kind in ("cpu", "gpu"))
    a100, ours = load_cluster("dgx_a100"), load_cluster("this_machine")
    moved = on_gpus_of(job_alone(here), "dgx_a100", a100)
    assert on_gpu(moved)
    assert capsys.readouterr().out.startswith("Kernels are those of GPUs, which dgx_a100 has")
    assert on_gpus_of(job_alone(there), "dgx_a100", a100) == job_alone(there)
    assert on_gpus_of(job_alone(here), "this_machine", ours) == job_alone(here)
    assert capsys.readouterr().out == ""


def test_predictions_of_a_run_with_stages_say_of_which() -> None:
    job = job_alone(compose("cluster=dgx_a100", "data.ramp=[{until: 7, batch_size: 8}]", name="simulate"))
    (said,) = doubts(job, "dgx_a100", load_cluster("dgx_a100"))
    assert said == "data.ramp: predictions are of a step after step 7, of the last stage."


def test_a_calibration_of_another_device_is_a_warning_that_stays_in_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ["model.layers=2", "model.hidden=16", "model.heads=2", "model.ffn=32", "model.sequence_length=16"]
    tiny += ["parallel=single", "data.batch_size=2", "data.micro_batch_size=2", "moe.num_experts=2"]
    simulate.task(compose("cluster=this_machine", "trainer=gpu", f"output_dir={tmp_path}", *tiny, name="simulate"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["sim/warnings"]) == 1
    assert "this_machine is a calibration of another device (a CPU) than the job's" in summary["sim/warnings"][0]
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Warning: {summary['sim/warnings'][0]}" in printed
    low, high = summary["sim/step_time_s_range"]
    assert low < summary["perf/step_time_s"] < high
    assert f"s ({low:.3g} to {high:.3g}), by the errors of published runs" in printed


def test_every_cluster_is_the_same_by_its_preset_and_by_its_file() -> None:
    for name in cluster_names():
        assert on_cluster(compose(f"cluster={name}", name="simulate")) == (name, load_cluster(name))


def test_a_cluster_may_be_a_file_of_ones_own(tmp_path: Path) -> None:
    """Two of the same name are two."""
    known = (CONF / "cluster" / "summit.yaml").read_text()
    for folder, gpus in (("one", 3), ("an other", 5)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.yaml").write_text(known.replace("gpus_per_node: 6", f"gpus_per_node: {gpus}"))
    for folder, gpus in (("one", 3), ("an other", 5), ("one", 3)):
        path = f"{tmp_path}/{folder}/mine.yaml"
        for typed in (path, f"'{path}'"):
            overrides = prepare([f"cluster={typed}", "cluster.memory_bytes=1e9", "world_size=8"])
            config = compose(*overrides, name="plan")
            name, cluster = on_cluster(config)
            assert (name, cluster.gpus_per_node, cluster.memory_bytes) == (path, gpus, 1e9)
            assert config.parallel.world_size == 8


def test_clusters_can_be_swept_over() -> None:
    assert prepare(["-m", "cluster=summit,dgx_a100", "world_size=8,16"]) == [
        *("-m", "cluster=summit,dgx_a100", "parallel.world_size=8,16")
    ]


def test_a_sweep_over_clusters_gives_each_job_its_own(tmp_path: Path) -> None:
    own = tmp_path / "dgx_a100.yaml"  # as a preset is called
    own.write_text((CONF / "cluster" / "summit.yaml").read_text().replace("gpus_per_node: 6", "gpus_per_node: 3"))
    seen = []

    def look(config: simulate.SimulateConfig) -> float:
        name, cluster = on_cluster(config)
        seen.append((name, cluster.gpus_per_node, config.sim.rank))
        return 0.0

    main = hydra_entry(look, "simulate", simulate.SimulateConfig, prepare)
    swept = [f"cluster=dgx_a100,{own}", "sim.rank=0,stages", "logger=none", f"hydra.sweep.dir={tmp_path}/sweep"]
    assert run_command(main, "-m", *swept) is None
    assert seen == [(name, gpus, rank) for name, gpus in (("dgx_a100", 8), (f"{own}", 3)) for rank in (0, "stages")]


def test_what_cac_auto_keeps_depends_on_the_clusters_figures_as_overridden() -> None:
    """Slow links inside a node make a collective of the tensor group worth its memory, slow ones outside the others."""
    asked = [
        "model.recompute.granularity=block",
        "comm=ted",
        "comm.cac=auto",
        "comm.cac_budget_bytes=700000",
        "logger=none",
    ]
    asked += ["data.batch_size=256", "moe.num_experts=8"]
    layout = ["parallel.world_size=32", "parallel.tensor=2", "parallel.expert=8"]
    kept = []
    for slow in ("in_node", "between_nodes"):
        config = compose("cluster=dgx_a100", f"cluster.{slow}.bandwidth=1e3", *asked, *layout, name="simulate")
        kept.append(complete_simulated(job_alone(config), on_cluster(config)[1]).comm.cac)
    assert kept == [["1/combine.gather"], ["1/dispatch.all_to_all", "1/combine.all_to_all"]]


WRONG_CLUSTERS = {
    "unknown": (["cluster=sumit"], "no cluster 'sumit'. Did you mean 'summit'"),
    "no_file": (["cluster=nowhere/mine.yaml"], "nowhere/mine.yaml is not a file"),
    "figures_of_none": (["cluster.gpus_per_node=4"], "cluster.gpus_per_node=4: of which cluster?"),
}


@pytest.mark.parametrize(("arguments", "said"), WRONG_CLUSTERS.values(), ids=WRONG_CLUSTERS)
def test_a_cluster_that_there_is_not_is_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        prepare(arguments)
    assert said in str(caught.value)
    assert "frontier" in str(caught.value)


def test_a_job_on_a_cluster_is_the_job_and_nothing_else() -> None:
    config = compose("cluster=summit", "trainer=cpu", "seed=3", "plan.simulate=2", "logger=none", name="plan")
    job, choices = compose("seed=3", "logger=none"), {"cluster": "summit"}
    assert job_alone(config) == replace(job, choices=job.choices | choices)


GENERATED = [
    *(("temperature", value) for value in (math.nan, math.inf, -1.0, 1e-9, True)),
    *(("tokens", value) for value in (-1, 2**40, True)),
    *(("seed", value) for value in (-1, 2**63)),
]


@pytest.mark.parametrize(("name", "value"), GENERATED)
def test_generate_refuses(name: str, value: Any) -> None:
    config = replace(GenerateConfig(run="/nowhere"), **{name: value})
    with pytest.raises(ValueError, match=f"^{name} is {value}; it must be"):
        generate(config)


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (calibrate.main, ["out=x.yaml", "processes=0"], "processes is 0; it must be at least 1"),
        (calibrate.main, ["out=x.json"], "out=x.json is not a path that ends in .yaml"),
        (simulate.main, ["cluster=summit", "world_size=0"], "parallel.world_size is 0; it must be at least 1"),
        (plan.main, ["cluster=summit", "data.micro_batch_size=0"], "data.micro_batch_size is 0"),
        (certify.main, ["data.micro_batch_size=0"], "data.micro_batch_size is 0"),
        (certify.main, ["~trainer.accelerator"], "trainer.accelerator is missing"),
    ],
    ids=["calibrate", "calibrate_out", "simulate", "plan", "certify", "certify_trainer"],
)
def test_a_number_out_of_range_ends_every_command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], main: Callable[[], None], arguments: list[str], said: str
) -> None:
    code = run_command(main, *arguments, f"hydra.run.dir={tmp_path}/run")
    shown = capfd.readouterr().err
    assert code == 1
    assert said in shown
    assert "Traceback" not in shown
    assert len(shown.splitlines()) < SCREEN
