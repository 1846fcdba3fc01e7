"""Checks the arguments of Lightning's Trainer: those that a run sets itself, the values of others, and the whole."""

import inspect
import logging
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Trainer

from tedlab.config import TrainConfig
from tedlab.hints import did_you_mean
from tedlab.ranges import LARGEST, Range
from tedlab.strategy.contract import PRECISIONS

_NEEDED = ("devices", "num_nodes", "max_steps", "precision", "accelerator")
_EPOCHS = "Lightning's epochs would differ from the data's, and a resumed run go wrong"
_OURS: dict[str, tuple[tuple[object, ...], str]] = {  # arguments that are not the user's: harmless values, what to use
    "strategy": ((), "it is tedlab's; use parallel.… and comm.…"),
    "logger": ((), "use the group logger: logger=none, or +logger.NAME._target_=…"),
    "callbacks": ((), "use +callbacks.NAME._target_=…, beside tedlab's own"),
    "plugins": ((), "they follow from parallel.… and trainer.precision"),
    "default_root_dir": ((), "use hydra.run.dir"),
    "val_check_interval": ((), "use validate_every, which counts steps"),
    "check_val_every_n_epoch": ((), "use validate_every, which counts steps"),
    "fast_dev_run": ((False,), "use trainer.max_steps=1"),
    "limit_train_batches": ((1.0,), f"{_EPOCHS}; use trainer.max_steps"),
    "overfit_batches": ((0, 0.0), f"{_EPOCHS}; use data.path with less text"),
    "limit_val_batches": ((1.0, 0, 0.0), "use data.validation_samples, or 0 for no validation at all"),
    "limit_test_batches": ((), "a run does not test"),
    "limit_predict_batches": ((), "a run does not predict"),
    "enable_checkpointing": ((True,), "a run keeps its last checkpoint; checkpoint.every=null writes no other"),
    "barebones": ((False,), "a run logs and saves; use logger=none and checkpoint.every=null"),
    "gradient_clip_algorithm": (("norm", "value"), "gradients are clipped by their global norm, or element by element"),
    "reload_dataloaders_every_n_epochs": ((0,), "each epoch has an order of its own anyway"),
    "sync_batchnorm": ((False,), "no layer is a batch normalisation"),
    "model_registry": ((), "checkpoints stay in the run directory"),
}
_NUMBERS = {  # None stands for Lightning's default
    "devices": Range(1, 1 << 20, whole=True),
    "num_nodes": Range(1, 1 << 20, whole=True),
    "max_steps": Range(1, LARGEST, whole=True),
    "min_steps": Range(1, LARGEST, whole=True),
    "max_epochs": Range(1, LARGEST, also=(-1,), whole=True),
    "min_epochs": Range(1, LARGEST, whole=True),
    "num_sanity_val_steps": Range(0, LARGEST, also=(-1,), whole=True),
    "log_every_n_steps": Range(1, LARGEST, whole=True),
    "accumulate_grad_batches": Range(1, LARGEST, whole=True),
    "gradient_clip_val": Range(0),  # 0: no clipping
}
_WORDS: dict[str, tuple[object, ...]] = {
    "accelerator": ("cpu", "gpu", "cuda", "auto"),
    "precision": PRECISIONS,
    "deterministic": (None, True, False, "warn"),
    "profiler": (None, "simple", "advanced", "pytorch"),
    **dict.fromkeys(("benchmark", "enable_progress_bar", "enable_model_summary"), (None, True, False)),
    **dict.fromkeys(("detect_anomaly", "enable_autolog_hparams", "inference_mode"), (True, False)),
    "use_distributed_sampler": (True, False),  # the data module keeps its own sampler in either case
}


def check_trainer(config: TrainConfig) -> None:
    """Checks all of ``trainer``.

    Raises:
        ValueError: If an argument is invalid; the message says what would do.
    """
    trainer = config.trainer
    for name in _NEEDED:
        if name not in trainer:
            raise ValueError(f"trainer.{name} is missing; the presets trainer=cpu and trainer=gpu have it")
    known = _arguments()
    for name in trainer:
        if name not in known:
            raise ValueError(
                f"trainer.{name} is not an argument of lightning.Trainer.{did_you_mean(name, known)} "
                f"Valid: {', '.join(sorted(known))}"
            )
    for name, value in trainer.items():
        _check_argument(name, value)
    if trainer["precision"] == "16-mixed" and trainer["accelerator"] == "cpu":
        raise ValueError("trainer.precision=16-mixed needs a GPU (Lightning would run bf16 instead); use bf16-mixed")
    if (trainer.get("min_steps") or 0) > trainer["max_steps"]:
        raise ValueError(f"trainer.min_steps ({trainer['min_steps']}) exceeds max_steps ({trainer['max_steps']})")
    _try({name: value for name, value in trainer.items() if name not in _ELSEWHERE and value is not None})


def _check_argument(name: str, value: object) -> None:
    if name in _OURS:
        harmless, instead = _OURS[name]
        # None stands for Lightning's default; but a run sets some of the arguments without a harmless value itself.
        if not any(_same(value, other) for other in harmless) and not (value is None and harmless):
            raise ValueError(f"trainer.{name}={value} is not for this command: {instead}")
    elif name in _NUMBERS:
        _NUMBERS[name].check(f"trainer.{name}", value, optional=name not in _NEEDED)
    elif name in _WORDS and not any(_same(value, word) for word in _WORDS[name]):
        words = ["null" if word is None else str(word).lower() for word in _WORDS[name]]
        raise ValueError(f"trainer.{name}={value} is not supported; valid: {', '.join(words)}")


def _same(value: object, other: object) -> bool:
    """Returns whether values are equal and of one type: to Lightning, 1 is one batch, 1.0 all, and true neither."""
    return type(value) is type(other) and value == other


@cache  # a plan validates thousands of configurations
def _arguments() -> frozenset[str]:
    return frozenset(inspect.signature(Trainer).parameters)


# Arguments that are checked above, or that the constructor would set for the whole process or look for on this machine.
_ELSEWHERE = frozenset({*_OURS, "accelerator", "devices", "num_nodes", "precision", "deterministic", "benchmark"})
_tried: set[str] = set()  # arguments with which a Trainer could be built


def _try(arguments: Mapping[str, Any]) -> None:
    """Builds a Trainer that starts no process, touches no device and writes no file."""
    key = repr(sorted(arguments.items()))
    if key in _tried:
        return
    error = _refusal(arguments)
    if error is not None:
        alone = (name for name in arguments if _refusal({"max_steps": 1, name: arguments[name]}) is not None)
        name = next(alone, None)
        what = f"trainer.{name}={arguments[name]}" if name else "these values of trainer"
        raise ValueError(f"Lightning's Trainer refuses {what}: {error}")
    _tried.add(key)


def _refusal(arguments: Mapping[str, Any]) -> Exception | None:
    harmless: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "plugins": [LightningEnvironment()]}
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)  # the run's own Trainer reports devices
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Trainer(accelerator="cpu", devices=1, **harmless, **arguments)
    except Exception as error:  # the constructor can raise anything
        return error
    finally:
        log.setLevel(level)
    return None
