"""What simulations use of torch's private names: tensors without values, and process groups that are none."""

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses import fake_tensor
from torch.testing._internal.distributed import fake_pg, multi_threaded_pg

aten = torch.ops.aten

FakeTensor, FakeTensorMode = fake_tensor.FakeTensor, fake_tensor.FakeTensorMode
"""Tensors with a shape, a dtype and a device, but no memory; within the mode all new ones are such."""

FakeStore = fake_pg.FakeStore
"""With it ``init_process_group("fake")`` makes one rank of a world of any size, whose collectives do nothing."""

ThreadedGroup = multi_threaded_pg.ProcessLocalGroup
"""What the ranks of a threaded world share: ``exception_handle`` ends those who wait, ``reset`` forgets the world."""

Operator = OpOverload
"""An operator as ``__torch_dispatch__`` gets it."""


def make_ranks_of_threads() -> None:
    """From now on each thread may be a rank, of a group of the backend ``threaded``; torch tests itself like this."""
    torch._C._distributed_c10d._set_thread_isolation_mode(True)  # type: ignore[attr-defined]
    multi_threaded_pg._install_threaded_pg()


def make_ranks_of_processes() -> None:
    """Undoes :func:`make_ranks_of_threads`."""
    multi_threaded_pg._uninstall_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(False)  # type: ignore[attr-defined]
    multi_threaded_pg.ProcessLocalGroup.reset()


def packet_of(operator: Operator) -> OpOverloadPacket:
    """The operator without its overload: ``aten.add`` of ``aten.add.Tensor``."""
    return operator._overloadpacket


def argument_names(operator: Operator) -> list[str]:
    """In the order of positional arguments."""
    return [argument.name for argument in operator._schema.arguments]


# ---- operators whose own names begin with an underscore --------------------------------------------------------------
# They are what public functions call (torch.softmax, Tensor.item), and what a dispatch mode sees.

READ_SCALAR, UNSAFE_VIEW, TO_COPY = aten._local_scalar_dense, aten._unsafe_view, aten._to_copy
SOFTMAXES = {aten._softmax, aten._softmax_backward_data, aten._log_softmax, aten._log_softmax_backward_data}
CPU_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
GPU_ATTENTIONS = {aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_flash_attention_backward}
