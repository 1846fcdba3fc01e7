"""Provides the world of a simulated rank: a process group without peers, and a strategy that makes tensors fake."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn
from typing_extensions import override

from tedlab._compat.simulation import FakeStore, FakeTensorMode
from tedlab.comm import SlotAgreement
from tedlab.models.wrap import compiling
from tedlab.moe.grouped import one_by_one
from tedlab.moe.precise import tensor_cores
from tedlab.moe.products import standing_in
from tedlab.nn.ids import unchecked
from tedlab.nn.loss import compiling_loss
from tedlab.nn.norm import gpu_norms
from tedlab.predict.sim.fusion import CompiledBlock, compiled
from tedlab.predict.sim.meter import Meter
from tedlab.predict.sim.norm import FusedNorm
from tedlab.predict.sim.row_ops import FusedRowOps
from tedlab.strategy import TEDStrategy
from tedlab.strategy.interleave import DeferredBackward
from tedlab.topology import Topology


@contextmanager
def fake_process_group(world_size: int, rank: int) -> Iterator[None]:
    """Makes this process one of ``world_size`` ranks. Collectives return at once, and their results have no values.

    Raises:
        RuntimeError: If there is a process group already.
    """
    if dist.is_initialized():
        raise RuntimeError("a simulation needs a process of its own, but this one is part of a process group already")
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class OneOfMany(LightningEnvironment):
    """Tells Lightning that this process is one rank of a world whose nodes have one process each."""

    def __init__(self, world_size: int, rank: int) -> None:
        super().__init__()
        self._size, self._rank = world_size, rank

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return True

    @override
    def world_size(self) -> int:
        return self._size

    @override
    def global_rank(self) -> int:
        return self._rank

    @override
    def node_rank(self) -> int:
        return self._rank

    @override
    def local_rank(self) -> int:
        return 0


class _Unasked(SlotAgreement):
    """Assumes that all processes have as many tokens, since there are no others to agree with."""

    @override
    def expect(self, layer: nn.Module, tokens: int, slots: int, gathered: bool = False) -> None:
        pass


class SimulatedStrategy(TEDStrategy):
    """A TEDStrategy with fake tensors, under a :class:`Meter`, from ``configure_model`` to the end.

    Args:
        meter: Makes the meter once the topology exists.
        gpu: Whether the process has a GPU.
        arguments, options: The arguments of TEDStrategy.
    """

    def __init__(self, meter: Callable[[Topology], Meter], gpu: bool, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._make_meter, self._gpu = meter, gpu
        self._meter: Meter | None = None
        self._modes = ExitStack()

    @property
    def meter(self) -> Meter:
        """The meter, which exists from ``configure_model`` on."""
        assert self._meter is not None
        return self._meter

    @override
    def setup_environment(self) -> None:
        super().setup_environment()  # meshes are real tensors
        self.topology.slots = _Unasked(self.topology.comm)
        self._modes.enter_context(unchecked())  # fake tensors have no values
        self._fake = self._modes.enter_context(FakeTensorMode())
        self._meter = self._modes.enter_context(self._make_meter(self.topology))
        # torch knows neither all shapes nor the FLOPs of grouped products.
        self._modes.enter_context(one_by_one(*((self._meter.one_kernel,) if self._gpu else ())))
        self._modes.enter_context(standing_in(FusedRowOps(self._meter.on_kernel)))
        if self._gpu:
            self._modes.enter_context(tensor_cores())
            self._modes.enter_context(gpu_norms(FusedNorm(self._meter.on_norm, lambda: self.meter.fusion.on)))
        self._modes.enter_context(compiling(functools.partial(CompiledBlock, self._meter.compile)))
        self._modes.enter_context(compiling_loss(functools.partial(compiled, self._meter.compile)))

    @override
    def _start(self, lengths: Any, stage: str) -> None:
        """Does nothing: there are no other processes whose numbers of batches could differ."""

    @override
    def _check_batch(self, batch: Any, stage: str, alone: bool = True) -> None:
        """Does nothing: there are no other processes whose batches could differ."""

    @override
    def setup_optimizers(self, trainer: Any) -> None:
        assert self.model is not None
        for parameter in self.model.parameters():  # before the optimizer's hooks, which may take the gradient
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._label_gradient)
        super().setup_optimizers(trainer)
        for optimizer in self.sharded_optimizers:
            # Real kernels return no tensors that would show them to the meter, and work tile by tile on a CPU.
            optimizer.kernel = self.meter.on_fused_step

    def _label_gradient(self, parameter: Any) -> None:
        self.meter.label_gradient(parameter.grad)

    @override
    def _at(self, number: int) -> None:
        super()._at(number)
        self.meter.start(number)

    @override
    def _show_step(self, batches: list[Any]) -> None:
        with self.meter.forward_pass():
            super()._show_step(batches)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.meter.forward_pass():
            return super().training_step(*args, **kwargs)

    @override
    def _run_beside(self, deferred: DeferredBackward) -> None:
        with self._fake, self.meter:  # a thread has modes of its own
            super()._run_beside(deferred)

    @override
    def post_backward(self, closure_loss: Any) -> None:
        super().post_backward(closure_loss)
        for optimizer in self.sharded_optimizers:
            for bucket in optimizer.buckets:
                if bucket.gradient is not None:
                    self.meter.label_gradient(bucket.gradient)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj  # there are no other processes

    @override
    def teardown(self) -> None:
        self._modes.close()
        super().teardown()
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
