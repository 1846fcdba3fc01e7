"""Computes what one operation costs: arithmetic or memory traffic, whichever takes longer (Williams et al., 2009).

A cluster's ``kernels`` say how far a machine is from that: every kind of kernel has a latency, and those that compute
have a bandwidth. With latency L and peak R, a product of F FLOPs runs at R·F / (F + L·R): half the peak at F = L·R.
Where the cluster has a table of a kernel by size (``kernels.tables``), that replaces the peak, and a call takes L at
least.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from tedlab._compat.simulation import (
    CPU_ATTENTION,
    CPU_ATTENTION_BACKWARD,
    GPU_ATTENTIONS,
    READ_SCALAR,
    SOFTMAXES,
    TO_COPY,
    UNSAFE_VIEW,
    Operator,
    argument_names,
    packet_of,
)
from tedlab._compat.torch import storage_address
from tedlab.nn.attend import OPERATIONS
from tedlab.predict.cluster import ClusterConfig, seconds_through
from tedlab.spec import Kernel, Work

aten = torch.ops.aten
_FREE = {  # these allocate memory or view it differently, but neither read nor write it
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    UNSAFE_VIEW,
    READ_SCALAR,
}
_NOT_READ = {  # these do not read their first argument, which is overwritten or gives a shape
    aten.copy_,
    aten.fill_,
    aten.zero_,
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
}
_LOOKUPS = {aten.embedding, aten.gather, aten.index, aten.index_select}  # these read some of their first argument
_SCATTERS = {aten.scatter_, aten.scatter_add_, aten.index_put_, aten.index_add_}  # these read and write some of it
_BY_INDEX = {aten.scatter, aten.scatter_add, aten.index_put, aten.index_add, aten.embedding_dense_backward}
_ATTENTIONS = {CPU_ATTENTION, CPU_ATTENTION_BACKWARD, *GPU_ATTENTIONS, *OPERATIONS}
_ARITHMETIC = {  # these compute so much for each element that memory need not be the limit
    aten.native_layer_norm,
    aten.native_layer_norm_backward,
    aten.gelu,
    aten.gelu_backward,
    *SOFTMAXES,
    aten.exp,
    aten.exp_,
}
_NORMS = {aten.native_layer_norm: "norm", aten.native_layer_norm_backward: "norm_backward"}
_OWN = {aten.topk: "topk", aten.scatter_add_: "scatter_add"}
_MAPPED = 32 * 2**20  # from this size on, glibc requests pages from the system and returns them every time
_PEAKS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


def work_of(func: Operator, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Work | None:
    """Returns the work of a call of an aten operation, or None for one that does no work, such as a view.

    The work of a functional collective is only the allocation of its result; the rest is not done by a kernel.
    """
    packet = packet_of(func)
    operands, results = list(tensors_in(args)), list(tensors_in((out,)))
    known = {storage_address(operand) for operand in operands}
    sizes = [touched_bytes(result) for result in results if storage_address(result) not in known]
    fresh = sum(size for size in sizes if size >= _MAPPED)
    if func.namespace == "_c10d_functional" and fresh and "out" not in kwargs:
        return Work(0.0, 0.0, results[0].dtype, "movement", fresh)
    elsewhere = func.namespace != "aten" and packet not in OPERATIONS
    if elsewhere or func.is_view or packet in _FREE or not results:
        return None
    written = sum(map(touched_bytes, results))
    if packet in _LOOKUPS:
        moved = 2 * written + sum(map(touched_bytes, operands[1:]))
    elif packet in _SCATTERS:
        moved = 3 * sum(map(touched_bytes, operands[1:]))
    else:
        moved = written + sum(map(touched_bytes, operands[1:] if packet in _NOT_READ else operands))
    first = operands[0] if operands else results[0]
    flops = _flops(func, args, kwargs, out)
    kind: Literal["gemm", "attention", "arithmetic", "movement"] = "gemm" if flops else "movement"
    if packet in _ATTENTIONS:
        kind = "attention"
    elif packet in _ARITHMETIC:
        kind = "arithmetic"
    kernel = _kernel(func, args, kwargs, results)
    if kernel is None and kind == "movement" and packet not in _LOOKUPS | _SCATTERS | _BY_INDEX | _NOT_READ:
        kernel = _elementwise(packet, operands, results)
    return Work(flops, moved, first.dtype, kind, fresh, kernel)


def seconds(work: Work, cluster: ClusterConfig) -> float:
    """Returns the seconds that work takes: the longer of arithmetic and memory, each at its efficiency and latency."""
    kernels, efficiency = cluster.kernels, cluster.efficiency
    dtype = _PEAKS.get(work.dtype, "fp32")
    peak: float = getattr(cluster.peak_flops, dtype)
    table = None if work.kernel is None else kernels.table(work.kernel.name, work.kernel.width, dtype)
    mapping = work.fresh / kernels.fresh_bandwidth if kernels.fresh_bandwidth else 0.0
    size = None if work.kernel is None else work.kernel.size
    if table is not None and size is None:
        return cluster.slower.kernels * (mapping + seconds_through(table.rates, kernels.memory_latency, work.bytes))
    computing = 0.0
    if work.kind in ("gemm", "attention"):
        least, share = kernels.gemm_latency, efficiency.gemm
        if work.kind == "attention":
            least, share = kernels.attention_latency, efficiency.attention or efficiency.gemm
        if table is not None and size is not None:
            computing = max(least, work.flops * table.seconds_per_flop(size))
        else:
            computing = least + work.flops / (peak * share)
    latency, bandwidth = kernels.memory_latency, cluster.memory_bandwidth * efficiency.memory
    if work.kind == "arithmetic":
        latency = latency if kernels.arithmetic_latency is None else kernels.arithmetic_latency
        bandwidth = kernels.arithmetic_bandwidth or bandwidth
    return cluster.slower.kernels * (mapping + max(computing, latency + work.bytes / bandwidth))


def _kernel(func: Operator, args: Sequence[Any], kwargs: Mapping[str, Any], results: Sequence[Tensor]) -> Kernel | None:
    """Returns the kernel of a call if a cluster may have a table of it, see :data:`tedlab.predict.cluster.KERNELS`."""
    packet = packet_of(func)
    if packet in (CPU_ATTENTION, CPU_ATTENTION_BACKWARD):
        backward = packet is CPU_ATTENTION_BACKWARD
        q, k = args[1:3] if backward else args[:2]
        if _causal(func, args, kwargs) == 1.0 or q.shape[-2] != k.shape[-2]:
            return None
        return Kernel("attention_backward" if backward else "attention", k.shape[-2], q.shape[-1])
    if packet in _NORMS:
        return Kernel(_NORMS[packet])
    if packet in (aten.copy_, TO_COPY):
        source, made = args[1 if packet is aten.copy_ else 0], results[0]
        if source.dtype.is_floating_point and made.dtype.is_floating_point and source.itemsize != made.itemsize:
            return Kernel("narrowing" if source.itemsize > made.itemsize else "widening")
    return Kernel(_OWN[packet]) if packet in _OWN else None


def _elementwise(packet: Any, operands: Sequence[Tensor], results: Sequence[Tensor]) -> Kernel | None:
    """Returns the kernel of an operation on elements that torch does not do several of at once; None: of any other.

    See ``aten/src/ATen/native/cuda/CUDALoops.cuh``: those all of whose operands are contiguous are.
    """
    large = [operand for operand in operands if operand.dim()]
    if not large or max(operand.numel() for operand in large) > results[0].numel():  # a reduction
        return None
    if packet is aten.cat:  # its copies go into parts of rows
        return Kernel("strided") if any(operand.shape[0] == results[0].shape[0] for operand in large) else None
    if all(operand.is_contiguous() and operand.shape == results[0].shape for operand in large):
        return None
    dtypes = {operand.dtype for operand in large if operand.dtype.is_floating_point}
    return Kernel("promoted" if len(dtypes) > 1 else "strided")


def _flops(func: Operator, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> float:
    packet = packet_of(func)
    if packet is CPU_ATTENTION:
        return sdpa_flop_count(*_with_heads_of_queries(*args[:3])) * _causal(func, args, kwargs)
    if packet is CPU_ATTENTION_BACKWARD:
        shapes = args[0].shape, *_with_heads_of_queries(*args[1:4])
        return sdpa_backward_flop_count(*shapes) * _causal(func, args, kwargs)
    count = flop_registry.get(packet)
    return 0.0 if count is None else float(count(*args, **kwargs, out_val=out))


def _with_heads_of_queries(q: Tensor, k: Tensor, v: Tensor) -> tuple[torch.Size, ...]:
    """Returns the shapes as if no heads shared keys, which is the same work; torch 2.11 counts nothing else."""
    return q.shape, *(x.shape[:1] + q.shape[1:2] + x.shape[2:] for x in (k, v))


def _causal(func: Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    place = argument_names(func).index("is_causal")
    causal = args[place] if place < len(args) else kwargs.get("is_causal", False)
    return 0.5 if causal else 1.0


def tensors_in(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def touched_bytes(tensor: Tensor) -> int:
    """Returns the bytes of the memory behind a tensor: an expanded tensor is read once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())
