"""Checkpoints of a run: what one holds, and how a run goes on from it, in this layout or in another."""

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
from tedlab.optim import LossScaler, ShardedOptimizer
from tedlab.topology import Topology


class Checkpointing:
    """Writes and reads the checkpoints of a run. Every process takes part.

    Args:
        topology: where this process stands.
        options: how checkpoints are written.
        timeout: after which a process that does not answer counts as lost.
    """

    def __init__(self, topology: Topology, options: CheckpointOptions, timeout: timedelta) -> None:
        self.writer = checkpoint.Writer(options.async_save, timeout)
        self._topology = topology
        self._resumed: Mapping[str, Any] | None = None  # what a checkpoint says, until the first batch

    def take_over(self, trainer: Trainer) -> None:
        """Callbacks link through the writer, and what no checkpoint could hold is refused before the first step."""
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                compat.link_through(callback, self._link)
        if trainer.state.fn == TrainerFn.FITTING and trainer.checkpoint_callbacks:
            for owner in filter(None, (trainer.lightning_module, getattr(trainer, "datamodule", None))):
                key = owner.CHECKPOINT_HYPER_PARAMS_KEY
                checkpoint.encode({key: checkpoint.plain(dict(owner.hparams))})

    def _link(self, trainer: Trainer, filepath: str, linkpath: str) -> None:
        """In the place of ModelCheckpoint's own, which links to what is not written yet, and not at once."""
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
            content: Lightning's, with the state of the model and of optimizers; it is taken apart.
            path: of the directory, the same in every process.
            optimizers: of the run.
            scaler: of its loss, if any.
            wait: until everything is written, also where it is written in the background.
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
            content.pop(key, None)  # a class of OmegaConf, which they no longer are
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
        """Reads a checkpoint of any layout into the module, and to go on also into optimizers and scaler.

        Args:
            path: of the directory, the same in every process.
            module: to be filled.
            state: its tensors by name.
            optimizers: of the run that goes on; None for one that does not train.
            scaler: of its loss, if any.

        Returns:
            What the checkpoint holds beside tensors, and the state of the module, for Lightning's hooks.

        Raises:
            ValueError: if a run is to go on from weights alone.
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
        # Half precision keeps an fp32 master copy of the weights; saved in full precision, these are the weights.
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
        if scaler is not None and "loss_scaler" in meta:
            scaler.load_state_dict(meta["loss_scaler"])
        self._resumed = meta
        return meta

    def _random_states(self) -> list[dict[str, Any]]:
        """Of all processes."""
        states: list[Any] = [None] * self._topology.comm.size("world")
        with self._topology.comm.place.within("gathering of random states"):
            dist.all_gather_object(states, compat.random_states(include_cuda=self._topology.device.type == "cuda"))
        return states

    def restore_random_state(self) -> None:
        """Once after :meth:`load`: generators go on as they would have, or, in another layout, as none has before.

        There each data rank gets a state of its own, which no step repeats.
        """
        meta, self._resumed = self._resumed, None
        if meta is None:
            return
        comm = self._topology.comm
        if meta.get("layout") == asdict(self._topology.degrees):
            compat.set_random_states(meta["random"][comm.rank("world")])
        else:
            new = np.random.SeedSequence((torch.initial_seed(), meta["global_step"], comm.rank("data")))
            seed = int(new.generate_state(1)[0])
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)


def _room_for(optimizer: ShardedOptimizer, prefix: str, stored: Collection[str], masters: bool) -> dict[str, Any]:
    """An optimizer's state to be filled from a checkpoint: of what it has, which before a first step is little."""
    state = f"{prefix}state."
    keys = [name.removeprefix(state).rsplit(".", 1) for name in stored if name.startswith(state)]
    optimizer.initialize_state({name for name, key in keys if key != "master"})
    room = optimizer.state_dict(masters=masters)
    there = {name for name, _ in keys}
    room["state"] = {name: values if name in there else {} for name, values in room["state"].items()}
    known = optimizer.optimizer.defaults  # what schedulers added may be missing, not what makes this optimizer
    room["param_groups"] = [
        {k: v for k, v in group.items() if k in known or f"{prefix}param_groups.{i}.{k}" in stored}
        for i, group in enumerate(room["param_groups"])
    ]
    return room
