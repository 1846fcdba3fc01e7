"""Muon is torch's Muon and AdamW in one process, and the same on shards, whatever is fused and whoever owns it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from tedlab import Topology
from tedlab.comm.ledger import Ledger, differences
from tedlab.config import ModelConfig
from tedlab.models import GPT
from tedlab.nn import fused_parameters
from tedlab.optim import Grouping, Muon, ShardedOptimizer, matrix_groups
from tedlab.optim.blocks import Block, blocks_of, cost, overlap, owners
from tedlab.optim.bucket import local
from tedlab.optim.muon import newton_schulz
from tedlab.predict.volumes import predict
from tedlab.spec import Fused
from tests.certify.runs import composed
from tests.comm.test_ledger import Recorder, configuration, one_step, seen_by, topology_of
from tests.pool import WorkerPool

STEPS = 4


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def polynomial(matrix: Tensor, steps: int = 5) -> Tensor:
    """What Newton–Schulz is: its polynomial of each singular value, and their vectors as they are."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vh


# ---- one process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(100, 60), (60, 100), (100, 100)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_matrices_step_as_by_torchs_muon_bit_for_bit(shape: tuple[int, int], nesterov: bool) -> None:
    """Of 100 rows or columns, so that Moonlight's factor is 2, which rounds nothing."""
    options: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    ours, theirs = (nn.Parameter(drawn(*shape)) for _ in range(2))
    muon, judge = Muon([ours], **options), torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)
    for step in range(STEPS):
        for p, optimizer in ((ours, muon), (theirs, judge)):
            p.grad = drawn(*shape, seed=step + 1)
            optimizer.step()
        assert torch.equal(ours, theirs)
    assert not torch.equal(ours, drawn(*shape))


def test_what_is_no_matrix_steps_as_by_adamw_bit_for_bit() -> None:
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-7}
    ours, theirs = ([nn.Parameter(drawn(5)), nn.Parameter(drawn(3, 4))] for _ in range(2))
    muon, judge = Muon([{"params": ours, "matrix": False}], **options), AdamW(theirs, **options)
    for step in range(STEPS):
        for its, optimizer in ((ours, muon), (theirs, judge)):
            for p in its:
                p.grad = drawn(*p.shape, seed=step + 1)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shape", [(7, 20), (20, 7), (1, 9), (12, 12)])
def test_newton_schulz_is_a_polynomial_of_singular_values(shape: tuple[int, int]) -> None:
    matrix = drawn(*shape, dtype=torch.float64)
    assert torch.allclose(newton_schulz(matrix, 5), polynomial(matrix), rtol=0, atol=1e-12)
    singular = torch.linalg.svdvals(newton_schulz(matrix, 5))
    assert 0.6 < singular.min() <= singular.max() < 1.2


def test_without_a_gradient_so_far_no_weight_moves_and_after_one_every_step_is_full() -> None:
    """An expert that gets no token: its momentum fades, but not what is made orthogonal of it."""
    weight = nn.Parameter(drawn(2, 3, 4))
    optimizer = Muon([weight], lr=0.01, weight_decay=0.0, dtype="float32")
    weight.grad = torch.zeros(2, 3, 4)
    optimizer.step()
    assert torch.equal(weight, drawn(2, 3, 4))
    weight.grad = drawn(2, 3, 4, seed=1)
    optimizer.step()
    weight.grad = torch.zeros(2, 3, 4)
    moved = []
    for _ in range(20):
        before = weight.detach().clone()
        optimizer.step()
        moved.append(float((weight - before).norm()))
    assert min(moved) > 0.9 * max(moved)


@pytest.mark.parametrize("shape", [(64, 48), (16, 24)])
def test_other_shapes_step_as_by_torchs_muon_but_for_one_rounding(shape: tuple[int, int]) -> None:
    """Moonlight's factor is applied where a matrix is whole, in the precision in which its update travels."""
    ours, theirs = (nn.Parameter(drawn(*shape)) for _ in range(2))
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
    for p, optimizer in (
        (ours, Muon([ours], **options)),
        (theirs, torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)),
    ):
        p.grad = drawn(*shape, seed=1)
        optimizer.step()
    update = (theirs - drawn(*shape) * (1 - 0.02 * 0.1)).abs().max()
    assert 0 < (ours - theirs).abs().max() <= update * 2.0**-8


def test_a_stack_that_the_tensor_group_divides_has_whole_matrices() -> None:
    assert blocks_of((4, 3, 5), 0, None) == [Block((3, 5), None, None)] * 4
    assert blocks_of((4, 3, 5), 2, None) == [Block((3, 5), 1, None)] * 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"momentum": 1.0}, "momentum is 1.0.*smaller than 1"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0"),
        ({"betas": (0.9,)}, "betas is .*two numbers"),
        ({"rms": 0.0}, "rms is 0.0.*greater than 0"),
        ({"adamw": None}, "adamw is None.*list of patterns"),
        ({"ns_steps": 0}, "ns_steps is 0.*from 1 to 99"),
        ({"ns_steps": True}, "ns_steps is True.*whole number"),
        ({"dtype": "float16"}, "dtype is float16; valid: bfloat16, float32"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0.*at least 0"),
        ({"adamw": "*router*"}, "list of patterns"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Muon([nn.Parameter(torch.ones(2, 2))], **options)


@pytest.mark.parametrize("shape", [(3,), (2, 2, 2, 2)])
def test_what_cannot_be_a_matrix_is_refused_among_matrices(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"parameter 1 of group 0 has the shape .{shape[0]}.*matrix=False"):
        Muon([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(shape))])


# ---- what is fused -----------------------------------------------------------------------------------------------

SMALL = "model.hidden=16", "model.heads=4", "model.ffn=24"
MODELS = {
    "queries, keys and values, gate and linear part": ("model.activation=swiglu", *SMALL),
    "keys and values": ("model.kv_heads=2", "model.positions=rotary", *SMALL),
    "latents": ("preset=deepseek_v3_tiny",),
}


def apart(name: str, shape: torch.Size, sizes: ModelConfig) -> list[Any]:
    """Which elements are each matrix's, from what the layers say of the order of their rows."""
    gated = sizes.activation == "swiglu"
    if len(shape) == 3:  # experts, of whose columns gate and linear part alternate
        columns = [slice(0, None, 2), slice(1, None, 2)] if gated and name.endswith("up") else [slice(None)]
        return [(expert, slice(None), its) for expert in range(shape[0]) for its in columns]
    rows, width, latent = torch.arange(shape[0]), sizes.head_dim or sizes.hidden // sizes.heads, sizes.attention.latent
    of = torch.zeros_like(rows)
    if name.endswith("attention.qkv.weight"):
        of = rows // width % 3
    elif name.endswith("attention.kv.weight"):
        of = rows // width % 2
    elif name.endswith("attention.kv_up.weight"):
        of = (rows % (latent.nope_dim + latent.v_dim)) // latent.nope_dim
    elif name.endswith("attention.kv_down.weight"):
        assert latent.kv_rank is not None
        of = rows // latent.kv_rank
    elif name.endswith(("feed_forward.up.weight", "shared.up.weight")) and gated:
        of = rows % 2
    return [(of == number).nonzero()[:, 0] for number in of.unique()]


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_matrices_that_are_fused_become_orthogonal_each_by_itself(single: Topology, overrides: tuple[str, ...]) -> None:
    config = composed(*overrides, "optim=muon", "model.layers=2", "model.vocab_size=64", "model.sequence_length=16")
    torch.set_default_dtype(torch.float64)
    try:
        model = GPT(config.model, config.moe, single, 0)
    finally:
        torch.set_default_dtype(torch.float32)
    names = {p: name for name, p in model.named_parameters()}
    muon = Muon(matrix_groups(model), lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0)
    comm, fused = single.comm, fused_parameters(model)
    sharded = ShardedOptimizer(muon, comm, names, zero=True, tile=50, fused=fused)
    before = {name: local(p).clone() for p, name in names.items()}
    gradients = {name: drawn(*p.shape, seed=n, dtype=torch.float64) for n, (p, name) in enumerate(names.items())}
    torch.stack([(p.to_local() * gradients[name]).sum() for p, name in names.items()]).sum().backward()
    sharded.reduce_gradients()
    muon.step()
    several = set()
    for p in muon.param_groups[0]["params"]:
        name, moved = names[p], before[names[p]] - local(p)
        matrices = apart(name, p.shape, config.model)
        if len(matrices) > (len(p) if p.dim() == 3 else 1):
            several.add(p)
        for its in matrices:
            expected = polynomial(gradients[name][its])
            expected *= 0.2 * max(expected.shape) ** 0.5
            assert torch.allclose(moved[its], expected, rtol=0, atol=1e-11), name
    assert several == fused.keys() & {*muon.param_groups[0]["params"]} != set()


@pytest.mark.parametrize(
    ("shape", "divided", "fused"),
    [((12, 4), 0, None), ((12, 4), 1, Fused(0, (1, 2))), ((3, 4, 12), 2, Fused(2, (2, 1))), ((3, 4, 5), None, None)],
)
def test_a_block_comes_apart_and_together(shape: tuple[int, ...], divided: int | None, fused: Fused | None) -> None:
    blocks = blocks_of(shape, divided, fused)
    assert sum(block.elements for block in blocks) == torch.Size(shape).numel()
    whole = drawn(*blocks[0].shape)
    assert torch.equal(blocks[0].joined(blocks[0].matrices(whole)), whole)
    assert [tuple(x.shape) for x in blocks[0].matrices(whole)] == [*blocks[0].shapes(1)]


# ---- who does what -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("across", "tensor"), [(1, 1), (4, 1), (3, 2), (8, 4)])
def test_work_is_divided_evenly_and_the_same_way_each_time(across: int, tensor: int) -> None:
    draw = torch.Generator().manual_seed(across)
    sizes = (1 + torch.randint(30, (80, 2), generator=draw)).tolist()
    blocks = [Block((rows, columns), None if n % 3 == 0 else n % 2) for n, (rows, columns) in enumerate(sizes)]
    its = owners(blocks, across, tensor)
    assert its == owners(blocks, across, tensor)
    loads = torch.zeros(across, tensor)
    for block, owner in zip(blocks, its, strict=True):
        assert (owner.inner is None) == (block.divided is None)
        loads[owner.across, slice(None) if owner.inner is None else owner.inner] += cost(block, tensor)
    largest = max(cost(block, tensor) for block in blocks)
    assert loads.max() <= loads.mean() + largest  # Graham's bound


def test_shards_hold_every_element_of_a_block_once() -> None:
    for start, elements, size in ((0, 5, 3), (4, 7, 3), (2, 1, 10), (9, 4, 5)):
        held = [overlap(start, elements, shard, size) for shard in range(8)]
        assert [n for part in held for n in range(elements)[part]] == [*range(elements)]


def complaints(layout: tuple[int, int, int], overrides: list[dict[str, Any]]) -> list[str]:
    """What ledger, closed form and dispatcher disagree on, for this rank; every process has its own matrices."""
    wrong = []
    for its in overrides:
        config = configuration(layout, {"optim.optimizer": composed("optim=muon").optim.optimizer, **its})
        topology, ledger = topology_of(config), Ledger()
        with Recorder() as recorder:
            one_step(config, topology, ledger)
        rank = torch.distributed.get_rank()
        expected = predict(config, rank)
        for entry, (ours, theirs) in differences(ledger.totals, expected).items():
            wrong.append(f"{its} rank {rank}: {entry}: {ours} instead of {theirs}")
        for entry, count in ledger.totals.items():
            if entry.tag.startswith("matrices.") and count.wire_bytes != expected[entry].wire_bytes:
                wrong.append(f"{its} rank {rank}: {entry}: sent {count}, not {expected[entry]}")
        if seen_by(ledger, topology) != recorder.seen:
            wrong.append(f"{its}: the dispatcher saw {recorder.seen}")
        tags = {entry.tag for entry in ledger.totals}
        if topology.comm.size("tensor") > 1 and "matrices.join" not in tags:
            wrong.append(f"{its}: no matrix was joined")
    return wrong


LEDGERS: list[dict[str, Any]] = [
    {},
    {"optim.zero": False, "trainer.precision": "bf16-true"},
    {"model.activation": "swiglu", "optim.bucket_elements": 500, "parallel.sequence": True, "model.kv_heads": 2},
]


@pytest.mark.parametrize(
    "layout",
    [(4, 2, 2), pytest.param((4, 4, 1), marks=pytest.mark.slow), pytest.param((4, 1, 2), marks=pytest.mark.slow)],
)
def test_every_process_exchanges_what_the_closed_form_says(pool: WorkerPool, layout: tuple[int, int, int]) -> None:
    cells = [its for its in LEDGERS if layout[1] > 1 or "parallel.sequence" not in its]
    for wrong in pool.run(layout[0], complaints, layout, cells):
        assert not wrong, "\n".join(wrong)


# ---- groups ------------------------------------------------------------------------------------------------------


def test_groups_are_matrices_then_the_rest_with_and_without_decay() -> None:
    """As Moonlight has it: embeddings, output, routers, norms and biases are AdamW's."""
    config = composed("optim=muon", "model.tie_embeddings=false", "moe.shared.experts=1", "moe.shared.combine=cg1")
    grouping = Grouping.under(config.optim)
    assert [group["matrix"] for group in grouping.options(config.optim)] == [True, False, False]
    names = {  # dimensions, decayed, group
        "embedding.weight": (2, True, 1),
        "positions.weight": (2, True, 1),
        "output.weight": (2, True, 1),
        "blocks.1.feed_forward.router.weight": (2, True, 1),
        "blocks.1.feed_forward.shared.gate.weight": (2, True, 1),
        "blocks.0.attention.qkv.weight": (2, True, 0),
        "blocks.0.attention.kv_down.weight": (2, True, 0),
        "blocks.1.feed_forward.experts.up": (3, True, 0),
        "blocks.1.feed_forward.experts.up_bias": (3, False, 2),
        "blocks.0.attention.qkv.bias": (1, False, 2),
        "norm.weight": (1, False, 2),
    }
    for name, (dimensions, decayed, expected) in names.items():
        assert grouping.index(name, dimensions, decayed) == expected, name


def test_a_guests_module_is_grouped_by_its_names() -> None:
    module = nn.ModuleDict({"embed": nn.Embedding(4, 3), "inner": nn.Linear(3, 3), "lm_head": nn.Linear(3, 4)})
    names = {p: name for name, p in module.named_parameters()}
    groups = [[names[p] for p in group["params"]] for group in matrix_groups(module)]
    assert groups == [["inner.weight"], ["embed.weight", "lm_head.weight"], ["inner.bias", "lm_head.bias"]]


def test_names_inside_another_module_and_tables_of_any_name_are_adamws() -> None:
    net = nn.ModuleDict({"output": nn.Linear(3, 4, bias=False), "router": nn.Linear(3, 2, bias=False)})
    module = nn.ModuleDict({"net": net, "words": nn.Embedding(4, 3), "up": nn.Linear(3, 3, bias=False)})
    for whole, matrices in ((module, ["up.weight"]), (net, [])):
        names = {p: name for name, p in whole.named_parameters()}
        assert [names[p] for p in matrix_groups(whole)[0]["params"]] == matrices
