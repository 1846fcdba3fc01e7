"""What other libraries keep to themselves is used in ``tedlab._compat`` only, and still does what it is used for."""

import ast
import atexit
import importlib
import inspect
import io
import itertools
import os
import pickle
import pkgutil
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from jinja2.exceptions import SecurityError
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import tedlab
from tedlab._compat import hydra, lightning, python, simulation
from tedlab._compat import torch as compat
from tedlab.cli import CONF
from tests.pool import WorkerPool

SOURCE = Path(tedlab.__file__).parent
DOCUMENTED = {  # in Python's manual, underscore or not
    *("_asdict", "_fields", "_make", "_replace"),  # of named tuples
    *("_exit", "_current_frames"),  # of os and sys
}


# ---- nothing private outside -----------------------------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in {"_", *DOCUMENTED}


def private_uses(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of what is reached into: private attributes of anything but ``self`` and ``cls``, also by
    ``getattr`` and its like, and private names and modules that are imported, from elsewhere than ``tedlab``."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass  # its own, or inherited: see below
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super"))):
                pass
            case ast.Attribute(attr=name) if is_private(name):
                yield node.lineno, name
            case ast.ImportFrom(module=module, level=0) if not f"{module}".startswith("tedlab"):
                names = [*f"{module}".split("."), *(alias.name for alias in node.names)]
                yield from ((node.lineno, name) for name in names if is_private(name))
            case ast.Import():
                parts = [part for alias in node.names for part in alias.name.split(".")]
                yield from ((node.lineno, part) for part in parts if is_private(part))
            case ast.Call(func=ast.Name(id="getattr" | "setattr" | "hasattr" | "delattr"), args=[_, name, *_]):
                text = "".join(f"{part.value}" for part in ast.walk(name) if isinstance(part, ast.Constant))
                if is_private(text):
                    yield node.lineno, text


@pytest.mark.parametrize(
    "source",
    [
        "from torch._subclasses.fake_tensor import FakeTensor",
        "from torch.distributed import _functional_collectives",
        "import hydra._internal.utils",
        "trainer._signal_connector.register()",
        "parameter._local_tensor = values",
        "self.optimizer._hooks.clear()",
        "getattr(optimizer, '_hooks')",
        "getattr(optimizer, f'_hooks_{when}')",
    ],
)
def test_a_private_use_is_seen(source: str) -> None:
    assert list(private_uses(source))


@pytest.mark.parametrize(
    "source",
    [
        "self._own = 1",
        "super()._method()",
        "from tedlab.moe.row_ops import _helper",
        "point._replace(x=1)",
        "os._exit(1)",
        "type(x).__name__",
        "getattr(self, name)",
    ],
)
def test_what_is_ones_own_or_documented_is_none(source: str) -> None:
    assert not list(private_uses(source))


def test_nothing_outside_uses_what_other_libraries_keep_to_themselves() -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{line} {name}"
        for path in sorted(SOURCE.rglob("*.py"))
        if path.parent.name != "_compat"
        for line, name in private_uses(path.read_text())
    ]
    assert not found, f"give these a plain name in tedlab._compat, with a test here: {found}"


BY_METACLASS = {"_abc_impl", "_backward_cls"}  # in every class of those that have them


def own_private_names(kind: type) -> set[str]:
    """Private names that a class defines, and those that its methods mention."""
    names, codes = set(vars(kind)) - BY_METACLASS, []
    for value in vars(kind).values():
        for function in (value, *(getattr(value, part, None) for part in ("__func__", "fget", "fset"))):
            codes.append(getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None))
    while codes:
        code = codes.pop()
        if code is not None:
            names.update(code.co_names)
            codes.extend(constant for constant in code.co_consts if inspect.iscode(constant))
    return set(filter(is_private, names))


def classes() -> Iterator[type]:
    for found in pkgutil.walk_packages([str(SOURCE)], "tedlab."):
        if found.name.endswith("__main__") or found.name.startswith("tedlab._compat") or "kernel" in found.name:
            continue
        module = importlib.import_module(found.name)
        yield from (kind for kind in vars(module).values() if inspect.isclass(kind) and kind.__module__ == found.name)


def shared_private_names(kind: type) -> set[str]:
    """Those that a class has in common with its bases from torch and Lightning."""
    elsewhere = [base for base in kind.__mro__ if base.__module__.partition(".")[0] in ("torch", "lightning")]
    return own_private_names(kind) & {name for base in elsewhere for name in own_private_names(base)}


class _Callback(ModelCheckpoint):
    @property
    def step(self) -> int:
        return self._last_global_step_saved

    def on_train_start(self, *arguments: Any) -> None:
        self._best = 1


def test_an_inherited_private_name_is_seen() -> None:
    assert shared_private_names(_Callback) == {"_last_global_step_saved"}


def test_no_class_shares_a_private_name_with_a_base_from_elsewhere() -> None:
    """It would override what the library calls, or be overwritten: on purpose only in ``_compat``."""
    shared = {f"{kind.__module__}.{kind.__qualname__}": shared_private_names(kind) for kind in classes()}
    assert not {name: names for name, names in shared.items() if names}


# ---- torch -----------------------------------------------------------------------------------------------------------


def ask_torch(rank_0_waits: float) -> dict[str, Any]:
    """In each of two ranks: what the functions that need a process group do."""
    found: dict[str, Any] = {}
    rank = dist.get_rank()
    store = compat.default_store()
    store.set(f"compat/{rank}", f"{rank}")
    found["store"] = [store.get(f"compat/{other}").decode() for other in (0, 1)]

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "tensor"))

    group = dist.group.WORLD
    assert group is not None
    x = torch.arange(2.0) + rank
    pending = compat.functional_collectives.all_reduce(x, "sum", group)
    found["pending"] = isinstance(pending, compat.AsyncCollectiveTensor)
    found["reduced"] = compat.functional_collectives.wait_tensor(pending).tolist()
    swapped = compat.functional_collectives.all_to_all_single(x, None, None, group)
    found["swapped"] = compat.functional_collectives.wait_tensor(swapped).tolist()
    ops, name = compat.collective_operators, group.group_name
    found["scattered"] = ops.wait_tensor(ops.reduce_scatter_tensor(x, "sum", 2, name)).tolist()
    found["gathered"] = ops.wait_tensor(ops.all_gather_into_tensor(x, 2, name)).tolist()
    out = torch.zeros(4)
    ops.wait_tensor(ops.all_gather_into_tensor_out(x, 2, name, out=out))
    found["gathered into"] = out.tolist()

    whole = DTensor.from_local(torch.full((3, 2), float(rank)), mesh, [Shard(0), Replicate()], run_check=False)
    found["shard"] = compat.shape_and_offset_of_shard(whole.shape, mesh, whole.placements)
    found["local"] = compat.local_tensor(whole).data_ptr() == whole.to_local().data_ptr()
    compat.set_local_tensor(whole, torch.full((3, 2), 7.0))
    found["set"] = whole.to_local().unique().tolist()
    twin = DTensor(torch.full((3, 2), float(rank)), compat.spec_of(whole), requires_grad=False)
    found["twin"] = tuple(twin.shape), twin.placements == whole.placements, twin.full_tensor()[:, 0].tolist()
    replicated = compat.spec_of(whole, (Replicate(), Replicate()))
    found["replicated"] = DTensor(torch.ones(6, 2), replicated, requires_grad=False).placements

    alone = dist.new_group([0, 1])
    compat.set_timeout(timedelta(seconds=rank_0_waits), alone)
    if rank == 0:
        began = time.monotonic()
        try:
            dist.all_reduce(torch.ones(1), group=alone)
        except RuntimeError:
            found["waited"] = time.monotonic() - began
    return found


@pytest.fixture(scope="module")
def asked(pool: WorkerPool) -> list[dict[str, Any]]:
    return pool.run(2, ask_torch, 0.3)


def test_default_store_is_the_one_that_all_ranks_share(asked: list[dict[str, Any]]) -> None:
    assert [found["store"] for found in asked] == [["0", "1"]] * 2


def test_set_timeout_ends_a_collective_that_nobody_joins(asked: list[dict[str, Any]]) -> None:
    assert 0.2 < asked[0]["waited"] < 20


def test_functional_collectives_return_what_is_under_way(asked: list[dict[str, Any]]) -> None:
    assert asked[0]["pending"]
    assert [found["reduced"] for found in asked] == [[1.0, 3.0]] * 2
    assert [found["swapped"] for found in asked] == [[0.0, 1.0], [1.0, 2.0]]


def test_collective_operators_take_a_size_and_the_name_of_a_group(asked: list[dict[str, Any]]) -> None:
    assert [found["scattered"] for found in asked] == [[1.0], [3.0]]
    assert [found["gathered"] for found in asked] == [[0.0, 1.0, 1.0, 2.0]] * 2
    assert [found["gathered into"] for found in asked] == [[0.0, 1.0, 1.0, 2.0]] * 2


def test_a_shards_shape_and_offset(asked: list[dict[str, Any]]) -> None:
    assert [tuple(map(tuple, found["shard"])) for found in asked] == [((3, 2), (0, 0)), ((3, 2), (3, 0))]


def test_a_dtensors_shard_is_read_and_replaced_in_place(asked: list[dict[str, Any]]) -> None:
    assert asked[0]["local"]
    assert asked[0]["set"] == [7.0]


def test_a_spec_makes_a_dtensor_of_another_shard(asked: list[dict[str, Any]]) -> None:
    assert asked[0]["twin"] == ((6, 2), True, [0.0] * 3 + [1.0] * 3)
    assert asked[0]["replicated"] == (Replicate(), Replicate())


def test_tree_map_reaches_leaves_of_containers() -> None:
    assert compat.tree_map(lambda x: x + 1, {"a": [1, (2,)]}) == {"a": [2, (3,)]}
    assert compat.tree_map_only(int, lambda x: x + 1, ["a", {"b": 1}]) == ["a", {"b": 2}]


def test_a_dispatch_mode_sees_operators_by_name() -> None:
    class Names(compat.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(compat.operator_name(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    with Names():
        torch.ones(1).add_(1)
    assert seen == ["aten::ones", "aten::add_"]


def test_batch_norm_is_the_base_of_its_kinds_and_of_no_other_norm() -> None:
    assert all(
        isinstance(norm, compat.BatchNorm) for norm in (nn.BatchNorm1d(1), nn.BatchNorm3d(1), nn.SyncBatchNorm(1))
    )
    assert not isinstance(nn.LayerNorm(1), compat.BatchNorm)


def test_precise_buffers_stay_in_fp32_whatever_the_module_becomes() -> None:
    class Module(compat.PreciseBuffers):
        def __init__(self) -> None:
            super().__init__()
            self.register_precise_buffer("values", torch.tensor([1.001]))
            self.register_buffer("others", torch.tensor([1.001]))

    module = Module()
    for change in (module.bfloat16, module.half, module.double):
        change()
        assert module.values.dtype is torch.float32
        assert torch.equal(module.values, torch.tensor([1.001]))
        assert module.others.dtype is not torch.float32
    assert module.to("meta").values.is_meta
    assert list(module.state_dict()) == ["values", "others"]


def test_require_raises_with_its_message() -> None:
    compat.require(True, lambda: "never made")
    with pytest.raises(RuntimeError, match="four words of it"):
        compat.require(False, lambda: "four words of it")


def test_assert_on_device_raises_with_its_message() -> None:
    compat.assert_on_device(torch.tensor(True), "nothing")
    with pytest.raises(RuntimeError, match="what is wrong"):
        compat.assert_on_device(torch.tensor(False), "what is wrong")


@pytest.mark.slow
def test_processes_can_be_kept_from_choosing_kernels_by_their_own_timing() -> None:
    options = compat.reproducible_choices()
    assert options == {"deterministic": True}  # since torch 2.11 at the latest

    @partial(torch.compile, options=options)
    def mean(x: Tensor) -> Tensor:
        return x.mean()

    assert mean(torch.arange(4.0)) == 1.5


def test_in_backward_is_true_in_hooks_of_the_backward_pass_only() -> None:
    x, seen = torch.ones(1, requires_grad=True), []
    x.register_hook(lambda gradient: seen.append(compat.in_backward()))
    loss = (2 * x).sum()
    assert not compat.in_backward()
    loss.backward()
    assert seen == [True]
    assert not compat.in_backward()


def test_version_counts_changes_in_place() -> None:
    x = torch.ones(2)
    before = compat.version(x)
    x.add_(1)
    assert compat.version(x) == before + 1


@pytest.mark.parametrize("decoupled", [True, False])
def test_fused_adam_takes_one_step_of_torchs_optimizer(decoupled: bool) -> None:
    values, gradient = torch.linspace(-1, 1, 5), torch.linspace(2, -3, 5)
    parameter = nn.Parameter(values.clone())
    parameter.grad = gradient.clone()
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    kind([parameter], lr=0.1, weight_decay=0.2).step()
    moments = torch.zeros(5), torch.zeros(5)
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.2, "eps": 1e-8}
    kernel = compat.fused_adam(decoupled)
    kernel(
        [values], [gradient], [moments[0]], [moments[1]], [], [torch.tensor(1.0)],
        **options, amsgrad=False, maximize=False,
    )  # fmt: skip
    torch.testing.assert_close(values, parameter.detach())


RETURNED: dict[str, Callable[[Tensor], Tensor]] = {
    "a new tensor": lambda x: 2 * x,
    "written in place": lambda x: (2 * x).masked_fill_(x < 0, 0.0),
    "scattered into": lambda x: torch.zeros_like(x).scatter_(0, torch.zeros_like(x, dtype=torch.int64), x),
    "contiguous as it was": lambda x: x.narrow(0, 0, 2).contiguous(),
    "of the right dtype": lambda x: (2 * x).to(x.dtype),
    "flattened to itself": lambda x: (2 * x).flatten(0, 0),
    "its input": lambda x: x,
    "a view": lambda x: x[:2],
}


def gradients_of(returned: Callable[[Tensor], Tensor], compiled: Callable[..., Callable[..., Tensor]]) -> list[Tensor]:
    class Tripled(torch.autograd.Function):  # its gradient is no derivative, so that nothing else could compute it
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
            out = returned(x)
            ctx.save_for_backward(out)
            ctx.rows = len(x)
            return out, x.argmax(-1)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            (out,) = ctx.saved_tensors
            return torch.cat([grads[0] + out] * 3)[: ctx.rows]

    def f(x: Tensor, w: Tensor) -> Tensor:
        out, largest = Tripled.apply(x @ w)
        return (out * out).sum() + largest.sum()

    torch.compiler.reset()
    x, w = (torch.linspace(-1, 2, n * 4).view(n, 4).requires_grad_() for n in (3, 4))
    compiled(f)(x, w).backward()
    return [x.grad, w.grad]  # type: ignore[list-item]


@pytest.fixture(params=[False, True], ids=["as torch does", "viewed"])
def viewed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch 2.11 many functions would have no gradient, so there all return views; later, these change nothing."""
    helper, functions = compat.autograd_function.DynamoAutogradFunctionTraceHelper, compat.autograd_function
    monkeypatch.setattr(helper, "fwd_trace_helper", staticmethod(helper.fwd_trace_helper))  # afterwards it is as before
    rewritten = "autograd_function_forward_rewritten"
    monkeypatch.setattr(functions, rewritten, getattr(functions, rewritten))
    if request.param:
        compat.return_views_while_compiling()


def compiled_whole(f: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(f, backend="aot_eager", fullgraph=True)


@pytest.mark.usefixtures("viewed")
@pytest.mark.parametrize("returned", RETURNED.values(), ids=list(RETURNED))
def test_functions_keep_their_gradients_when_they_are_compiled(returned: Callable[[Tensor], Tensor]) -> None:
    right, found = gradients_of(returned, lambda f: f), gradients_of(returned, compiled_whole)
    assert all(gradient.abs().sum() > 1 for gradient in right)
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)


class Marked(torch.autograd.Function):
    """The gradient of what is marked would be seen: it is added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        out, floor = 2 * x, x.floor()
        ctx.mark_non_differentiable(floor)
        return out, floor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * grads[0] + grads[1]


class MarkedLater(Marked):
    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return 2 * x, x.floor()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])


class RememberedLater(Marked):
    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return (2 * x).masked_fill_(x < 0, 0.0), x.floor()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * grads[0] + grads[1] + ctx.saved_tensors[0]


@pytest.mark.usefixtures("viewed")
@pytest.mark.parametrize("function", [Marked, MarkedLater, RememberedLater])
def test_marks_and_contexts_of_functions_mean_the_same_when_they_are_compiled(
    function: type[torch.autograd.Function],
) -> None:
    def f(x: Tensor) -> tuple[Tensor, bool]:
        out, floor = function.apply(x * 1)
        return (out * floor + floor * floor).sum(), floor.requires_grad

    found = []
    for each in (f, compiled_whole(f)):
        x = torch.linspace(-1, 2, 6).requires_grad_()
        loss, differentiable = each(x)
        loss.backward()
        found.append((x.grad, differentiable == (function is RememberedLater)))
    torch.testing.assert_close(*found)
    assert found[0][1]


def test_a_function_is_compiled_for_as_many_shapes_as_are_asked_for() -> None:
    made = []

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    compat.compile_for_shapes(16)
    compiled = torch.compile(lambda x: 2 * x, dynamic=False, backend=backend)
    for size in range(1, 13):
        assert compiled(torch.ones(size)).sum() == 2 * size
    assert len(made) == 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_delay_gpu_keeps_it_busy() -> None:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    compat.delay_gpu(10_000_000)
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) > 1


def test_is_any_true_is_what_anomaly_detection_asks() -> None:
    assert compat.IS_ANY_TRUE(torch.tensor([False, True]))

    class Names(compat.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func)
            return func(*args, **(kwargs or {}))

    seen: set[Any] = set()
    with torch.autograd.set_detect_anomaly(True), Names():
        (torch.ones(1, requires_grad=True) * 2).sum().backward()
    assert compat.IS_ANY_TRUE in seen


def test_step_hooks_are_found_and_left_out() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    called: list[str] = []
    before = optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    optimizer.register_step_post_hook(lambda *_: called.append("post"))
    assert [len(compat.step_hooks(optimizer, when)) for when in ("pre", "post")] == [1, 1]
    with compat.without_step_hooks(optimizer):
        optimizer.step()
        assert called == []
    optimizer.step()
    assert called == ["pre", "post"]
    before.remove()
    assert compat.step_hooks(optimizer, "pre") == []


def test_a_schedules_state_has_its_last_learning_rates() -> None:
    schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), lambda _: 0.5)
    assert schedule.state_dict()[compat.LAST_LEARNING_RATES] == [0.05]


def test_state_is_flattened_to_dotted_names_and_set_by_them() -> None:
    flat, places = compat.flatten_state_dict({"a": {"b": torch.ones(1), "c": 2}})
    assert set(flat) == {"a.b", "a.c"}
    nested: dict[str, Any] = {}
    compat.set_element(nested, places["a.c"], 3)
    assert nested == {"a": {"c": 3}}


def test_a_checkpoints_metadata_consists_of_the_classes_and_the_layout(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(2), "b": [1]}, checkpoint_id=tmp_path)
    asked_for: set[Any] = set()

    class Reader(python.PythonUnpickler):
        def find_class(self, module: str, name: str) -> Any:
            found = super().find_class(module, name)
            asked_for.add(found)
            return found

    metadata = Reader(io.BytesIO((tmp_path / ".metadata").read_bytes())).load()
    assert all(isinstance(place, compat.StorageInfo) for place in metadata.storage_data.values())
    others = {torch.Size, torch.serialization._get_layout, type(tmp_path), getattr}  # of early releases of Python 3.11
    assert {kind for kind in asked_for if not isinstance(kind, torch.dtype)} <= compat.CHECKPOINT_CLASSES | others
    assert compat.layout_by_name("torch.strided") is torch.strided


# ---- simulations -----------------------------------------------------------------------------------------------------


def test_fake_tensors_have_a_shape_but_no_memory() -> None:
    with simulation.FakeTensorMode():
        a, b = torch.empty(1 << 40), torch.empty(3)
    assert isinstance(a, simulation.FakeTensor)
    assert (a + a).shape == (1 << 40,)
    assert compat.storage_address(a) != compat.storage_address(b)
    assert compat.storage_address(a) == compat.storage_address(a[:5])


def answers_nothing() -> bool:
    dist.init_process_group("fake", rank=2, world_size=1000, store=simulation.FakeStore())
    x = torch.ones(1)
    dist.all_reduce(x)
    world = dist.get_world_size()
    dist.destroy_process_group()
    return world == 1000


def threads_reduce() -> list[float]:
    """In one process: what two threads that are ranks sum up."""
    from concurrent.futures import ThreadPoolExecutor

    store = dist.HashStore()

    def rank_of(rank: int) -> float:
        dist.init_process_group("threaded", rank=rank, world_size=2, store=store)
        x = torch.tensor([float(rank + 1)])
        dist.all_reduce(x)
        dist.destroy_process_group()
        return x.item()

    simulation.make_ranks_of_threads()
    try:
        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(rank_of, range(2)))
    finally:
        simulation.make_ranks_of_processes()


def in_place_of_the_pools_group(ask: Callable[[], Any]) -> Any:
    dist.destroy_process_group()
    answer = ask()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # which the pool takes down
    return answer


def test_the_fake_group_of_simulations_answers_nothing(pool: WorkerPool) -> None:
    assert pool.run(1, in_place_of_the_pools_group, answers_nothing) == [True]


@pytest.mark.skipif(torch.__version__ < "2.13", reason="simulations refuse threads before")
def test_the_threaded_group_of_simulations_copies_between_threads(pool: WorkerPool) -> None:
    assert hasattr(simulation.ThreadedGroup, "exception_handle")
    assert pool.run(1, in_place_of_the_pools_group, threads_reduce) == [[3.0, 3.0]]


def test_an_operator_has_a_packet_and_argument_names() -> None:
    operator = torch.ops.aten.add.Tensor
    assert isinstance(operator, simulation.Operator)
    assert simulation.packet_of(operator) is torch.ops.aten.add
    assert simulation.argument_names(operator) == ["self", "other", "alpha"]


def test_operators_with_underscores_are_what_public_functions_call() -> None:
    class Packets(compat.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(simulation.packet_of(func))
            return func(*args, **(kwargs or {}))

    seen: set[Any] = set()
    with Packets():
        x = torch.ones(1, 1, 4, 8, requires_grad=True)
        attended = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        (attended.softmax(-1) + attended.log_softmax(-1)).sum().backward()
        x.sum().item()
        torch.ones(2, 3, 4) @ torch.ones(4, 5)
    assert seen >= simulation.SOFTMAXES
    assert {simulation.CPU_ATTENTION, simulation.CPU_ATTENTION_BACKWARD, simulation.READ_SCALAR} <= seen
    assert simulation.UNSAFE_VIEW in seen
    for attention in (simulation.CPU_ATTENTION, simulation.CPU_ATTENTION_BACKWARD, *simulation.GPU_ATTENTIONS):
        assert "is_causal" in simulation.argument_names(attention.default)


# ---- Lightning -------------------------------------------------------------------------------------------------------


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, default_root_dir=tmp_path)


def meshes_in_new_groups() -> list[DeviceMesh]:
    """That of a tensor, and that of an operation's result."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
        x = DTensor.from_local(torch.ones(7, 5), mesh, [Replicate(), Replicate()], run_check=False)
        return [x.device_mesh, x.detach().device_mesh]
    finally:
        dist.destroy_process_group()


def test_meshes_of_groups_that_have_ended_are_forgotten() -> None:
    _, first = meshes_in_new_groups()
    own, remembered = meshes_in_new_groups()
    assert remembered is first is not own
    compat.forget_meshes()
    own, remembered = meshes_in_new_groups()
    assert remembered is own


def test_the_training_loop_and_signals_are_told_by_the_names_replaced(trainer: Trainer) -> None:
    lightning.leave_out_sigterm_broadcast(trainer)
    lightning.leave_signals_alone(trainer)
    # Of whole modules: for a class alone Python 3.11 parses its file, and has failed to (a SystemError of its parser).
    loop = inspect.getsource(importlib.import_module(type(trainer.fit_loop.epoch_loop).__module__))
    assert "self._broadcast_sigterm_tensor()" in loop
    assert "_signal_connector.register_signal_handlers()" in inspect.getsource(
        importlib.import_module("lightning.pytorch.trainer.trainer")
    )
    assert "_broadcast_sigterm_tensor" in vars(trainer.fit_loop.epoch_loop)
    assert lightning.BATCHES_THAT_STEPPED in trainer.fit_loop.epoch_loop.on_save_checkpoint()


def test_of_lightnings_signal_handlers_that_of_sigterm_is_left_out(trainer: Trainer, monkeypatch: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    trainer._signal_connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) is not before
    trainer._signal_connector.teardown()
    lightning.leave_sigterm_alone(trainer)
    trainer._signal_connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) is before
    trainer._signal_connector.teardown()


def test_trainer_of_a_module_is_none_before_it_has_one(trainer: Trainer) -> None:
    module = LightningModule()
    assert lightning.trainer_of(module) is None
    module.trainer = trainer
    assert lightning.trainer_of(module) is trainer


@pytest.mark.parametrize("given", [True, False])
def test_a_trainer_knows_whether_it_detects_anomalies(given: bool) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, detect_anomaly=given)
    assert lightning.detects_anomalies(trainer) is given


def test_a_strategy_knows_its_plugins_and_wrapped_optimizers(tmp_path: Path) -> None:
    from lightning.pytorch.plugins.io import TorchCheckpointIO
    from lightning.pytorch.strategies import DDPStrategy

    plain, full = DDPStrategy(), DDPStrategy(checkpoint_io=TorchCheckpointIO())
    assert lightning.given_checkpoint_io(plain) is None
    assert isinstance(lightning.given_checkpoint_io(full), TorchCheckpointIO)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", sync_batchnorm=True, logger=False, enable_checkpointing=False
    )
    assert lightning.synchronises_batch_norm(trainer.strategy)
    assert not lightning.synchronises_batch_norm(plain)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    plain.optimizers = [optimizer]
    (wrapper,) = lightning.wrapped_optimizers(plain)
    assert wrapper.optimizer is optimizer


def test_processes_are_started_as_for_ddp_unless_something_else_starts_them() -> None:
    from tedlab.predict.sim.world import OneOfMany

    options: dict[str, Any] = {"accelerator": "cpu", "strategy": "ted", "logger": False, "enable_checkpointing": False}
    started = Trainer(**options, devices=2).strategy
    assert isinstance(started, lightning.SubprocessStrategy)
    assert started.num_processes == 2
    assert started.launcher is not None
    assert Trainer(**options, devices=1, num_nodes=2, plugins=[OneOfMany(2, 0)]).strategy.launcher is None


def test_what_lightnings_own_strategies_call(pool: WorkerPool) -> None:
    assert lightning.backend_for(torch.device("cpu")) == "gloo"
    x = torch.ones(1)
    assert lightning.reduce_in_group(x, None, reduce_op="sum") is x  # no group: as it is
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    optimizer.param_groups[0]["params"][0].sum().backward()
    optimizer.step()
    lightning.optimizers_to_device([optimizer], torch.device("cpu"))
    parameters = inspect.signature(lightning.init_process_group).parameters
    assert {"cluster_environment", "torch_distributed_backend"} <= set(parameters)


def test_random_states_go_back() -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    states = lightning.random_states(include_cuda=False)
    first = draw()
    assert draw() != first
    lightning.set_random_states(states)
    assert draw() == first


def test_a_checkpoint_callback_saves_now_and_links_through_a_function(tmp_path: Path) -> None:
    links: list[tuple[str, str]] = []
    callback = ModelCheckpoint(tmp_path, save_last="link", filename="now")
    lightning.link_through(callback, lambda trainer, file, link: links.append((Path(file).name, Path(link).name)))

    class Now(BoringModel):
        def on_train_batch_end(self, *arguments: Any) -> None:
            if self.trainer.global_step == 1:
                lightning.count_as_saved(callback, 1)
                lightning.save_now(callback, self.trainer)  # nothing: it is saved
                assert not (tmp_path / "now.ckpt").exists()
            else:
                lightning.save_now(callback, self.trainer)
                assert (tmp_path / "now.ckpt").exists()

    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(Now())
    assert ("now.ckpt", "last.ckpt") in links


def test_weight_averaging_takes_the_given_copy() -> None:
    callback, module = StochasticWeightAveraging(swa_lrs=0.1), LightningModule()
    lightning.set_average_model(callback, module)
    assert "update_parameters(self._average_model" in inspect.getsource(StochasticWeightAveraging)


def test_lightning_accumulates_over_the_remainder_by_the_number_of_micro_batches() -> None:
    number = lightning.MicroBatches(3, first=4)
    assert [batch % number for batch in range(4, 9)] == [0, 1, 2, 0, 1]
    assert (number, 6 / number) == (3, 2.0)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.accumulate_grad_batches = number
    loop = trainer.fit_loop.epoch_loop
    for ready, ended in ((5, False), (7, True)):
        loop.batch_progress.current.ready = ready
        assert loop._accumulated_batches_reached() == ended
    assert "batch_idx % self.trainer.accumulate_grad_batches == 0" in inspect.getsource(
        type(loop.automatic_optimization)
    )


def test_the_users_sampler_is_inside_lightnings() -> None:
    from lightning.fabric.utilities.distributed import DistributedSamplerWrapper

    sampler = torch.utils.data.SequentialSampler(range(4))
    assert lightning.sampler_inside(DistributedSamplerWrapper(sampler, num_replicas=2, rank=0)) is sampler


def test_a_wandb_logger_has_not_started_and_has_an_argument_too_many(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    assert not lightning.has_started(logger)
    lightning.forget_anonymous(logger)
    assert "anonymous" not in logger._wandb_init
    assert logger._wandb_init["dir"] is not None  # it is still what is given to wandb.init


# ---- Hydra, OmegaConf, Python ----------------------------------------------------------------------------------------


def test_hydras_parser_tells_flags_from_overrides() -> None:
    found = hydra.arguments_parser(pytest.fail).parse_args(["--cfg", "job", "a=1", "--multirun"])
    assert (found.cfg, found.overrides, found.multirun) == ("job", ["a=1"], True)
    assert {"config_dir", "config_path", "config_name", "help", "hydra_help", "info"} <= set(vars(found))


def test_options_of_groups_are_those_that_hydra_lists(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "of_ones_own.yaml").touch()
    places = [f"hydra.searchpath=[file://{tmp_path}]"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        listed = hydra.group_options(loader, "train", places)
        for group, kind in itertools.product(
            ("model", "moe", "logger", "hydra"), (ObjectType.CONFIG, ObjectType.GROUP)
        ):
            assert listed(group, kind) == loader.get_group_options(group, kind, "train", places), group
    assert {"of_ones_own", "gpt_tiny"} < {*listed("model", ObjectType.CONFIG)}


def test_hydra_composes_the_translation_of_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = hydra.ConfigLoaderImpl
    monkeypatch.setattr(loader, "_load_single_config", loader._load_single_config)  # is put back after this test
    (tmp_path / "group").mkdir()
    (tmp_path / "group" / "option.yaml").write_text("x: ${y}\n")
    (tmp_path / "main.yaml").write_text("defaults: [_self_, {group: option}]\ny: 2\n")
    seen = []

    def translate(path: str, content: dict) -> dict:
        seen.append((path, content))
        return {"group": {"z": content["group"]["x"]}} if "group" in content else content

    hydra.translate_files(translate)
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert compose("main") == {"group": {"z": 2}, "y": 2}
    assert (f"file://{tmp_path}", {"group": {"x": "${y}"}}) in seen


def test_omegaconfs_yaml_knows_9e9_and_no_key_twice() -> None:
    assert yaml.load("a: 9e9", Loader=hydra.yaml_loader()) == {"a": 9e9}
    with pytest.raises(yaml.constructor.ConstructorError, match="duplicate"):
        yaml.load("a: 1\na: 2", Loader=hydra.yaml_loader())


def test_the_harness_renders_in_a_sandbox_and_asks_before_it_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api import task
    from lm_eval.tasks import TaskManager, _yaml_loader
    from lm_eval.utils import apply_template

    from tedlab._compat import lm_eval

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"refused: {name}")

    lm_eval.sandbox_templates()
    assert apply_template("{{ a.upper() }}{{ a | regex_replace('x', 'y') }}", {"a": "x"}) == "Xy"
    with pytest.raises(SecurityError):
        apply_template("{{ a.__class__.__mro__ }}", {"a": "x"})
    (tmp_path / "x.yaml").write_text("task: x\nprocess_docs: !function os.getcwd\n")
    with pytest.raises(ValueError, match=r"refused: os\.getcwd"), lm_eval.without_functions(refuse):
        TaskManager(include_path=f"{tmp_path}", include_defaults=False).load(["x"])
    monkeypatch.setattr(_yaml_loader, "_Base", yaml.FullLoader)
    (tmp_path / "x.yaml").write_text("task: x\nprocess_docs: !!python/name:os.getcwd\n")
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"), lm_eval.without_functions(refuse):
        TaskManager(include_defaults=False).load([f"{tmp_path / 'x.yaml'}"])
    with lm_eval.without_unknown_metrics(refuse):
        assert task.get_metric("acc")
        with pytest.raises(ValueError, match="refused: of_ones_own"):
            task.get_metric("of_ones_own")
        with pytest.raises(ValueError, match="refused: acc"):
            task.get_metric("acc", True)


def test_exit_functions_run_at_once() -> None:
    """In a process of its own: they would all run."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        atexit._clear()
        atexit.register(os.write, write, b"ran")
        python.run_exit_functions()
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with open(read, "rb") as file:
        assert file.read() == b"ran"


@pytest.mark.parametrize(("length", "there"), [(71, True), (72, False), (120, False)])
def test_sockets_are_elsewhere_where_the_path_of_temporary_files_is_too_long(length: int, there: bool) -> None:
    code = "import python, tempfile; from multiprocessing.connection import Listener; "
    code += "python.shorten_paths_of_sockets(); print(tempfile.gettempdir(), Listener(family='AF_UNIX').address)"
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        shutil.copy(python.__file__, short)  # alone, without all that importing tedlab takes
        folder = os.path.join(short, "x" * (length - len(short) - 1))
        os.mkdir(folder)
        command, environment = [sys.executable, "-c", code], os.environ | {"TMPDIR": folder}
        done = subprocess.run(command, cwd=short, env=environment, capture_output=True, text=True, check=True)
        found = done.stdout.split()
    assert found[0] == folder
    assert found[1].startswith(folder) == there


def test_where_no_folder_is_usable_the_error_comes_where_a_socket_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise FileNotFoundError

    monkeypatch.setattr(tempfile, "gettempdir", refuse)
    python.shorten_paths_of_sockets()


def test_an_instruction_of_the_unpickler_can_be_replaced() -> None:
    class Reader(python.PythonUnpickler):
        def build(self) -> None:
            refused.append(self.stack[-2])
            self.stack.pop()

        dispatch = {**python.PythonUnpickler.dispatch, pickle.BUILD[0]: build}

    refused: list[Any] = []
    made = Reader(io.BytesIO(pickle.dumps(SimpleNamespace(a=1)))).load()
    assert refused == [made]
    assert made == SimpleNamespace()
