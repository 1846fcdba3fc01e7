"""Padding that routers are told of: as if it were not there, judged by loops over the other tokens in plain torch."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tedlab import ParallelDegrees, Topology
from tedlab.config import BalanceConfig, CommOptions, ModelConfig, MoEConfig, RecomputeConfig, RouterConfig
from tedlab.models import GPT
from tedlab.moe import MoELayer, MoESpec
from tedlab.nn import FeedForwardSpec, Init, initialize
from tests.pool import WorkerPool
from tests.training import full

BATCH, LENGTH, HIDDEN, FFN, EXPERTS = 3, 8, 6, 8, 4
INIT = Init(std=0.7)
CAPACITY = MoEConfig(num_experts=EXPERTS, capacity_factor=0.75, capacity_multiple=1)
SIGMOID = RouterConfig(scoring="sigmoid", gates="raw", gate_scale=1.5)
KINDS = {
    "top1": CAPACITY,
    "top2": replace(CAPACITY, top_k=2),
    "top2_groups": replace(CAPACITY, top_k=2, capacity_groups=4),
    "dropless": replace(CAPACITY, top_k=2, dispatch="dropless"),
    "top2_kept_by_sequence": replace(
        CAPACITY, top_k=2, capacity_factor=0.5, balance=BalanceConfig("sequence", dropped=False)
    ),
    "sigmoid_first_by_sequence": replace(
        CAPACITY, top_k=2, dispatch="dropless", router=SIGMOID, balance=BalanceConfig("sequence", "first")
    ),
    "top2_by_score": replace(CAPACITY, top_k=2, drop_policy="probs"),
    "expert_choice": replace(CAPACITY, top_k=2, gating="expert_choice", capacity_groups=2),
}
PATTERNS = {"some": [5, 0, 8], "none": [8, 8, 8], "all": [0, 0, 0]}  # tokens of each sample


def x_of(data_rank: int) -> Tensor:
    draw = torch.Generator().manual_seed(data_rank)
    return torch.randn(BATCH, LENGTH, HIDDEN, generator=draw, dtype=torch.float64)


def mask_of(pattern: str, data_rank: int) -> Tensor:
    lengths = torch.tensor(PATTERNS[pattern]).roll(data_rank)
    return torch.arange(LENGTH) >= lengths.unsqueeze(1)


def direction() -> Tensor:
    return torch.linspace(-1, 2, BATCH * LENGTH * HIDDEN, dtype=torch.float64).view(BATCH, LENGTH, HIDDEN)


@dataclass
class Outcome:
    """Of one data rank's micro-batch: result, losses, counts, and gradients of tokens and weights."""

    y: Tensor
    balance: float
    z: float
    load: list[int]
    dropped: int
    grad_x: Tensor
    grads: dict[str, Tensor]


def plain(weights: dict[str, Tensor], x: Tensor, padding: Tensor, config: MoEConfig, groups: int) -> Outcome:
    """Token after token, of those that are tokens."""
    x = x.clone().requires_grad_()
    w = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    logits = x @ w["router.weight"].T
    scores = logits.sigmoid() if config.router.scoring == "sigmoid" else logits.softmax(-1)
    real = [(b, s) for b in range(BATCH) for s in range(LENGTH) if not padding[b, s]]
    capacity = math.ceil(config.top_k * BATCH * LENGTH / groups / EXPERTS * config.capacity_factor)  # type: ignore[operator]
    find = experts_choose if config.gating == "expert_choice" else tokens_choose
    choices, kept, load, dropped = find(scores.detach(), real, capacity, groups, config)
    y = torch.zeros_like(x)
    for b, s, e in kept:
        gate = scores[b, s, e] * config.router.gate_scale
        if config.top_k > 1 and config.router.gates is None and config.gating == "default":
            gate = gate / scores[b, s][[expert for *place, expert in choices if place == [b, s]]].sum()
        inner = F.gelu(x[b, s] @ w["experts.up"][e] + w["experts.up_bias"][e, 0])
        out = inner @ w["experts.down"][e] + w["experts.down_bias"][e, 0]
        at = torch.zeros(BATCH, LENGTH, 1, dtype=x.dtype)
        at[b, s] = 1.0
        y = y + at * gate * out
    zero = (x * 0).sum()
    first = config.balance.choices == "first"
    counting = choices[: len(real)] if first else choices
    counted = [choice for choice in counting if config.balance.dropped or choice in kept]
    samples = [[place for place in real if place[0] == b] for b in range(BATCH)]
    together = [sample for sample in samples if sample] if config.balance.scope == "sequence" else [real]
    balance = zero
    for places in filter(None, together):
        shares, mean = torch.zeros(EXPERTS, dtype=x.dtype), torch.zeros(EXPERTS, dtype=x.dtype)
        for b, s in places:
            mean = mean + scores[b, s] / scores[b, s].sum() / len(places)
            for *place, e in counted:
                shares[e] += (place == [b, s]) / len(places) / (1 if first else config.top_k)
        balance = balance + EXPERTS * (shares * mean).sum() / len(together)
    z = sum((logits[place].logsumexp(-1).square() for place in real), start=zero) / max(1, len(real))
    ((y * direction()).sum() + 2 * balance + 3 * z).backward()
    assert x.grad is not None
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in w.items()}
    return Outcome(y.detach(), balance.item(), z.item(), load, dropped, x.grad, grads)


Choice = tuple[int, int, int]  # sample, position, expert
Choices = tuple[list[Choice], list[Choice], list[int], int]  # all, those with a slot, by expert, how many were dropped


def tokens_choose(
    scores: Tensor, real: list[tuple[int, int]], capacity: int, groups: int, config: MoEConfig
) -> Choices:
    """First choices, then second ones, each in order of the tokens, or the highest score first."""
    best = {place: scores[place].topk(config.top_k).indices.tolist() for place in real}
    choices = [(*place, best[place][k]) for k in range(config.top_k) for place in real]
    queued = sorted(choices, key=lambda choice: -scores[choice]) if config.drop_policy == "probs" else choices
    taken: dict[tuple[int, int], int] = {}
    kept = []
    for b, s, e in queued:
        queue = e, s * groups // LENGTH
        taken[queue] = taken.get(queue, 0) + 1
        if config.dispatch == "dropless" or taken[queue] <= capacity:
            kept.append((b, s, e))
    load = [sum(e == expert for *_, e in choices) for expert in range(EXPERTS)]
    return choices, kept, load, len(choices) - len(kept)


def experts_choose(
    scores: Tensor, real: list[tuple[int, int]], capacity: int, groups: int, config: MoEConfig
) -> Choices:
    """Each expert its best tokens, in each part of the positions; a token that nobody takes loses K choices."""
    kept = []
    for e in range(EXPERTS):
        for group in range(groups):
            own = [(b, s) for b, s in real if s * groups // LENGTH == group]
            kept += [(*place, e) for place in sorted(own, key=lambda place: -scores[(*place, e)])[:capacity]]
    load = [sum(e == expert for *_, e in kept) for expert in range(EXPERTS)]
    idle = set(real) - {(b, s) for b, s, _ in kept}
    return kept, kept, load, config.top_k * len(idle)


# ---- ours --------------------------------------------------------------------------------------------------------


def layer_of(config: MoEConfig, topology: Topology) -> MoELayer:
    torch.set_default_dtype(torch.float64)
    layer = MoELayer(MoESpec(FeedForwardSpec(HIDDEN, FFN, INIT, INIT), config), topology)
    initialize(layer, seed=3)
    for name, parameter in layer.named_parameters():  # biases start at zero
        if "bias" in name:
            local = parameter.detach().to_local()  # type: ignore[attr-defined]
            first = topology.comm.rank("tensor") * local.shape[-1] * (name == "experts.up_bias")
            local += torch.arange(first, first + local.shape[-1]) / 10
    return layer


def run(config: MoEConfig, topology: Topology, pattern: str, noise: float = 0.0) -> Outcome:
    comm, layer = topology.comm, layer_of(config, topology)
    rank, padding = comm.rank("data"), mask_of(pattern, comm.rank("data"))
    x = x_of(rank) + noise * padding.unsqueeze(-1)
    own = slice(None)
    if topology.sequence_sharded:
        share = LENGTH // comm.size("tensor")
        own = slice(comm.rank("tensor") * share, (comm.rank("tensor") + 1) * share)
    leaf = x[:, own].clone().requires_grad_()
    y, report = layer(leaf, padding[:, own])
    loss = (y * direction()[:, own]).sum()
    losses = 2 * report.balance_loss + 3 * report.z_loss
    # Sequence-sharded, each tensor rank has the whole losses, and a part of their gradient.
    (loss + losses).backward()
    assert leaf.grad is not None

    def of_all_positions(x: Tensor) -> Tensor:
        if not topology.sequence_sharded:
            return x.detach()
        whole = comm.all_gather(x.detach().transpose(0, 1).contiguous(), "tensor", tag="test", phase="metrics")
        return whole.transpose(0, 1)

    counts = torch.cat((report.load, report.dropped.unsqueeze(0)))
    router = layer.router.weight.grad.to_local()  # type: ignore[union-attr, operator]
    if topology.sequence_sharded:
        counts = comm.all_reduce(counts, "tensor", tag="test", phase="metrics")
        router = comm.all_reduce(router, "tensor", tag="test", phase="metrics")
    grads = {name: p.grad for name, p in layer.experts.named_parameters()}
    grads = {f"experts.{n}": torch.zeros(0) if g is None else g.to_local() for n, g in grads.items()}  # type: ignore[union-attr, operator]
    return Outcome(
        of_all_positions(y),
        report.balance_loss.item(),
        report.z_loss.item(),
        counts[:-1].tolist(),
        int(counts[-1]),
        of_all_positions(leaf.grad),
        {"router.weight": router, **grads},
    )


LAYOUTS: dict[str, tuple[ParallelDegrees, CommOptions]] = {
    "alone": (ParallelDegrees(1), CommOptions()),
    "E2": (ParallelDegrees(2, 1, 2), CommOptions()),
    "T2_E2": (ParallelDegrees(4, 2, 2), CommOptions()),
    "T2_E2_dtd": (ParallelDegrees(4, 2, 2), CommOptions(dtd=True)),
    "T2_E2_fused": (ParallelDegrees(4, 2, 2), CommOptions(dtd=True, fuse_reduce_scatter=True)),
    "T2_E2_sequence": (ParallelDegrees(4, 2, 2, sequence=True), CommOptions()),
}


def groups_of(kind: str, layout: str) -> int:
    return KINDS[kind].capacity_groups or (2 if "sequence" in layout else 1)


def outcomes(layout: str) -> dict[tuple[str, str], Outcome]:
    degrees, options = LAYOUTS[layout]
    topology = Topology(degrees, options=options)
    found = {(kind, pattern): run(config, topology, pattern) for kind, config in KINDS.items() for pattern in PATTERNS}
    for kind, config in KINDS.items():  # whatever padding holds
        noisy, quiet = run(config, topology, "some", noise=100.0), found[kind, "some"]
        real = ~mask_of("some", topology.comm.rank("data"))
        assert torch.equal(noisy.y[real], quiet.y[real])
        assert (noisy.load, noisy.dropped, noisy.balance, noisy.z) == (
            quiet.load,
            quiet.dropped,
            quiet.balance,
            quiet.z,
        )
    return found


def whole_weights() -> dict[str, Tensor]:
    return {name: full(p) for name, p in layer_of(CAPACITY, Topology(ParallelDegrees(1))).named_parameters()}


@pytest.fixture(scope="module")
def weights(pool: WorkerPool) -> dict[str, Tensor]:
    return pool.run(1, whole_weights)[0]


def close(ours: Tensor, theirs: Tensor, what: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ("E2", "T2_E2", "T2_E2_fused"))) for name in LAYOUTS],
)
def test_padding_is_as_if_it_were_not_there_in_every_layout(
    pool: WorkerPool, weights: dict[str, Tensor], layout: str
) -> None:
    degrees = LAYOUTS[layout][0]
    answers = pool.run(degrees.world_size, outcomes, layout)
    for kind, config in KINDS.items():
        for pattern in PATTERNS:
            groups = groups_of(kind, layout)
            expected = [plain(weights, x_of(d), mask_of(pattern, d), config, groups) for d in range(degrees.data)]
            case = layout, kind, pattern
            for rank, answer in enumerate(answers):
                ours, theirs = answer[kind, pattern], expected[rank // degrees.tensor]
                close(ours.y, theirs.y, case)
                assert not ours.y[mask_of(pattern, rank // degrees.tensor)].any()
                close(ours.grad_x, theirs.grad_x, case)
                assert (ours.balance, ours.z) == pytest.approx((theirs.balance, theirs.z), rel=1e-12)
                assert (ours.load, ours.dropped) == (theirs.load, theirs.dropped), case
                close(ours.grads["router.weight"], theirs.grads["router.weight"], case)
                for name in ("experts.up", "experts.down", "experts.up_bias", "experts.down_bias"):
                    summed = sum((e.grads[name] for e in expected), start=torch.zeros(()))
                    first = rank // degrees.tensor % degrees.expert * (EXPERTS // degrees.expert)
                    part = summed[first : first + EXPERTS // degrees.expert]
                    tensor = rank % degrees.tensor
                    if name in ("experts.up", "experts.up_bias"):
                        part = part.chunk(degrees.tensor, 2)[tensor]
                    elif name == "experts.down":
                        part = part.chunk(degrees.tensor, 1)[tensor]
                    close(ours.grads[name], part, (*case, name))
            if kind == "top2" and pattern == "some":
                assert any(e.dropped for e in expected)  # the case is one where capacity matters


# ---- in the model ------------------------------------------------------------------------------------------------


def losses_of_models() -> None:
    """With the activations kept, recomputed, and compiled."""
    topology = Topology(ParallelDegrees(2, 2, 1, sequence=True))
    torch.set_default_dtype(torch.float64)
    ids = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(0))
    padding = torch.arange(8) >= torch.tensor([[3], [7]])
    targets = ids.roll(-1, 1).masked_fill(padding, -100)
    for dispatch in ("capacity", "dropless"):
        results = []
        compiled_with = "block" if dispatch == "capacity" else "none"  # dropless blocks are compiled in part
        for granularity, backend in (("none", "none"), ("block", "none"), (compiled_with, "aot_eager")):
            recompute = RecomputeConfig(granularity=granularity)
            model = ModelConfig(1, 8, 2, 16, 8, vocab_size=32, init_std=0.5, recompute=recompute, compile=backend)
            moe = MoEConfig(
                num_experts=4, every=1, dispatch=dispatch, capacity_factor=0.7, capacity_multiple=1, capacity_groups=2
            )
            network = GPT(model, moe, topology, seed=0)
            loss, reports = network.loss(ids, targets, padding)
            (loss + sum(r.balance_loss + r.z_loss for r in reports)).backward()
            gradient = network.blocks[0].feed_forward.router.weight.grad.to_local()  # type: ignore[union-attr, operator]
            results.append([loss.item(), *(r.z_loss.item() for r in reports), gradient.square().sum().item()])
            load = sum(r.load.sum() for r in reports)
            load = topology.comm.all_reduce(load, "tensor", tag="test", phase="metrics")
            assert int(load) == int((~padding).sum())
        kept, *others = results
        assert all(other == pytest.approx(kept, rel=1e-12) for other in others)
        with torch.no_grad():
            told, untold = (network.loss(ids, targets, mask)[0].item() for mask in (padding, None))
        # Padding can only take others' slots where there are slots.
        assert (abs(told - untold) < 1e-12) == (dispatch == "dropless"), (dispatch, told, untold)


@pytest.mark.slow
def test_models_hand_padding_to_their_routers(pool: WorkerPool) -> None:
    pool.run(2, losses_of_models)


def refusals() -> None:
    topology = Topology(ParallelDegrees(1))
    x = torch.zeros(2, 4, HIDDEN)
    layer = layer_of(CAPACITY, topology)
    for mask in (torch.zeros(2, 4), torch.zeros(8, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"it must be torch.bool \(2, 4\), True where there is padding"):
            layer(x, mask)
    for gating, choices in (("deepspeed_top1", 1), ("deepspeed_top2", 2), ("deepspeed_topk", 2)):
        layer = layer_of(MoEConfig(num_experts=4, gating=gating, top_k=choices), topology)
        with pytest.raises(ValueError, match=f"gating={gating} takes no padding_mask; moe.gating=default does"):
            layer(x, torch.zeros(2, 4, dtype=torch.bool))


def test_masks_that_cannot_be_are_refused(pool: WorkerPool) -> None:
    pool.run(1, refusals)
