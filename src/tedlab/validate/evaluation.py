"""Checks the sets of texts that a run evaluates at its validations."""

from tedlab.config import TrainConfig
from tedlab.data import TextDataModule
from tedlab.evaluation.names import check_names
from tedlab.evaluation.sets import read_set


def check_evaluation(config: TrainConfig) -> None:
    """Checks what can be checked without data.

    Raises:
        ValueError: If a set has a name that no metric can have, or nothing is validated.
    """
    if not config.eval.sets:
        return
    check_names(config.eval.sets, "eval.sets")
    if config.trainer.get("limit_val_batches") == 0:
        raise ValueError("eval.sets are evaluated at validations, and trainer.limit_val_batches is 0")


def check_sets(config: TrainConfig, data: object) -> None:
    """Reads the sets, so that a path without text is found before processes are launched.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a set has no text, or data of the run's module has no tokenizer.
    """
    if config.eval.sets and not isinstance(data, TextDataModule):
        raise ValueError(f"eval.sets are texts, and data.module={config.data.module} has no tokenizer for them")
    for name, path in config.eval.sets.items():
        assert isinstance(data, TextDataModule)
        read_set(name, path, config.data.field, data.tokenizer)
