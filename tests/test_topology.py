"""Which processes form a group, checked from the outside: by who adds to whose sum."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tedlab import ParallelDegrees, Topology
from tests.pool import WorkerPool

KINDS = ("tensor", "data", "expert", "expert_data", "expert_tensor", "world")


@pytest.fixture
def single() -> Iterator[Topology]:
    yield Topology.single()
    dist.destroy_process_group()


def meshes_and_groups(world_size: int, tensor: int, expert: int) -> dict[str, Any]:
    topology = Topology(ParallelDegrees(world_size, tensor, expert))
    comm, me = topology.comm, torch.zeros(world_size)
    me[dist.get_rank()] = 1
    members = {k: comm.all_reduce(me, k, tag="test", phase="forward").nonzero().flatten().tolist() for k in KINDS}
    return {
        "members": members,
        "rank": {kind: comm.rank(kind) for kind in KINDS},
        "size": {kind: comm.size(kind) for kind in KINDS},
        "dense": (topology.dense.mesh_dim_names, tuple(topology.dense.shape), topology.dense.get_coordinate()),
        "expert": (topology.expert.mesh_dim_names, tuple(topology.expert.shape), topology.expert.get_coordinate()),
    }


# (world size, tensor, expert): groups of each kind; the first is the example of the design.
GROUPS = {
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
}


@pytest.mark.parametrize("degrees", GROUPS, ids=str)
def test_groups_meshes_and_places(pool: WorkerPool, degrees: tuple[int, int, int]) -> None:
    world_size, tensor, expert = degrees
    expected = GROUPS[degrees] | {"expert_tensor": GROUPS[degrees]["tensor"], "world": [[*range(world_size)]]}
    expert_data = world_size // tensor // expert
    for rank, seen in enumerate(pool.run(world_size, meshes_and_groups, *degrees)):
        own = {kind: next(group for group in groups if rank in group) for kind, groups in expected.items()}
        assert seen["members"] == own
        assert {k: [*r] for k, r in ParallelDegrees(world_size, tensor, expert).groups(rank).items()} == own
        assert seen["rank"] == {kind: group.index(rank) for kind, group in own.items()}
        assert seen["size"] == {kind: len(group) for kind, group in own.items()}
        t, e, r = rank % tensor, rank // tensor % expert, rank // tensor // expert
        names, shape, place = seen["dense"]
        assert (names, shape) == (("data", "tensor"), (expert_data * expert, tensor))
        assert tuple(place) == (rank // tensor, t)
        names, shape, place = seen["expert"]
        assert (names, shape) == (("expert_data", "expert", "tensor"), (expert_data, expert, tensor))
        assert tuple(place) == (r, e, t)


TRIPLES = [(g, t, e) for g in range(1, 9) for t in range(1, 9) for e in range(1, 9)]
FITTING = [(g, t, e) for g, t, e in TRIPLES if g % (t * e) == 0]


def test_every_process_is_at_one_place_of_each_view() -> None:
    for g, t, e in FITTING:
        degrees = ParallelDegrees(g, t, e)
        assert degrees.tensor * degrees.data == g
        assert degrees.data == degrees.expert * degrees.expert_data


def test_degrees_that_do_not_fit_are_refused_with_all_that_would() -> None:
    for g, t, e in set(TRIPLES) - set(FITTING):
        with pytest.raises(ValueError, match=f"{t}×{e} = {t * e} does not divide the world size {g}") as caught:
            ParallelDegrees(g, t, e)
        before, after = str(caught.value).split("one of these tensor×expert:")
        assert {(g, int(a), int(b)) for a, b in re.findall(r"(\d+)×(\d+)", after)} == {f for f in FITTING if f[0] == g}
        (larger,) = re.findall(r"\((\d+), for instance\)", before)
        assert ParallelDegrees(int(larger), t, e).world_size > g


@pytest.mark.parametrize("field", ["world_size", "tensor", "expert"])
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
