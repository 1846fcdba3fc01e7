"""Evaluates named sets of texts whenever a run validates."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from tedlab.config import EvalDocuments, InTrainingConfig
from tedlab.data import TextDataModule
from tedlab.evaluation.scoring import scores
from tedlab.evaluation.sets import TextSet, read_set, result_of, windows_of
from tedlab.evaluation.windows import Window
from tedlab.module import LanguageModel


class NamedSets(Callback):
    """Logs ``val/<name>/loss``, ``perplexity`` and ``bits_per_byte`` of each set at each validation.

    The model computes as in validation: with the run's precision, and with its capacity if experts have one. Texts are
    end to end in samples of the model's ``sequence_length``, in micro-batches that are the same in every layout.
    :class:`tedlab.callbacks.Journal` passes the values to the loggers.

    Args:
        config: The sets.
        field: The field of a JSONL line that holds the text.
        micro_batch_size: Samples of a forward pass of one data rank.
        sequence_length: Inputs of a sample.
    """

    def __init__(self, config: InTrainingConfig, field: str, micro_batch_size: int, sequence_length: int) -> None:
        self.config, self.field = config, field
        self.micro_batch_size, self.sequence_length = micro_batch_size, sequence_length
        self._sets: list[tuple[TextSet, Sequence[Window]]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, TextDataModule)
        if self._sets:
            return
        for name, path in self.config.sets.items():
            texts = read_set(name, path, self.field, data.tokenizer)
            length = self.sequence_length
            samples = windows_of(texts, data.separator, EvalDocuments.PACKED, length, length)
            self._sets.append((texts, samples[: self.config.samples]))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"texts": {texts.name: texts.digest for texts, _ in self._sets}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Says which sets have other text than in the run that saved the checkpoint, under the same names."""
        for texts, _ in self._sets:
            if state_dict["texts"].get(texts.name, texts.digest) != texts.digest:
                rank_zero_warn(
                    f"eval.sets.{texts.name} has other text than when the checkpoint was saved: val/{texts.name}/loss "
                    "before and after are of different texts."
                )

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, LanguageModel)
        for texts, samples in self._sets:
            with trainer.precision_plugin.val_step_context():
                found = scores(pl_module.network, samples, self.micro_batch_size, self.sequence_length)
            metrics = result_of(texts, found).metrics(texts.name, "val")
            trainer.callback_metrics.update(
                {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
            )
