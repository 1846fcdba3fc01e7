"""TEDStrategy connects tensor × expert × data parallelism to Lightning. Only users and entry points import it."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from tedlab._compat import lightning as compat
from tedlab.comm import Whereabouts
from tedlab.comm.keep import kept_tags
from tedlab.config import CheckpointOptions, CommOptions, Order, ShardingOptions
from tedlab.degrees import GroupKind, ParallelDegrees
from tedlab.launch import outside, rendezvous
from tedlab.launch.watch import Watch, watch
from tedlab.models.gpt import known_tags
from tedlab.moe import Router
from tedlab.moe.balance import update_biases
from tedlab.nn import fused_parameters, partial_parameters
from tedlab.optim import FiniteGuard, Gradients, LossScaler, ShardedOptimizer
from tedlab.optim.finite import check_saved
from tedlab.optim.reading import MANUAL, hooks_that_read
from tedlab.spec import Layout
from tedlab.strategy import contract, seeding
from tedlab.strategy.ahead import StepAhead
from tedlab.strategy.batches import Lengths, PredictionsInStep, check_lengths
from tedlab.strategy.checkpointing import Checkpointing
from tedlab.strategy.interleave import DeferredBackward
from tedlab.strategy.metric_sync import sync_over_data_ranks
from tedlab.strategy.replicas import ReplicaCheck, agree_on_threads, check_batch
from tedlab.topology import Topology

HALF_PRECISIONS = ("16-true", "16-mixed")  # fp16, whose range needs a loss scale
_CHECKED = (LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment)  # a user's own environment is trusted


# Maps the strategy's arguments in 0.x to their present object and field. The next release removes them.
_OLD = {
    **{name: ("comm", name) for name in ("dtd", "fuse_reduce_scatter", "cac", "skip_dead_gemm")},
    **{name: ("sharding", name) for name in ("zero", "bucket_elements", "overlap", "tile")},
    "async_checkpoint": ("checkpoints", "async_save"),
}


def gpus(processes: int) -> list[torch.device]:
    """Returns a GPU for each of ``processes`` processes of this node. If there are fewer GPUs, processes share them.

    NCCL refuses shared GPUs; gloo does not.
    """
    return [torch.device("cuda", rank % torch.cuda.device_count()) for rank in range(processes)]


class TEDStrategy(compat.SubprocessStrategy):
    """Tensor × expert × data parallel training of any LightningModule built from tedlab's layers.

    The module builds its layers in ``configure_model`` with ``self.trainer.strategy.topology``. Everything else is as
    with any Lightning strategy: batches are drawn per data rank, gradients are reduced once per step, ``self.log(...,
    sync_dist=True)`` and torchmetrics' metrics count each sample once, and checkpoints are directories that load in any
    layout. Parameters that are not tedlab's (an ``nn.Linear`` of your own) are replicated as in DDP: all processes get
    process 0's initial values, and gradients are averaged over data ranks. When a loop starts, the generators and the
    workers of data loaders are seeded by data rank (see ``seeding.py``).

    Args:
        tensor_parallel_size: The number of processes that share one layer, T.
        expert_parallel_size: The number of tensor groups that the experts are divided over, E_p.
        comm: The communication options of layers: duplicate token dropping (``dtd``), what recomputation takes from
            memory instead of communicating again (``cac``), …; None: the defaults of :class:`CommOptions`.
        sharding: How optimizer state and gradients are divided and stepped: ZeRO-1 (``zero``), the size of buckets,
            overlap, tiles. None: the defaults of :class:`ShardingOptions`.
        checkpoints: How checkpoints are written; None: the defaults of :class:`CheckpointOptions`.
        sequence_parallel: Whether to divide activations between layers over the tensor group, by position.
        expert_tensor_parallel_size: The number of processes that divide each expert by width, T_e; None:
            ``tensor_parallel_size``.
        order: Which processes are neighbours, see :class:`tedlab.ParallelDegrees`.
        loss_scale: The initial value of dynamic loss scaling; None: 65536 with fp16, no scaling otherwise.
        stop_on_nonfinite: Whether to raise :class:`tedlab.optim.NonFiniteError` in all processes before an infinite or
            NaN loss or gradient reaches a weight (with a loss scale: if even the smallest scale does not help).
        process_group_backend: ``nccl`` or ``gloo``; None: chosen by device. With ``gloo``, several processes can share
            a GPU, see ``parallel_devices``.
        timeout: The time after which a collective counts as failed.
        check_replicas_every: The number of steps between checks that replicated parameters are equal to the last bit
            (see ``replicas.py``), which also happen at the end and before each checkpoint. None: no checks.
        parallel_devices: The device of each process of a node; None: the Trainer gives each its own. See :func:`gpus`.
        accelerator, cluster_environment, precision_plugin: Set by the Trainer.
        old: Names of 0.x that have moved into the objects above; they work for one more release.

    Raises:
        ValueError: If ``comm.cac`` names a collective that no model has; when the Trainer starts, if tensor × expert
            does not divide the number of processes, or if the Trainer's precision is not supported.
    """

    strategy_name = "ted"
    is_distributed = True  # without this Lightning gives every process the same batches

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        expert_parallel_size: int = 1,
        *,
        comm: CommOptions | None = None,
        sharding: ShardingOptions | None = None,
        checkpoints: CheckpointOptions | None = None,
        sequence_parallel: bool = False,
        expert_tensor_parallel_size: int | None = None,
        order: str = Order.EXPERT.value,
        loss_scale: float | None = None,
        stop_on_nonfinite: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=10),
        check_replicas_every: int | None = 100,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        precision_plugin: Precision | None = None,
        **old: Any,
    ) -> None:
        super().__init__(accelerator, parallel_devices, cluster_environment, precision_plugin=precision_plugin)
        self.tensor_parallel_size = tensor_parallel_size
        self.expert_parallel_size = expert_parallel_size
        self.sequence_parallel = sequence_parallel
        self.expert_tensor_parallel_size = expert_tensor_parallel_size
        self.order = order
        moved = _moved(old)
        self.comm = replace(comm or CommOptions(), **moved["comm"])
        self.sharding = replace(sharding or ShardingOptions(), **moved["sharding"])
        self.checkpoints = replace(checkpoints or CheckpointOptions(), **moved["checkpoints"])
        named = isinstance(self.comm.cac, Sequence) and not isinstance(self.comm.cac, str)
        kept_tags(self.comm.cac, known_tags() if named else None)  # raises if malformed
        self.loss_scale = loss_scale
        self.stop_on_nonfinite = stop_on_nonfinite
        self.replicas = ReplicaCheck(check_replicas_every)
        self.sharded_optimizers: list[ShardedOptimizer] = []
        self.loss_scaler: LossScaler | None = None
        self.num_nodes = 1
        self._backend = process_group_backend
        self._timeout = timeout
        self._topology: Topology | None = None
        self._watch: Watch | None = None
        self._checkpointing: Checkpointing | None = None
        self._last_micro_batch = True
        self._deferred: DeferredBackward | None = None
        self._seeds: seeding.Roots | None = None
        self._first_batch = True  # whether the next batch is the first of a loop
        self._predictions: PredictionsInStep
        self._ahead: StepAhead | None = None
        self._routers: list[Router] = []
        self._read_in: frozenset[str] = frozenset()  # the user's hooks that may read ``.grad``

    # ---- processes, devices, groups ------------------------------------------------------------------------------

    @property
    def topology(self) -> Topology:
        """The place of this process, known from ``LightningModule.configure_model`` on."""
        if self._topology is None:
            raise RuntimeError("The topology exists once the Trainer has started: use it in `configure_model`.")
        return self._topology

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The sampler's arguments, which divide samples over data ranks only: tensor ranks read the same batches."""
        comm = self.topology.comm
        return {"num_replicas": comm.size("data"), "rank": comm.rank("data")}

    def set_world_ranks(self) -> None:
        """Tells the cluster environment this process's rank. Lightning calls this once the environment is known."""
        assert self.cluster_environment is not None
        if type(self.cluster_environment) in _CHECKED:
            outside.check()
        self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    @override
    def setup_environment(self) -> None:
        # Check the degrees before any process can wait for another.
        tensor, expert_tensor = self.tensor_parallel_size, self.expert_tensor_parallel_size
        degrees = ParallelDegrees(
            self.num_nodes * self.num_processes,
            tensor,
            self.expert_parallel_size,
            self.sequence_parallel,
            tensor if expert_tensor is None else expert_tensor,
            self.order,
        )
        if self.comm.by_node and self.comm.ranks_per_node is None:
            self.comm = replace(self.comm, ranks_per_node=self.num_processes)
        _ = Layout(degrees, self.comm).nodes  # raises if they have unequal parts of an expert group
        super().setup_environment()
        if self._topology is not None:  # validate after fit, for example: groups and watch still exist
            if self._watch is not None and self._watch.stopped:  # another strategy's watch has stopped it
                self._watch = watch(self._topology.comm.place, self._timeout)
                assert self._watch is not None
                self._watch.groups = self._topology.comm.ranks
            return
        reset_seed()
        self.set_world_ranks()
        assert self.cluster_environment is not None
        backend = self._backend or compat.backend_for(self.root_device)
        # NCCL aborts the process, so the watch must time out first and say why.
        timeout = self._timeout + timedelta(seconds=15) if backend == "nccl" else self._timeout
        compat.init_process_group(
            self.cluster_environment,
            backend,
            timeout=timeout,
            store=rendezvous.store(self.global_rank, degrees.world_size, self._timeout),
            # This makes NCCL connect at once. With gloo, torch would then try to split groups, which gloo cannot.
            device_id=self.root_device if backend == "nccl" else None,
        )
        place = Whereabouts()
        self._watch = watch(place, self._timeout)
        with place.within("start of process groups"):
            limit = None if self._watch is None else timeout
            self._topology = Topology(degrees, self.root_device, self.comm, limit, place)
            self._checkpointing = Checkpointing(self._topology, self.checkpoints, self._timeout)
            if self.root_device.type == "cpu":
                agree_on_threads()
        if self._watch is not None:
            self._watch.groups = self._topology.comm.ranks
        self._topology.slots.patience = self._timeout / 2

    @override
    def setup(self, trainer: Trainer) -> None:
        contract.check(trainer, self, self.tensor_parallel_size)
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self._share_plain_tensors()
        contract.prepare(trainer)
        self._seeds = seeding.roots(self.broadcast)  # before optimizers, which may request loaders
        self.topology.context.seed = self._seeds[2]
        self._routers = [module for module in self.model.modules() if isinstance(module, Router)]
        for number, router in enumerate(self._routers):
            router.number = number
        sync_over_data_ranks(trainer.lightning_module, self.topology.comm)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        self.checkpointing.take_over(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            compat.optimizers_to_device(self.optimizers, self.root_device)
            # Lightning broadcasts a SIGTERM flag before every batch and waits for it. The launcher already passes
            # signals on, and a framework that measures communication must not add any.
            compat.leave_out_sigterm_broadcast(trainer)
            # Lightning's handler of SIGTERM broadcasts, too, at whatever step each process is, and waits for processes
            # that wait for this one. Let the signal end the process.
            if isinstance(self.cluster_environment, SLURMEnvironment):
                compat.leave_sigterm_alone(trainer)  # SLURM requeues jobs by another
            else:
                compat.leave_signals_alone(trainer)
        seeding.seed_generators(self._seeds, self.topology.comm.rank("data"))

    @override
    def process_dataloader(self, dataloader: object) -> object:
        assert self._seeds is not None
        seeding.seed_loader(dataloader, self._seeds, self.topology.comm.rank("data"))
        if self._trainer.training and getattr(self.lightning_module, "reads_step_ahead", False):
            dataloader = self._ahead = StepAhead(dataloader, lambda: self._trainer.accumulate_grad_batches)
        return dataloader

    def _share_plain_tensors(self) -> None:
        """Broadcasts the first process's values of parameters and buffers that are not sharded."""
        assert self.model is not None
        self._share([*self.model.parameters(), *self.model.buffers()], "broadcast of initial values")

    def _share_buffers(self) -> None:
        """Broadcasts the first process's buffers, as DDP does: batch norm's statistics differ between processes."""
        assert self.model is not None
        self._share(self.model.buffers(), "broadcast of buffers")

    def _share(self, tensors: Iterable[Tensor], what: str) -> None:
        with self._within(what):
            for tensor in tensors:
                if not isinstance(tensor, DTensor):
                    dist.broadcast(tensor.detach(), src=0)

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        if self.loss_scale is not None or self.precision_plugin.precision in HALF_PRECISIONS:
            # Lightning scales for 16-mixed only, and each process would decide on overflow alone.
            self.loss_scaler = LossScaler(self.loss_scale or 2.0**16)
            if isinstance(self.precision_plugin, MixedPrecision):
                self.precision_plugin.scaler = None
        assert self.model is not None
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.sharded_optimizers = [
            ShardedOptimizer(
                optimizer,
                self.topology.comm,
                names,
                partial=partial_parameters(self.model),
                fused=fused_parameters(self.model),
                zero=self.sharding.zero,
                bucket_elements=self.sharding.bucket_elements,
                tile=self.sharding.tile,
                overlap=self.sharding.overlap,
                scaler=self.loss_scaler,
                guard=FiniteGuard(self.topology.comm) if self.stop_on_nonfinite else None,
            )
            for optimizer in self.optimizers
        ]
        self._read_in = hooks_that_read(trainer)
        for sharded in self.sharded_optimizers:
            sharded.collects_early = not self._read_in & {"on_after_backward", "backward"}

    @override
    def setup_precision_plugin(self) -> None:
        super().setup_precision_plugin()
        # Lightning has no strategy hook for clipping, and a norm over local shards would be wrong.
        self.precision_plugin.clip_grad_by_norm = self._clip_grad_by_norm  # type: ignore[method-assign]
        self.precision_plugin.clip_grad_by_value = self._clip_grad_by_value  # type: ignore[method-assign]
        # ``self.optimizers()`` returns wrappers with the methods of the optimizer's class, not the replaced ones.
        for wrapper, sharded in zip(compat.wrapped_optimizers(self), self.sharded_optimizers, strict=True):
            wrapper.zero_grad = sharded.zero_grad  # type: ignore[attr-defined]
            wrapper.state_dict = sharded.state_dict  # type: ignore[attr-defined]
            wrapper.load_state_dict = sharded.load_state_dict  # type: ignore[attr-defined]

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    @override
    def teardown(self) -> None:
        self._deferred = None
        if self._topology is not None:
            self._topology.comm.turns.close()
        if self._checkpointing is not None:
            self._checkpointing.writer.wait()
        for optimizer in self.sharded_optimizers:
            optimizer.release()
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    # ---- gradients -----------------------------------------------------------------------------------------------

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        """Marks a micro-batch that is not the last of its step; Lightning enters this for each of these."""
        self._last_micro_batch = False
        try:
            yield
        finally:
            self._last_micro_batch = True

    @property
    def gradients(self) -> Gradients:
        """The gradient of the current step: its norms and values, and a way to change it."""
        return Gradients(self.sharded_optimizers, self.topology.comm)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's ``training_step``, and beside it the backward pass that waits for it, if there is one."""
        deferred, self._deferred = self._deferred, None
        forward = partial(super().training_step, *args, **kwargs)
        if deferred is None:
            return forward()
        other = partial(self._run_beside, deferred)
        result = self.topology.comm.turns.beside(other, forward, self.topology.context.keep)
        deferred.finish()
        return result

    def _run_beside(self, deferred: DeferredBackward) -> None:
        """Runs a backward pass beside a training step, in a thread of its own."""
        deferred.run()

    def _run_deferred(self) -> None:
        """Runs the backward pass that waits for the next training step, if there is one, before anything else."""
        deferred, self._deferred = self._deferred, None
        if deferred is not None:
            deferred.run_alone(self.topology.context.keep)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Runs Lightning's backward pass; if ``on_after_backward`` reads gradients, they are reduced by then.

        With ``comm.interleave``, that of a micro-batch that is not the last of its step runs in the next training step,
        or before a validation or a checkpoint in between.
        """
        module = self.lightning_module
        assert module is not None
        loss = closure_loss
        if self.loss_scaler is not None:
            closure_loss = closure_loss * self.loss_scaler.scale
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        note = partial(self._note_loss, module.trainer.global_step, module.trainer.fit_loop.batch_idx, loss.detach())
        if self.comm.interleave and not self._last_micro_batch and self.topology.comm.size("expert") > 1:
            scaled = closure_loss.detach()

            def finish() -> None:
                note()
                self.post_backward(self.precision_plugin.post_backward(scaled, module))

            backward = partial(closure_loss.backward, *args, **kwargs)
            modes = {part: part.training for part in module.modules()}
            self._deferred = DeferredBackward(backward, self.topology.context.keep(), finish, modes)
            return closure_loss
        self.precision_plugin.backward(closure_loss, module, optimizer, *args, **kwargs)
        note()
        early = self._last_micro_batch and self._read_in & {"on_after_backward", MANUAL}
        for sharded in self.sharded_optimizers if early else ():
            sharded.reduce_gradients()
            sharded.show_gradients()
        closure_loss = self.precision_plugin.post_backward(closure_loss, module)
        for sharded in self.sharded_optimizers if self._last_micro_batch and not early else ():
            sharded.reduce_gradients()
        self.post_backward(closure_loss)
        return closure_loss

    def _note_loss(self, step: int, batch_idx: int, loss: Tensor) -> None:
        for sharded in self.sharded_optimizers:
            sharded.note_loss(step, batch_idx, loss)

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        for optimizer in self.sharded_optimizers:
            optimizer.adopt()
            optimizer.hide_gradients()
            if self._last_micro_batch and "backward" not in self._read_in:
                optimizer.expect_backward()

    @override
    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], model: Any | None = None, **kwargs: Any
    ) -> Any:
        sharded = self._sharded(optimizer)

        def and_show() -> Any:
            result = closure()
            if sharded.stale:
                raise RuntimeError(
                    "optimizer.zero_grad() was not called between two steps: torch would add the gradients of both, "
                    "and TEDStrategy keeps none after a step. Call it after each step, or before each backward pass."
                )
            if self._read_in:
                sharded.show_gradients()
            return result

        result = super().optimizer_step(optimizer, and_show, model, **kwargs)
        if balanced := [router for router in self._routers if router.moves_biases]:
            update_biases(balanced, self.topology.comm)
        return result

    def _clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        self._sharded(optimizer).clip(clip_val)

    def _clip_grad_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        self._sharded(optimizer).clip_values(clip_val)

    def _sharded(self, optimizer: Optimizer) -> ShardedOptimizer:
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return next(s for s in self.sharded_optimizers if s.optimizer is inner)

    # ---- communication on Lightning's behalf ---------------------------------------------------------------------

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduces over data ranks (``mean``, ``sum``, ``max``, ``min``), or over a group of torch.distributed.

        Tensor ranks hold equal values, so the mean, the minimum and the maximum over all processes are those over data
        ranks. The sum over all processes would count each sample T times.
        """
        if not isinstance(tensor, Tensor):
            return tensor
        if group is not None and group is not dist.group.WORLD:
            return compat.reduce_in_group(tensor, group, reduce_op=reduce_op)
        op = (reduce_op if isinstance(reduce_op, str) else reduce_op.name).lower()
        mean = op in ("mean", "avg")
        if mean and not tensor.is_floating_point():
            tensor = tensor.float()
        comm = self.topology.comm
        kind: GroupKind = "data" if op == "sum" else "world"
        total = comm.all_reduce(tensor, kind, tag="metrics.reduce", phase="metrics", op="sum" if mean else op)
        return total / comm.size("world") if mean else total

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Returns whether all or any processes decided so. Lightning's version compares a sum with the world size."""
        own = torch.tensor(int(decision), device=self.root_device)
        return bool(self.reduce(own, reduce_op="min" if all else "max"))

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Returns every data rank's tensor, stacked to (D, …); all processes' tensors would repeat each T times."""
        comm = self.topology.comm
        if group is not None and group is not dist.group.WORLD:  # Lightning's default, WORLD, means no group
            return super().all_gather(tensor, group, sync_grads)
        if sync_grads:
            return super().all_gather(tensor, comm.group("data"), sync_grads)
        return comm.all_gather(tensor.detach().unsqueeze(0), "data", tag="metrics.gather", phase="metrics")

    @override
    def barrier(self, name: str | None = None) -> None:
        if dist.is_initialized():
            with self._within(f"barrier {name or ''}".strip()):
                dist.barrier(device_ids=[self.root_device.index] if dist.get_backend() == "nccl" else None)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not dist.is_initialized():
            return obj
        box = [obj]
        with self._within("broadcast of an object"):
            dist.broadcast_object_list(box, src)
        return box[0]

    def _within(self, what: str, limited: bool = True) -> AbstractContextManager[None]:
        """Tells the watch that this process waits in one of torch's own collectives."""
        return nullcontext() if self._topology is None else self._topology.comm.place.within(what, limited)

    # ---- replicas ------------------------------------------------------------------------------------------------

    @property
    def _trainer(self) -> Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    @override
    def on_train_start(self) -> None:
        for optimizer in self.sharded_optimizers:
            optimizer.state.refresh_masters(optimizer.piece)  # in case a hook has set weights
        self._start([self._trainer.num_training_batches], "training")

    @override
    def on_validation_start(self) -> None:
        self._run_deferred()
        self._share_buffers()
        trainer = self._trainer
        sanity = trainer.sanity_checking
        self._start(trainer.num_sanity_val_batches if sanity else trainer.num_val_batches, "validation")

    @override
    def on_test_start(self) -> None:
        self._start(self._trainer.num_test_batches, "tests")

    @override
    def on_predict_start(self) -> None:
        self._first_batch = True
        self.topology.slots.uneven = True
        self._predictions = PredictionsInStep(self._trainer.num_predict_batches, self.topology)

    @override
    def on_predict_end(self) -> None:
        self.topology.slots.uneven = False

    def _start(self, lengths: Lengths, stage: str) -> None:
        """Prepares for a loop of the given length for each data loader."""
        self._first_batch = True
        self.topology.slots.uneven = False
        in_step = self.topology.comm.size(self.topology.degrees.in_step)
        if stage == "training" or in_step > 1:  # else no process needs another
            check_lengths(lengths, stage, self.topology)

    @override
    def on_train_end(self) -> None:
        self._deferred = None  # of a step that did not come to its end
        self._check_replicas()

    def _check_replicas(self) -> None:
        assert self.model is not None
        self.replicas.now(self._trainer.global_step, self.model, self.topology)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self._check_batch(args[0], "validation")
        self._evaluate(args[1])
        return super().validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        self._check_batch(args[0], "test")
        self._evaluate(args[1])
        return super().test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        self._check_batch(args[0], "prediction")
        return self._predictions.predict(lambda: super(TEDStrategy, self).predict_step(*args, **kwargs))

    def _evaluate(self, batch_idx: int) -> None:
        """Notes which batch of an evaluation comes next."""
        comm = self.topology.comm
        self.topology.context.at(0, batch_idx * comm.size("data") + comm.rank("data"))

    def _check_batch(self, batch: Any, stage: str, alone: bool = True) -> None:
        """Compares a loop's first batch; ``alone`` outside of training, where a data rank may have none."""
        if self._first_batch:
            check_batch(batch, stage, self.topology, alone)
        self._first_batch = False

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def checkpointing(self) -> Checkpointing:
        """The object that writes and reads checkpoints, available from ``setup_environment`` on."""
        assert self._checkpointing is not None
        return self._checkpointing

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # shards load into the sharded model and its optimizers

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return False

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the state by parameter name, each tensor sharded like its parameter."""
        return self._sharded(optimizer).state_dict()

    @override
    def save_checkpoint(self, checkpoint_: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            raise TypeError("TEDStrategy writes a directory through torch.distributed.checkpoint: no storage_options")
        self._run_deferred()
        self._share_buffers()  # the state refers to these buffers
        self._check_replicas()
        if self.stop_on_nonfinite and self.sharded_optimizers:
            weights = [bucket.flat for optimizer in self.sharded_optimizers for bucket in optimizer.buckets]
            check_saved(weights, self.topology.comm, checkpoint_["global_step"], self.root_device)
        state = self._trainer.state
        # Outside of training there is nothing to overlap with, and no later call that would raise a failure.
        wait = state.fn != TrainerFn.FITTING or state.status != TrainerStatus.RUNNING
        path = Path(self.broadcast(filepath))
        self.checkpointing.save(checkpoint_, path, self.sharded_optimizers, self.loss_scaler, wait)

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero:
            self.checkpointing.writer.remove(Path(filepath))

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        module = self.lightning_module
        assert module is not None
        self.checkpointing.writer.wait()
        path, fitting = Path(self.broadcast(checkpoint_path)), module.trainer.state.fn == TrainerFn.FITTING
        optimizers = self.sharded_optimizers if fitting else None
        return self.checkpointing.load(path, module, self.lightning_module_state_dict(), optimizers, self.loss_scaler)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.topology.comm.place.step = self._trainer.global_step
        self._first_batch |= batch_idx == 0
        self._check_batch(batch, "training", alone=False)
        assert self.model is not None
        if self._deferred is None:  # else its backward pass, still to come, may need the buffers as they are
            self._share_buffers()
        self.replicas.at_step(self._trainer.global_step, self.model, self.topology)
        self.checkpointing.restore_random_state()  # this late because starting a data loader draws a number
        within = batch_idx % self._trainer.accumulate_grad_batches
        if within == 0 and self._ahead is not None and len(step := self._ahead.take()) > 1:
            self._show_step(step)
        self._at(within)

    def _at(self, number: int) -> None:
        """Notes which of this data rank's micro-batches of a step comes next."""
        comm = self.topology.comm
        self.topology.context.at(self._trainer.global_step, number * comm.size("data") + comm.rank("data"))

    def _show_step(self, batches: list[Any]) -> None:
        """Shows the micro-batches of a step, one after the other, to the module that asks for them."""

        def in_turn() -> Iterator[Any]:
            for number, batch in enumerate(batches):
                self._at(number)
                yield self.batch_to_device(batch, self.root_device)

        with self.precision_plugin.forward_context():
            hook: Any = self._trainer.lightning_module.on_step_batches
            hook(in_turn())

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads what the module's ``on_load_checkpoint`` has changed; ``load_checkpoint`` has done the rest.

        Where Lightning's ``WeightAveraging`` made the model in the checkpoint an average, training goes on with the
        weights that it was trained with, also without that callback.
        """
        assert self.lightning_module is not None
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        state = checkpoint.get("current_model_state") if fitting else None
        self.lightning_module.load_state_dict(state or checkpoint["state_dict"], strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Does nothing: ``load_checkpoint`` has done it."""


def _moved(old: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the values of old arguments by object and field, and warns where each has moved.

    Raises:
        TypeError: If there never was such an argument.
    """
    values: dict[str, dict[str, Any]] = {"comm": {}, "sharding": {}, "checkpoints": {}}
    for name, value in old.items():
        if name not in _OLD:
            raise TypeError(f"TEDStrategy has no argument '{name}'")
        place, field = _OLD[name]
        values[place][field] = value
        new = f"{place}={place.removesuffix('s').capitalize()}Options({field}={value!r})"
        warnings.warn(f"TEDStrategy({name}=…) is now TEDStrategy({new})", FutureWarning, stacklevel=3)
    return values


contract.explain_directories()
StrategyRegistry.register("ted", TEDStrategy, description="Tensor × expert × data parallelism (DeepSpeed-TED)")
