"""The raw operations, their hooks, the adjoints, and how many of them one step of the model needs."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from tedlab import ParallelDegrees, Topology
from tedlab.capacity import expert_capacity
from tedlab.comm import (
    Collective,
    all_to_all,
    copy_to,
    gather_from,
    gather_to,
    reduce_from,
    scatter_from,
    slice_to,
)
from tedlab.config import ModelConfig, MoEConfig
from tedlab.models import GPT
from tedlab.nn import vocab_parallel_cross_entropy
from tests.pool import WorkerPool

# Groups of four processes under tensor 2 × expert 2, see tests/test_topology.py.
GROUPS = {"tensor": [[0, 1], [2, 3]], "data": [[0, 2], [1, 3]], "expert": [[0, 2], [1, 3]], "world": [[0, 1, 2, 3]]}


def topology(tensor: int = 2, expert: int = 2) -> Topology:
    return Topology(ParallelDegrees(dist.get_world_size(), tensor, expert))


def buffer(rank: int) -> Tensor:
    """(4, 3), different on every rank and not monotonous in it."""
    return torch.arange(12.0).view(4, 3) * (rank + 1) + (7 * rank) % 4 * 100


def group_of(rank: int, kind: str) -> list[int]:
    return next(group for group in GROUPS[kind] if rank in group)


# ---- results -----------------------------------------------------------------------------------------------------


def operate(method: str, kind: str, options: dict[str, str]) -> tuple[Tensor, Tensor, bool]:
    """The result for a contiguous and for a strided input, and whether the inputs are as they were."""
    operation = getattr(topology().comm, method)
    x = buffer(dist.get_rank())
    strided = x.t().contiguous().t()
    results = [operation(y, kind, tag="test", phase="forward", **options) for y in (x, strided)]
    unchanged = torch.equal(x, buffer(dist.get_rank())) and torch.equal(strided, x)
    return results[0], results[1], unchanged


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("name", ["sum", "max", "all_to_all"])
def test_results_are_as_expected_and_inputs_stay(pool: WorkerPool, kind: str, name: str) -> None:
    method, options = ("all_to_all", {}) if name == "all_to_all" else ("all_reduce", {"op": name})
    for rank, (result, strided, unchanged) in enumerate(pool.run(4, operate, method, kind, options)):
        group = group_of(rank, kind)
        buffers = torch.stack([buffer(member) for member in group])
        place = group.index(rank)
        expected = {
            "sum": buffers.sum(0),
            "max": buffers.amax(0),
            "all_to_all": torch.cat([b.chunk(len(group))[place] for b in buffers]),
        }[name]
        assert torch.equal(result, expected)
        assert torch.equal(strided, expected)
        assert unchanged


def operate_alone() -> tuple[list[Any], int, list[bool]]:
    comm, heard = topology(1, 1).comm, []
    comm.register_hook(lambda call, when: heard.append(call))
    x = buffer(0).requires_grad_()
    with CommDebugMode() as witness:
        raw = [
            comm.all_reduce(x, "data", tag="test", phase="forward"),
            comm.all_reduce(x, "world", tag="test", phase="forward", op="max"),
            comm.all_to_all(x, "expert", tag="test", phase="forward"),
        ]
        pairs = [pair(x, comm, kind, "test") for pair, kind in PAIRS]
        sum(y.sum() for y in pairs).backward()
    assert x.grad is not None
    return heard, witness.get_total_counts(), [torch.equal(y, x) for y in (*raw, *pairs)] + [bool((x.grad == 3).all())]


def test_in_a_group_of_one_nothing_is_launched_and_no_hook_called(pool: WorkerPool) -> None:
    heard, launched, right = pool.run(1, operate_alone)[0]
    assert heard == []
    assert launched == 0
    assert all(right)


# ---- hooks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "size", "wire"),
    [("all_reduce", 2, 96), ("all_reduce", 4, 144), ("all_to_all", 2, 48), ("all_to_all", 4, 72), ("all_reduce", 1, 0)],
)
def test_payload_is_the_buffer_and_wire_what_a_ring_sends(op: Any, size: int, wire: float) -> None:
    call = Collective(op, "tensor", size, "forward", "tag", torch.Size([4, 3, 2]), torch.float32)
    assert call.payload_bytes == 96
    assert call.wire_bytes == pytest.approx(wire)
    half = Collective(op, "tensor", size, "forward", "tag", torch.Size([4, 3, 2]), torch.bfloat16)
    assert half.payload_bytes == 48


def hear() -> list[tuple[str, Any, str]]:
    comm, events = topology().comm, []
    first = comm.register_hook(lambda call, when: events.append(("first", call, when)))
    second = comm.register_hook(lambda call, when: events.append(("second", call, when)))
    comm.all_reduce(buffer(0), "tensor", tag="a", phase="forward")
    first.remove()
    comm.all_to_all(buffer(0).bfloat16(), "world", tag="b", phase="optimizer")
    second.remove()
    comm.all_reduce(buffer(0), "tensor", tag="c", phase="forward")
    return events


def test_hooks_hear_what_happens_in_order_until_removed(pool: WorkerPool) -> None:
    a = Collective("all_reduce", "tensor", 2, "forward", "a", torch.Size([4, 3]), torch.float32)
    b = Collective("all_to_all", "world", 4, "optimizer", "b", torch.Size([4, 3]), torch.bfloat16)
    expected = [
        ("first", a, "start"),
        ("second", a, "start"),
        ("first", a, "end"),
        ("second", a, "end"),
        ("second", b, "start"),
        ("second", b, "end"),
    ]
    assert pool.run(4, hear) == [expected] * 4


def raise_in_hook(at: str) -> tuple[str, Tensor]:
    comm = topology().comm

    def hook(call: Collective, when: str) -> None:
        if when == at:
            raise RuntimeError(f"fault at {when} of {call.tag}")

    handle = comm.register_hook(hook)
    with pytest.raises(RuntimeError, match="fault") as caught:
        comm.all_reduce(torch.ones(1), "tensor", tag="here", phase="forward")
    handle.remove()
    return str(caught.value), comm.all_reduce(torch.ones(1), "tensor", tag="after", phase="forward")


@pytest.mark.parametrize("when", ["start", "end"])
def test_what_a_hook_raises_reaches_the_caller(pool: WorkerPool, when: str) -> None:
    for message, after in pool.run(4, raise_in_hook, when):
        assert message == f"fault at {when} of here"
        assert after == 2  # and the group is still usable


# ---- adjoints ----------------------------------------------------------------------------------------------------

PAIRS = [(copy_to, "tensor"), (reduce_from, "tensor"), (all_to_all, "expert")]
SLICING = {f.__name__: f for f in (slice_to, gather_from, gather_to, scatter_from)}  # along a dimension
# What each process holds of a vector: its own part of the whole, or the same vector as all others.
REPLICATED_INPUT = {"copy_to": True, "slice_to": True}
REPLICATED_OUTPUT = {"reduce_from": True, "gather_from": True}


def bound(name: str) -> Any:
    """A pair as a function of tensor, collectives, kind and tag."""
    if name in SLICING:
        return lambda x, comm, kind, tag: SLICING[name](x, comm, kind, tag, 1)
    return {f.__name__: f for f, _ in PAIRS}[name]


def inner_products(name: str, kind: str) -> tuple[float, float, bool]:
    """<f(x), y> and <x, fᵀ(y)> as this process sees them, and whether x and y are as they were."""
    comm = topology(*((4, 1) if kind == "tensor" else (1, 4))).comm

    def random(replicated: bool, salt: int, shape: torch.Size) -> Tensor:
        seed = salt + (0 if replicated else 1 + dist.get_rank())
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    x = random(name in REPLICATED_INPUT, 100, torch.Size([8, 4, 3])).requires_grad_()
    out = bound(name)(x, comm, kind, "test")
    y = random(name in REPLICATED_OUTPUT, 200, out.shape)
    before = x.detach().clone(), y.clone()
    (transposed,) = torch.autograd.grad(out, x, y)
    unchanged = torch.equal(x, before[0]) and torch.equal(y, before[1])
    return (out * y).sum().item(), (x * transposed).sum().item(), unchanged


@pytest.mark.parametrize(
    ("pair", "kind"), [*((pair.__name__, kind) for pair, kind in PAIRS), *((name, "tensor") for name in SLICING)]
)
def test_backward_is_the_adjoint_of_forward(pool: WorkerPool, pair: str, kind: str) -> None:
    """A product of replicated vectors counts once, one of parts is the sum over processes."""
    lefts, rights, unchanged = zip(*pool.run(4, inner_products, pair, kind), strict=True)
    assert all(unchanged)
    for products, replicated in ((lefts, pair in REPLICATED_OUTPUT), (rights, pair in REPLICATED_INPUT)):
        if replicated:
            assert max(products) == pytest.approx(min(products), rel=1e-12)
    left = lefts[0] if pair in REPLICATED_OUTPUT else sum(lefts)
    right = rights[0] if pair in REPLICATED_INPUT else sum(rights)
    assert abs(left) > 0.1
    assert left == pytest.approx(right, rel=1e-12)


# ---- one micro-batch of the model --------------------------------------------------------------------------------

BATCH, SEQUENCE, HIDDEN, VOCABULARY = 2, 12, 16, 64


def count(layers: int, moe: MoEConfig, tie: bool) -> tuple[dict[tuple[str, ...], list[int]], int]:
    """Calls and payload bytes by (tag, phase, op, kind), and how many collectives torch has seen.

    Of a second micro-batch: with the first, and whenever sizes change, processes agree on them.
    """
    here, calls = topology(), {}
    config = ModelConfig(layers, HIDDEN, 4, 32, SEQUENCE, vocab_size=VOCABULARY, tie_embeddings=tie)
    model = GPT(config, moe, here, seed=0)

    def hook(call: Collective, when: str) -> None:
        if when == "end":
            seen = calls.setdefault((call.tag, call.phase, call.op, call.kind), [0, 0])
            seen[0] += 1
            seen[1] += call.payload_bytes

    generator = torch.Generator().manual_seed(here.comm.rank("data"))
    batch = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)
    model(batch[:, :-1])
    here.comm.register_hook(hook)
    with CommDebugMode() as witness:
        logits, reports = model(batch[:, :-1])
        loss = vocab_parallel_cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), here.comm).mean()
        (loss + sum(report.balance_loss for report in reports)).backward()
    return calls, witness.get_total_counts()


@pytest.mark.parametrize(
    ("layers", "moe", "tie"),
    [
        (4, MoEConfig(num_experts=4), True),
        (2, MoEConfig(num_experts=8, every=1, top_k=2, capacity_factor=0.7, capacity_multiple=2), False),
        (2, MoEConfig(num_experts=0), True),
    ],
    ids=["every_second", "every_top2_untied", "dense"],
)
def test_a_micro_batch_communicates_what_the_closed_form_says(
    pool: WorkerPool, layers: int, moe: MoEConfig, tie: bool
) -> None:
    tokens = BATCH * SEQUENCE
    s = tokens * HIDDEN * 4
    routed = layers // moe.every if moe.num_experts else 0
    dense = layers - routed
    capacity = expert_capacity(tokens, max(1, moe.num_experts), moe.top_k, moe.capacity_factor, moe.capacity_multiple)
    s_c = moe.num_experts * capacity * HIDDEN * 4
    reduce, exchange = ("all_reduce", "tensor"), ("all_to_all", "expert")
    expected = {
        ("embedding.reduce", "forward", *reduce): [1, s],
        ("attention.reduce", "forward", *reduce): [layers, layers * s],
        ("attention.copy", "backward", *reduce): [layers, layers * s],
        ("feed_forward.reduce", "forward", *reduce): [dense, dense * s],
        ("feed_forward.copy", "backward", *reduce): [dense, dense * s],
        ("dispatch.all_to_all", "forward", *exchange): [routed, routed * s_c],
        ("experts.reduce", "forward", "all_reduce", "expert_tensor"): [routed, routed * s_c],
        ("combine.all_to_all", "forward", *exchange): [routed, routed * s_c],
        ("combine.all_to_all", "backward", *exchange): [routed, routed * s_c],
        ("experts.copy", "backward", "all_reduce", "expert_tensor"): [routed, routed * s_c],
        ("dispatch.all_to_all", "backward", *exchange): [routed, routed * s_c],
        ("output.copy", "backward", *reduce): [1, s],
        ("loss.max", "forward", *reduce): [1, tokens * 4],
        ("loss.sum", "forward", *reduce): [1, 2 * tokens * 4],
    }
    expected = {key: value for key, value in expected.items() if value[0]}
    for calls, witnessed in pool.run(4, count, layers, moe, tie):
        assert calls == expected
        assert witnessed == sum(number for number, _ in expected.values())
