"""Attention of every form against what is written out in plain torch, divided over tensor ranks in every way."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.flex_attention import flex_attention

from tedlab import ParallelDegrees, Topology
from tedlab.certify.compare import relative_error
from tedlab.nn import Init, LatentAttention, LatentAttentionSpec, SelfAttention, SelfAttentionSpec, rotation
from tedlab.nn import attend as attend_module
from tedlab.nn.attend import attend, attention_path, visible_pairs
from tedlab.spec import Layout
from tests.pool import WorkerPool

INIT, LENGTH, WIDTH, HIDDEN = Init(std=1.0), 8, 6, 12
Weights = dict[str, Tensor]


def spec(heads: int, **options: Any) -> SelfAttentionSpec:
    return SelfAttentionSpec(HIDDEN, heads, INIT, INIT, width=WIDTH, **options)


def latent(heads: int, q_rank: int | None, **options: Any) -> LatentAttentionSpec:
    return LatentAttentionSpec(HIDDEN, heads, 7, q_rank, 3, WIDTH, 5, INIT, INIT, **options)


FORMS: dict[str, SelfAttentionSpec | LatentAttentionSpec] = {
    "keys of their own, normed together": spec(4, rotary=True, qk_norm=0.1, together=True, bias=False),
    "two queries a key": spec(8, rotary=True, kv_heads=4, qk_norm=0.1, out_bias=False),
    "keys shared by ranks": spec(8, rotary=True, kv_heads=2, qk_norm=0.1),
    "one key, normed together": spec(4, rotary=True, kv_heads=1, qk_norm=0.1, together=True),
    "two keys, normed together": spec(8, kv_heads=2, qk_norm=0.1, together=True, bias=False, out_bias=True),
    "a window": spec(4, rotary=True, kv_heads=2, window=3),
    "sinks": spec(8, kv_heads=4, sinks=True),
    "a window and sinks, keys shared by ranks": spec(8, rotary=True, kv_heads=1, window=2, sinks=True),
    "latents": latent(4, 9, scale=1.3),
    "latents, queries of activations": latent(8, None, bias=True, out_bias=True),
}


def random(name: str, *shape: int) -> Tensor:
    seed = int.from_bytes(name.encode()[-8:], "little") >> 1
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def visible(length: int, window: int | None) -> Tensor:
    return torch.tensor([[j <= i and (window is None or i - j < window) for j in range(length)] for i in range(length)])


def softmax_of(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Of (B, H, S, S), with one more column of sinks (H,), which is then left out."""
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1]


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """(B, S, heads, WIDTH), each half of the features with the other."""
    cos, sin = turns[:, :, None].tile(1, 1, 1, 2)
    return x * cos + torch.cat((-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]), -1) * sin


def of_latents(of: LatentAttentionSpec, w: Weights, x: Tensor, turns: Tensor) -> Tensor:
    def projected(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()).double())

    def normed(name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    q = projected("q", x) if of.q_rank is None else projected("q_up", normed("q_norm", projected("q_down", x)))
    q = q.unflatten(-1, (of.heads, -1))
    down = projected("kv_down", x)
    made = projected("kv_up", normed("kv_norm", down[..., :7])).unflatten(-1, (of.heads, -1))
    key = turned(down[..., 7:].unsqueeze(-2), turns)
    q = torch.cat((q[..., :3], turned(q[..., 3:], turns)), -1)
    k = torch.cat((made[..., :3], key.tile(1, 1, of.heads, 1)), -1)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * of.scale / (3 + WIDTH) ** 0.5
    weights = scores.masked_fill(~visible(LENGTH, None), -torch.inf).softmax(-1)
    return projected("out", torch.einsum("bhij,bjhd->bihd", weights, made[..., 3:]).flatten(-2))


def written_out(of: SelfAttentionSpec | LatentAttentionSpec, w: Weights, x: Tensor, turns: Tensor) -> Tensor:
    if isinstance(of, LatentAttentionSpec):
        return of_latents(of, w, x, turns)

    def projected(name: str, kinds: int, heads: int) -> list[Tensor]:
        """(B, S, heads, WIDTH) of each kind, which alternate head by head."""
        y = x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()).double())
        return list(y.unflatten(-1, (heads, kinds, WIDTH)).unbind(-2))

    if of.kv_heads is None:
        q, k, v = projected("qkv", 3, of.heads)
    else:
        (q,), (k, v) = projected("q", 1, of.heads), projected("kv", 2, of.kv_heads)
    if of.qk_norm is not None:
        dims, eps = ((-2, -1) if of.together else (-1,)), of.qk_norm
        q, k = (part / (part.square().mean(dims, keepdim=True) + eps).sqrt() for part in (q, k))
        q = q * (w["q_norm.weight"].view(of.heads, WIDTH) if of.together else w["q_norm.weight"])
        k = k * (w["k_norm.weight"].view(of.key_heads, WIDTH) if of.together else w["k_norm.weight"])
    if of.rotary:
        q, k = turned(q, turns), turned(k, turns)
    k, v = (part.repeat_interleave(of.heads // of.key_heads, -2) for part in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / WIDTH**0.5
    scores = scores.masked_fill(~visible(LENGTH, of.window), -torch.inf)
    y = torch.einsum("bhij,bjhd->bihd", softmax_of(scores, w.get("sinks")), v).flatten(-2)
    return y @ w["out.weight"].T + w.get("out.bias", torch.zeros(()).double())


def sites_of(of: SelfAttentionSpec | LatentAttentionSpec, degrees: ParallelDegrees) -> Counter[tuple[str, str, int]]:
    sites = of.sites(Layout(degrees)).present(Layout(degrees))
    return Counter((s.op, s.tag, s.width * 2 * LENGTH) for s in (*sites.forward, *sites.backward))


def compared(of: SelfAttentionSpec | LatentAttentionSpec, sequence: bool) -> tuple[dict[str, float], bool]:
    """Relative errors in this process, and whether it communicated what the specification states."""
    size = dist.get_world_size()
    degrees = ParallelDegrees(size, size, sequence=sequence)
    topology = Topology(degrees)
    kind = LatentAttention if isinstance(of, LatentAttentionSpec) else SelfAttention
    layer = kind(of, topology).double()
    calls: Counter[tuple[str, str, int]] = Counter()
    topology.comm.register_hook(
        lambda call, when: calls.update([(call.op, call.tag, call.shape.numel())] if when == "end" else [])
    )
    weights = {}
    with torch.no_grad():
        for name, p in layer.named_parameters():
            weights[name] = random(name, *p.shape)
            p.copy_(distribute_tensor(weights[name], p.device_mesh, p.placements, src_data_rank=None))
    whole = random("input", 2, LENGTH, HIDDEN).requires_grad_()
    direction = random("direction", 2, LENGTH, HIDDEN)

    def own(x: Tensor) -> Tensor:
        return x.chunk(size, 1)[dist.get_rank()] if sequence else x

    x = own(whole.detach()).clone().requires_grad_()
    turns = rotation(LENGTH, WIDTH, 100.0, x.device, x.dtype)
    y = layer(x, None if isinstance(of, SelfAttentionSpec) and not of.rotary else turns)
    y.backward(own(direction))
    for w in weights.values():
        w.requires_grad_()
    expected = written_out(of, weights, whole, turns)
    expected.backward(direction)
    assert x.grad is not None
    assert whole.grad is not None
    errors = {"output": relative_error(y, own(expected)), "input": relative_error(x.grad, own(whole.grad))}
    communicated = calls.copy()
    partial = {name for name, p in layer.named_parameters() if isinstance(p.grad, DTensor)}
    assert partial == set(weights)
    for name, p in layer.named_parameters():
        if size > 1 and sequence and name.endswith("out.bias"):
            continue  # whole on every rank, as the adjoint of the reduce-scatter gives it
        assert isinstance(p.grad, DTensor)
        errors[name] = relative_error(p.grad.full_tensor(), weights[name].grad)
    return errors, communicated == sites_of(of, degrees)


def all_compared() -> dict[tuple[str, bool], tuple[dict[str, float], bool]]:
    ways = (False, True) if dist.get_world_size() > 1 else (False,)
    return {(name, sequence): compared(of, sequence) for name, of in FORMS.items() for sequence in ways}


@pytest.fixture(scope="module", params=[1, 2, 4], ids="tensor {}".format)
def world(pool: WorkerPool, request: pytest.FixtureRequest) -> list[dict[tuple[str, bool], Any]]:
    """What each rank of a tensor group found."""
    return pool.run(request.param, all_compared)


@pytest.mark.parametrize("name", FORMS)
def test_output_and_gradients_are_those_of_plain_torch(world: list[dict[tuple[str, bool], Any]], name: str) -> None:
    for found in world:
        for errors, _ in (value for (of, _), value in found.items() if of == name):
            assert len(errors) >= 5
            assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("name", FORMS)
def test_collectives_are_those_that_the_specification_states(
    world: list[dict[tuple[str, bool], Any]], name: str
) -> None:
    assert all(stated for found in world for (of, _), (_, stated) in found.items() if of == name)


def test_a_head_of_keys_is_stored_once_where_ranks_have_their_own_and_by_all_where_they_share_it() -> None:
    of = FORMS["keys shared by ranks"]
    (weight,) = (p for p in of.parameters() if p.name == "kv.weight")
    degrees = [ParallelDegrees(tensor, tensor) for tensor in (1, 2, 4, 8)]
    assert [weight.parts(each) for each in degrees] == [1, 2, 1, 1]
    assert [weight.partial(Layout(each)) for each in degrees] == [False, False, True, True]


@pytest.mark.parametrize("window", [1, 3, 300, None])
def test_attention_in_blocks_is_attention_at_once(window: int | None) -> None:
    """In more than one block of queries, with heads of values of another width."""
    q, k, v, sinks = random("q", 1, 4, 520, 6), random("k", 1, 2, 520, 6), random("v", 1, 2, 520, 5), random("s", 4)
    inputs = [x.requires_grad_() for x in (q, k, v, sinks)]
    direction = random("direction", 1, 4, 520, 5)
    found = attend(q, k, v, window, sinks, scale=0.3)
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~visible(520, window), -torch.inf)
    expected = softmax_of(scores, sinks) @ v.repeat_interleave(2, 1)
    assert relative_error(found.detach(), expected.detach()) < 1e-13
    for ours, theirs in zip(*(torch.autograd.grad(y, inputs, direction) for y in (found, expected)), strict=True):
        assert relative_error(ours, theirs) < 1e-12


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("window", "sinks"), [(13, False), (13, True), (None, True)])
def test_flex_attention_is_given_the_same_windows_and_sinks(
    monkeypatch: pytest.MonkeyPatch, window: int | None, sinks: bool
) -> None:
    """Forward, as torch runs it without a GPU: not compiled."""
    monkeypatch.setattr(attend_module, "_compiled_flex", lambda: flex_attention)
    q, k, v = (random(name, 2, heads, 140, 8) for name, heads in (("q", 4), ("k", 2), ("v", 2)))
    sink = random("sinks", 4) if sinks else None
    mask = attend_module._mask(140, window, q.device)
    found = attend_module._by_flex(q, k, v, mask, sink, 0.3)
    assert relative_error(found, torch.ops.tedlab.attention(q, k, v, sink, 0.3, window)[0]) < 1e-12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("window", "sinks", "wide"), [(100, False, 64), (100, True, 64), (None, True, 128), (None, False, 32)]
)
def test_attention_on_a_gpu_is_that_of_float64(window: int | None, sinks: bool, wide: int) -> None:
    """By flex_attention, or of heads whose values are less wide by the fused kernel: output and gradients."""
    shapes = {"q": (2, 8, 512, 64), "k": (2, 2, 512, 64), "v": (2, 2, 512, wide), "s": (8,)}
    exact = [random(name, *shape).requires_grad_() for name, shape in shapes.items()]
    direction = random("direction", 2, 8, 512, wide)
    given = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in exact]
    found = attend(*given[:3], window, given[3] if sinks else None)
    q, k, v, sink = exact
    expected = torch.ops.tedlab.attention(q, k, v, sink if sinks else None, 1 / 8, window)[0]
    assert relative_error(found.detach().double().cpu(), expected.detach()) < 0.02
    used = slice(4 if sinks else 3)
    ours = torch.autograd.grad(found, given[used], direction.to("cuda", torch.bfloat16))
    for own, best in zip(ours, torch.autograd.grad(expected, exact[used], direction), strict=True):
        assert relative_error(own.double().cpu(), best) < 0.05


def test_queries_and_keys_are_cast_as_autocast_would() -> None:
    """As it leaves them after norms in fp32."""
    q, k, v = (random(name, 1, 2, 9, 8) for name in "qkv")
    found = attend(q.float(), k.float(), v.bfloat16(), window=3)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.double(), attend(q, k, v, window=3)) < 0.02


def test_a_window_that_holds_the_whole_text_is_none() -> None:
    q, k, v = (random(name, 1, 2, 5, 4) for name in "qkv")
    assert torch.equal(attend(q, k, v, window=5), attend(q, k, v))


def test_the_fused_kernel_is_taken_wherever_it_can_be_and_flex_where_its_kernels_can() -> None:
    half, double, same, other = torch.bfloat16, torch.float64, (64, 64), (96, 64)
    assert attention_path("cuda", half, same) == attention_path("cpu", double, same) == "sdpa"
    assert attention_path("cuda", half, other) == attention_path("cuda", double, other) == "sdpa"
    assert attention_path("cuda", half, same, window=True) == attention_path("cuda", half, same, sinks=True) == "flex"
    assert attention_path("cuda", double, same, window=True) == "blocks"
    assert attention_path("cuda", half, (8, 8), sinks=True) == "blocks"
    assert attention_path("cpu", half, same, window=True) == attention_path("cpu", half, other) == "blocks"


def test_only_visible_pairs_count() -> None:
    """Up to half a pair for each token with itself."""
    for length, window in ((7, 3), (7, 7), (7, 9), (5, 1)):
        assert visible_pairs(length, window) == visible(length, window).sum().item() - min(window, length) / 2
    plain, sliding = (spec(4, kv_heads=2, window=window).flops(100) for window in (None, 10))
    assert sliding["attention_projections"] == plain["attention_projections"]
    assert sliding["attention_scores"] == round(plain["attention_scores"] * 10 * 190 / 100**2)
