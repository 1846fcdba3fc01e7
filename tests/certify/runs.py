"""Certification inside the shared worker pool, with or without a bug planted into the processes of the layout."""

from collections.abc import Callable

import hydra
import pytest
import torch.distributed as dist
from omegaconf import OmegaConf

from tedlab.certify import record
from tedlab.certify.certificate import Execute
from tedlab.cli import CONF
from tedlab.config import TrainConfig
from tests.pool import WorkerPool

Plant = Callable[[pytest.MonkeyPatch], None]


def composed(*overrides: str) -> TrainConfig:
    """What ``python -m tedlab.certify <overrides>`` would certify."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", overrides=["output_dir=unused", "choices={}", "logger=none", *overrides])
    typed = OmegaConf.to_object(config)
    assert isinstance(typed, TrainConfig)
    return typed


def in_pool(pool: WorkerPool, plant: Plant | None = None) -> Execute:
    """Runs :func:`tedlab.certify.record` in the pool; ``plant`` changes the code of layouts, not of one process."""

    def execute(config: TrainConfig) -> None:
        pool.run(config.parallel.world_size, _record, config, plant)

    return execute


def _record(config: TrainConfig, plant: Plant | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if plant is not None and dist.get_world_size() > 1:
            plant(patch)
        record(config)
