"""The LightningModule for language models, with the loss, step metrics, optimizer and schedule."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import hydra
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from tedlab._compat.lightning import trainer_of
from tedlab._compat.torch import LAST_LEARNING_RATES
from tedlab.config import BalanceScope, ModelConfig, MoEConfig, OptimConfig
from tedlab.models import models
from tedlab.moe import RouterReport, global_losses, stacked, step_totals
from tedlab.nn import Reading, decay_groups, rows_of
from tedlab.optim import Grouping, schedule_of
from tedlab.parametrization import scales
from tedlab.strategy import TEDStrategy
from tedlab.topology import Topology

_NETWORK = "network."  # prefix of the names of the model's parameters
NOT_SCALARS = ("loss", "routers")  # entries of ``training_step``'s result that are not metrics to average


class LanguageModel(LightningModule):
    """Trains next-token prediction with load-balanced experts, under :class:`TEDStrategy`.

    Batches are (B, S+1) int64 token ids: positions 0…S-1 predict 1…S. ``reading`` may say that -1 is padding.

    Args:
        model: The architecture, with its ``vocab_size`` set.
        moe: The configuration of the experts.
        optim: The optimizer and schedule.
        seed: The seed of the initial weights.
        bytes_per_token: The mean UTF-8 bytes of a token, for bits per byte.
        reading: How samples of several documents are read; None: as one.

    Attributes:
        length: Inputs of the rows that training reads samples as, see :func:`tedlab.nn.rows_of`. Validation reads whole
            samples.
    """

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        optim: OptimConfig,
        seed: int,
        bytes_per_token: float = 1.0,
        reading: Reading | None = None,
    ) -> None:
        super().__init__()
        self.model_config, self.moe_config, self.optim_config = model, moe, optim
        self.seed: int | None = seed
        self.bytes_per_token, self.reading = bytes_per_token, reading or Reading()
        self.length = model.sequence_length
        self._totals = torch.empty(0)  # of the current step, see ``on_step_batches``
        self._grouping = Grouping.under(optim, scales(models[model.architecture].spec, model, moe))
        self._options: list[dict[str, Any]] = []  # the configured options of each parameter group
        stored = {"model": asdict(model), "moe": asdict(moe), "optim": asdict(optim), "seed": seed}
        self.save_hyperparameters(stored, logger=False)

    @property
    def topology(self) -> Topology:
        """The strategy's topology."""
        strategy = self.trainer.strategy
        assert isinstance(strategy, TEDStrategy)
        return strategy.topology

    @override
    def configure_model(self) -> None:
        if not hasattr(self, "network"):  # Lightning calls this again before validation
            network = models[self.model_config.architecture]
            self.network = network(self.model_config, self.moe_config, self.topology, self.seed)
            self.network.separator = self.reading.separator if self.reading.masked else None
            for name, parameter in self.named_parameters():
                if not self._grouping.trains(name.removeprefix(_NETWORK)):
                    parameter.requires_grad_(False)

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        """Computes the loss of a micro-batch, and its detached metrics for callbacks.

        Returns:
            ``loss``, to be minimised; ``routers``, if there are experts: a :class:`RouterReport` whose tensors have one
            row per MoE layer. Every other entry is a scalar for :class:`tedlab.callbacks.StepMetrics`.
        """
        loss, reports = self.network.loss(*self.reading.of(rows_of(batch, self.length)))
        outputs: dict[str, Any] = {"train/loss": loss.detach()}
        if reports:
            routers = stacked(reports)
            if self.moe_config.balance.scope == BalanceScope.GLOBAL_BATCH:
                routers = self._over_the_global_batch(routers)
            balance, z = routers.balance_loss.sum(), routers.z_loss.sum()
            loss = loss + self.moe_config.aux_loss * balance + self.moe_config.z_loss * z
            outputs["train/aux_loss"] = balance.detach() / len(reports)  # 1 when perfectly balanced
            outputs["router/dropped_fraction"] = routers.dropped.sum() / routers.load.sum()
            outputs["routers"] = routers.detached()
        return {"loss": loss, **outputs}

    @property
    def reads_step_ahead(self) -> bool:
        """Whether the strategy calls :meth:`on_step_batches` before steps of several micro-batches."""
        balance, experts = self.moe_config.balance, self.moe_config.routed(self.model_config.layers)
        return len(experts) > 0 and balance.scope == BalanceScope.GLOBAL_BATCH

    @torch.no_grad()
    def on_step_batches(self, micro_batches: Iterator[Tensor]) -> None:
        """Counts the choices of a whole step, which the balance loss of its first micro-batch already depends on."""
        read = (self.reading.of(rows_of(batch, self.length)) for batch in micro_batches)
        reports = (stacked(self.network.route(ids, padding)) for ids, _, padding in read)
        counts = torch.stack([report.sums.counts for report in reports if report.sums is not None])
        self._totals = step_totals(counts.sum(0), self.topology.comm)

    def _over_the_global_batch(self, routers: RouterReport) -> RouterReport:
        """Replaces the losses of a micro-batch by its parts of those over the global batch."""
        comm, accumulated = self.topology.comm, self.trainer.accumulate_grad_batches
        assert routers.sums is not None
        totals = self._totals if accumulated > 1 else step_totals(routers.sums.counts, comm)
        balance, z = global_losses(routers.sums, totals, accumulated * comm.size("data"))
        return routers._replace(balance_loss=balance, z_loss=z)

    @override
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        loss, _ = self.network.loss(*self.reading.of(batch))
        bits = loss.double() / (math.log(2) * self.bytes_per_token)
        metrics = {"val/loss": loss, "val/bits_per_byte": bits}
        # Logged to callback_metrics only; tedlab.callbacks.Journal passes them to the loggers.
        self.log_dict(metrics, sync_dist=True, batch_size=len(batch), logger=False)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = parameter_groups(self, self._grouping, self.optim_config)
        optimizer, schedule = optimizer_with_schedule(self.optim_config, groups, self.trainer.max_steps)
        self._options = [{name: value for name, value in g.items() if name != "params"} for g in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the trainer's values that the schedule and the optimizer step depend on."""
        trainer = self.trainer
        checkpoint["trainer"] = {"max_steps": trainer.max_steps, "gradient_clip_val": trainer.gradient_clip_val}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes the optimizer continue with the saved state, but with the values that are configured now.

        A checkpoint's parameter groups and schedule also hold learning rate, betas, weight decay and so on. Those that
        the run takes over are already in its configuration (``resume.py``).
        """
        if trainer_of(self) is None or not self.trainer.optimizers or not checkpoint.get("lr_schedulers"):
            return
        optimizer, schedule = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        saved = checkpoint["lr_schedulers"][0]
        if len(self._options) != len(saved["base_lrs"]):  # a callback has added groups, or a subclass has its own
            return
        assert isinstance(schedule, LambdaLR)
        saved["base_lrs"] = [options["initial_lr"] for options in self._options]
        saved[LAST_LEARNING_RATES] = [
            rate * factor(saved["last_epoch"])
            for rate, factor in zip(saved["base_lrs"], schedule.lr_lambdas, strict=True)
        ]
        for group, options, rate in zip(optimizer.param_groups, self._options, saved[LAST_LEARNING_RATES], strict=True):
            group.update({**options, "lr": rate})


def parameter_groups(module: nn.Module, grouping: Grouping, config: OptimConfig) -> list[dict[str, Any]]:
    """Returns the optimizer's groups of a network's parameters, or of those of a module whose ``network`` it is."""
    groups = [{"params": [], **options} for options in grouping.options(config)]
    decayed = {*decay_groups(module)[0]}
    for name, parameter in module.named_parameters():
        name = name.removeprefix(_NETWORK)
        if grouping.trains(name):
            groups[grouping.index(name, parameter.dim(), parameter in decayed)]["params"].append(parameter)
    return groups


def optimizer_with_schedule(
    config: OptimConfig, groups: list[dict[str, Any]], total_steps: int
) -> tuple[Optimizer, LambdaLR]:
    """Makes the configured optimizer and schedule for parameter groups and a run of ``total_steps``."""
    # Hydra would copy the groups into its own containers if they were arguments of instantiate.
    optimizer = hydra.utils.instantiate(config.optimizer, _partial_=True)(groups, lr=config.lr)
    return optimizer, LambdaLR(optimizer, schedule_of(config, total_steps))
