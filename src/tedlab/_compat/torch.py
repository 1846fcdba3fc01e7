"""What tedlab uses of torch's private names; what only simulations use is in ``simulation.py``.

CONTRIBUTING.md says with which releases its tests were run.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import CodeType
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn
from torch._functorch import autograd_function
from torch.distributed import _functional_collectives, distributed_c10d
from torch.distributed.checkpoint import _nested_dict, filesystem, metadata
from torch.distributed.tensor import DTensor, Placement, _utils, debug
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.nn.modules import batchnorm
from torch.optim import Optimizer
from torch.utils import _python_dispatch, _pytree

tree_map, tree_map_only = _pytree.tree_map, _pytree.tree_map_only
"""Apply a function to all leaves of nested containers, or to those of a type. torch has no public functions for it."""

TorchDispatchMode = _python_dispatch.TorchDispatchMode
"""Sees every operator below autograd; documented, and in wide use, but where its module has an underscore."""

BatchNorm = batchnorm._BatchNorm
"""The base of ``nn.BatchNorm1d`` to ``3d`` and of the lazy and synchronised ones, which have no public one."""


class PreciseBuffers(nn.Module):
    """Keeps some buffers in fp32 whatever the precision of the module becomes, for which torch has no public way."""

    def register_precise_buffer(self, name: str, values: Tensor) -> None:
        """Registers a buffer that stays in fp32."""
        self.register_buffer(name, values.float())
        self.precise = (*getattr(self, "precise", ()), name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: getattr(self, name) for name in getattr(self, "precise", ())}
        super()._apply(fn, recurse)
        for name, values in before.items():
            moved = getattr(self, name)
            if moved.dtype != values.dtype:  # the values, too: they have been rounded
                setattr(self, name, values.to(moved.device))
        return self


def storage_address(tensor: Tensor) -> int:
    """What tells storages apart that have no memory: fake ones all have the data pointer 0."""
    return address_of(tensor.untyped_storage())


def address_of(storage: torch.UntypedStorage) -> int:
    """As :func:`storage_address`, of a storage."""
    address: int = storage._cdata
    return address


# ---- process groups and meshes ---------------------------------------------------------------------------------------

functional_collectives = _functional_collectives
"""Collectives that return new tensors and that may be waited for later; documented in their module only."""

AsyncCollectiveTensor = _functional_collectives.AsyncCollectiveTensor
"""What a functional collective returns while it is under way: it has no memory that others could read."""

collective_operators = torch.ops._c10d_functional
"""The operators below functional collectives, which differ from them in nothing but the time that Python takes."""


def default_store() -> distributed.Store:
    """The store by which the processes of the default group met. No public function returns it."""
    return distributed_c10d._get_default_store()


def set_timeout(timeout: timedelta, group: distributed.ProcessGroup) -> None:
    """After how long a group's collectives fail. A mesh makes its groups without asking, with torch's 30 minutes."""
    distributed_c10d._set_pg_timeout(timeout, group)


# ---- autograd and operators ------------------------------------------------------------------------------------------

require = torch._check
"""Raises RuntimeError with a message unless a condition holds, also in a compiled program, which learns from it."""

assert_on_device = torch._assert_async
"""Ends the process when a tensor turns out to be False, without making the host wait for it."""


IS_ANY_TRUE = torch.ops.aten._is_any_true.default
"""What anomaly detection asks of every gradient, about its NaNs."""


def in_backward() -> bool:
    """Whether this thread is in a backward pass, in which recomputation is, too."""
    return torch._C._current_graph_task_id() != -1


def operator_name(operator: Any) -> str:
    """Of an operator as ``__torch_dispatch__`` gets it, with its namespace: ``aten::add``."""
    name: str = operator._schema.name
    return name


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place, by which autograd notices that what it saved is no more."""
    return tensor._version


def return_views_while_compiling() -> None:
    """Lets a compiled ``autograd.Function`` return no tensor that its forward already had.

    torch 2.11 silently compiles no gradient for a Function whose forward returns what an operation was given: a tensor
    that it wrote in place, or for which ``contiguous`` or ``to`` had nothing to do. Its results are right, and weights
    before it do not learn. Later releases compile the gradient. A Function whose own ``forward`` or ``setup_context``
    marks results as not differentiable is left as it is, because its views would be differentiable.
    """
    functions: Any = autograd_function
    helper = functions.DynamoAutogradFunctionTraceHelper
    as_torch_does, with_setup_context = helper.fwd_trace_helper, functions.autograd_function_forward_rewritten

    def viewed(out: Any) -> Any:
        return out.view_as(out) if isinstance(out, Tensor) and (out.is_floating_point() or out.is_complex()) else out

    def marks(code: CodeType) -> bool:
        return "mark_non_differentiable" in code.co_names

    def returning_views(function: Callable[..., Any]) -> Callable[..., Any]:
        def outer(*args: Any, **kwargs: Any) -> Any:
            out = function(*args, **kwargs)
            return viewed(out) if isinstance(out, Tensor) else tuple(viewed(each) for each in out)

        return outer

    def traced(forward: Callable[..., Any]) -> Callable[..., Any]:
        inner = as_torch_does(forward)
        code = inspect.unwrap(forward).__code__  # below decorators such as torch.amp.custom_fwd
        done = "original_setup_context" in code.co_freevars  # torch has put both into one function, see ``together``
        return inner if done or marks(code) else returning_views(inner)

    def together(forward: Callable[..., Any], setup_context: Callable[..., Any]) -> Callable[..., Any]:
        left = marks(setup_context.__code__)
        return with_setup_context(forward if left else returning_views(forward), setup_context)

    helper.fwd_trace_helper = staticmethod(traced)
    functions.autograd_function_forward_rewritten = together


if torch.__version__.startswith("2.11."):  # also for those who compile what uses tedlab's functions themselves
    return_views_while_compiling()


def compile_for_shapes(number: int) -> None:
    """Lets this process compile a function for so many shapes; by itself torch runs it uncompiled after eight."""
    config = torch._dynamo.config
    config.recompile_limit = max(number, config.recompile_limit)


def fused_adam(decoupled: bool) -> Callable[..., Any]:
    """The kernel below ``torch.optim.AdamW(fused=True)``, or Adam's. The optimizers themselves take no tiles."""
    return torch._fused_adamw_ if decoupled else torch._fused_adam_


def reproducible_choices() -> dict[str, bool]:
    """Options of ``torch.compile`` with which no process chooses kernels by timing them; none in old versions."""
    import torch._inductor as inductor

    return {"deterministic": True} if "deterministic" in inductor.list_options() else {}


def delay_gpu(cycles: int) -> None:
    """Keeps the current stream busy for so many cycles, while the host launches what is to be timed."""
    torch.cuda._sleep(cycles)


# ---- DTensor ---------------------------------------------------------------------------------------------------------


def local_tensor(tensor: DTensor) -> Tensor:
    """The shard itself. ``to_local`` is differentiable and takes more than twice as long: small models wait for it."""
    return tensor._local_tensor


def set_local_tensor(tensor: DTensor, values: Tensor) -> None:
    """Gives a DTensor other memory for its shard, for which there is no public way."""
    tensor._local_tensor = values


def forget_meshes() -> None:
    """Makes DTensor forget the results of operations that it remembers, and with them meshes whose groups have ended.

    An equal mesh of later groups would otherwise be taken for one of these. There is no public way.
    """
    debug._clear_sharding_prop_cache()


def spec_of(tensor: DTensor, placements: tuple[Placement, ...] | None = None) -> DTensorSpec:
    """What ``DTensor(local, spec, requires_grad=False)`` takes beside the shard, of a tensor like this one.

    ``from_local`` takes several times as long, and makes no subclass.

    Args:
        tensor: whose mesh, global shape and dtype it has.
        placements: that it has instead of the tensor's own.
    """
    spec = tensor._spec
    return spec if placements is None else DTensorSpec(tensor.device_mesh, placements, spec.tensor_meta)


shape_and_offset_of_shard = _utils.compute_local_shape_and_global_offset
"""Of a global shape, a mesh and placements: which part of the tensor this process has."""


# ---- optimizers and schedules ----------------------------------------------------------------------------------------

LAST_LEARNING_RATES = "_last_lr"
"""Where the state of a schedule has the learning rates that it set last."""

_STEP_HOOKS = {"pre": "_optimizer_step_pre_hooks", "post": "_optimizer_step_post_hooks"}


def step_hooks(optimizer: Optimizer, when: str) -> list[Callable[..., Any]]:
    """What ``register_step_pre_hook`` (``pre``) or ``register_step_post_hook`` (``post``) has registered."""
    return list(getattr(optimizer, _STEP_HOOKS[when]).values())


@contextmanager
def without_step_hooks(optimizer: Optimizer) -> Iterator[None]:
    """Within, ``step`` calls none of its hooks: who steps tile by tile calls them once."""
    hooks = {name: getattr(optimizer, name) for name in _STEP_HOOKS.values()}
    for name in hooks:
        setattr(optimizer, name, OrderedDict())
    try:
        yield
    finally:
        for name, registered in hooks.items():
            setattr(optimizer, name, registered)


# ---- checkpoints -----------------------------------------------------------------------------------------------------

flatten_state_dict, set_element = _nested_dict.flatten_state_dict, _nested_dict.set_element
"""Nested state by the dotted names that files have, and the way back for one of them."""

StorageInfo = filesystem._StorageInfo
"""Where in a file an entry of a checkpoint is."""

CHECKPOINT_CLASSES: set[type] = {
    metadata.Metadata,
    metadata.TensorStorageMetadata,
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.TensorProperties,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    filesystem._StoragePrefix,
}
"""What ``.metadata`` consists of."""

layout_by_name = torch.serialization._get_layout
"""By which a pickled ``torch.layout`` is made again; it looks a name up in a dictionary."""
