"""Every layer against plain torch on the whole tensors: output, gradient of the input, gradient of every parameter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tedlab import ParallelDegrees, Topology
from tedlab.certify.compare import relative_error
from tedlab.comm import Collective
from tedlab.nn import (
    ColumnParallelLinear,
    ColumnParallelSpec,
    Embedding,
    EmbeddingSpec,
    FeedForward,
    FeedForwardSpec,
    Init,
    LayerNorm,
    Nonlinearity,
    NormSpec,
    RMSNorm,
    RowParallelLinear,
    RowParallelSpec,
    SelfAttention,
    SelfAttentionSpec,
    VocabParallelEmbedding,
    VocabParallelEmbeddingSpec,
    activate,
    linear_cross_entropy,
    rotation,
    vocab_parallel_cross_entropy,
)
from tests.pool import WorkerPool

INIT = Init(std=1.0)
Weights = dict[str, Tensor]
IDS = torch.tensor([[0, 3, 4, 7, 8], [11, 12, 15, 3, 3]])  # first and last of every shard of 16 rows, and repeats


def random(name: str, *shape: int) -> Tensor:
    seed = int.from_bytes(name.encode()[-8:], "little") >> 1
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(w: Weights, x: Tensor, turned: bool = False) -> Tensor:
    """Causal attention written out; rows of the fused projection are ordered head by head."""
    (batch, length, hidden), heads = x.shape, 4
    qkv = (x @ w["qkv.weight"].T + w["qkv.bias"]).view(batch, length, heads, 3, hidden // heads)
    q, k, v = (qkv[:, :, :, i].transpose(1, 2) for i in range(3))
    if turned:
        q, k = (as_complex_numbers(z) for z in (q, k))
    scores = q @ k.transpose(-1, -2) / (hidden // heads) ** 0.5
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    y = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
    return y.transpose(1, 2).reshape(batch, length, hidden) @ w["out.weight"].T + w["out.bias"]


def as_complex_numbers(x: Tensor) -> Tensor:
    """Position p times e^(i·p·θ), real and imaginary parts in the two halves of the features."""
    half = x.shape[-1] // 2
    theta = torch.tensor([10_000.0 ** (-j / half) for j in range(half)], dtype=torch.float64)
    turns = torch.polar(torch.ones(()).double(), torch.arange(x.shape[-2]).unsqueeze(-1) * theta)
    y = torch.complex(x[..., :half], x[..., half:]) * turns
    return torch.cat((y.real, y.imag), -1)


def swiglu(w: Weights, x: Tensor) -> Tensor:
    gate, value = F.linear(x, w["up.weight"][::2]), F.linear(x, w["up.weight"][1::2])
    return F.linear(gate * torch.sigmoid(gate) * value, w["down.weight"])


# name: (layer, its forward, plain torch, input, dimension along which input / output are divided)
Case = tuple[Callable[[Topology], nn.Module], Callable, Callable, Tensor, int | None, int | None]
CASES: dict[str, Case] = {
    "column": (
        lambda t: ColumnParallelLinear(ColumnParallelSpec(6, 8, "test", INIT), t),
        lambda m, x: m(x),
        lambda w, x: F.linear(x, w["weight"], w["bias"]),
        random("column", 3, 6),
        None,
        -1,
    ),
    "column_without_bias": (
        lambda t: ColumnParallelLinear(ColumnParallelSpec(6, 8, "test", INIT, bias=False), t),
        lambda m, x: m(x),
        lambda w, x: F.linear(x, w["weight"]),
        random("column", 2, 3, 6),
        None,
        -1,
    ),
    "row": (
        lambda t: RowParallelLinear(RowParallelSpec(8, 6, "test", INIT), t),
        lambda m, x: m(x),
        lambda w, x: F.linear(x, w["weight"], w["bias"]),
        random("row", 3, 8),
        -1,
        None,
    ),
    "feed_forward": (
        lambda t: FeedForward(FeedForwardSpec(6, 8, INIT, INIT), t),
        lambda m, x: m(x),
        lambda w, x: F.linear(F.gelu(F.linear(x, w["up.weight"], w["up.bias"])), w["down.weight"], w["down.bias"]),
        random("feed_forward", 2, 3, 6),
        None,
        None,
    ),
    "attention": (
        lambda t: SelfAttention(SelfAttentionSpec(8, 4, INIT, INIT), t),
        lambda m, x: m(x),
        attention,
        random("attention", 2, 5, 8),
        None,
        None,
    ),
    "swiglu": (
        lambda t: FeedForward(FeedForwardSpec(6, 8, INIT, INIT, activation="swiglu", bias=False), t),
        lambda m, x: m(x),
        swiglu,
        random("swiglu", 2, 3, 6),
        None,
        None,
    ),
    "rotary_attention": (
        lambda t: SelfAttention(SelfAttentionSpec(16, 4, INIT, INIT), t),
        lambda m, x: m(x, rotation(5, 4, 10_000.0, x.device, x.dtype)),
        lambda w, x: attention(w, x, turned=True),
        random("rotary", 2, 5, 16),
        None,
        None,
    ),
    "vocabulary_embedding": (
        lambda t: VocabParallelEmbedding(VocabParallelEmbeddingSpec(16, 6, INIT), t),
        lambda m, x: m(IDS) * x,
        lambda w, x: F.embedding(IDS, w["weight"]) * x,
        random("embedding", 2, 5, 6),
        None,
        None,
    ),
    "tied_output": (
        lambda t: VocabParallelEmbedding(VocabParallelEmbeddingSpec(16, 6, INIT), t),
        lambda m, x: m.logits(x),
        lambda w, x: F.linear(x, w["weight"]),
        random("tied", 2, 5, 6),
        None,
        -1,
    ),
    "positions": (
        lambda t: Embedding(EmbeddingSpec(7, 6, INIT), t),
        lambda m, x: m(5) * x,
        lambda w, x: F.embedding(torch.arange(5), w["weight"]) * x,
        random("positions", 2, 5, 6),
        None,
        None,
    ),
    "norm": (
        lambda t: LayerNorm(NormSpec(6, eps=0.1), t),
        lambda m, x: m(x),
        lambda w, x: F.layer_norm(x, (6,), w["weight"], w["bias"], 0.1),
        random("norm", 2, 5, 6),
        None,
        None,
    ),
    "rms_norm": (
        lambda t: RMSNorm(NormSpec(6, "rms", 0.1), t),
        lambda m, x: m(x),
        lambda w, x: x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * w["weight"],
        random("rms_norm", 2, 5, 6),
        None,
        None,
    ),
}


def own_part(x: Tensor, dim: int | None, topology: Topology) -> Tensor:
    return x if dim is None else x.chunk(topology.comm.size("tensor"), dim)[topology.comm.rank("tensor")]


def compare(name: str) -> dict[str, float]:
    """Relative errors of one case, on this process, with the tensor degree the world size."""
    build, forward, plain, x, x_dim, y_dim = CASES[name]
    topology = Topology(ParallelDegrees(dist.get_world_size(), tensor=dist.get_world_size()))
    layer = build(topology).double()
    weights = {}
    with torch.no_grad():
        for n, p in layer.named_parameters():
            weights[n] = random(name + n, *p.shape)
            p.copy_(distribute_tensor(weights[n], p.device_mesh, p.placements, src_data_rank=None))

    x_whole = x.clone().requires_grad_()
    x_own = own_part(x, x_dim, topology).clone().requires_grad_()
    for w in weights.values():
        w.requires_grad_()
    y, expected = forward(layer, x_own), plain(weights, x_whole)
    direction = random("direction", *expected.shape)
    y.backward(own_part(direction, y_dim, topology))
    expected.backward(direction)

    assert x_own.grad is not None
    errors = {
        "output": relative_error(y, own_part(expected, y_dim, topology)),
        "input": relative_error(x_own.grad, own_part(x_whole.grad, x_dim, topology)),
    }
    for n, p in layer.named_parameters():
        assert isinstance(p.grad, DTensor)
        errors[n] = relative_error(p.grad.full_tensor(), weights[n].grad)
    return errors


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_plain_torch(pool: WorkerPool, name: str, tensor: int) -> None:
    for errors in pool.run(tensor, compare, name):
        assert len(errors) >= 3
        assert max(errors.values()) < 1e-13, errors


def rms_norm_beside_torchs() -> None:
    x, direction = (random(name, 3, 5, 64).bfloat16() for name in ("rms", "direction"))
    weight, kept = random("weight", 64).bfloat16().requires_grad_(), []
    norm = RMSNorm(NormSpec(64, "rms"), Topology(ParallelDegrees(1))).bfloat16()
    with torch.no_grad():
        norm.local("weight").copy_(weight)
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = norm(x)
    assert {tuple(t.shape) for t in kept} == {(3, 5, 64), (64,), (3, 5, 1)}
    assert all(t.dtype is torch.bfloat16 for t in kept if t.shape[-1] == 64)
    expected = F.rms_norm(x, (64,), weight, 1e-5)
    assert torch.equal(y, expected)
    own = torch.autograd.grad(y, (x, norm.weight), direction)
    best = torch.autograd.grad(expected, (x, weight), direction)
    for a, b in zip(own, best, strict=True):
        torch.testing.assert_close(a.to_local() if isinstance(a, DTensor) else a, b)


def test_rms_norm_is_torchs_and_keeps_its_input_and_a_number_a_row(pool: WorkerPool) -> None:
    pool.run(1, rms_norm_beside_torchs)


def too_long() -> None:
    topology = Topology(ParallelDegrees(1))
    with pytest.raises(RuntimeError, match="8 positions, but the table has 7"):
        Embedding(EmbeddingSpec(7, 6, INIT), topology)(8)


def test_the_clamped_swiglu_and_its_gradient_are_those_of_torch_s_operations() -> None:
    draw = torch.Generator().manual_seed(0)
    z, grad = (torch.randn(40, width, generator=draw, dtype=torch.float64) for width in (12, 6))
    found = []
    for ours in (True, False):
        leaf = z.clone().requires_grad_()
        gate, linear = leaf[:, 0::2].clamp(max=0.7), leaf[:, 1::2].clamp(-0.7, 0.7)
        plain = gate * torch.sigmoid(1.702 * gate) * (linear + 1)
        y = activate(leaf, Nonlinearity("clamped_swiglu", 0.7)) if ours else plain
        found.append((y.detach(), *torch.autograd.grad(y, leaf, grad)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


def test_more_positions_than_the_table_has_are_refused(pool: WorkerPool) -> None:
    pool.run(1, too_long)


# ---- cross-entropy over a divided vocabulary ---------------------------------------------------------------------

VOCABULARY = 16
TARGETS = torch.arange(VOCABULARY)  # each token once: both sides of every boundary between shards
EXTREME = torch.where(random("signs", VOCABULARY, VOCABULARY) > 0, 1e4, -1e4).double()
LOGITS = {
    "ordinary": 3 * random("logits", VOCABULARY, VOCABULARY),
    "extreme": EXTREME,
    "target_certain": torch.diag(torch.full((VOCABULARY,), 2e4, dtype=torch.float64)) - 1e4,
    "target_impossible": 1e4 - torch.diag(torch.full((VOCABULARY,), 2e4, dtype=torch.float64)),
}


def cross_entropy(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Collective]]:
    """Losses, this process's part of the gradient, the logits afterwards, and what was communicated."""
    topology = Topology(ParallelDegrees(dist.get_world_size(), tensor=dist.get_world_size()))
    calls: list[Any] = []
    topology.comm.register_hook(lambda call, when: calls.append(call) if when == "end" else None)
    own = own_part(logits, -1, topology).clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(own, TARGETS, topology.comm)
    losses.backward(torch.linspace(0.5, 2, VOCABULARY, dtype=losses.dtype))
    assert own.grad is not None
    return losses.detach(), own.grad, own.detach(), calls


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("kind", LOGITS)
def test_cross_entropy_equals_torch_s(pool: WorkerPool, kind: str, tensor: int) -> None:
    logits = LOGITS[kind].clone().requires_grad_()
    expected = F.cross_entropy(logits, TARGETS, reduction="none")
    expected.backward(torch.linspace(0.5, 2, VOCABULARY, dtype=torch.float64))
    answers = pool.run(tensor, cross_entropy, LOGITS[kind])
    for losses, _, _, _ in answers:
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-13, atol=1e-13)
    gradient, after = (torch.cat([answer[i] for answer in answers], -1) for i in (1, 2))
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-12, atol=1e-15)
    assert torch.equal(after, LOGITS[kind])


def test_cross_entropy_never_gathers_logits_and_is_silent_in_backward(pool: WorkerPool) -> None:
    for _, _, _, calls in pool.run(4, cross_entropy, LOGITS["ordinary"]):
        assert [(call.tag, call.shape.numel()) for call in calls] == [
            ("loss.max", VOCABULARY),
            ("loss.sum", 2 * VOCABULARY),
        ]


@pytest.mark.parametrize("tensor", [1, 2])
def test_low_precision_logits_give_a_loss_in_fp32_and_a_gradient_in_theirs(pool: WorkerPool, tensor: int) -> None:
    logits = LOGITS["ordinary"].bfloat16()
    expected = F.cross_entropy(logits.float(), TARGETS, reduction="none")
    for losses, gradient, _, _ in pool.run(tensor, cross_entropy, logits):
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
        assert gradient.dtype == torch.bfloat16


# ---- … of a linear layer, a few tokens at a time -----------------------------------------------------------------

WIDTH, SCALE = 6, 3.0
Chunked = tuple[Tensor, Tensor, Tensor, list[Collective]]


def chunked_cross_entropy(x: Tensor, weight: Tensor, chunk: int, backend: str) -> Chunked:
    """The loss, gradients of the input and of this process's part of the weight, and what was communicated."""
    topology = Topology(ParallelDegrees(dist.get_world_size(), tensor=dist.get_world_size()))
    calls: list[Any] = []
    topology.comm.register_hook(lambda call, when: calls.append(call) if when == "end" else None)
    x, own = x.clone().requires_grad_(), own_part(weight, 0, topology).clone().requires_grad_()
    loss = linear_cross_entropy(x, own, TARGETS, topology.comm, chunk, backend)
    (SCALE * loss).backward()
    assert x.grad is not None
    assert own.grad is not None
    with torch.no_grad():
        silent = linear_cross_entropy(x, own, TARGETS, topology.comm, chunk, backend)
    assert torch.equal(silent, loss)
    return loss.detach(), x.grad, own.grad, calls


def expected_of(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = (t.double().clone().requires_grad_() for t in (x, weight))
    loss = F.cross_entropy(x @ weight.mT, TARGETS)
    (SCALE * loss).backward()
    assert x.grad is not None
    assert weight.grad is not None
    return loss.detach(), x.grad, weight.grad


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 5, VOCABULARY, 100])
def test_the_loss_of_chunks_equals_torch_s(pool: WorkerPool, chunk: int, tensor: int) -> None:
    x, weight = random("x", VOCABULARY, WIDTH), random("w", VOCABULARY, WIDTH)
    loss, of_x, of_weight = expected_of(x, weight)
    answers = pool.run(tensor, chunked_cross_entropy, x, weight, chunk, "none")
    for ours, _, _, calls in answers:
        torch.testing.assert_close(ours, loss, rtol=1e-13, atol=0)
        sizes = [min(chunk, VOCABULARY - start) for start in range(0, VOCABULARY, chunk)] if tensor > 1 else []
        expected = [call for size in sizes for call in (("loss.max", size), ("loss.sum", 2 * size))] * 2
        assert [(call.tag, call.shape.numel()) for call in calls] == expected
    summed = sum(answer[1] for answer in answers)  # each has the part that its part of the vocabulary caused
    torch.testing.assert_close(summed, of_x, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(torch.cat([answer[2] for answer in answers]), of_weight, rtol=1e-12, atol=1e-15)


def test_the_loss_of_chunks_is_as_exact_as_its_operands_and_compiles(pool: WorkerPool) -> None:
    """Certain and impossible targets, in bfloat16: differences from 1 are taken before rounding."""
    x, weight = random("x", VOCABULARY, WIDTH).bfloat16(), (4 * random("w", VOCABULARY, WIDTH)).bfloat16()
    loss, of_x, of_weight = expected_of(x, weight)
    for backend in ("none", "aot_eager"):
        ((ours, our_x, our_weight, _),) = pool.run(1, chunked_cross_entropy, x, weight, 5, backend)
        assert ours.dtype == torch.float32
        assert our_x.dtype == our_weight.dtype == torch.bfloat16
        assert relative_error(ours.double(), loss) < 1e-2
        assert relative_error(our_x.double(), of_x) < 1e-2
        assert relative_error(our_weight.double(), of_weight) < 1e-2
