"""Throughput of a run, from tokens to the share of what the hardware can do."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tedlab.callbacks import StepMetrics


def throughput(device: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Of 4 devices that take 5 s for 10 steps of 1000 tokens of 1 GFLOP."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    clock = iter([100.0, 105.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    trainer: Any = SimpleNamespace(
        world_size=4, precision="bf16-true", strategy=SimpleNamespace(root_device=torch.device(device)), global_step=0
    )
    metrics = StepMetrics(lambda a, b: 1000 * (b - a), lambda a, b: 10**12 * (b - a))
    metrics.on_train_start(trainer, None)  # type: ignore[arg-type]
    trainer.global_step = 10
    metrics.on_train_start(trainer, None)  # type: ignore[arg-type]
    return metrics.overall()


def test_flops_are_per_device_and_mfu_is_their_share_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert throughput("cuda:0", monkeypatch) == pytest.approx(
        {
            "perf/step_time_s": 0.5,
            "perf/tokens_per_second": 2000,
            "perf/tflops": 2000 / 4 / 1000,
            "perf/mfu": 2000 / 4 / 1000 / 312,
        }
    )


def test_a_cpu_has_no_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    values = throughput("cpu", monkeypatch)
    assert "perf/mfu" not in values
    assert values["perf/tflops"] == pytest.approx(0.5)
