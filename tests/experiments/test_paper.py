"""What is committed of the studies of the paper's claims is what the code gives, and what their READMEs say."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from experiments.breakdown import BOTH, RANK, parts, total
from experiments.paper import MODEL_40B, MODES, Job, composed, configured, simulated
from experiments.paper_memory import __main__ as memory
from experiments.paper_real import __main__ as real
from experiments.paper_scaling import __main__ as scaling
from experiments.paper_shares import __main__ as shares
from experiments.uncertainty import BASELINE, einsum_flops, rank_correlation, read_draws, step_seconds
from tedlab.predict.cluster import ClusterConfig, load_cluster
from tedlab.predict.sim import Simulation
from tests.pool import WorkerPool
from tests.predict.sim.test_simulation import out_of_the_pools_group

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def results_of(study: str) -> Any:
    return json.loads((EXPERIMENTS / study / "results.json").read_text())


def said_in(study: str, *numbers: str) -> None:
    readme = " ".join((EXPERIMENTS / study / "README.md").read_text().split())  # wherever a line ends
    assert [number for number in numbers if number not in readme] == []


def simulate_in_worker(jobs: list[Job]) -> list[Simulation]:
    with out_of_the_pools_group():
        return [simulated(job) for job in jobs]


def at_two_depths(pool: WorkerPool, cluster: ClusterConfig, *overrides: str) -> list[Simulation]:
    """With 2 and 4 blocks: what more blocks add is linear in their number."""
    jobs = [Job((*overrides, f"model.layers={layers}"), cluster, RANK) for layers in (2, 4)]
    return pool.run(1, simulate_in_worker, jobs)[0]


def extrapolated(two: float, four: float, layers: int) -> float:
    return two + (four - two) / 2 * (layers - 2)


def as_assumed(results: Any) -> ClusterConfig:
    cluster = OmegaConf.to_object(OmegaConf.merge(ClusterConfig, results["assumed"]))
    assert isinstance(cluster, ClusterConfig)
    return cluster


# ---- paper_breakdown, paper_today ----------------------------------------------------------------------------------


STUDIES = ["paper_breakdown", "paper_today"]


@pytest.mark.slow
def test_breakdowns_and_draws_are_what_the_model_gives(pool: WorkerPool) -> None:
    for mode in (BASELINE, BOTH):
        overrides = (*MODEL_40B, "data.micro_batch_size=1", f"comm={MODES[mode]}")
        einsum = einsum_flops(configured(overrides))
        simulations = at_two_depths(pool, load_cluster("summit"), *overrides)
        for study in STUDIES:
            results, draws = results_of(study), read_draws(EXPERIMENTS / study / "draws.csv")
            assert results["configuration"] == list(MODEL_40B)
            cluster = as_assumed(results)
            in_parts = [parts(simulation.seconds_on(cluster)) for simulation in simulations]
            for part, seconds in results["breakdown_seconds"][mode].items():
                assert extrapolated(*(each[part] for each in in_parts), 32) == pytest.approx(
                    seconds, rel=0.02, abs=0.01
                )
            chosen = int(np.flatnonzero(draws.constants["micro_batch"] == 1)[7])
            constants = {name: float(values[chosen]) for name, values in draws.constants.items()}
            drawn = [step_seconds(simulation, 0, cluster, constants) for simulation in simulations]
            added = step_seconds(simulations[0], einsum, cluster, constants) - drawn[0]
            assert extrapolated(*drawn, 32) + added == pytest.approx(draws.seconds[mode][chosen], rel=0.01)


@pytest.mark.parametrize("study", STUDIES)
def test_readme_says_what_was_drawn(study: str) -> None:
    results, draws = results_of(study), read_draws(EXPERIMENTS / study / "draws.csv")
    summary = results["monte_carlo"]
    for mode, quantiles in summary["speedup"].items():
        expected = np.percentile(draws.speedup(mode), [float(q.split()[0]) for q in quantiles])
        assert list(quantiles.values()) == pytest.approx(list(expected), rel=1e-3)
        said_in(study, f"×{quantiles['5 %']:.2f} to ×{quantiles['95 %']:.2f}")
    said_in(study, f"median of **×{summary['speedup'][BOTH]['50 %']:.2f}**")
    said_in(study, *(f"{100 * share:.1f} %" for share in summary["share_of_draws_below"].values()))
    steps = {mode: total(seconds) for mode, seconds in results["breakdown_seconds"].items()}
    said_in(study, "| step | " + " | ".join(f"{step:.1f}" for step in steps.values()) + " |")
    said_in(study, *(f"×{steps[BASELINE] / step:.2f}" for mode, step in steps.items() if mode != BASELINE))
    strongest = max(summary["rank_correlation"].items(), key=lambda item: abs(item[1]))
    said_in(study, f"{strongest[1]:.2f}".replace("-", "−"))
    assert strongest[1] == pytest.approx(rank_correlation(draws.constants[strongest[0]], draws.speedup()), abs=1e-3)


def test_other_layouts_of_today_are_as_said() -> None:
    results = results_of("paper_today")
    for name, seconds in results["layouts_seconds"].items():
        peak = results["layouts_peak_gib"].get(name, results["peak_gib"]["+ both, micro-batch 1"])
        said_in("paper_today", f"| {name} | {total(seconds):.1f} | {peak:.1f} |")


def test_rank_correlation_is_spearmans() -> None:
    x = np.array([1.0, 2.0, 2.0, 3.0])
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1)
    assert rank_correlation(x, -x) == pytest.approx(-1)
    assert rank_correlation(x, np.array([1.0, 3.0, 2.0, 4.0])) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


# ---- paper_shares --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_the_shares_need_is_what_the_readme_says() -> None:
    found = shares.study()
    readme = (EXPERIMENTS / "paper_shares" / "README.md").read_text()
    assert "\n".join(shares.table(found)) in readme
    committed = results_of("paper_shares")
    for name, (modes, _) in found.items():
        assert shares.change(modes, "all_reduce") == pytest.approx(-1 / 3, abs=0.005)
        for mode, of in modes.items():
            assert of.total == pytest.approx(sum(committed[name][mode].values()), rel=1e-4)
    assert shares.change(found["… and kernels for −20.7 %"][0]) == pytest.approx(shares.STEP)


def test_a_fixed_time_is_found_that_gives_a_share() -> None:
    """Worked by hand: 6 exchanges of 1 s become 4 of 1/4 s, −83 %; with f more each, (4f + 1) / (6f + 6) = 0.36."""
    bytes_alone = {
        BASELINE: shares.Mode({"all_to_all, between_nodes": 6.0, "kernels": 10.0}, 6, 0.2),
        BOTH: shares.Mode({"all_to_all, between_nodes": 1.0, "kernels": 10.0}, 4, 0.2),
    }
    assert shares.change(bytes_alone, "all_to_all") == pytest.approx(-5 / 6)
    fixed = shares.solved(bytes_alone, -0.64, "all_to_all", "fixed")
    assert fixed == pytest.approx(1.16 / 1.84)
    of = shares.changed(bytes_alone, fixed=fixed, kernels=2, added=1.0)
    assert of[BASELINE].total == pytest.approx(6 + 6 * fixed + 22)
    assert of[BASELINE].peak == pytest.approx(0.2 * 16 / of[BASELINE].total)


# ---- paper_memory --------------------------------------------------------------------------------------------------


def rows_of(study: str, name: str) -> list[dict[str, Any]]:
    with (EXPERIMENTS / study / name).open() as file:
        return [
            {key: value if key in ("machine", "model", "mode") else float(value) for key, value in row.items()}
            for row in csv.DictReader(file)
        ]


def test_largest_models_are_what_the_closed_form_gives_and_the_readme_says() -> None:
    rows = rows_of("paper_memory", "largest.csv")
    for row in rows:
        if (row["gpus"], row["experts"]) == (128, 16):
            template = composed(memory.overrides_of(1024, 128, int(row["tensor"]), 16))
            assert memory.largest_hidden(template) == row["hidden"]
    said_in("paper_memory", *("| " + " | ".join(row) + " |" for row in memory.largest_table(rows, 16)))
    for gpus in (128, 512):
        said_in("paper_memory", *(f"**{memory.ratios(rows, 16, tensor)[gpus]:.1f}×**" for tensor in (4, 8)))
    accumulating = {
        row["tensor"]: row["base_parameters_if_accumulating"]
        for row in rows
        if (row["gpus"], row["experts"]) == (128, 16)
    }
    said_in("paper_memory", f"{accumulating[1] / 1e9:.1f} B with tensor degree 1, {accumulating[4] / 1e9:.1f} B with 4")


def test_the_optimizer_step_is_as_said_and_simulations_confirm_memory() -> None:
    results = results_of("paper_memory")
    for name, values in results["optimizer_step"].items():
        assert values[2] == pytest.approx(memory.optimizer_step(16, memory.OPTIMIZERS[name]), rel=1e-4)
    said_in("paper_memory", f"**{results['optimizer_step']['untiled'][2]['spike']:.2f} GiB**")
    said_in("paper_memory", f"**{results['optimizer_step']['tiles of 1.8 M'][2]['spike']:.2f} GiB**")
    for name, both in results["confirmed"].items():
        assert both["simulated_gib"] == pytest.approx(both["closed_form_gib"], rel=0.01)
        said_in("paper_memory", f"| {name} | {both['closed_form_gib']:.2f} | {both['simulated_gib']:.2f} |")


# ---- paper_scaling -------------------------------------------------------------------------------------------------


def test_scaling_is_what_the_closed_form_gives_and_the_readme_says() -> None:
    rows, results = rows_of("paper_scaling", "scaling.csv"), results_of("paper_scaling")
    for machine, model, gpus in (("Summit", "6.7b", 128), ("ThetaGPU", "13b", 256)):
        ours = [row for row in rows if (row["machine"], row["model"], row["gpus"]) == (machine, model, gpus)]
        for row, again in zip(ours, scaling.rows_of(machine, model, gpus), strict=True):
            assert row["tensor"] == again["tensor"]
            assert row["seconds"] == pytest.approx(again["seconds"], rel=1e-6)
    for machine in scaling.CLUSTERS:
        for model in scaling.MODELS:
            said_in("paper_scaling", *(scaling.cell(rows, machine, model, gpus) for gpus in scaling.GPUS))
    for name, both in results["confirmed"].items():
        assert both["simulated"] == pytest.approx(both["closed_form"], rel=0.03)
        said_in("paper_scaling", f"| {name} | {both['closed_form']:.2f} | {both['simulated']:.2f} |")


# ---- paper_real ----------------------------------------------------------------------------------------------------


def test_the_real_run_sent_what_its_simulation_sends_with_equal_losses() -> None:
    results = results_of("paper_real")
    assert results["overrides"] == list(real.OVERRIDES)
    modes = results["modes"]
    assert len({mode["loss"] for mode in modes.values()}) == 1
    for name, mode in modes.items():
        for op in real.OPERATIONS:
            assert mode["measured"][op]["wire_bytes"] == mode["simulated"][op]["wire_bytes"]
        sent, seconds = (real.total(mode["measured"], what) for what in ("wire_bytes", "seconds"))
        predicted = real.total(mode["simulated"], "seconds")
        assert mode["emulated_seconds"] == pytest.approx(predicted, rel=0.01)
        assert seconds > predicted
        said_in("paper_real", f"| {name} | {sent / 2**20:.1f} | {predicted:.2f} | {seconds:.2f} |")
