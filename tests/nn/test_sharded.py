"""Parameters that exist only as shards: their values, and the placements of their gradients."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from tedlab import ParallelDegrees, Topology
from tedlab.nn import Init, ShardedModule, initialize
from tedlab.spec import ParameterSpec
from tests.pool import WorkerPool

BIG = (1500, 1024)  # more than the 2^20 values that are drawn at a time: two blocks, the second begins in row 1024
SHAPES = {
    "rows": (24, 6),
    "columns": (6, 24),
    "vector": (8,),
    "experts": (4, 6, 8),
    "inner": (4, 8, 6),
    "whole": (5, 3),
}
SHARDS = {
    "rows": {"tensor": 0},
    "columns": {"tensor": 1},
    "vector": {"tensor": 0},
    "experts": {"expert": 0, "expert_tensor": 2},
    "inner": {"expert": 0, "expert_tensor": 1},
    "whole": {},
    "big_rows": {"tensor": 0},
    "big_columns": {"tensor": 1},
}


class Example(ShardedModule):
    """One parameter of every kind."""

    def __init__(self, topology: Topology, big: bool = False) -> None:
        super().__init__()
        shapes = SHAPES | ({"big_rows": BIG, "big_columns": BIG} if big else {})
        for name, shape in shapes.items():
            mesh = "expert" if len(shape) == 3 else "dense"
            init = Init(0.5) if name == "vector" else Init(1.0, 0.25)
            self.add_parameter(ParameterSpec(name, shape, init, SHARDS[name], mesh), topology)


def initialized(topology: Topology, seed: int = 0, big: bool = False) -> dict[str, Tensor]:
    model = nn.ModuleDict({"a": Example(topology), "b": Example(topology, big)})
    initialize(model, seed)
    return {name: parameter.detach().to_local() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def unsharded(single: Topology) -> dict[str, Tensor]:
    return initialized(single, big=True)


def shards(tensor: int, expert: int, expected: dict[str, Tensor]) -> dict[str, bool]:
    """Whether this process's shards are the slices that belong to its rank."""
    rank = dist.get_rank()
    place = {"tensor": (rank % tensor, tensor), "expert": (rank // tensor % expert, expert)}
    place["expert_tensor"] = place["tensor"]
    equal = {}
    for name, local in initialized(Topology(ParallelDegrees(dist.get_world_size(), tensor, expert)), big=True).items():
        part = expected[name]
        for axis, dim in SHARDS[name.split(".")[1]].items():
            index, parts = place[axis]
            part = part.chunk(parts, dim)[index]
        equal[name] = torch.equal(local, part)
    return equal


@pytest.mark.parametrize("layout", [(2, 2, 1), (4, 4, 1), (2, 1, 2), (4, 1, 4), (4, 2, 2)], ids=str)
def test_shards_of_any_layout_are_slices_of_the_unsharded_parameter(
    pool: WorkerPool, layout: tuple[int, int, int], unsharded: dict[str, Tensor]
) -> None:
    world_size, tensor, expert = layout
    for equal in pool.run(world_size, shards, tensor, expert, unsharded):
        assert equal == dict.fromkeys(unsharded, True)


def test_values_have_the_mean_and_deviation_asked_for(unsharded: dict[str, Tensor]) -> None:
    big = unsharded["b.big_rows"]
    assert big.mean().item() == pytest.approx(1.0, abs=1e-3)
    assert big.std().item() == pytest.approx(0.25, abs=1e-3)
    assert torch.equal(unsharded["a.vector"], torch.full((8,), 0.5))


def test_no_two_places_hold_the_same_values(unsharded: dict[str, Tensor], single: Topology) -> None:
    """Not other names, experts, blocks of rows, or seeds."""
    experts = unsharded["a.experts"]
    first, second = unsharded["b.big_rows"][:476], unsharded["b.big_rows"][1024:]
    other = initialized(single, seed=1)
    pairs = [
        (unsharded["a.rows"], unsharded["b.rows"]),
        (unsharded["b.big_rows"], unsharded["b.big_columns"]),
        (first, second),
        *((experts[0], experts[i]) for i in range(1, 4)),
        *((unsharded[name], other[name]) for name in other if not name.endswith("vector")),
    ]
    for a, b in pairs:
        assert (a == b).double().mean() < 0.01


def test_uninitialised_parameters_are_nan(single: Topology) -> None:
    for parameter in Example(single).parameters():
        assert parameter.detach().to_local().isnan().all()


def indivisible() -> str:
    topology = Topology(ParallelDegrees(2, tensor=2))
    with pytest.raises(ValueError, match="divided") as caught:
        ShardedModule().add_parameter(ParameterSpec("odd", (4, 3), divided={"tensor": 1}), topology)
    return str(caught.value)


def test_a_dimension_that_cannot_be_divided_is_refused_by_name(pool: WorkerPool) -> None:
    for message in pool.run(2, indivisible):
        for part in ("ShardedModule.odd", "dimension 1", "(4, 3)", "2 equal parts", "'tensor'"):
            assert part in message


def drawn_at_a_time(shape: tuple[int, int], dim: int) -> tuple[list[int], int]:
    """Sizes of the random tensors made while a matrix is initialised, and of the shard."""
    topology = Topology(ParallelDegrees(4, tensor=4))
    module = ShardedModule()
    module.add_parameter(ParameterSpec("weight", shape, Init(std=1), {"tensor": dim}), topology)
    sizes, randn = [], torch.randn

    def recording(*args: int, **options: object) -> Tensor:
        values = randn(*args, **options)
        sizes.append(values.numel())
        return values

    torch.randn = recording
    try:
        initialize(module, 0)
    finally:
        torch.randn = randn
    local = module.get_parameter("weight").detach().to_local()
    assert not local.isnan().any()
    return sizes, local.numel()


def test_only_blocks_that_overlap_the_shard_are_drawn_and_one_at_a_time(pool: WorkerPool) -> None:
    block = 1 << 20
    for sizes, shard in pool.run(4, drawn_at_a_time, (6000, 1024), 0):
        assert max(sizes) <= block  # 4 MiB, the promise
        assert sum(sizes) < shard + 2 * block
    for sizes, _ in pool.run(4, drawn_at_a_time, (1500, 1024), 1):
        assert max(sizes) <= block


def gradient_placements() -> dict[str, tuple[tuple, tuple]]:
    topology = Topology(ParallelDegrees(4, tensor=2, expert=2))
    module = Example(topology)
    sum(module.local(name).sum() for name in SHAPES).backward()
    placements = {}
    for name, parameter in module.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        assert parameter.grad.shape == parameter.shape == SHAPES[name]
        placements[name] = (parameter.placements, parameter.grad.placements)
    return placements


def test_gradients_are_partial_along_the_data_axis_and_else_placed_as_their_parameter(pool: WorkerPool) -> None:
    own = {
        "rows": (Shard(0),),
        "columns": (Shard(1),),
        "vector": (Shard(0),),
        "experts": (Shard(0), Shard(2)),
        "inner": (Shard(0), Shard(1)),
        "whole": (Replicate(),),
    }
    expected = {name: ((Replicate(), *rest), (Partial(), *rest)) for name, rest in own.items()}
    assert pool.run(4, gradient_placements) == [expected] * 4
