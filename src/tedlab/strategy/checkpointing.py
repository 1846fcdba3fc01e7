"""Writes a run's checkpoints, and resumes a run from one, in the same layout or another."""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from tedlab import checkpoint
from tedlab._compat import lightning as compat
from tedlab.config import CheckpointOptions
from tedlab.degrees import ParallelDegrees
from tedlab.optim import LossScaler, ShardedOptimizer
from tedlab.topology import Topology


class Checkpointing:
    """Writes and reads the checkpoints of a run. All processes take part.

    Args:
        topology: The topology of this process.
        options: How checkpoints are written.
        timeout: The time after which a process that does not answer counts as lost.
    """

    def __init__(self, topology: Topology, options: CheckpointOptions, timeout: timedelta) -> None:
        self.writer = checkpoint.Writer(options.async_save, timeout)
        self._topology = topology
        self._resumed: Mapping[str, Any] | None = None  # a loaded checkpoint's content, until the first batch

    def take_over(self, trainer: Trainer) -> None:
        """Makes callbacks link through the writer, and refuses before the first step what no checkpoint could hold."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                compat.link_through(callback, self._link)
        if trainer.state.fn == TrainerFn.FITTING and trainer.checkpoint_callbacks:
            for owner in filter(None, (trainer.lightning_module, getattr(trainer, "datamodule", None))):
                key = owner.CHECKPOINT_HYPER_PARAMS_KEY
                checkpoint.encode({key: checkpoint.plain(dict(owner.hparams))})

    def _link(self, trainer: Trainer, filepath: str, linkpath: str) -> None:
        """Replaces ModelCheckpoint's own method, which would link at once to a checkpoint that is not yet written."""
        self.writer.link(Path(filepath), Path(linkpath))

    def save(
        self,
        content: dict[str, Any],
        path: Path,
        optimizers: Sequence[ShardedOptimizer],
        scaler: LossScaler | None,
        wait: bool,
    ) -> None:
        """Writes what Lightning has collected, and what only this strategy knows.

        Args:
            content: Lightning's checkpoint with the state of the model and optimizers; it is modified.
            path: The checkpoint directory, the same in all processes.
            optimizers: The run's optimizers.
            scaler: The scaler of the run's loss, if any.
            wait: Whether to wait until everything is written, even if it is written in the background.
        """
        tensors = {"model": content.pop("state_dict")}
        for i, state in enumerate(content.pop("optimizer_states", [])):
            tensors[f"optimizer_{i}"] = state
        if attached := checkpoint.detach(content):
            tensors["attached"] = attached
        if scaler is not None:
            content["loss_scaler"] = scaler.state_dict()
        content["optimizer_groups"] = [optimizer.state.group_names() for optimizer in optimizers]
        content["layout"] = asdict(self._topology.degrees)
        content["random"] = self._random_states()
        for key in (LightningModule.CHECKPOINT_HYPER_PARAMS_KEY, LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY):
            if key in content:
                content[key] = checkpoint.plain(content[key])
        for key in (LightningModule.CHECKPOINT_HYPER_PARAMS_TYPE, LightningDataModule.CHECKPOINT_HYPER_PARAMS_TYPE):
            content.pop(key, None)  # an OmegaConf class that no longer applies
        with self._topology.comm.place.within("writing of a checkpoint", limited=False):
            self.writer.save(tensors, content, path)
            if wait:
                self.writer.wait()

    def load(
        self,
        path: Path,
        module: LightningModule,
        state: dict[str, Any],
        optimizers: Sequence[ShardedOptimizer] | None,
        scaler: LossScaler | None,
    ) -> dict[str, Any]:
        """Reads a checkpoint of any layout into the module and, to resume training, into optimizers and scaler.

        Args:
            path: The checkpoint directory, the same in all processes.
            module: The module to fill.
            state: The module's tensors by name.
            optimizers: The optimizers of the resumed run; None for a run that does not train.
            scaler: The scaler of the run's loss, if any.

        Returns:
            The checkpoint's content besides tensors, and the state of the module, for Lightning's hooks.

        Raises:
            ValueError: If training is to resume from a checkpoint of weights only.
        """
        meta = checkpoint.read_meta(path)
        if optimizers is not None and "lr_schedulers" not in meta:
            raise ValueError(
                f"{path} holds weights only (save_weights_only, or save_checkpoint(weights_only=True)): validate, test "
                "and predict can use it, but fit cannot go on from it without the optimizer; to start anew from these "
                "weights, call tedlab.checkpoint.load_weights(self, path) in on_fit_start"
            )
        tensors: dict[str, Any] = {"model": state}
        if attached := checkpoint.attach(meta, self._topology.mesh_of):
            tensors["attached"] = attached
        optimizers = optimizers or ()
        stored = checkpoint.stored_names(path)
        # Half precision keeps an fp32 master copy of the weights; a full-precision checkpoint has it as the weights.
        masters_stored = any(name.endswith(".master") for name in stored)
        for optimizer, groups in zip(optimizers, meta.get("optimizer_groups", []), strict=False):
            optimizer.state.regroup(groups)
        for i, optimizer in enumerate(optimizers):
            if any(name.startswith(f"optimizer_{i}.") for name in stored):
                tensors[f"optimizer_{i}"] = _room_for(optimizer, f"optimizer_{i}.", stored, masters_stored)
        with self._topology.comm.place.within("reading of a checkpoint", limited=False):
            checkpoint.load(tensors, path, strict=module.strict_loading)
        module.load_state_dict(tensors["model"], strict=module.strict_loading)
        for i, optimizer in enumerate(optimizers):
            if f"optimizer_{i}" in tensors:
                optimizer.load_state_dict(tensors[f"optimizer_{i}"])
            if not masters_stored:
                optimizer.state.refresh_masters(optimizer.piece)
        meta["state_dict"] = tensors["model"]  # for hooks, which may change it
        if "current_model_state" in meta:  # it is an average, whose place in the module others take
            meta["state_dict"] = {name: _copied(value) for name, value in tensors["model"].items()}
        if scaler is not None and "loss_scaler" in meta:
            scaler.load_state_dict(meta["loss_scaler"])
        self._resumed = meta
        return meta

    def _random_states(self) -> list[dict[str, Any]]:
        """Returns the random states of all processes. Collective."""
        states: list[Any] = [None] * self._topology.comm.size("world")
        with self._topology.comm.place.within("gathering of random states"):
            dist.all_gather_object(states, compat.random_states(include_cuda=self._topology.device.type == "cuda"))
        return states

    def restore_random_state(self) -> None:
        """Restores the generators, once after :meth:`load`.

        In another layout than the checkpoint's, each data rank gets a new state that depends on seed, step and rank.
        """
        meta, self._resumed = self._resumed, None
        if meta is None:
            return
        comm = self._topology.comm
        if "layout" in meta and ParallelDegrees(**meta["layout"]) == self._topology.degrees:
            compat.set_random_states(meta["random"][comm.rank("world")])
        else:
            new = np.random.SeedSequence((torch.initial_seed(), meta["global_step"], comm.rank("data")))
            seed = int(new.generate_state(1)[0])
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _room_for(optimizer: ShardedOptimizer, prefix: str, stored: Collection[str], masters: bool) -> dict[str, Any]:
    """Returns an optimizer's state to fill from a checkpoint, initialised for what the checkpoint holds."""
    state = f"{prefix}state."
    keys = [name.removeprefix(state).rsplit(".", 1) for name in stored if name.startswith(state)]
    optimizer.initialize_state({name for name, key in keys if key != "master"})
    room = optimizer.state_dict(masters=masters)
    there = {name for name, _ in keys}
    room["state"] = {name: values if name in there else {} for name, values in room["state"].items()}
    known = optimizer.optimizer.defaults  # options that schedulers add may be missing, the optimizer's own not
    room["param_groups"] = [
        {k: v for k, v in group.items() if k in known or f"{prefix}param_groups.{i}.{k}" in stored}
        for i, group in enumerate(room["param_groups"])
    ]
    return room
