"""Experts that lend compute what they compute at home: results, every gradient, and what is communicated for it."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tedlab import ParallelDegrees, Topology
from tedlab.comm import Ledger, Splits
from tedlab.comm.reading import deliver
from tedlab.config import CommOptions, LendConfig, MoEConfig
from tedlab.moe import RowExperts, mixtures
from tedlab.moe.experts import ExpertsSpec
from tedlab.moe.grouped import Groups, grouped_matmul
from tedlab.moe.lending import Loan, Loans, Plan, by_slot, even, least_loaded, loans_of, runs_of, slots_of
from tedlab.moe.router import RouterReport, Routing
from tedlab.moe.slots import sort_choices
from tedlab.nn import FeedForwardSpec, Init, initialize
from tests.pool import WorkerPool

EXPERTS, HIDDEN, TOKENS = 8, 4, 11
MODES = {
    "plain": (CommOptions(), False),
    "dtd": (CommOptions(dtd=True), False),
    "fused": (CommOptions(dtd=True, fuse_reduce_scatter=True), False),
    "sequence": (CommOptions(), True),
}
LAYOUTS = [(2, 1, 2, "plain"), (4, 1, 4, "plain"), *((4, 2, 2, mode) for mode in MODES), (8, 2, 2, "dtd")]
POLICIES = {
    "home": LendConfig(),
    "never": LendConfig("llep", threshold=1e9, minimum=1),
    "llep": LendConfig("llep", threshold=1.0, minimum=1),
    "large": LendConfig("llep", threshold=1.0, minimum=4, keep_small=False),
    "even": LendConfig("even"),
}
CHOICES = ("uniform", "one_expert", "one_process", "tokens_of_some_ranks_alike", "no_tokens_here", "no_tokens")


def problem(rank: int, choices: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, gates and two distinct choices of each, of a rank that has tokens of its own."""
    draw = torch.Generator().manual_seed(rank)
    tokens = 0 if choices == "no_tokens" or (choices == "no_tokens_here" and rank == 0) else TOKENS + rank % 2
    x = torch.randn(tokens, HIDDEN, generator=draw, dtype=torch.float64)
    gates = torch.rand(tokens, 2, generator=draw, dtype=torch.float64)
    likes = torch.rand(tokens, EXPERTS, generator=draw)
    if choices in ("one_expert", "no_tokens_here"):
        likes[:, 5] += 1
    elif choices == "one_process":
        likes[:, :2] += 1
    elif choices == "tokens_of_some_ranks_alike" and rank % 2:
        likes = torch.linspace(0, 1, EXPERTS).expand(tokens, -1)
    return x, gates, likes.argsort(-1, descending=True)[:, :2]


def routing_of(expert_TK: Tensor, gate_TK: Tensor) -> Routing:
    place_TK, choice, load_E = sort_choices(expert_TK, EXPERTS)
    zero = torch.zeros(())
    return Routing(gate_TK, place_TK, choice, RouterReport(zero, zero, load_E, zero))


def experts_of(topology: Topology, lend: LendConfig, activation: str = "gelu", bias: bool = True) -> RowExperts:
    torch.set_default_dtype(torch.float64)
    config = MoEConfig(num_experts=EXPERTS, top_k=2, dispatch="dropless", lend=lend)
    expert = FeedForwardSpec(HIDDEN, 8, Init(std=0.5), Init(std=0.5), activation, bias)
    layer = mixtures["dropless"].make(ExpertsSpec(expert, config), topology)
    torch.set_default_dtype(torch.float32)
    initialize(layer, seed=1)
    for name in ("up_bias", "down_bias") if bias else ():
        values = layer.get_parameter(name)._local_tensor  # type: ignore[attr-defined]
        first = topology.comm.rank("expert") * len(values)
        each = torch.arange(first, first + len(values), dtype=values.dtype).view(-1, 1, 1)
        values.data.copy_((each + torch.linspace(-1, 1, values.shape[-1], dtype=values.dtype)).cos())
    assert isinstance(layer, RowExperts)
    return layer


def outcome(layer: RowExperts, rank: int, choices: str) -> dict[str, Tensor]:
    """Results and gradients of one micro-batch."""
    x, gates, experts = problem(rank, choices)
    x.requires_grad_()
    gates.requires_grad_()
    y = layer(x, routing_of(experts, gates))
    layer.zero_grad()
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    assert x.grad is not None
    assert gates.grad is not None
    found = {"result": y.detach(), "gradient of tokens": x.grad, "gradient of gates": gates.grad}
    return found | {f"gradient of {n}": p.grad.to_local().clone() for n, p in layer.named_parameters()}  # type: ignore


def complaints(tensor: int, expert: int, mode: str) -> dict[str, Any]:
    """How far lending experts differ from those at home, and what they move."""
    options, sequence = MODES[mode]
    topology = Topology(ParallelDegrees(dist.get_world_size(), tensor, expert, sequence), options=options)
    rank = dist.get_rank() if sequence else topology.comm.rank("data")
    wrong, exchanges, largest = [], 0, 0.0
    for activation, bias in (("gelu", True), ("swiglu", False)):
        layers = {name: experts_of(topology, lend, activation, bias) for name, lend in POLICIES.items()}
        for choices in CHOICES:
            at_home = outcome(layers["home"], rank, choices)
            for name, layer in layers.items():
                before, ledger = layer.moved, Ledger()
                handle = topology.comm.register_hook(ledger)
                ours = outcome(layer, rank, choices)
                handle.remove()
                moved = {key: getattr(layer.moved, key) - getattr(before, key) for key in ("lent", "borrowed")}
                for what, value in ours.items():
                    error = (value - at_home[what]).abs().max().item() if value.numel() else 0.0
                    largest = max(largest, error)
                    if error > 1e-12 or (name == "never" and not torch.equal(value, at_home[what])):
                        wrong.append(f"{name}, {choices}, {activation}: {what} is {error} off")
                width = sum(p.to_local().numel() for p in layer.parameters()) // len(layer.local("up"))  # type: ignore
                sent = {e.phase: c.payload_bytes for e, c in ledger.totals.items() if e.tag == "experts.lend"}
                if sent and sent != {"forward": moved["lent"] * width * 8, "backward": moved["borrowed"] * width * 8}:
                    wrong.append(f"{name}, {choices}: {moved} experts of {width} numbers, but sent {sent}")
                exchanges += bool(sent)
        for name, layer in layers.items():
            if (name in ("home", "never")) == bool(layer.moved.exchanges):
                wrong.append(f"{name}: {layer.moved}")
    return {"wrong": wrong, "exchanges": exchanges, "largest": largest}


@pytest.mark.parametrize(
    ("world_size", "tensor", "expert", "mode"),
    [pytest.param(*layout, marks=[pytest.mark.exhaustive] * (layout[0] > 4)) for layout in LAYOUTS],
)
def test_lending_changes_no_result_and_no_gradient_in_any_layout(
    pool: WorkerPool, world_size: int, tensor: int, expert: int, mode: str
) -> None:
    answers = pool.run(world_size, complaints, tensor, expert, mode)
    for rank, answer in enumerate(answers):
        assert not answer["wrong"], f"rank {rank}:\n" + "\n".join(answer["wrong"])
        assert answer["largest"] <= 1e-12
        assert answer["exchanges"] >= 10


# ---- one process -----------------------------------------------------------------------------------------------------


def test_slots_divide_each_senders_rows_by_hand() -> None:
    # Two senders of two experts; expert 0 has 3 + 4 rows, of which the second process borrows the last 4.
    plan = Plan(np.array([7, 1]), 2, (Loan(0, 1, 3, 7),))
    slots = slots_of(plan, np.array([[[3, 1], [4, 0]]]))
    assert slots.expert_V.tolist() == [0, 1, 0]
    assert (slots.of(0), slots.of(1)) == (slice(0, 1), slice(1, 3))
    assert slots.counts_isV.tolist() == [[[3, 1, 0], [0, 0, 4]]]
    assert (loans_of(plan, 0), loans_of(plan, 1)) == (
        Loans((0,), Splits((0, 1), (0, 0))),
        Loans((), Splits((0, 0), (1, 0))),
    )


def test_slots_have_the_rows_of_the_plan_whatever_was_chosen() -> None:
    generator = np.random.default_rng(1)
    for _ in range(1000):
        ranks, processes, local = generator.integers(1, 5, 3)
        counts = generator.integers(0, generator.choice([2, 9, 50]), (ranks, processes, processes * local))
        counts[:, :, generator.integers(processes * local)] *= int(generator.integers(0, 9))
        load_E = counts.sum((0, 1))
        plan = even(load_E, processes) if generator.random() < 0.5 else least_loaded(load_E, processes, threshold=1.0)
        slots = slots_of(plan, counts)
        assert slots.counts_isV.min() >= 0
        assert np.add.reduceat(slots.counts_isV.sum((0, 1)), slots.first_P[:-1]).tolist() == plan.loads_P.tolist()
        for expert in range(len(load_E)):  # each sender's rows of it are all there
            assert (slots.counts_isV[:, :, slots.expert_V == expert].sum(-1) == counts[:, :, expert]).all()
        for loan in plan.loans:  # each tensor rank has its share of what another computes, within rounding
            rows = slots.counts_isV[:, :, slots.of(loan.borrower)][
                :, :, slots.expert_V[slots.of(loan.borrower)] == loan.expert
            ].sum((1, 2))
            fair = counts[:, :, loan.expert].sum(1) * (loan.stop - loan.start) / load_E[loan.expert]
            assert np.abs(rows - fair).max() <= ranks


def test_choices_listed_by_slot_keep_their_experts_and_their_order() -> None:
    generator = torch.Generator().manual_seed(0)
    expert_TK = torch.rand(40, 4, generator=generator).pow(3).argsort(-1)[:, :2]
    routing = routing_of(expert_TK, torch.ones(40, 2))
    counts = np.stack([routing.counts_E.numpy(), np.array([0, 30, 9, 2, 4, 0, 0, 7])])[None]
    plan = least_loaded(counts.sum((0, 1)), 2, threshold=1.0)
    assert plan.loans
    slots = slots_of(plan, counts)
    listing = by_slot(routing, torch.from_numpy(runs_of(slots, 0, 0)))
    expert_R = expert_TK.flatten()[listing.choice_EC]
    assert expert_R.tolist() == np.repeat(slots.expert_V, slots.counts_isV[0, 0]).tolist()
    assert (listing.slot_TK.flatten()[listing.choice_EC] == torch.arange(80)).all()
    for expert in range(4):  # in the order of the slots of an expert, tokens are in their order
        rows = torch.cat([(torch.arange(80))[expert_R == expert]])
        assert (listing.choice_EC[rows].diff() > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sizes", [(3, 0, 5, 0, 4), (0, 0, 0, 2, 6), (4, 1, 2, 0, 0)])
def test_products_with_borrowed_experts_are_those_of_all_experts_in_one_tensor(
    dtype: torch.dtype, sizes: tuple[int, ...]
) -> None:
    """In bf16 all rows of a tensor are one kernel, which must leave those of the borrowed experts to the other."""
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((sum(sizes), 16), (5, 16, 8)))
    of_rows = torch.tensor(sizes)
    groups = Groups(torch.arange(5).repeat_interleave(of_rows), of_rows.cumsum(0).int(), sizes)
    together = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    apart = [x.clone().requires_grad_(), *(part.clone().requires_grad_() for part in weight.split([3, 2]))]
    expected = grouped_matmul(*together, groups)
    found = grouped_matmul(apart[0], apart[1], groups, more_bKM=apart[2])
    assert torch.equal(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    gradients = [part.grad for part in apart]
    assert torch.equal(gradients[0], together[0].grad)
    assert torch.equal(torch.cat(gradients[1:]), together[1].grad)


def test_numbers_go_to_the_device_in_one_copy_and_keep_their_shapes() -> None:
    parts = [np.arange(6).reshape(1, 2, 3), np.array([], dtype=np.int64), np.array([[7, 8]])]
    found = deliver(parts, torch.device("cpu"))
    assert [part.tolist() for part in found] == [part.tolist() for part in parts]
    assert len({part.untyped_storage().data_ptr() for part in found}) == 1
