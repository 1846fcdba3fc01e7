"""``tile=fused`` computes what torch's Adam and AdamW compute in float64, to the rounding of the dtype it works in.

Errors are counted in epsilons of that dtype. A parameter's is relative to |parameter| + learning rate, because a step
adds a number of about the second size to one of the first; a second moment's to itself; a first moment's to 1, which is
about the largest gradient. Torch's own fp32 steps, fused or not, are as far from float64 as these.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.optimizer import Temporaries, measure
from tedlab import ParallelDegrees, Topology
from tedlab.config import MoEConfig
from tedlab.optim import NarrowAdamW, ShardedOptimizer, fused
from tests.pool import WorkerPool
from tests.test_parity import compare, reference
from tests.training import Job, Layout, train

LR, DECAY, FACTOR, STEPS = 1e-2, 0.1, 0.37, 5
BOUND = 3.0 * STEPS  # epsilons; measured on a million numbers: 9, and 8 of torch's plain fp32 step
KINDS = [AdamW, Adam]
DTYPES = [  # of what is updated, and of gradients and parameters if that is another
    pytest.param(torch.float64, None, id="float64"),
    pytest.param(torch.float32, None, id="float32"),
    pytest.param(torch.float32, torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float32, torch.float16, id="float16"),
]
HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")


def numbers(size: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def errors(kind: type[Adam], size: int, dtype: torch.dtype, half: torch.dtype | None, device: str = "cpu") -> dict:
    """Of parameters and moments, after some steps beside torch's in float64; and how many were rounded differently."""
    exact = nn.Parameter(numbers(size, 0).double())
    optimizer = kind([exact], lr=LR, weight_decay=DECAY)
    master = numbers(size, 0, dtype, device)
    rounded = None if half is None else torch.empty_like(master, dtype=half)
    state: dict[str, Any] = {}
    for seed in range(1, STEPS + 1):
        gradient = numbers(size, seed, half or dtype, device)
        gradient += 2 * gradient.sign()  # near zero, the division by √v makes any rounding a large one
        exact.grad = gradient.cpu().double() * FACTOR
        optimizer.step()
        group = optimizer.param_groups[0]
        fused.fused_adam_step(master, gradient, state, group, factor=FACTOR, rounded=rounded)
    wanted = optimizer.state[exact]
    assert state.keys() == wanted.keys()
    assert state["step"] == wanted["step"]
    found = {
        "parameter": (master.cpu() - exact.detach()) / (exact.detach().abs() + LR),
        "exp_avg": state["exp_avg"].cpu() - wanted["exp_avg"],
        "exp_avg_sq": (state["exp_avg_sq"].cpu() - wanted["exp_avg_sq"]) / wanted["exp_avg_sq"],
    }
    epsilons = {name: (error.abs().max() / torch.finfo(dtype).eps).item() for name, error in found.items()}
    return epsilons | {"rounded": 0 if rounded is None else (rounded != master.to(half)).sum().item()}


def exceeding(found: dict[str, float]) -> dict[str, float]:
    return {name: error for name, error in found.items() if not error <= (0 if name == "rounded" else BOUND)}


@pytest.mark.parametrize("size", [1, 7, fused._TILE + 5])
@pytest.mark.parametrize(("dtype", "half"), DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_torchs_in_float64(
    kind: type[Adam], dtype: torch.dtype, half: torch.dtype | None, size: int
) -> None:
    assert not exceeding(errors(kind, size, dtype, half))


@needs_gpu
@pytest.mark.parametrize("size", [1, 7, 1024, 3001, (1 << 20) + 16])
@pytest.mark.parametrize(("dtype", "half"), DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_on_a_gpu_equal_torchs_in_float64(
    kind: type[Adam], dtype: torch.dtype, half: torch.dtype | None, size: int
) -> None:
    assert not exceeding(errors(kind, size, dtype, half, "cuda"))


@pytest.mark.skipif(HAS_GPU, reason="the kernel itself is tested on this machine")
@pytest.mark.parametrize("size", [1, 1024, 3001])
@pytest.mark.parametrize(("dtype", "half"), DTYPES[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_interpreted_kernel_equals_torchs_in_float64(
    monkeypatch: pytest.MonkeyPatch, kind: type[Adam], dtype: torch.dtype, half: torch.dtype | None, size: int
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; it comes with torch for GPUs")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernel is first imported; here nothing else imports it
    monkeypatch.setattr(fused, "_torch_step", fused._triton_step)
    found = errors(kind, size, dtype, half)
    if half == torch.bfloat16:
        del found["rounded"]  # the interpreter cuts bits off where GPUs round to nearest
    assert not exceeding(found)


@pytest.mark.parametrize("size", [0, 1, 1024, 40_001])
def test_squares_are_summed_in_float64_by_a_kernel(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """On a GPU if there is one, else in an interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed; it comes with torch for GPUs")
    if not HAS_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernel is first imported
    from tedlab.optim.squares_kernel import launch

    x = numbers(size, 1, device="cuda" if HAS_GPU else "cpu") * 1e20  # whose squares are too large for fp32
    assert launch(x).sum().item() == pytest.approx(x.double().square().sum().item(), rel=1e-14)


@needs_gpu
@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_a_step_on_a_gpu_allocates_nothing(half: torch.dtype | None) -> None:
    size = 3_000_001
    group = AdamW([torch.zeros(1)]).param_groups[0]
    master, gradient = numbers(size, 0, device="cuda"), numbers(size, 1, half or torch.float32, "cuda")
    rounded = None if half is None else master.to(half)
    state: dict[str, Any] = {}
    for _ in range(2):  # the first makes the state
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fused.fused_adam_step(master, gradient, state, group, factor=FACTOR, rounded=rounded)
    assert torch.cuda.max_memory_allocated() == before


# ---- inside the sharded optimizer ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_three_steps_of_a_layout_equal_one_process_without_tiles(pool: WorkerPool) -> None:
    layout, job = Layout(4, tensor=2, expert=2), {"moe": MoEConfig(num_experts=4), "steps": 3, "clip": 0.1}
    record = pool.run(4, train, layout, Job(**job, tile="fused"))[0]
    found = compare(record, reference(pool, Job(**job, tile=None)))
    wrong = {name: error for name, error in found.items() if not error < 1e-9}
    assert not wrong, wrong


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_parameters_are_rounded_as_without_tiles(pool: WorkerPool, precision: str) -> None:
    """Masters differ by roundings of fp32, which rarely crosses one of half precision, and then by one."""
    layout = Layout(4, tensor=2, expert=2)
    jobs = [(layout, Job(precision=precision, tile=tile)) for tile in ("fused", None)]
    ours, theirs = (ranks[0].weights for ranks in pool.run_each(4, train, jobs))
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=torch.finfo(weight.dtype).eps, atol=1e-7)
        assert (weight != theirs[name]).float().mean() < 0.02, name


def sharded(module: nn.Module, tile: int | str | None, plain: Optimizer | None = None) -> ShardedOptimizer:
    names = {p: name for name, p in module.named_parameters()}
    plain = plain or AdamW(module.parameters(), lr=LR, weight_decay=DECAY)
    comm = Topology(ParallelDegrees(torch.distributed.get_world_size())).comm
    return ShardedOptimizer(plain, comm, names, zero=True, tile=tile)


def module_of(dtype: torch.dtype, *sizes: int) -> nn.Module:
    return nn.ParameterList(numbers(size, size, dtype) for size in sizes)


def take_step(module: nn.Module, optimizer: ShardedOptimizer, seed: int) -> None:
    for p in module.parameters():
        p.grad = numbers(p.numel(), seed, p.dtype)
    optimizer.reduce_gradients()
    optimizer.clip(1.0)
    optimizer.optimizer.step()


def handed_over(dtype: torch.dtype, first: int | str, second: int | str) -> None:
    module, others = module_of(dtype, 5, 13), module_of(dtype, 5, 13)
    one, other = sharded(module, first), sharded(others, second)
    take_step(module, one, 1)
    state = copy.deepcopy(one.state_dict())
    with torch.no_grad():
        for p, q in zip(module.parameters(), others.parameters(), strict=True):
            q.copy_(p)
    other.initialize_state()
    other.load_state_dict(state)
    torch.testing.assert_close(other.state_dict(), state, rtol=0.0, atol=0.0)
    for seed in (2, 3):
        take_step(module, one, seed)
        take_step(others, other, seed)
    bound = {"rtol": 10 * torch.finfo(dtype).eps, "atol": 1e-7}
    torch.testing.assert_close(list(others.parameters()), list(module.parameters()), **bound)
    assert other.state_dict()["state"]["0"]["step"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("first", "second"), [("fused", 7), (7, "fused")])
def test_checkpoints_serve_either_step(
    pool: WorkerPool, dtype: torch.dtype, first: int | str, second: int | str
) -> None:
    pool.run(2, handed_over, dtype, first, second)


def scheduled(options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    results = []
    for tile in ("fused", None):
        module = module_of(torch.float64, 9)
        plain = AdamW(module.parameters(), lr=LR, **options)
        scheduler = LambdaLR(plain, lambda step: 0.5**step)
        optimizer = sharded(module, tile, plain)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # LambdaLR warns when it believes that no step was taken
            for seed in (1, 2):
                take_step(module, optimizer, seed)
                scheduler.step()
        results.append(next(module.parameters()).detach())
    return results[0], results[1]


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_schedulers_drive_a_fused_step(pool: WorkerPool, options: dict[str, Any]) -> None:
    ours, theirs = pool.run(1, scheduled, options)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-15)


def temporary_bytes(dtype: torch.dtype, tile: int | str | None, size: int) -> int:
    module = module_of(dtype, size)
    optimizer = sharded(module, tile)
    take_step(module, optimizer, 1)  # makes the state
    (bucket,) = optimizer.buckets
    bucket.gradient, bucket.present = numbers(size, 2, dtype), set(bucket.parameters)
    optimizer.global_norm()  # whose temporaries have a bound of their own
    with Temporaries() as temporaries:
        optimizer.step()
    return temporaries.peak


def test_temporaries_do_not_grow_with_the_model(pool: WorkerPool) -> None:
    for size in (300_000, 600_000):
        assert pool.run(1, temporary_bytes, torch.bfloat16, None, size)[0] >= 8 * size  # upcast gradient, denominator
        assert pool.run(1, temporary_bytes, torch.bfloat16, "fused", size)[0] < 4 * fused._TILE + 100
        assert pool.run(1, temporary_bytes, torch.float32, "fused", size)[0] < 100


def test_the_benchmark_measures_every_kind_of_step(pool: WorkerPool) -> None:
    size = 30_000
    untiled, tiled, ours, peer, copied = pool.run(1, measure, size, torch.device("cpu"), torch.bfloat16, 1)[0]
    assert untiled.temporary_bytes == tiled.temporary_bytes > ours.temporary_bytes == 4 * size
    assert peer.temporary_bytes == copied.temporary_bytes == 0
    assert untiled.speedup == copied.of_copy == 1


# ---- tile=auto -----------------------------------------------------------------------------------------------------


EXPLICIT = ("fused", fused.TILE, 7, None)


def automatic(gpu: bool) -> tuple[list[Any], list[int]]:
    """The tiles of several optimizers, and for AdamW how many fused steps a step takes, by tile."""
    chosen, steps = [], []
    with patch("tedlab.optim.sharded.has_kernel", lambda device: gpu):
        for kind in (AdamW, Adam, SGD, NarrowAdamW):
            module = module_of(torch.float32, 9)
            chosen.append(sharded(module, "auto", kind(module.parameters(), lr=LR)).tile)
        for tile in ("auto", *EXPLICIT):
            module = module_of(torch.float32, 9, 40)
            optimizer = sharded(module, tile)
            chosen += [] if tile == "auto" else [optimizer.tile]
            optimizer.kernel = Mock(wraps=fused._torch_step)
            take_step(module, optimizer, 1)
            steps.append(optimizer.kernel.call_count)
    return chosen, steps


def test_auto_is_fused_on_a_gpu_where_the_optimizer_can_be(pool: WorkerPool) -> None:
    assert pool.run(1, automatic, True)[0] == (["fused", "fused", fused.TILE, fused.TILE, *EXPLICIT], [1, 1, 0, 0, 0])


def test_auto_is_tiles_elsewhere(pool: WorkerPool) -> None:
    assert pool.run(1, automatic, False)[0] == ([*[fused.TILE] * 4, *EXPLICIT], [0, 1, 0, 0, 0])


@pytest.mark.parametrize(
    ("missing", "capability", "expected"),
    [
        *((None, (9, 0), True), ("triton", (9, 0), False), ("gcc", (9, 0), True), ("compilers", (9, 0), False)),
        (None, (6, 1), False),
    ],
)
def test_the_kernel_needs_triton_a_compiler_and_a_gpu_that_these_know(
    monkeypatch: pytest.MonkeyPatch, missing: str | None, capability: tuple[int, int], expected: bool
) -> None:
    absent = {"gcc", "clang"} if missing == "compilers" else {missing}
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in absent else name)
    monkeypatch.setattr("shutil.which", lambda name: None if name in absent else name)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert fused.has_kernel(torch.device("cuda", 1)) is expected
    assert not fused.has_kernel(torch.device("cpu"))
    if missing == "compilers":
        monkeypatch.setenv("CC", "cc")
        assert fused.has_kernel(torch.device("cuda"))


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_one_group_that_cannot_be_fused_decides(option: str) -> None:
    assert fused.chosen_tile("auto", AdamW, [{option: False}, {}], gpu=True) == "fused"
    assert fused.chosen_tile("auto", AdamW, [{option: False}, {option: True}], gpu=True) == fused.TILE


def group_added_later() -> None:
    module = module_of(torch.float32, 9, 40)
    first, second = module.parameters()
    plain = AdamW([first], lr=LR)
    with patch("tedlab.optim.sharded.has_kernel", lambda device: True):
        optimizer = sharded(module, "auto", plain)
    plain.add_param_group({"params": [second], "amsgrad": True})
    with pytest.raises(ValueError, match="tile=fused knows no amsgrad"):
        optimizer.adopt()


def test_a_group_that_cannot_be_fused_is_refused_when_it_comes_later(pool: WorkerPool) -> None:
    pool.run(1, group_added_later)


# ---- what it refuses -----------------------------------------------------------------------------------------------


class OwnAdam(Adam):
    """What its step does is its own business."""

    elementwise = True


WRONG: dict[str, tuple[Callable[[list[Tensor]], Optimizer], Any, list[str]]] = {
    "sgd": (SGD, "fused", ["SGD", "torch.optim.AdamW and torch.optim.Adam", "null"]),
    "subclass": (OwnAdam, "fused", ["OwnAdam"]),
    "amsgrad": (lambda p: Adam(p, amsgrad=True), "fused", ["amsgrad", "null"]),
    "amsgrad_in_a_group": (lambda p: AdamW([{"params": p, "amsgrad": True}]), "fused", ["amsgrad"]),
    "maximize": (lambda p: AdamW(p, maximize=True), "fused", ["maximize"]),
    "unknown_word": (AdamW, "fuse", ["fuse", "at least 1", "null", "fused"]),
    "tile_0": (SGD, 0, ["tile=0", "at least 1", "null", "fused"]),
}


@pytest.mark.parametrize(("optimizer", "tile", "fragments"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_stepped_is_refused_at_construction(
    optimizer: Callable[[list[Tensor]], Optimizer], tile: Any, fragments: list[str]
) -> None:
    comm: Any = None  # not reached
    with pytest.raises(ValueError, match="tile=") as caught:
        ShardedOptimizer(optimizer([torch.zeros(3)]), comm, {}, zero=True, tile=tile)
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []
