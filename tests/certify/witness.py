"""tedlab's side of what the oracle judges: short runs of small models, recorded, with what they were given."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from tedlab.certify.record import CertificateRecorder, Record, assembled, packed, unpacked
from tedlab.config import TrainConfig
from tedlab.run import build
from tests.certify.runs import Plant, planted

STEPS = 4
SMALL = {
    **{"model.layers": 2, "model.hidden": 12, "model.heads": 4, "model.ffn": 14, "model.sequence_length": 6},
    **{"model.vocab_size": 260, "model.init_std": 0.3, "moe.num_experts": 6, "moe.capacity_multiple": 1},
    **{"moe.aux_loss": 0.1, "moe.z_loss": 0.05, "data.micro_batch_size": 3, "data.batch_size": 12},
    **{"optim.tile": 50, "optim.bucket_elements": 100, "optim.warmup_steps": 2, "optim.lr": 0.01},
    **{"optim.optimizer.eps": 1e-5, "trainer.max_steps": STEPS, "trainer.precision": "64-true"},
    **{"+trainer.enable_progress_bar": False},
    **{"data": "text", "data.validation_fraction": 0.5, "data.validation_samples": 12},
}
TODAY = {"model.activation": "swiglu", "model.bias": False, "model.norm": "rms", "model.positions": "rotary"}
SETTINGS: dict[str, dict[str, object]] = {
    "top1_clipped": {"moe.capacity_factor": 1.1, "moe.capacity_multiple": 3, "trainer.gradient_clip_val": 0.3},
    "top2_dropping_in_groups": {
        **{"moe.top_k": 2, "moe.capacity_factor": 0.7, "moe.capacity_groups": 3, "moe.every": 1},
        **{"model.tie_embeddings": False, "optim.schedule": "wsd", "optim.decay_fraction": 0.5, "optim.overlap": True},
    },
    "dropless_today": {
        **TODAY,
        **{"model.heads": 2, "moe.dispatch": "dropless", "moe.top_k": 2, "model.tie_embeddings": False},
        **{"model.loss_chunk": 7},
    },
    "dense_chunked_scaled": {
        **{"moe": "dense", "model.loss_chunk": 5, "optim.loss_scale": 1024, "trainer.gradient_clip_val": 0.3},
        **{"optim.schedule": "constant", "optim.zero": False},
    },
    "sequence_parallel": {"parallel.sequence": True, "moe.capacity_factor": 0.8, "moe.every": 1, "moe.top_k": 2},
}
MORE: dict[str, dict[str, object]] = {
    "ted": {"comm": "ted", "model.recompute.granularity": "block", "moe.capacity_factor": 0.9, "moe.every": 1},
    "ted_fused_dropless": {
        "comm": "ted_fused",
        "model.recompute.granularity": "block",
        "moe.dispatch": "dropless",
        "moe.top_k": 3,
    },
    "today_sequence": {
        **TODAY,
        **{"model.heads": 2, "parallel.sequence": True, "moe.dispatch": "dropless", "moe.every": 1},
        **{"model.recompute.granularity": "block", "comm.cac": True, "model.loss_chunk": 7},
    },
    "fused_step_untied": {"optim.tile": "fused", "model.tie_embeddings": False, "trainer.gradient_clip_val": 0.1},
    "listed_blocks_of_their_own_width": {
        **{"model.layers": 3, "moe.blocks": "[2,0]", "moe.ffn": 10, "moe.top_k": 2, "moe.dispatch": "dropless"},
    },
    "no_drops": {"moe.capacity_factor": "null", "moe.top_k": 3, "moe.every": 1, "optim.schedule": "wsd"},
}

ROUTERS: dict[str, dict[str, object]] = {
    "deepseek_v3_sequence_wise": {
        **{"moe.num_experts": 12, "moe.top_k": 3, "moe.every": 1, "moe.dispatch": "dropless"},
        **{"moe.router.scoring": "sigmoid", "moe.router.gates": "normalized", "moe.router.gate_scale": 2.5},
        **{"moe.router.expert_groups": 3, "moe.router.chosen_groups": 2, "moe.router.group_score": "top2"},
        **{"moe.router.bias_update": "sign", "moe.router.bias_rate": 0.0625, "moe.balance.scope": "sequence"},
        **{"model.recompute.granularity": "block"},
    },
    "global_of_kept_choices_recomputed": {
        **{"moe.top_k": 2, "moe.every": 1, "moe.capacity_factor": 0.7, "moe.balance.scope": "global_batch"},
        **{"moe.balance.dropped": False, "model.recompute.granularity": "block", "optim.overlap": True},
    },
}
PARTS: dict[str, dict[str, object]] = {
    "shared_experts_after_a_dense_block": {
        **{**TODAY, "model.heads": 2, "moe.dispatch": "dropless", "moe.top_k": 2, "moe.ffn": 10},
        **{"moe.every": 1, "moe.first_dense": 1, "moe.shared.experts": 2, "moe.shared.combine": "cg1"},
        **{"model.recompute.granularity": "block"},
    },
    "clamped_with_biases": {
        **{"model.activation": "clamped_swiglu", "model.swiglu_limit": 0.5, "moe.router.bias": True, "moe.every": 1},
        **{"moe.top_k": 2, "moe.router.gates": "softmax", "moe.shared.experts": 1, "moe.capacity_factor": 0.8},
    },
}
PAIRS: dict[str, object] = {"model.layers": 4, "moe.every": 2, "moe.shared.experts": 1, "moe.aux_loss": 0.1}
SHORTCUTS: dict[str, dict[str, object]] = {
    "pos1_in_every_block": {
        **{"moe.shortcut": "pos1", "moe.shared.experts": 1, "moe.every": 1, "moe.capacity_factor": 0.8},
        **{"moe.shared.combine": "cg2", "comm.shortcut_slot": 0},
    },
    "pos2": {
        **PAIRS,
        "moe.shortcut": "pos2",
        "moe.shared.combine": "cg1",
        "model.recompute.granularity": "block",
        "comm.overlap_shortcut": True,
    },
    "pos3_top2_sequence_dropless": {
        **{**PAIRS, "moe.shortcut": "pos3", "moe.top_k": 2, "moe.dispatch": "dropless", "parallel.sequence": True},
        **{"model.recompute.granularity": "block", "comm.cac": True, "moe.shared.combine": "cg2"},
        "comm.overlap_shortcut": True,
    },
    "dgmoe_ted": {
        **{**PAIRS, "moe.shared.experts": 0, "moe.shortcut": "dgmoe", "moe.capacity_factor": 0.8, "comm": "ted"},
        **{"model.recompute.granularity": "block", "moe.capacity_groups": 3, "moe.router.bias_update": "sign"},
    },
    "dgmoe_sequence_dropless": {
        **{**PAIRS, **TODAY, "model.heads": 2, "moe.shared.experts": 0, "moe.shortcut": "dgmoe"},
        **{"moe.dispatch": "dropless", "parallel.sequence": True, "moe.balance.scope": "global_batch"},
    },
}
MORE_ROUTERS: dict[str, dict[str, object]] = {
    "deepseek_v2_by_score": {
        **{"moe.top_k": 2, "moe.router.gates": "raw", "moe.router.gate_scale": 4, "moe.drop_policy": "probs"},
        **{"moe.router.expert_groups": 3, "moe.router.chosen_groups": 2, "moe.capacity_factor": 0.8, "comm": "ted"},
        **{"moe.balance.dropped": False, "model.recompute.granularity": "block"},
    },
    "gpt_oss_global_first": {
        **{"moe.top_k": 3, "moe.every": 1, "moe.dispatch": "dropless", "moe.router.gates": "softmax"},
        **{"moe.balance.scope": "global_batch", "moe.balance.choices": "first", "comm.dtd": True},
    },
    "global_sequence_parallel": {
        **{"moe.top_k": 2, "moe.every": 1, "parallel.sequence": True, "moe.capacity_factor": 0.8},
        **{"moe.balance.scope": "global_batch", "model.recompute.granularity": "block", "comm.cac": True},
        **{"moe.router.bias_update": "proportional", "moe.router.bias_rate": 0.5},
    },
    "proportional_biases_alone": {
        **{"moe.router.bias_update": "proportional", "moe.router.bias_rate": 0.25, "moe.aux_loss": 0},
        **{"moe.capacity_factor": 0.9, "model.recompute.granularity": "block", "model.recompute.early_stop": False},
    },
    "sigmoid_raw_sequence_wise_in_slices": {
        **{"parallel.sequence": True, "moe.router.scoring": "sigmoid", "moe.router.gates": "raw", "moe.every": 1},
        **{"moe.router.gate_scale": 0.5, "moe.balance.scope": "sequence", "moe.balance.choices": "first"},
        **{"moe.balance.dropped": False, "moe.capacity_factor": 0.7, "moe.top_k": 2},
    },
    "sigmoid_normalized_by_score_in_groups": {
        **{"moe.top_k": 3, "moe.router.scoring": "sigmoid", "moe.drop_policy": "probs", "moe.capacity_groups": 3},
        **{"moe.capacity_factor": 0.6, "moe.router.bias_update": "sign", "moe.router.bias_rate": 0.25},
        **{"moe.balance.scope": "sequence", "moe.balance.dropped": False},
    },
    "one_choice_normalized_and_one_softmax": {
        **{"moe.router.gates": "normalized", "moe.router.scoring": "sigmoid", "moe.balance.scope": "global_batch"},
        **{"moe.drop_policy": "probs", "moe.capacity_factor": 0.8, "moe.every": 1},
    },
}


@dataclass
class Observation:
    """What a run did, in the first process; None in the others.

    Attributes:
        record: of its steps.
        initial: a checkpoint of the weights that it started from.
        batches: of every step and data rank the micro-batches.
    """

    record: Record
    initial: Path
    batches: list[list[Tensor]]


class _Witness(CertificateRecorder):
    def __init__(self, directory: Path) -> None:
        super().__init__(piece=50)
        self.initial = directory / "initial.ckpt"
        self.batches: list[list[Tensor]] = [[]]

    def _provoke_overflow(self, trainer: Trainer) -> None:
        """Here no step is to be skipped."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.initial)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if len(self.batches[-1]) == trainer.accumulate_grad_batches:
            self.batches.append([])
        self.batches[-1].append(batch)


def observe(runs: Sequence[tuple[TrainConfig, Plant | None]]) -> list[Observation | None]:
    """Trains one configuration after the other, in every process of a world."""
    return [_trained(config, plant) for config, plant in runs]


def _trained(config: TrainConfig, plant: Plant | None) -> Observation | None:
    witness = _Witness(Path(config.output_dir))
    with planted(plant):
        trainer, module, data = build(config, [witness], logged=False)
        trainer.fit(module, data)
    everybody: list[Any] | None = [None] * dist.get_world_size() if trainer.is_global_zero else None
    dist.gather_object((packed(witness.parts), witness.batches), everybody)
    if everybody is None:
        return None
    parts, batches = zip(*everybody, strict=True)
    tensor = config.parallel.tensor
    for rank, its in enumerate(batches):  # tensor ranks read the same
        first = batches[rank - rank % tensor]
        assert all(
            a.equal(b) for ours, theirs in zip(its, first, strict=True) for a, b in zip(ours, theirs, strict=True)
        )
    of_steps = [[batch for its in of_step for batch in its] for of_step in zip(*batches[::tensor], strict=True)]
    return Observation(assembled([unpacked(*its) for its in parts]), witness.initial, of_steps)
