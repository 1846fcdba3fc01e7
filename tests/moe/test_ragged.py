"""Dropless routing: every choice reaches its expert and comes back, whatever was chosen, in every world."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tedlab import ParallelDegrees, Topology
from tedlab.comm import Recomputation, Second
from tedlab.comm.recompute import _Pass, _Region
from tedlab.comm.rows import Rows
from tedlab.config import CommOptions, MoEConfig
from tedlab.moe import Experts, ExpertsSpec, MoELayer, MoESpec, mixtures, pilots, ragged
from tedlab.moe.gather import spread_choices
from tedlab.moe.grouped import Groups, bias_rows, grouped_matmul, native
from tedlab.moe.pilot_steps import list_choices, list_pilots, number_choices
from tedlab.moe.ragged import RaggedRows, arrange, ragged_path
from tedlab.moe.router import RouterReport, Routing
from tedlab.moe.slots import sort_choices
from tedlab.nn import FeedForwardSpec, Init, initialize
from tests.pool import WorkerPool

EXPERTS, HIDDEN = 4, 3
MODES = {
    "plain": (CommOptions(), False),
    "dtd": (CommOptions(dtd=True), False),
    "fused": (CommOptions(dtd=True, fuse_reduce_scatter=True), False),
    "sequence": (CommOptions(), True),
}
CHOICES = ["uniform", "skewed", "one_expert", "tokens_of_some_ranks_alike"]


@pytest.fixture
def single() -> Iterator[Topology]:
    yield Topology.single()
    dist.destroy_process_group()


def problem(
    rank: int, top_k: int, choices: str, tokens: int = 7, number: int = EXPERTS
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, gates and distinct choices of one rank that has tokens of its own; T divides their number nowhere."""
    draw = torch.Generator().manual_seed(10 * rank + top_k)
    x = torch.randn(tokens, HIDDEN, generator=draw, dtype=torch.float64)
    gates = torch.rand(tokens, top_k, generator=draw, dtype=torch.float64)
    likes = torch.rand(tokens, number, generator=draw)
    if choices == "skewed":
        likes += torch.linspace(1.5, 0, number)
    elif choices == "one_expert" or (choices == "tokens_of_some_ranks_alike" and rank % 2):
        likes = torch.linspace(0, 1, number).expand(tokens, -1)
    return x, gates, likes.argsort(-1, descending=True)[:, :top_k]


def routing_of(expert_TK: Tensor, gate_TK: Tensor, number: int = EXPERTS) -> Routing:
    place_TK, choice, load_E = sort_choices(expert_TK, number)
    zero = torch.zeros(())
    return Routing(gate_TK, place_TK, choice, RouterReport(zero, zero, load_E, zero))


def through_experts(x: Tensor, routing: Routing, topology: Topology) -> Tensor:
    """Expert e is x ↦ tanh((e + 1)·x) + e, of which each tensor rank computes a share, all but the bias e."""
    path, region = ragged_path(EXPERTS, (HIDDEN, HIDDEN), topology)
    rows = path.dispatch(x, routing)
    arrangement = arrange(rows.exchange)
    expert_N = arrangement.groups.expert_N + topology.comm.rank("expert") * EXPERTS // topology.degrees.expert
    inside = region.enter(rows, arrangement)
    partial = torch.tanh((expert_N.unsqueeze(1) + 1) * inside) / topology.degrees.tensor
    if topology.comm.rank("expert_tensor") == 0:
        partial = partial + expert_N.unsqueeze(1)
    return path.combine(RaggedRows(region.leave(partial, rows.exchange, arrangement), rows.exchange), routing)


def expected(x: Tensor, gate_TK: Tensor, expert_TK: Tensor) -> Tensor:
    expert = expert_TK.unsqueeze(-1)
    return (gate_TK.unsqueeze(-1) * (torch.tanh((expert + 1) * x.unsqueeze(1)) + expert)).sum(1)


def exchange(tensor: int, mode: str) -> list[str]:
    """Differences between ours and the closed form, in results and gradients, for all kinds of choices."""
    options, sequence = MODES[mode]
    degrees = ParallelDegrees(dist.get_world_size(), tensor, dist.get_world_size() // tensor, sequence)
    topology, wrong = Topology(degrees, options=options), []
    rank = dist.get_rank() if sequence else topology.comm.rank("data")
    for choices in CHOICES:
        for top_k in (1, 2, 3):
            x, gates, experts = problem(rank, top_k, choices)
            results = []
            for ours in (True, False):
                leaves = x.clone().requires_grad_(), gates.clone().requires_grad_()
                if ours:
                    y = through_experts(leaves[0], routing_of(experts, leaves[1]), topology)
                else:
                    y = expected(*leaves, experts)
                weights = torch.linspace(-1, 2, y.numel()).view_as(y)
                results.append((y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)))
            for name, a, b in zip(("result", "token gradient", "gate gradient"), *results, strict=True):
                if not torch.allclose(a, b, rtol=1e-13, atol=1e-13):
                    wrong.append(f"{choices}, top {top_k}: {name} off by {(a - b).abs().max()}")
    return wrong


@pytest.mark.parametrize(
    ("world_size", "tensor", "mode"),
    [(1, 1, "plain"), (4, 1, "plain"), *((4, 2, mode) for mode in MODES), (4, 4, "dtd"), (4, 4, "sequence")],
)
def test_every_choice_comes_back_from_its_expert_in_every_world(
    pool: WorkerPool, world_size: int, tensor: int, mode: str
) -> None:
    for wrong in pool.run(world_size, exchange, tensor, mode):
        assert not wrong, "\n".join(wrong)


def heard(topology: Topology) -> list[str]:
    """The list to which the host's reads and the starts of collectives add themselves from now on."""
    events: list[str] = []
    start = topology.comm.reader

    def reader(values: Tensor) -> Any:
        events.append("asked")
        read = start(values)
        return lambda: (events.append("read"), read())[1]

    topology.comm.reader = reader
    topology.comm.register_hook(lambda call, event: events.append(call.tag) if event == "start" else None)
    return events


def order_of_events(dtd: bool) -> list[str]:
    """What two processes do on the way to experts."""
    degrees = ParallelDegrees(2, 2, 1) if dtd else ParallelDegrees(2, 1, 2)
    topology = Topology(degrees, options=CommOptions(dtd=dtd))
    events = heard(topology)
    x, gates, experts = problem(0, 1, "uniform")
    path, _ = ragged_path(EXPERTS, (HIDDEN, HIDDEN), topology)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged, "spread_choices", lambda *args: (events.append("spread"), spread_choices(*args))[1])
        path.dispatch(x, routing_of(experts, gates))
    return events


def test_numbers_of_rows_travel_while_rows_are_spread(pool: WorkerPool) -> None:
    counts, there = "dispatch.counts", "dispatch.all_to_all"
    assert pool.run(2, order_of_events, False)[0] == [counts, "asked", "spread", "read", there]
    assert pool.run(2, order_of_events, True)[0] == ["dispatch.gather_counts", "asked", "spread", "read"]


# ---- pilots --------------------------------------------------------------------------------------------------------


def layer_of(dedup: str, topology: Topology, activation: str, number: int = EXPERTS) -> Experts:
    """The same experts whatever ``dedup`` is, with biases of their own."""
    topology.options = replace(topology.options, dedup=dedup)
    torch.set_default_dtype(torch.float64)
    config = MoEConfig(num_experts=number, top_k=3, dispatch="dropless", capacity_factor=None)
    expert = FeedForwardSpec(HIDDEN, 8, Init(std=1.0), Init(std=0.5), activation)
    layer = mixtures["dropless"].make(ExpertsSpec(expert, config), topology)
    torch.set_default_dtype(torch.float32)
    initialize(layer, seed=3)
    rank = topology.comm.rank("expert")
    for name in ("up_bias", "down_bias"):
        values = layer.get_parameter(name)._local_tensor  # type: ignore[attr-defined]
        values.data.copy_(torch.linspace(-1 - rank, 1, values.numel()).view_as(values))
    return layer


def pilots_and_rows(
    tensor: int, mode: str, dedup: str = "rank", per_node: int | None = None, number: int = EXPERTS
) -> tuple[list[str], list[int]]:
    """Differences between a layer that sends pilots and one that sends rows, and what both send."""
    options, sequence = MODES[mode]
    options = replace(options, ranks_per_node=per_node, hierarchical=per_node is not None)
    degrees = ParallelDegrees(dist.get_world_size(), tensor, dist.get_world_size() // tensor, sequence)
    topology, wrong, sent = Topology(degrees, options=options), [], []
    rank = dist.get_rank() if sequence else topology.comm.rank("data")
    for choices in CHOICES:
        for top_k, activation, tokens in ((1, "gelu", 7), (2, "gelu", 7 * (rank % 2)), (3, "swiglu", 7)):
            x, gates, experts = problem(rank, top_k, choices, tokens, number)
            results: list[tuple[Tensor, ...]] = []
            for how in (dedup, "none"):
                layer = layer_of(how, topology, activation, number)
                leaves = x.clone().requires_grad_(), gates.clone().requires_grad_()
                y = layer(leaves[0], routing_of(experts, leaves[1], number))
                (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
                weights = (p.grad.to_local() for p in layer.parameters())  # type: ignore[union-attr]
                results.append((y.detach(), leaves[0].grad, leaves[1].grad, *weights))  # type: ignore[arg-type]
                assert layer.moved is not None
                sent.append(layer.moved.sent)
            for place, (a, b) in enumerate(zip(*results, strict=True)):
                if a.numel() and (a - b).abs().max() > 1e-12 * b.abs().max().clamp(min=1):
                    wrong.append(f"{choices}, top {top_k}: {place} off by {(a - b).abs().max()}")
    return wrong, sent


@pytest.mark.parametrize(
    ("world_size", "cell"),
    [
        (2, (1, "plain")),
        *((4, (2, mode)) for mode in ("plain", "fused", "sequence")),
        (4, (1, "plain", "node", 2)),  # E_p = 4 on two nodes
        pytest.param(8, (1, "plain", "node", 4, 16), marks=pytest.mark.exhaustive),  # E_p = 8 on two nodes
        pytest.param(8, (1, "plain", "node", 2, 8), marks=pytest.mark.slow),  # E_p = 8 on four nodes
        pytest.param(8, (2, "sequence", "node", 4, 8), marks=pytest.mark.slow),  # E_p = 4 on two nodes
        *(pytest.param(8, (2, mode, "node", 4, 8), marks=pytest.mark.exhaustive) for mode in ("plain", "fused")),
    ],
    ids=str,
)
def test_pilots_give_what_rows_give_and_are_fewer(pool: WorkerPool, world_size: int, cell: tuple[Any, ...]) -> None:
    """Results and all gradients, in float64 to 1e-12: sums are added in another order. Some ranks have no tokens."""
    found = pool.run(world_size, pilots_and_rows, *cell)
    for wrong, sent in found:
        assert not wrong, "\n".join(wrong)
        of_pilots, of_rows = sent[::2], sent[1::2]
        assert all(a <= b for a, b in zip(of_pilots, of_rows, strict=True))
    assert sum(sum(sent[::2]) for _, sent in found) < sum(sum(sent[1::2]) for _, sent in found)


def events_of_pilots() -> list[str]:
    """What two processes do on the way to experts."""
    topology = Topology(ParallelDegrees(2, 1, 2))
    events = heard(topology)
    x, gates, experts = problem(0, 2, "uniform")
    layer = layer_of("rank", topology, "gelu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pilots, "list_pilots", lambda *args: (events.append("listed"), list_pilots(*args))[1])
        layer.send(x, routing_of(experts, gates))
    return events


def test_numbers_of_pilots_travel_while_pilots_are_listed(pool: WorkerPool) -> None:
    assert pool.run(2, events_of_pilots)[0] == [
        *("dispatch.counts", "asked", "listed", "read"),
        *("dispatch.choices", "dispatch.gates", "dispatch.all_to_all"),
    ]


def test_a_token_has_one_pilot_for_each_process_that_it_chose() -> None:
    expert_TK = torch.tensor([[0, 3, 1], [2, 0, 3], [3, 2, 1]])  # of two processes with two experts each
    numbered = number_choices(expert_TK, 4, 2)
    sent = list_pilots(numbered, 2, list_choices(expert_TK, 4, 9))
    assert numbered.pilots_s.tolist() == [3, 3]
    assert sent.token_R[:6].tolist() == [0, 1, 2, 0, 1, 2]
    assert sent.pilot_TK.tolist() == [[0, 3, -1], [4, 1, -1], [5, -1, 2]]
    # Choices by expert and then by token: experts 0, 0, 1, 1, 2, 2, 3, 3, 3 of tokens 0, 1, 0, 2, 1, 2, 0, 1, 2.
    assert sent.choice_R.tolist() == [0, 4, 2, 8, 3, 7, 1, 5, 6]
    assert sent.code_R.tolist() == [0, 2, 1, 4, 2, 5, 0, 3, 4]


def test_choices_that_a_pilot_does_not_have_are_passed_on_to_nobody() -> None:
    expert_TK = torch.tensor([[-1, 3, 1], [-1, -1, -1], [3, -1, 2]])
    numbered = number_choices(expert_TK, 4, 2)
    sent = list_pilots(numbered, 2, list_choices(expert_TK, 4, 4))
    assert numbered.pilots_s.tolist() == [1, 2]
    assert sent.token_R[:3].tolist() == [0, 0, 2]
    assert sent.pilot_TK.tolist() == [[-1, 1, 0], [-1, -1, -1], [2, -1, -1]]
    assert sent.choice_R.tolist() == [2, 8, 1, 6]  # of experts 1, 2, 3, 3
    assert sent.place_TK.tolist() == [[-1, 2, 0], [-1, -1, -1], [3, -1, 1]]
    assert sent.code_R.tolist() == [0, 3, 0, 2]


def test_a_token_whose_router_repeats_an_expert_claims_no_other_pilots_places() -> None:
    expert_TK = torch.full((2, 4), 3)  # as one does without finite scores
    repeated = number_choices(expert_TK, 4, 2)
    assert repeated.pilots_s.tolist() == [0, 2]
    sent = list_pilots(repeated, 2, list_choices(expert_TK, 4, 8))
    assert [code // 2 for code in sent.code_R.tolist()] == [0] * 4 + [1] * 4


# ---- one process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "bias"), [("gelu", True), ("swiglu", False), ("swiglu", True)])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_layer_is_one_whose_capacity_drops_nothing(single: Topology, top_k: int, activation: str, bias: bool) -> None:
    results = []
    for dispatch in ("dropless", "capacity"):
        torch.set_default_dtype(torch.float64)
        config = MoEConfig(num_experts=EXPERTS, top_k=top_k, dispatch=dispatch, capacity_factor=None)
        expert = FeedForwardSpec(HIDDEN, 5, Init(std=1.0), Init(std=0.5), activation, bias)
        layer = MoELayer(MoESpec(expert, config), single)
        torch.set_default_dtype(torch.float32)
        initialize(layer, seed=3)
        for name in ("up_bias", "down_bias") if bias else ():
            values = layer.experts.get_parameter(name)._local_tensor  # type: ignore[attr-defined]
            values.data.copy_(torch.linspace(-1, 1, values.numel()).view_as(values))
        x = torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
        y, report = layer(x)
        (y.square().sum() + report.balance_loss + report.z_loss).backward()
        gradients = [p.grad.to_local() for p in layer.parameters()]  # type: ignore[union-attr]
        results.append([y, x.grad, report.load.double(), report.dropped.double(), report.balance_loss, *gradients])
    assert results[0][3] == 0
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_experts_that_nobody_chooses_get_gradients_of_zero(single: Topology) -> None:
    config = MoEConfig(num_experts=EXPERTS, dispatch="dropless")
    layer = MoELayer(MoESpec(FeedForwardSpec(HIDDEN, 5, Init(std=1.0), Init(std=0.5)), config), single)
    initialize(layer, seed=0)
    with torch.no_grad():
        layer.router.get_parameter("weight")._local_tensor.zero_()[1].fill_(1.0)  # type: ignore[attr-defined]
    y, report = layer(torch.rand(1, 6, HIDDEN))
    assert report.load.tolist() == [0, 6, 0, 0]
    y.sum().backward()
    for name, parameter in layer.experts.named_parameters():
        gradient = parameter.grad.to_local()  # type: ignore[union-attr]
        assert [bool(part.any()) for part in gradient] == [False, True, False, False], name


def test_one_process_in_bf16_never_waits_for_the_device(single: Topology) -> None:
    def refuse(values: Tensor) -> Any:
        raise RuntimeError("the host waits")

    single.comm.reader = refuse
    config, init = MoEConfig(num_experts=EXPERTS, dispatch="dropless"), Init(std=1.0)
    layer = MoELayer(MoESpec(FeedForwardSpec(16, 32, init, init), config), single)
    initialize(layer, seed=0)
    x = torch.rand(1, 6, 16)
    layer.to(torch.bfloat16)(x.bfloat16())[0].sum().backward()
    assert layer.experts.moved == Rows(6, 6, 6, 6)
    with pytest.raises(RuntimeError, match="the host waits"):  # torch's kernel takes no fp32 on all devices
        layer.float()(x)


# ---- grouped products ----------------------------------------------------------------------------------------------

SIZES = (5, 0, 8, 3)


def groups_of(sizes: tuple[int, ...], told: bool = True) -> Groups:
    counts = torch.tensor(sizes)
    expert = torch.arange(len(sizes)).repeat_interleave(counts)
    return Groups(expert, counts.cumsum(0).int(), sizes if told else None)


@pytest.mark.parametrize("sizes", [SIZES, (0, 0, 0, 1), (16, 0, 0, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_grouped_products_are_those_of_each_row_with_its_experts_matrix(
    dtype: torch.dtype, sizes: tuple[int, ...]
) -> None:
    """In bf16 by torch's kernel, which is not told the sizes on the host."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(sum(sizes), 16, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(4, 16, 8, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(4, 8, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    groups = groups_of(sizes, told=not native(dtype, 16, 8))
    y = grouped_matmul(x, weight, groups) + bias_rows(bias, groups, dtype)
    ours = y, *torch.autograd.grad(y.square().sum() / 2, (x, weight, bias))
    precise = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    z = (precise[0].unsqueeze(1) @ precise[1][groups.expert_N]).squeeze(1) + precise[2][groups.expert_N]
    theirs = z, *torch.autograd.grad(z.square().sum() / 2, precise)
    for a, b in zip(ours, theirs, strict=True):
        bound = 0.03 if dtype is torch.bfloat16 else 1e-14
        assert a.shape == b.shape
        assert ((a.double() - b).abs() <= bound * b.abs().amax() if b.numel() else b).all()


def test_products_that_a_kept_result_makes_superfluous_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tedlab.moe.grouped.unused", lambda shape, like: like.new_full(shape, torch.nan))
    x, weight, groups = torch.rand(sum(SIZES), 4), torch.rand(4, 4, 2), groups_of(SIZES)
    with _Pass(_Region({"experts.reduce": Second.WHOLE}, True, Recomputation()), second=True):
        assert grouped_matmul(x, weight, groups, "experts.reduce").isnan().all()
        assert grouped_matmul(x, weight, groups).isfinite().all()
