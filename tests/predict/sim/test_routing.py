"""What a simulated rank of a dropless layer is sent: by assumption, by Zipf's law, or as a real run's routers chose."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tedlab.comm.rows import spread
from tedlab.config import LendConfig, TrainConfig, with_values
from tedlab.errors import UsageError
from tedlab.predict.cluster import load_cluster
from tedlab.predict.estimate import estimate
from tedlab.predict.sim import Simulation, simulate
from tedlab.predict.sim.routing import SimulatedRouting, routing_of
from tests.pool import WorkerPool
from tests.predict.sim.test_simulation import WORLD, checked, out_of_the_pools_group
from tests.selection import asked_of

DROPLESS = [*WORLD, "moe.dispatch=dropless"]
LENT = ["moe.lend.policy=llep", "moe.lend.minimum=1"]
TOKENS = 2 * 32  # of a micro-batch


def simulated(config: TrainConfig, routing: SimulatedRouting | None, *ranks: int) -> list[Simulation]:
    with out_of_the_pools_group():
        return [simulate(config, load_cluster("summit"), rank, routing=routing) for rank in ranks]


@pytest.fixture(scope="module")
def of_zipf(pool: WorkerPool, request: pytest.FixtureRequest) -> dict[tuple[str, ...], list[Simulation]]:
    """Of the first and the last rank, with all toggles that this session asks for, in one process."""
    asked = [tuple(cell["toggles"]) for cell in asked_of(request)]
    configs = [checked(*DROPLESS, *toggles) for toggles in asked]
    arguments = [(config, routing_of(config, "zipf", 1.2, None), 0, 127) for config in configs]
    found = pool.run_each(1, simulated, arguments, timeout=280)
    return {toggles: simulations for toggles, (simulations,) in zip(asked, found, strict=True)}


TOGGLES = [
    ["model.recompute.granularity=block", "comm=ted", "moe.every=1"],
    ["moe.top_k=2", "parallel.expert=8", "comm.dedup=rank", "comm.dtd=true", "comm.fuse_reduce_scatter=true"],
    ["parallel.sequence=true", "moe.lend.policy=even"],
    ["moe.dispatch=packed", "comm=dtd", "moe.top_k=2"],
    ["moe.top_k=2", "parallel.expert_tensor=2", "parallel.expert=8", "comm=ted", "model.recompute.granularity=block"],
    ["moe.top_k=2", "parallel.tensor=1", "parallel.expert_tensor=4", "parallel.expert=8", "data.batch_size=512"],
]
MORE_TOGGLES = [
    ["moe.top_k=2"],
    ["model.recompute.granularity=block", "parallel.sequence=true", "comm.cac=shard", "trainer.precision=bf16-true"],
    ["parallel.expert=1", "comm=dtd", "data.batch_size=64"],
    ["moe.top_k=2", "parallel.expert=8", "comm.hierarchical=true", "comm.ranks_per_node=8"],
    [
        *("moe.top_k=2", "parallel.expert=8", "comm.dedup=node", "comm.dtd=true", "comm.fuse_reduce_scatter=true"),
        *("comm.ranks_per_node=8", "model.recompute.granularity=block", "comm.cac=true"),
    ],
    [
        *("moe.top_k=2", "parallel.expert=8", "comm.dedup=group", "comm.dtd=true", "comm.fuse_reduce_scatter=true"),
        *("model.recompute.granularity=block", "comm.cac=true"),
    ],
    ["moe.top_k=2", *LENT],
    ["model.recompute.granularity=block", "comm=ted_fused", "moe.every=1", *LENT],
    ["moe.dispatch=packed", "parallel.sequence=true", "moe.capacity_factor=2"],
    ["moe.top_k=2", "parallel.expert_tensor=1", "moe.slice=tokens", "parallel.order=expert_data"],
    ["moe.top_k=2", "parallel.expert_tensor=1", "comm.dedup=rank", "parallel.expert=8", "parallel.order=expert_data"],
    [
        *("moe.top_k=2", "parallel.expert_tensor=1", "comm.dedup=node", "parallel.expert=8", "comm.ranks_per_node=4"),
        *("moe.slice=tokens", "model.recompute.granularity=block", "comm.cac=shard"),
    ],
    [
        *("moe.top_k=2", "parallel.expert_tensor=2", "comm.dedup=node", "parallel.expert=8", "comm.ranks_per_node=8"),
        *("comm.fuse_reduce_scatter=true", "model.recompute.granularity=block", "comm.cac=true"),
    ],
]


@pytest.mark.parametrize(
    "toggles",
    [
        *TOGGLES,
        *(pytest.param(toggles, marks=pytest.mark.exhaustive) for toggles in MORE_TOGGLES[::2]),
        *(pytest.param(toggles, marks=pytest.mark.slow) for toggles in MORE_TOGGLES[1::2]),
    ],
    ids=lambda toggles: ",".join(toggles),
)
def test_the_ledger_of_any_rank_is_the_closed_form_whatever_is_chosen(
    of_zipf: dict[tuple[str, ...], list[Simulation]], toggles: list[str]
) -> None:
    assert [simulation.differences for simulation in of_zipf[tuple(toggles)]] == [{}, {}]


@pytest.mark.slow
def test_a_popular_experts_rank_computes_more_and_keeps_more(pool: WorkerPool) -> None:
    config = checked(*DROPLESS)
    routing = routing_of(config, "zipf", 1.2, None)
    assert routing is not None
    (balanced, other) = pool.run(1, simulated, config, None, 0, 60)[0]
    first, last = pool.run(1, simulated, config, routing, 0, 60)[0]
    assert balanced.flops == other.flops
    assert first.flops["forward"] > balanced.flops["forward"] > last.flops["forward"]
    assert first.memory.total.max() > balanced.memory.total.max() > last.memory.total.max()
    assert first.step_seconds > balanced.step_seconds


@pytest.mark.parametrize("toggles", [[], ["model.recompute.granularity=block"]], ids=["stored", "recomputed"])
def test_lending_relieves_the_busiest_rank_and_what_it_takes_is_estimated(pool: WorkerPool, toggles: list[str]) -> None:
    home, lent = (checked(*DROPLESS, "moe.top_k=2", *toggles, *more) for more in ([], LENT))
    flops, peaks = [], []
    for config in (home, lent):
        routing = routing_of(config, "zipf", 1.2, None)
        assert routing is not None
        ranks = (0, 12)
        for rank, simulation in zip(ranks, pool.run(1, simulated, config, routing, *ranks)[0], strict=True):
            estimated = estimate(config, load_cluster("summit"), rank, routing.rows(rank))
            peaks.append(int(simulation.memory.total.max()))
            assert estimated.memory.total == pytest.approx(peaks[-1], rel=0.2)
            # An exchange counts for what a rank sends: a home that only lends gets gradients back for nothing.
            assert estimated.step_seconds == pytest.approx(simulation.step_seconds, rel=0.035)
            flops.append(simulation.flops["forward"])
    assert flops[0] > flops[2]
    assert peaks[0] > 2 * peaks[2]
    assert routing.rows(0)[1].lent > 0 == routing.rows(0)[1].borrowed
    assert routing.rows(60)[1].borrowed > 0  # of those that nobody likes, the last


def test_loads_are_planned_as_processes_will_plan_them() -> None:
    """Two of sixteen experts get all tokens: each process may compute as many rows as the mean, rounded up."""
    config = checked(*DROPLESS, *LENT)
    shares = np.zeros((1, 16))
    shares[:, [3, 9]] = 1
    alone = SimulatedRouting(with_values(config, {"moe.lend": LendConfig()}), shares)
    lending = SimulatedRouting(config, shares)
    assert alone.rows_by_expert_rank().max() == 16 * TOKENS / 2
    assert lending.rows_by_expert_rank().max() == 16 * TOKENS / 16
    assert (lending.lending(LendConfig()).rows_by_expert_rank() == alone.rows_by_expert_rank()).all()


def test_rows_by_expert_rank_are_those_of_the_law_and_the_busiest_is_named() -> None:
    config = checked(*DROPLESS, "parallel.expert=4", "moe.top_k=2")
    load = np.arange(1, 17) / np.arange(1, 17).sum() * TOKENS * 2
    routing = SimulatedRouting(config, load[None])
    rows = routing.rows_by_expert_rank()
    assert rows.shape == (1, 4)
    assert rows.sum() == 4 * TOKENS * 2  # four senders; no choice is lost
    assert rows[0].tolist() == pytest.approx(4 * load.reshape(4, 4).sum(1), abs=4 * 4)
    assert routing.busiest_rank() == 12  # the last of four expert ranks of four tensor ranks each
    assert routing.rows(12)[1].computed == routing.rows(31)[1].computed == rows[0, 3]  # of the next replica, too


def test_rows_of_a_folded_layout_are_those_of_the_tensor_ranks_in_an_expert_group() -> None:
    """Three of a data rank's rows are the first expert's: tensor ranks 0, 1 and 2 of four have one of them each."""
    shares = np.zeros((1, 16))
    shares[:, [0, 8]] = 3, TOKENS - 3
    config = checked(*DROPLESS, "parallel.expert=2", "parallel.expert_tensor=1")
    rows = [SimulatedRouting(config, shares).rows(rank)[1] for rank in range(8)]
    assert [each.sent for each in rows] == [TOKENS / 4] * 8
    # Expert groups are ranks 0 and 1, 2 and 3, …; the first of each has the experts from 0 to 7.
    assert [each.computed for each in rows] == [2, 30, 1, 31] * 2
    side_by_side = with_values(config, {"parallel.order": "expert_data"})  # ranks 0 and 64, 1 and 65, …
    routing = SimulatedRouting(side_by_side, shares)
    assert [routing.rows(rank)[1].computed for rank in (0, 2, 3, 64, 66, 67)] == [2, 2, 0, 30, 30, 32]


def test_rows_that_whole_data_ranks_gather_are_all_of_theirs() -> None:
    """Without tensor parallelism, four processes that divide an expert gather the rows of four data ranks."""
    layout = ["parallel.tensor=1", "parallel.expert=2", "parallel.expert_tensor=4", "data.batch_size=512"]
    config = checked(*DROPLESS, *layout)
    found = SimulatedRouting(config).rows(0)[1]
    assert (found.sent, found.received, found.gathered, found.computed) == (64, 64, 256, 256)


def test_pilots_of_a_folded_layout_are_those_of_the_tensor_ranks_in_an_expert_group() -> None:
    """Every token chooses the experts 0 and 8; of 30 tokens, tensor ranks 0 to 3 have 8, 8, 7 and 7."""
    shares = np.zeros((1, 16))
    shares[:, [0, 8]] = 1
    layout = ["parallel.expert_tensor=1", "moe.top_k=2", "data.micro_batch_size=1", "data.batch_size=32"]
    config = checked(*DROPLESS, *layout, "model.sequence_length=30", "comm.dedup=rank", "parallel.expert=2")
    rows = [SimulatedRouting(config, shares).rows(rank)[1] for rank in range(4)]  # groups of two neighbours
    assert [(each.sent, each.received, each.computed) for each in rows] == [(16, 16, 16)] * 2 + [(14, 14, 14)] * 2
    side_by_side = SimulatedRouting(with_values(config, {"parallel.order": "expert_data"}), shares)
    assert [side_by_side.rows(rank)[1].received for rank in (0, 1, 2, 3, 64, 67)] == [16, 16, 14, 14, 16, 14]
    # Groups of four on nodes of two. Ranks 0 and 2 hold the experts, and tokens go to each by way of two ranks.
    by_node = {"parallel.expert": 4, "comm.dedup": "node", "comm.ranks_per_node": 2}
    rows = [SimulatedRouting(with_values(config, by_node), shares).rows(rank)[1] for rank in range(4)]
    assert [(each.sent, each.relayed, each.passed) for each in rows] == [(16, 15, 15)] * 2 + [(14, 15, 15)] * 2
    assert [(each.received, each.computed) for each in rows] == [(30, 30), (0, 0)] * 2


def test_processes_that_compute_the_same_but_receive_other_pilots_differ() -> None:
    """Each is chosen for a quarter; the first has two experts for it, and a token that chooses both sends one pilot."""
    config = checked(*DROPLESS, "moe.top_k=2", "comm.dedup=rank", "parallel.expert=4")
    shares = np.array([[1.0, 1, 0, 0, *[2.0, 0, 0, 0] * 3]])
    routing = SimulatedRouting(config, shares)
    rows = [routing.rows(rank)[1] for rank in routing.degrees.groups(0)["expert"]]
    assert len({each.computed for each in rows}) == 1
    assert rows[0].received < rows[1].received == rows[2].received == rows[3].received
    kinds = routing.kinds_by_expert_rank()
    assert kinds[0] != kinds[1] == kinds[2] == kinds[3]


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
        ([], ("balanced", 1.0, None), "sim.routing=zipf and sim.zipf=… go together"),
        ([], ("trace", None, "nowhere.npz"), "nowhere.npz is not a router_trace.npz"),
        (["moe.dispatch=capacity"], ("zipf", 1.0, None), "has no effect"),
    ],
)
def test_a_mistake_is_named(overrides: list[str], arguments: tuple[str, float | None, str | None], said: str) -> None:
    with pytest.raises(UsageError) as error:
        routing_of(checked(*DROPLESS, *overrides), *arguments)
    assert said in str(error.value)


def test_a_trace_of_another_model_is_refused(tmp_path: Path) -> None:
    file = trace(tmp_path / "trace.npz", np.ones((1, 2, 8)))
    with pytest.raises(UsageError, match=r"2 MoE layers of 8 experts; this model has 1 of 16"):
        routing_of(checked(*DROPLESS), "trace", None, file)


NAN, INFINITE = float("nan"), float("inf")


def _load(*values: float, dtype: str = "float64") -> np.ndarray:
    """(1, 1, 16): these values, and then ones."""
    return np.array([*values, *[1] * (16 - len(values))], dtype=dtype).reshape(1, 1, 16)


TRACES = {
    "NaN": (_load(NAN), "must be finite, not negative, and not all 0"),
    "infinite": (_load(INFINITE), "must be finite"),
    "minus infinity": (_load(-INFINITE), "must be finite"),
    "negative": (_load(-1), "not negative"),
    "all 0": (_load() * 0, "not all 0"),
    "NaN in half precision": (_load(NAN, dtype="float16"), "must be finite"),
    "no step": (np.ones((0, 1, 16)), "has shape (0, 1, 16)"),
    "one step alone": (np.ones((1, 16)), "has shape (1, 16)"),
    "a number": (np.float64(3), "has shape ()"),
    "four dimensions": (np.ones((1, 1, 16, 1)), "has shape (1, 1, 16, 1)"),
    "complex": (_load().astype(complex), "type complex128"),
    "truth values": (_load() > 0, "type bool"),
    "strings": (_load().astype(str), "type <U"),
    "objects": (_load().astype(object), "allow_pickle=False"),
    "dates": (_load().astype("datetime64[s]"), "type datetime64"),
}


@pytest.mark.parametrize(("load", "said"), TRACES.values(), ids=TRACES)
def test_a_trace_that_no_run_writes_is_refused(tmp_path: Path, load: np.ndarray, said: str) -> None:
    with pytest.raises(UsageError, match=r"is not a router_trace\.npz of a run") as error:
        routing_of(checked(*DROPLESS), "trace", None, trace(tmp_path / "t.npz", load))
    assert said in str(error.value)


def _damaged(file: Path) -> Iterator[bytes]:
    whole = file.read_bytes()
    yield b""
    yield b"text"
    yield whole[:100]
    yield whole[:-30]
    yield whole.replace(b"\x93NUMPY", b"\x93NUMPX")
    middle = len(whole) // 3
    yield whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]


def test_a_damaged_trace_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "t.npz"
    np.savez(file, load=np.random.default_rng(0).integers(100, size=(9, 1, 16)))
    config = checked(*DROPLESS)
    for content in [*_damaged(file)]:
        file.write_bytes(content)
        with pytest.raises(UsageError, match=r"is not a router_trace\.npz of a run"):
            routing_of(config, "trace", None, str(file))
    np.save(tmp_path / "t.npy", _load())
    np.savez(tmp_path / "other.npz", step=_load())
    os.mkfifo(tmp_path / "pipe")
    for name in ("t.npy", "other.npz", "pipe", "."):
        with pytest.raises(UsageError, match=r"is not a router_trace\.npz of a run"):
            routing_of(config, "trace", None, str(tmp_path / name))


def test_very_large_numbers_of_choices_are_only_proportions(tmp_path: Path) -> None:
    config = checked(*DROPLESS)
    rows = [
        routing_of(config, "trace", None, trace(tmp_path / "t.npz", _load(2, 3) * scale)).rows_by_expert_rank()
        for scale in (1.0, 1e300, 5e307, 1e-300)
    ]
    assert all((others == rows[0]).all() for others in rows)


@pytest.mark.parametrize("shares", [[NAN, 1.0], [INFINITE, 1.0], [-1.0, 2.0], [1.0, 1.0]])
def test_what_cannot_be_divided_is_an_error_and_no_endless_loop(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="cannot be divided"):
        spread(shares, 100, 50 if shares[0] != shares[1] else 49)
