"""What tedlab uses of Lightning's private names."""

import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

from lightning.fabric.utilities import distributed, optimizer, seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import ParallelStrategy, launchers
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Sampler
from typing_extensions import override

# ---- for a strategy: what Lightning's own strategies call ------------------------------------------------------------

init_process_group = distributed._init_dist_connection
"""Starts the default process group as the cluster environment says, and has it destroyed when the process ends."""

backend_for = distributed._get_default_process_group_backend_for_device
"""``nccl`` for a GPU, ``gloo`` for a CPU, or what else torch has registered for a device."""

reduce_in_group = distributed._sync_ddp_if_available
"""Reduces a tensor over a process group; as it is where there is none."""

optimizers_to_device = optimizer._optimizers_to_device
"""Moves the state of optimizers."""

random_states, set_random_states = seed._collect_rng_states, seed._set_rng_states
"""Those of the generators of Python, NumPy and torch, in one dictionary that checkpoints hold."""


class SubprocessStrategy(ParallelStrategy):
    """A strategy for which Lightning starts the other processes of a node, as it does for DDP.

    ``_configure_launcher`` is how every strategy says so; Lightning has no public name for it, nor for the launcher.
    """

    num_nodes: int

    @property
    def num_processes(self) -> int:
        """Processes on this node."""
        return len(self.parallel_devices or ())

    @override
    def _configure_launcher(self) -> None:
        environment = self.cluster_environment
        assert environment is not None
        if not environment.creates_processes_externally:
            self._launcher = launchers._SubprocessScriptLauncher(environment, self.num_processes, self.num_nodes)


def wrapped_optimizers(strategy: ParallelStrategy) -> Sequence[LightningOptimizer]:
    """What ``LightningModule.optimizers()`` returns. The strategy makes them, and shows only what they wrap."""
    return strategy._lightning_optimizers


def given_checkpoint_io(strategy: ParallelStrategy) -> Any | None:
    """The user's plugin; ``strategy.checkpoint_io`` makes one if there is none."""
    return strategy._checkpoint_io


def synchronises_batch_norm(strategy: ParallelStrategy) -> bool:
    """Whether the Trainer was given ``sync_batchnorm=True``."""
    return strategy._layer_sync is not None


# ---- the Trainer -----------------------------------------------------------------------------------------------------


def detects_anomalies(trainer: Trainer) -> bool:
    """Whether it was given ``detect_anomaly=True``: before it runs, torch has not been told yet."""
    return trainer._detect_anomaly


def leave_out_sigterm_broadcast(trainer: Trainer) -> None:
    """Keeps the training loop from broadcasting before every batch whether a process was told to end."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def leave_signals_alone(trainer: Trainer) -> None:
    """Keeps Lightning's signal handlers from being registered."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def leave_sigterm_alone(trainer: Trainer) -> None:
    """Keeps Lightning's handler of SIGTERM from being registered, and no other."""
    connector = trainer._signal_connector
    register = connector.register_signal_handlers

    def without_sigterm() -> None:
        before = signal.getsignal(signal.SIGTERM)
        register()
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)

    connector.register_signal_handlers = without_sigterm  # type: ignore[method-assign]


def trainer_of(module: LightningModule) -> Trainer | None:
    """The module's, or None; ``module.trainer`` raises where there is none."""
    return module._trainer


class MicroBatches(int):
    """How many micro-batches a step has, for ``trainer.accumulate_grad_batches``, where earlier steps had others.

    Lightning accumulates as long as the remainder of the number of an epoch's batches by this one is not 0. It has no
    public way of changing this within an epoch. Here the remainder is that of the batches from ``first`` on.
    """

    first: int

    def __new__(cls, number: int, first: int) -> "MicroBatches":
        """Args: number: of a step; first: the batches of the epoch before the first step of so many."""
        self = super().__new__(cls, number)
        self.first = first
        return self

    def __rmod__(self, batches: int) -> int:
        return (batches - self.first) % int(self)


BATCHES_THAT_STEPPED = "_batches_that_stepped"
"""Where the state of a training loop counts the batches that loggers take for steps."""


# ---- callbacks, samplers and loggers ---------------------------------------------------------------------------------


def save_now(callback: ModelCheckpoint, trainer: Trainer) -> None:
    """Does what the callback does when a save is due; when that is, its hooks decide, all in one."""
    if not callback._should_skip_saving_checkpoint(trainer):
        candidates = callback._monitor_candidates(trainer)
        callback._save_topk_checkpoint(trainer, candidates)
        callback._save_last_checkpoint(trainer, candidates)


def count_as_saved(callback: ModelCheckpoint, step: int) -> None:
    """Lets the callback take a step for one that it has saved."""
    callback._last_global_step_saved = step


def link_through(callback: ModelCheckpoint, link: Callable[[Trainer, str, str], None]) -> None:
    """Has ``last.ckpt`` made a link by this function of the trainer, the file and the link."""
    callback._link_checkpoint = link  # type: ignore[assignment, method-assign]


def set_average_model(callback: StochasticWeightAveraging, module: LightningModule) -> None:
    """Gives the callback the copy in which it averages weights, which it makes when a run is set up."""
    callback._average_model = module


def averaged_model(callback: WeightAveraging) -> AveragedModel | None:
    """The averages of the callback, once a fit has begun."""
    return callback._average_model


def sampler_inside(sampler: Sampler) -> Any:
    """The user's, inside the one by which Lightning divides its samples over processes."""
    return sampler.dataset._sampler  # type: ignore[attr-defined]


def has_started(logger: WandbLogger) -> bool:
    """Whether there is a run; asking ``experiment`` starts one."""
    return logger._experiment is not None


def forget_anonymous(logger: WandbLogger) -> None:
    """Takes back an argument of ``wandb.init`` that Lightning passes though nobody gave it, and that W&B warns of."""
    logger._wandb_init.pop("anonymous", None)
