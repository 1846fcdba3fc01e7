"""What a simulated rank of a dropless layer is sent: by assumption, by Zipf's law, or as a real run's routers chose."""

from pathlib import Path

import numpy as np
import pytest

from tedlab.cli import UsageError
from tedlab.cluster import load_cluster
from tedlab.config import TrainConfig
from tedlab.sim import Simulation, simulate
from tedlab.sim.routing import Routing, routing_of
from tests.pool import WorkerPool
from tests.sim.test_simulation import WORLD, checked, out_of_the_pools_group

DROPLESS = [*WORLD, "moe.dispatch=dropless"]
TOKENS = 2 * 32  # of a micro-batch


def simulated(config: TrainConfig, routing: Routing | None, *ranks: int) -> list[Simulation]:
    with out_of_the_pools_group():
        return [simulate(config, load_cluster("summit"), rank, routing=routing) for rank in ranks]


@pytest.mark.parametrize(
    "toggles",
    [
        ["moe.top_k=2"],
        ["model.checkpoint=block", "comm=ted", "moe.every=1"],
        ["model.checkpoint=block", "parallel.sequence=true", "comm.cac=shard", "trainer.precision=bf16-true"],
        ["parallel.expert=1", "comm=dtd", "data.batch_size=64"],
    ],
    ids=lambda toggles: ",".join(toggles),
)
def test_the_ledger_of_any_rank_is_the_closed_form_whatever_is_chosen(pool: WorkerPool, toggles: list[str]) -> None:
    config = checked(*DROPLESS, *toggles)
    for simulation in pool.run(1, simulated, config, routing_of(config, "zipf", "1.2", None), 0, 127)[0]:
        assert simulation.differences == {}


def test_a_popular_experts_rank_computes_more_and_keeps_more(pool: WorkerPool) -> None:
    config = checked(*DROPLESS)
    routing = routing_of(config, "zipf", "1.2", None)
    assert routing is not None
    (balanced, other) = pool.run(1, simulated, config, None, 0, 60)[0]
    first, last = pool.run(1, simulated, config, routing, 0, 60)[0]
    assert balanced.flops == other.flops
    assert first.flops["forward"] > balanced.flops["forward"] > last.flops["forward"]
    assert first.memory.total.max() > balanced.memory.total.max() > last.memory.total.max()
    assert first.step_seconds > balanced.step_seconds


def test_rows_by_expert_rank_are_those_of_the_law_and_the_busiest_is_named() -> None:
    config = checked(*DROPLESS, "parallel.expert=4", "moe.top_k=2")
    load = np.arange(1, 17) / np.arange(1, 17).sum() * TOKENS * 2
    routing = Routing(config, load[None])
    rows = routing.rows_by_expert_rank()
    assert rows.shape == (1, 4)
    assert rows.sum() == 4 * TOKENS * 2  # four senders; no choice is lost
    assert rows[0].tolist() == pytest.approx(4 * load.reshape(4, 4).sum(1), abs=4 * 4)
    assert routing.busiest_rank() == 12  # the last of four expert ranks of four tensor ranks each
    assert routing.rows(12)[1].computed == routing.rows(31)[1].computed == rows[0, 3]  # of the next replica, too


def trace(file: Path, load: np.ndarray) -> str:
    np.savez_compressed(file, load=load)
    return str(file)


def test_a_trace_stands_for_its_last_step(tmp_path: Path) -> None:
    load = np.ones((3, 1, 16))
    load[-1, 0, 4:] = 0
    routing = routing_of(checked(*DROPLESS), "trace", None, trace(tmp_path / "trace.npz", load))
    assert routing is not None
    assert routing.rows_by_expert_rank()[0].tolist() == [16 * TOKENS / 4] * 4 + [0] * 12


@pytest.mark.parametrize(
    ("overrides", "arguments", "said"),
    [
        ([], ("ziph", None, None), "sim.routing=ziph is unknown; valid: balanced, zipf, trace"),
        ([], ("zipf", None, None), "sim.routing=zipf and sim.zipf=… go together"),
        ([], ("balanced", "1", None), "sim.routing=zipf and sim.zipf=… go together"),
        ([], ("zipf", "steep", None), "sim.zipf=steep is not an exponent"),
        ([], ("zipf", "-1", None), "a number from 0"),
        ([], ("trace", None, "nowhere.npz"), "nowhere.npz is not a router_trace.npz"),
        (["moe.dispatch=capacity"], ("zipf", "1", None), "has no effect"),
    ],
)
def test_a_mistake_is_named(overrides: list[str], arguments: tuple[str, str | None, str | None], said: str) -> None:
    with pytest.raises(UsageError) as error:
        routing_of(checked(*DROPLESS, *overrides), *arguments)
    assert said in str(error.value)


def test_a_trace_of_another_model_is_refused(tmp_path: Path) -> None:
    file = trace(tmp_path / "trace.npz", np.ones((1, 2, 8)))
    with pytest.raises(UsageError, match=r"2 MoE layers of 8 experts; this model has 1 of 16"):
        routing_of(checked(*DROPLESS), "trace", None, file)
