"""Which processes form a group, checked from the outside: by who adds to whose sum."""

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tedlab import ParallelDegrees, Topology, topology
from tests.pool import WorkerPool

KINDS = ("tensor", "data", "expert", "expert_data", "expert_tensor", "world")


@pytest.fixture
def single() -> Iterator[Topology]:
    yield Topology.single()
    dist.destroy_process_group()


def meshes_and_groups(degrees: ParallelDegrees) -> dict[str, Any]:
    topology = Topology(degrees)
    comm, me = topology.comm, torch.zeros(degrees.world_size)
    me[dist.get_rank()] = 1
    members = {k: comm.all_reduce(me, k, tag="test", phase="forward").nonzero().flatten().tolist() for k in KINDS}
    return {
        "members": members,
        "rank": {kind: comm.rank(kind) for kind in KINDS},
        "size": {kind: comm.size(kind) for kind in KINDS},
        "dense": (topology.dense.mesh_dim_names, tuple(topology.dense.shape), topology.dense.get_coordinate()),
        "expert": (topology.expert.mesh_dim_names, tuple(topology.expert.shape), topology.expert.get_coordinate()),
    }


# (world size, tensor, expert[, sequence, expert_tensor, order]): groups of each kind; the first is the example of the
# design. Where none of expert_tensor are given, they are those of tensor.
GROUPS: dict[tuple[Any, ...], dict[str, list[list[int]]]] = {
    (8, 2, 2): {
        "tensor": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "data": [[0, 2, 4, 6], [1, 3, 5, 7]],
        "expert": [[0, 2], [1, 3], [4, 6], [5, 7]],
        "expert_data": [[0, 4], [1, 5], [2, 6], [3, 7]],
    },
    (8, 4, 2): {
        "tensor": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "data": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "expert": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "expert_data": [[0], [1], [2], [3], [4], [5], [6], [7]],
    },
    (6, 1, 3): {
        "tensor": [[0], [1], [2], [3], [4], [5]],
        "data": [[0, 1, 2, 3, 4, 5]],
        "expert": [[0, 1, 2], [3, 4, 5]],
        "expert_data": [[0, 3], [1, 4], [2, 5]],
    },
    (4, 2, 1): {
        "tensor": [[0, 1], [2, 3]],
        "data": [[0, 2], [1, 3]],
        "expert": [[0], [1], [2], [3]],
        "expert_data": [[0, 2], [1, 3]],
    },
    (1, 1, 1): {"tensor": [[0]], "data": [[0]], "expert": [[0]], "expert_data": [[0]]},
    (8, 2, 2, False, None, "expert_data"): {
        "tensor": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "data": [[0, 2, 4, 6], [1, 3, 5, 7]],
        "expert": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "expert_data": [[0, 2], [1, 3], [4, 6], [5, 7]],
    },
    (8, 2, 4, False, 1): {
        "tensor": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "data": [[0, 2, 4, 6], [1, 3, 5, 7]],
        "expert": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "expert_data": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "expert_tensor": [[0], [1], [2], [3], [4], [5], [6], [7]],
    },
    (8, 1, 2, False, 2, "expert_data"): {
        "tensor": [[0], [1], [2], [3], [4], [5], [6], [7]],
        "data": [[0, 1, 2, 3, 4, 5, 6, 7]],
        "expert": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "expert_data": [[0, 2], [1, 3], [4, 6], [5, 7]],
        "expert_tensor": [[0, 1], [2, 3], [4, 5], [6, 7]],
    },
    (6, 2, 1, False, 3): {  # neither of the degrees divides the other
        "tensor": [[0, 1], [2, 3], [4, 5]],
        "data": [[0, 2, 4], [1, 3, 5]],
        "expert": [[0], [1], [2], [3], [4], [5]],
        "expert_data": [[0, 3], [1, 4], [2, 5]],
        "expert_tensor": [[0, 1, 2], [3, 4, 5]],
    },
}


@pytest.mark.parametrize("given", GROUPS, ids=str)
def test_groups_meshes_and_places(pool: WorkerPool, given: tuple[Any, ...]) -> None:
    degrees, groups_of = ParallelDegrees(*given), GROUPS[given]
    expected = {"expert_tensor": groups_of["tensor"], "world": [[*range(degrees.world_size)]]} | groups_of
    sizes = {kind: len(groups[0]) for kind, groups in expected.items()}
    dense, expert = ("data", "tensor"), ("expert_data", "expert", "expert_tensor")
    for rank, seen in enumerate(pool.run(degrees.world_size, meshes_and_groups, degrees)):
        own = {kind: next(group for group in groups if rank in group) for kind, groups in expected.items()}
        places = {kind: group.index(rank) for kind, group in own.items()}
        assert seen["members"] == own
        assert {k: [*r] for k, r in degrees.groups(rank).items()} == own
        assert seen["rank"] == degrees.coordinates(rank) == places
        assert seen["size"] == degrees.sizes == sizes
        assert seen["dense"] == (dense, tuple(map(sizes.get, dense)), tuple(map(places.get, dense)))
        assert seen["expert"] == (expert, tuple(map(sizes.get, expert)), tuple(map(places.get, expert)))


TRIPLES = [(g, t, e) for g in range(1, 9) for t in range(1, 9) for e in range(1, 9)]
FITTING = [(g, t, e) for g, t, e in TRIPLES if g % (t * e) == 0]
FOLDED = [(g, t, e, f) for g, t, e in TRIPLES for f in range(1, 9) if g % t == g % (e * f) == 0 and f != t]


def test_every_process_is_at_one_place_of_each_view() -> None:
    for g, t, e in FITTING:
        degrees = ParallelDegrees(g, t, e)
        assert degrees.tensor * degrees.data == g
        assert degrees.data == degrees.expert * degrees.expert_data
        assert not degrees.folded
    for g, t, e, f in FOLDED:
        for order in ("expert", "expert_data"):
            degrees = ParallelDegrees(g, t, e, expert_tensor=f, order=order)
            assert degrees.folded
            assert degrees.expert * degrees.expert_data * f == g
            kinds = ("expert_data", "expert", "expert_tensor")
            assert len({tuple(map(degrees.coordinates(rank).get, kinds)) for rank in range(g)}) == g


@pytest.mark.parametrize(
    ("degrees", "together"),
    [
        (ParallelDegrees(8, 2, 4), 1),  # one replica
        (ParallelDegrees(8, 8, 4, expert_tensor=1), 2),  # the tensor group has both
        (ParallelDegrees(8, 2, 4, expert_tensor=1), 1),
        (ParallelDegrees(8, 4, 2, expert_tensor=1), 2),  # of four
        (ParallelDegrees(12, 4, 3, expert_tensor=2), 2),  # the middle one of three tensor groups has parts of both
        (ParallelDegrees(8, 2, 4, expert_tensor=1, order="expert_data"), 2),  # neighbours are replicas
        (ParallelDegrees(8, 1, 2), 1),
    ],
    ids=str,
)
def test_replicas_that_tensor_groups_connect_wait_for_each_other(degrees: ParallelDegrees, together: int) -> None:
    assert degrees.replicas_together == together


def test_degrees_that_do_not_fit_are_refused_with_all_that_would() -> None:
    for g, t, e in set(TRIPLES) - set(FITTING):
        with pytest.raises(ValueError, match=f"{t}×{e} = {t * e} does not divide the world size {g}") as caught:
            ParallelDegrees(g, t, e)
        before, after = str(caught.value).split("one of these tensor×expert:")
        assert {(g, int(a), int(b)) for a, b in re.findall(r"(\d+)×(\d+)", after)} == {f for f in FITTING if f[0] == g}
        (larger,) = re.findall(r"\((\d+), for instance\)", before)
        assert ParallelDegrees(int(larger), t, e).world_size > g


def test_folded_degrees_that_do_not_fit_are_refused_with_all_that_would() -> None:
    with pytest.raises(ValueError, match="tensor = 4 does not divide the world size 6") as caught:
        ParallelDegrees(6, 4, expert_tensor=2)
    assert str(caught.value).endswith("tensor can be 1, 2, 3, 6")
    with pytest.raises(
        ValueError, match="expert_tensor × expert = 4×3 = 12 does not divide the world size 8"
    ) as caught:
        ParallelDegrees(8, 8, 3, expert_tensor=4)
    assert "(24, for instance)" in str(caught.value)
    assert "one of these expert_tensor×expert: 1×1, 1×2, 1×4, 1×8, 2×1, 2×2" in str(caught.value)


def test_a_layout_names_the_tensor_degree_of_experts_only_if_it_is_folded() -> None:
    assert str(ParallelDegrees(4, 2, 2)) == "4 processes: tensor 2 × expert 2 × expert_data 1 (data 2)"
    assert str(ParallelDegrees(4, 2, 2, expert_tensor=1, order="expert_data")) == (
        "4 processes: tensor 2; expert_tensor 1 × expert 2 × expert_data 2 (data 2), replicas of experts side by side"
    )


@pytest.mark.parametrize("field", ["world_size", "tensor", "expert", "expert_tensor"])
@pytest.mark.parametrize("value", [0, -2])
def test_a_degree_below_one_is_refused_by_name(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        ParallelDegrees(**({"world_size": 4} | {field: value}))


def topology_of(degrees: ParallelDegrees) -> str:
    with pytest.raises(ValueError, match="processes") as caught:
        Topology(degrees)
    dist.barrier()  # do not leave while others are still connecting
    return str(caught.value)


def test_a_topology_of_another_world_size_is_refused(pool: WorkerPool) -> None:
    for message in pool.run(2, topology_of, ParallelDegrees(4, 2, 2)):
        assert "for 4 processes" in message
        assert "2 were started" in message


def test_a_world_of_one_needs_no_launcher_and_can_be_asked_for_again(single: Topology) -> None:
    assert {single.comm.size(kind) for kind in KINDS} == {1}
    assert Topology.single().degrees == single.degrees == ParallelDegrees(1)


def test_exchanges_go_first_under_nccl_and_need_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=SimpleNamespace), raising=False)
    for backend, options in (("gloo", None), ("nccl", SimpleNamespace(is_high_priority_stream=True))):
        monkeypatch.setattr(dist, "get_backend", lambda backend=backend: backend)
        assert topology._urgent() == options
