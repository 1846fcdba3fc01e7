"""What the installed Lightning offers, as it says itself: each name must have its row in the contract."""

import inspect

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks

BASES = {LightningModule: (ModelHooks, DataHooks, CheckpointHooks), LightningDataModule: (DataHooks,)}
NOT_CALLED = {"configure_sharded_model"}  # removed, but still there to say so


def trainer_arguments() -> list[str]:
    return list(inspect.signature(Trainer).parameters)


def methods_of(kind: type) -> list[str]:
    """Public names that a class or its hook classes define."""
    return sorted(
        {n for base in (kind, *BASES.get(kind, ())) for n in vars(base) if not n.startswith("_") and not n.isupper()}
    )


def hooks_of(kind: type) -> list[str]:
    """Those that Lightning calls."""
    names = (n for n in methods_of(kind) if inspect.isfunction(getattr(kind, n)))
    prefixes = ("on_", "setup", "teardown", "prepare_data", "configure_", "transfer_batch", "state_dict")
    return [n for n in names if n.startswith(prefixes) or n.endswith("_dataloader") if n not in NOT_CALLED]
