"""The matrix: layouts × routers, capacity, ZeRO, tiles, accumulation, clipping, optimizers, each against one process.

A cell compares everything that :func:`tedlab.certify.certify` does, and most continue the layout's checkpoint in one
process. ``python -m tests.certify.test_matrix`` prints a table of the largest errors.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tedlab.certify import Row, certify
from tests.certify.runs import Case, certified, composed, in_pool
from tests.pool import WorkerPool
from tests.selection import asked_of
from tests.test_parity import LAYOUTS as COMPARED

Layout = tuple[int, ...]  # processes, tensor, expert, and expert_tensor if folded; up to D_e = 8 replicas
LAYOUTS = [
    *((2, 2, 1), (2, 1, 2), (2, 1, 1)),
    *((4, 4, 1), (4, 1, 4), (4, 1, 1), (4, 2, 2), (4, 2, 1), (4, 1, 2)),
    *((8, 2, 2), (8, 4, 2), (8, 2, 4), (8, 1, 8), (8, 1, 4), (8, 1, 1)),
]
EXPERTS_PER_RANK = "experts_per_rank"
ACCUMULATED = "accumulated"
TODAY: dict[str, object] = {  # a model like OLMoE
    **{"model.activation": "swiglu", "model.bias": False, "model.norm": "rms", "model.positions": "rotary"}
}
JOBS: dict[str, dict[str, object]] = {
    "top1_clipped": {EXPERTS_PER_RANK: 2, ACCUMULATED: 2, "trainer.gradient_clip_val": 0.05},
    "many_dropped_no_zero": {
        **{EXPERTS_PER_RANK: 2, "moe.capacity_factor": 0.5, "moe.capacity_multiple": 1},
        **{"optim.zero": False, "optim.tile": "null", "optim.schedule": "constant"},
    },
    "top2_none_dropped_overlapped": {
        **{EXPERTS_PER_RANK: 4, "moe.top_k": 2, "moe.capacity_factor": "null", "moe.every": 1},
        **{"optim.overlap": True, ACCUMULATED: 2},
    },
    "one_expert_per_rank_sgd": {
        **{EXPERTS_PER_RANK: 1, "trainer.gradient_clip_val": "null", "optim.tile": 7},
        **{"optim": "sgd", "optim.optimizer.momentum": 0.9},
    },
    # Three tokens for four or more experts: some get none.
    "starved_experts": {EXPERTS_PER_RANK: 4, "model.sequence_length": 3, "data.micro_batch_size": 1, ACCUMULATED: 2},
    "losses_untied_fused": {
        **{EXPERTS_PER_RANK: 2, "moe.z_loss": 0.01, "moe.aux_loss": 0.1, "model.tie_embeddings": False},
        **{"optim.tile": "fused", "optim.schedule": "wsd"},
    },
    "deepspeed_top1": {
        **{EXPERTS_PER_RANK: 2, "moe.gating": "deepspeed_top1", "moe.random_token_selection": False},
        **{"moe.capacity_factor": 0.8, "optim.zero": False, "optim.overlap": True},
    },
    "fp16_scaled": {EXPERTS_PER_RANK: 2, "trainer.precision": "16-true", "optim.tile": 50, "moe.top_k": 2},
    "ted": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, "comm": "ted", "model.recompute.granularity": "block"},
        **{"moe.capacity_factor": 0.7, "model.recompute.early_stop": False},
    },
    "ted_fused_sharded": {
        **{
            EXPERTS_PER_RANK: 2,
            "comm": "ted_fused",
            "comm.cac": "shard",
            "model.recompute.granularity": "block",
            "moe.top_k": 2,
        },
        **{"moe.capacity_factor": 0.6, "moe.capacity_multiple": 1, "optim.overlap": True},
    },
    "sequence": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, "parallel.sequence": True, "moe.capacity_factor": 0.7},
        **{"moe.z_loss": 0.01, "moe.aux_loss": 0.1, "optim.overlap": True, "model.tie_embeddings": False},
    },
    "sequence_cac": {
        **{EXPERTS_PER_RANK: 1, "parallel.sequence": True, "model.recompute.granularity": "block", "comm.cac": True},
        **{"optim.zero": False, "moe.every": 1},
    },
    "deepspeed_topk": {
        **{EXPERTS_PER_RANK: 2, "moe.gating": "deepspeed_topk", "moe.top_k": 2, "moe.drop_policy": "position"},
        **{"moe.capacity_factor": 0.8, ACCUMULATED: 2},
    },
    "dropless_top2": {EXPERTS_PER_RANK: 2, ACCUMULATED: 2, "moe.dispatch": "dropless", "moe.top_k": 2, "moe.every": 1},
    "dropless_recomputed": {
        **{EXPERTS_PER_RANK: 4, "moe.dispatch": "dropless", "model.recompute.granularity": "block", "moe.z_loss": 0.01},
        **{"model.recompute.early_stop": False, "optim.overlap": True, "optim.zero": False},
    },
    "dropless_ted": {
        **{EXPERTS_PER_RANK: 2, "moe.dispatch": "dropless", "comm": "ted", "model.recompute.granularity": "block"},
        **{"model.sequence_length": 3, "data.micro_batch_size": 1, "moe.top_k": 2},  # T does not divide the rows
    },
    "dropless_ted_fused_sharded": {
        **{EXPERTS_PER_RANK: 2, "moe.dispatch": "dropless", "comm": "ted_fused", "comm.cac": "shard"},
        **{"model.recompute.granularity": "block", ACCUMULATED: 2},
    },
    "dropless_sequence": {
        **{EXPERTS_PER_RANK: 2, "moe.dispatch": "dropless", "parallel.sequence": True, "moe.top_k": 2},
        **{"model.recompute.granularity": "block", "comm.cac": True},
    },
    "today": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, **TODAY, "moe.dispatch": "dropless", "moe.top_k": 2},
        **{"model.tie_embeddings": False, "model.loss_chunk": 7},
    },
    "today_dense_chunked": {EXPERTS_PER_RANK: 1, **TODAY, "moe.every": 2, "model.loss_chunk": 5, "optim.overlap": True},
    "today_sequence": {
        **{EXPERTS_PER_RANK: 2, **TODAY, "parallel.sequence": True, "moe.dispatch": "dropless", "model.loss_chunk": 7},
        **{"model.recompute.granularity": "block", "comm.cac": True},
    },
    "rotary_ted": {
        **{EXPERTS_PER_RANK: 2, "model.positions": "rotary", "model.norm": "rms", "comm": "ted"},
        **{"model.recompute.granularity": "block", "model.loss_chunk": 5},
    },
}
MUON: dict[str, dict[str, object]] = {
    "muon_clipped": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, "optim": "muon", "trainer.gradient_clip_val": 0.05, "optim.tile": 50},
        **{"optim.groups": "[{pattern: '*.experts.*', lr_factor: 2}]"},
    },
    "muon_no_zero": {EXPERTS_PER_RANK: 2, "optim": "muon", "optim.zero": False, "optim.tile": "null"},
    "muon_shared_keys_in_slices": {  # queries apart from keys and values, which tensor ranks share where there are more
        **{EXPERTS_PER_RANK: 3, **TODAY, "optim": "muon", "model.kv_heads": 2, "moe.dispatch": "dropless"},
        **{"moe.top_k": 2, "model.tie_embeddings": False, "optim.overlap": True, "parallel.sequence": True},
    },
    "muon_latent": {
        **{EXPERTS_PER_RANK: 2, **TODAY, "optim": "muon", "model.attention.latent.kv_rank": 8, "moe.top_k": 2},
        **{"optim.optimizer.nesterov": False, "trainer.precision": "16-true"},
    },
}
JOBS |= MUON
DOCUMENTS: dict[str, dict[str, object]] = {
    "documents_masked": {EXPERTS_PER_RANK: 2, ACCUMULATED: 2, "data.documents": "masked", "moe.capacity_factor": 0.7},
    "documents_best_fit_in_slices": {
        **{EXPERTS_PER_RANK: 2, **TODAY, "data.documents": "masked", "data.packing": "best_fit"},
        **{"parallel.sequence": True, "moe.dispatch": "dropless", "model.recompute.granularity": "block"},
        **{"comm.cac": True, "model.loss_chunk": 7},
    },
    "documents_best_fit_beside_each_other": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, "data.documents": "masked", "data.packing": "best_fit"},
        **{"moe.balance.scope": "global_batch", "moe.aux_loss": 0.1, "model.recompute.granularity": "block"},
        **{"comm.interleave": True},
    },
}
JOBS |= DOCUMENTS
RECOMPUTED: dict[str, object] = {"model.recompute.granularity": "block"}
RAMPS: dict[str, dict[str, object]] = {
    "ramp": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 6, "moe.capacity_factor": 0.7, "optim.overlap": True},
        "data.ramp": "[{until: 5, batch_size: ONE_EACH, sequence_length: 8}, {until: 9, sequence_length: 16}]",
    },
    "ramp_of_rows_in_slices": {
        **{EXPERTS_PER_RANK: 2, **TODAY, "parallel.sequence": True, "moe.dispatch": "dropless", "moe.top_k": 2},
        **{"model.recompute.granularity": "block", "comm.cac": True, "model.loss_chunk": 7, "optim": "muon"},
        "data.ramp": "[{until: 5, sequence_length: 16}]",
    },
    "ramp_of_documents_and_a_global_balance": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 3, "data.documents": "masked", "data.packing": "best_fit"},
        **{"moe.balance.scope": "global_batch", "moe.aux_loss": 0.1},
        "data.ramp": "[{until: 5, batch_size: ONE_EACH, sequence_length: 16}]",
    },
}
JOBS |= RAMPS
AVERAGED: dict[str, dict[str, object]] = {
    "averaged": {EXPERTS_PER_RANK: 2, ACCUMULATED: 2, "average.kind": "ema", "moe.capacity_factor": 0.7, **RECOMPUTED},
    "averaged_mean_no_zero": {
        **{EXPERTS_PER_RANK: 2, "average.kind": "mean", "average.start": 1, "optim.zero": False},
        **{"parallel.sequence": True, "moe.router.bias_update": "sign", "moe.top_k": 2, **TODAY},
    },
}
JOBS |= AVERAGED
NARROW: dict[str, dict[str, object]] = {
    "narrow_moments": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, "optim": "adamw_bf16", "optim.tile": 50, "optim.overlap": True},
        **{"moe.top_k": 2, "trainer.gradient_clip_val": 0.05},
    },
    "narrow_moments_to_the_nearest": {
        **{EXPERTS_PER_RANK: 2, "optim": "adamw_bf16", "optim.optimizer.rounding": "nearest", "optim.zero": False},
        **{"optim.tile": "null", "trainer.precision": "16-true"},
    },
}
JOBS |= NARROW
SIGMOID: dict[str, object] = {"moe.router.scoring": "sigmoid", "moe.router.gates": "normalized"}
GLOBAL: dict[str, object] = {"moe.balance.scope": "global_batch", "moe.aux_loss": 0.1, "moe.z_loss": 0.01}
ROUTERS: dict[str, dict[str, object]] = {
    "deepseek_v3_dropless": {
        **{EXPERTS_PER_RANK: 4, ACCUMULATED: 2, **RECOMPUTED, "moe.dispatch": "dropless", "moe.top_k": 2},
        **{**SIGMOID, "moe.router.gate_scale": 2.5, "moe.router.expert_groups": 2, "moe.router.group_score": "top2"},
        **{"moe.router.bias_update": "sign", "moe.balance.scope": "sequence", "moe.aux_loss": 0.1},
    },
    "global_balance_of_kept_choices": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, **RECOMPUTED, **GLOBAL, "moe.top_k": 2, "moe.capacity_factor": 0.7},
        **{"moe.balance.dropped": False, "optim.overlap": True, "moe.every": 1},
    },
    "global_balance_of_one_micro_batch_dropless": {
        **{EXPERTS_PER_RANK: 2, **RECOMPUTED, **GLOBAL, "moe.dispatch": "dropless", "moe.balance.choices": "first"},
        **{"moe.top_k": 2, "moe.router.bias_update": "proportional", "optim.zero": False},
    },
    "global_balance_ted_biased": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, **RECOMPUTED, **GLOBAL, "comm": "ted", "moe.top_k": 2},
        **{"moe.router.bias_update": "proportional", "model.recompute.early_stop": False},
    },
    "sequence_wise_in_slices_by_score": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, "parallel.sequence": True, "moe.drop_policy": "probs", **SIGMOID},
        **{"moe.balance.scope": "sequence", "moe.balance.dropped": False, "moe.aux_loss": 0.1, "moe.top_k": 2},
        **{"moe.capacity_factor": 0.7, "moe.capacity_multiple": 1, "moe.router.bias_update": "sign"},
    },
    "global_balance_in_slices": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, **RECOMPUTED, **GLOBAL, "parallel.sequence": True, "comm.cac": True},
        **{"moe.dispatch": "dropless", "moe.router.noise": "normal", "moe.router.bias_update": "sign"},
    },
    "noisy_jittered_ted": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, **RECOMPUTED, "comm": "ted", "moe.top_k": 2},
        **{"moe.router.noise": "gumbel", "moe.router.noise_std": 0.5, "moe.router.jitter": 0.1},
    },
    "noisy_groups_by_score": {
        **{EXPERTS_PER_RANK: 4, **RECOMPUTED, "moe.drop_policy": "probs", "moe.router.gates": "raw"},
        **{"moe.router.expert_groups": 2, "moe.router.gate_scale": 3, "moe.router.noise": "normal"},
        **{"moe.capacity_factor": 0.6, "moe.capacity_multiple": 1, "moe.router.jitter": 0.2, "optim.overlap": True},
    },
    "softmax_of_chosen_by_score": {
        **{EXPERTS_PER_RANK: 2, "moe.drop_policy": "probs", "moe.router.gates": "softmax", "moe.top_k": 2},
        **{"moe.capacity_factor": 0.6, "moe.capacity_multiple": 1, ACCUMULATED: 2, "moe.every": 1},
    },
    "hash": {EXPERTS_PER_RANK: 2, **RECOMPUTED, "moe.gating": "hash", "moe.dispatch": "dropless", "moe.top_k": 2},
    "hash_in_slices": {EXPERTS_PER_RANK: 2, ACCUMULATED: 2, "parallel.sequence": True, "moe.gating": "hash"},
    "random": {EXPERTS_PER_RANK: 2, **RECOMPUTED, ACCUMULATED: 2, "moe.gating": "random", "moe.top_k": 2},
    "random_in_slices": {
        **{EXPERTS_PER_RANK: 2, **RECOMPUTED, "parallel.sequence": True, "moe.gating": "random"},
        **{"moe.dispatch": "dropless", ACCUMULATED: 2},
    },
    "round_robin": {EXPERTS_PER_RANK: 2, ACCUMULATED: 2, "moe.gating": "round_robin", "moe.top_k": 2, "moe.every": 1},
    "expert_choice": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, **RECOMPUTED, "moe.gating": "expert_choice", "moe.top_k": 2},
        **{"moe.router.scoring": "sigmoid", "moe.capacity_multiple": 1},
    },
    "expert_choice_in_slices": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, **RECOMPUTED, "moe.gating": "expert_choice", "comm.cac": True},
        **{"parallel.sequence": True, "moe.capacity_multiple": 1, "moe.router.noise": "normal"},
    },
}
DEEPSEEK: dict[str, object] = {  # a dense block, then experts of another width beside shared ones
    **{"moe.every": 1, "moe.first_dense": 1, "moe.ffn": 64, "moe.shared.experts": 2, "moe.top_k": 2, **TODAY}
}
BLOCKS: dict[str, dict[str, object]] = {
    "shared_dropless": {EXPERTS_PER_RANK: 2, ACCUMULATED: 2, **DEEPSEEK, **RECOMPUTED, "moe.dispatch": "dropless"},
    "shared_weighted_ted": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, **DEEPSEEK, **RECOMPUTED, "comm": "ted", "moe.shared.combine": "cg1"},
        **{"model.bias": True, "moe.capacity_factor": 0.8, "moe.blocks": "[0,1]"},
    },
    "shared_in_slices": {
        **{EXPERTS_PER_RANK: 2, **DEEPSEEK, **RECOMPUTED, "parallel.sequence": True, "comm.cac": True},
        **{"moe.shared.combine": "cg1", "moe.shared.ffn": 32, "moe.dispatch": "dropless", "moe.router.bias": True},
    },
    "clamped_in_slices": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, "model.activation": "clamped_swiglu", "model.swiglu_limit": 0.3},
        **{"moe.router.bias": True, "moe.router.gates": "softmax", "moe.every": 1, "moe.top_k": 2},
        **{"parallel.sequence": True, "moe.shared.experts": 1, "moe.capacity_factor": 0.8, "optim.overlap": True},
    },
}
PAIR: dict[str, object] = {"moe.shared.experts": 1, "comm.overlap_shortcut": True, ACCUMULATED: 2}
SHORTCUTS: dict[str, dict[str, object]] = {
    "pos1_every_block_dropless": {
        **{EXPERTS_PER_RANK: 2, **PAIR, **RECOMPUTED, "moe.shortcut": "pos1", "moe.every": 1, "comm.cac": True},
        **{"moe.dispatch": "dropless", "moe.shared.combine": "cg2", "moe.top_k": 2},
    },
    "pos2_ted": {
        **{EXPERTS_PER_RANK: 2, **PAIR, **RECOMPUTED, "moe.shortcut": "pos2", "comm": "ted"},
        **{"moe.shared.combine": "cg1", "moe.capacity_factor": 0.8, "optim.overlap": True, "comm.shortcut_slot": 1},
    },
    "pos3_in_slices": {
        **{EXPERTS_PER_RANK: 2, **PAIR, "moe.shortcut": "pos3", "parallel.sequence": True, **TODAY},
        **{"moe.shared.combine": "cg2", "moe.dispatch": "dropless", "comm.shortcut_slot": 4, "moe.every": 2},
    },
    "dgmoe_dealt": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, **RECOMPUTED, "moe.shortcut": "dgmoe", "comm": "ted_fused"},
        **{"moe.dispatch": "dropless", "optim.overlap": True},
    },
    "dgmoe_in_slices": {
        **{EXPERTS_PER_RANK: 2, "moe.shortcut": "dgmoe", "parallel.sequence": True, "moe.capacity_factor": 0.8},
    },
}
TRAINED: dict[str, dict[str, object]] = {
    "frozen_router_experts_faster": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, "moe.top_k": 2, "moe.every": 1, "moe.dispatch": "dropless"},
        "optim.groups": "[{pattern: '*.router.*', frozen: true}, {pattern: '*.experts.*', lr_factor: 3}]",
    },
    "experts_alone_ted": {
        **{EXPERTS_PER_RANK: 2, "comm": "ted", "model.recompute.granularity": "block", "optim.overlap": True},
        "optim.groups": "[{pattern: '*.experts.*', weight_decay: 0.3}, {pattern: '*', frozen: true}]",
    },
}
OVERLAP: dict[str, dict[str, object]] = {
    "overlapped_ted": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, **DEEPSEEK, **RECOMPUTED, "comm": "ted", "comm.chunks": 2},
        **{"comm.overlap_shared": True, "moe.shared.combine": "cg1", "moe.capacity_factor": 0.8, "optim.overlap": True},
    },
    "overlapped_in_slices": {
        **{EXPERTS_PER_RANK: 2, **DEEPSEEK, **RECOMPUTED, "parallel.sequence": True, "comm.cac": True},
        **{"comm.overlap_shared": True, "comm.chunks": 3, "moe.capacity_factor": 1.5},
    },
}
OVERLAP |= {
    "rows_in_chunks": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, **TODAY, "moe.dispatch": "dropless", "moe.top_k": 2, "moe.every": 1},
        **{"comm.chunks": 2, "optim.overlap": True},
    },
    "rows_in_chunks_ted": {
        **{EXPERTS_PER_RANK: 2, **RECOMPUTED, "comm": "ted", "moe.dispatch": "dropless", "moe.top_k": 2},
        **{"comm.chunks": 3, "model.sequence_length": 3, "data.micro_batch_size": 1},  # T does not divide the rows
    },
    "rows_in_chunks_in_slices": {
        **{EXPERTS_PER_RANK: 2, **DEEPSEEK, **RECOMPUTED, "parallel.sequence": True, "comm.cac": "shard"},
        **{"moe.dispatch": "packed", "comm.chunks": 2, "comm.overlap_shared": True, "moe.capacity_factor": 0.8},
    },
}
OVERLAP |= {
    "micro_batches_beside_each_other": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, **RECOMPUTED, "comm.interleave": True, "moe.dispatch": "dropless"},
        **{"moe.router.noise": "gumbel", "moe.router.jitter": 0.1, "moe.top_k": 2, "optim.overlap": True},
    },
    "micro_batches_beside_each_other_ted": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, **DEEPSEEK, **RECOMPUTED, "comm": "ted", "comm.interleave": True},
        **{"comm.overlap_shared": True, "moe.capacity_factor": 0.8},
    },
}
PILOT: dict[str, object] = {
    **{EXPERTS_PER_RANK: 2, "moe.dispatch": "dropless", "moe.top_k": 2, "moe.every": 1, "comm.dedup": "rank"}
}
PILOTS: dict[str, dict[str, object]] = {
    "pilots": {**PILOT, ACCUMULATED: 2, **RECOMPUTED, "moe.z_loss": 0.01, "optim.overlap": True},
    "pilots_ted_fused": {
        **{**PILOT, **RECOMPUTED, "comm": "ted_fused", "model.recompute.early_stop": False},
        **{"model.sequence_length": 3, "data.micro_batch_size": 1},  # T does not divide the tokens
    },
    "pilots_in_slices": {
        **{**PILOT, ACCUMULATED: 2, **RECOMPUTED, **TODAY, "parallel.sequence": True, "comm.cac": "shard"},
        **{"moe.shared.experts": 1, "comm.overlap_shared": True},
    },
}
GATHERED: dict[str, object] = {**PILOT, "comm.dedup": "group"}
PILOTS |= {
    "gathered": {**GATHERED, ACCUMULATED: 2, **RECOMPUTED, "moe.z_loss": 0.01, "optim.overlap": True},
    "gathered_ted_fused": {
        **{**GATHERED, **RECOMPUTED, "comm": "ted_fused", "model.recompute.early_stop": False},
        **{"model.sequence_length": 3, "data.micro_batch_size": 1},  # T does not divide the tokens
    },
    "gathered_in_slices": {
        **{**GATHERED, ACCUMULATED: 2, **RECOMPUTED, **TODAY, "parallel.sequence": True, "comm.cac": "shard"},
        **{"moe.shared.experts": 1, "comm.overlap_shared": True},
    },
}
NODE_PILOT: dict[str, object] = {**PILOT, **RECOMPUTED, "comm.dedup": "node", "comm.ranks_per_node": 4}
NODES: dict[str, dict[str, object]] = {  # in some layouts of several nodes, with several processes of a group on each
    "node_pilots": {**NODE_PILOT, ACCUMULATED: 2, "comm.ranks_per_node": 2, "comm.cac": True, "optim.overlap": True},
    "node_pilots_ted_fused": {
        **{**NODE_PILOT, "comm": "ted_fused", "model.sequence_length": 3, "data.micro_batch_size": 1}
    },
    "node_pilots_in_slices": {**NODE_PILOT, **TODAY, "parallel.sequence": True, "comm.cac": "shard"},
    "hierarchical": {
        **{EXPERTS_PER_RANK: 2, **RECOMPUTED, "moe.dispatch": "dropless", "moe.top_k": 2, "comm.chunks": 2},
        **{"comm.hierarchical": True, "comm.ranks_per_node": 2},
    },
    "node_pilots_sliced": {  # X-MoE's own system, if experts are folded
        **{**NODE_PILOT, ACCUMULATED: 2, "moe.slice": "tokens", "comm.ranks_per_node": 2, "comm.cac": True},
        **{"moe.shared.experts": 1, "comm.overlap_shared": True, "optim.overlap": True},
    },
}
LENDING: dict[str, dict[str, object]] = {
    "lent": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, "moe.dispatch": "dropless", "moe.top_k": 2, "moe.every": 1},
        **{"moe.lend.policy": "llep", "optim.overlap": True},
    },
    "lent_ted": {
        **{EXPERTS_PER_RANK: 4, ACCUMULATED: 2, **RECOMPUTED, **TODAY, "comm": "ted", "moe.dispatch": "dropless"},
        **{"moe.lend.policy": "llep", "moe.top_k": 2, "model.sequence_length": 3, "data.micro_batch_size": 1},
    },
    "even_ted_fused": {
        **{EXPERTS_PER_RANK: 2, **RECOMPUTED, "comm": "ted_fused", "moe.dispatch": "dropless", "optim.zero": False},
        **{"moe.lend.policy": "even", "moe.every": 1, "comm.cac": "[experts.lend,dispatch.all_to_all]"},
    },
    "lent_in_slices": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, **RECOMPUTED, "comm.cac": True, "parallel.sequence": True},
        **{"moe.dispatch": "dropless", "moe.top_k": 2, "moe.lend.policy": "llep"},
    },
}
PACK: dict[str, object] = {EXPERTS_PER_RANK: 2, ACCUMULATED: 2, **RECOMPUTED, "moe.dispatch": "packed", "moe.every": 1}
PACKED: dict[str, dict[str, object]] = {
    "packed_ted": {**PACK, "comm": "ted", "moe.top_k": 2, "moe.capacity_factor": 0.6, "moe.capacity_multiple": 1},
    "packed_in_slices_by_score": {
        **{**PACK, "parallel.sequence": True, "comm.cac": True, "moe.drop_policy": "probs", **SIGMOID},
        **{"moe.capacity_factor": 0.7, "optim.overlap": True},
    },
}
SLICED: dict[str, dict[str, object]] = {
    "sliced": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, **RECOMPUTED, "moe.slice": "tokens", "moe.capacity_factor": 0.7},
        **{**GLOBAL, "comm.cac": "shard", "optim.overlap": True, "moe.every": 1},
    },
    "sliced_dropless_shared": {
        **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, **DEEPSEEK, **RECOMPUTED, "moe.slice": "tokens", "comm.cac": True},
        **{"moe.dispatch": "dropless", "moe.shared.combine": "cg2", "comm.overlap_shared": True},
        **{"moe.router.bias_update": "sign", "moe.router.noise": "gumbel"},
    },
    "sliced_shortcut": {
        **{EXPERTS_PER_RANK: 2, **PAIR, "moe.shortcut": "pos2", "moe.slice": "tokens", "moe.balance.scope": "sequence"},
        **{"moe.shared.combine": "cg1", "moe.capacity_factor": 0.8},
    },
}
JOBS |= ROUTERS | BLOCKS | SHORTCUTS | TRAINED | OVERLAP | PILOTS | LENDING | PACKED | SLICED | NODES
JOBS["mup_muon"] = {  # matrices, what AdamW steps of them, and the rest have rates of their own
    **{EXPERTS_PER_RANK: 2, ACCUMULATED: 2, **DEEPSEEK, "model.parametrization": "mup", "model.base_hidden": 64},
    **{"model.tie_embeddings": False, "optim": "muon", "optim.overlap": True},
    **{"moe.shared.combine": "cg1", "moe.shared.ffn": 32},
    "optim.groups": "[{pattern: '*.experts.*', lr_factor: 2}]",
}
TENSOR_ONLY = (  # toggles that do nothing without
    *("ted", "ted_fused_sharded", "sequence", "sequence_cac"),
    *("dropless_ted", "dropless_ted_fused_sharded", "dropless_sequence", "today_sequence", "rotary_ted"),
    *("sequence_wise_in_slices_by_score", "global_balance_in_slices", "global_balance_ted_biased"),
    *("shared_weighted_ted", "shared_in_slices", "clamped_in_slices"),
    *("noisy_jittered_ted", "hash_in_slices", "random_in_slices", "expert_choice_in_slices"),
    *("experts_alone_ted", "overlapped_ted", "overlapped_in_slices", "pos2_ted", "pos3_in_slices"),
    *("rows_in_chunks_ted", "rows_in_chunks_in_slices", "pilots_ted_fused", "pilots_in_slices"),
    *("gathered_ted_fused", "gathered_in_slices"),
    *("micro_batches_beside_each_other_ted", "dgmoe_dealt", "dgmoe_in_slices"),
    *("node_pilots_ted_fused", "node_pilots_in_slices", "node_pilots_sliced"),
    *("lent_ted", "even_ted_fused", "lent_in_slices", *PACKED, *SLICED, "muon_shared_keys_in_slices"),
    *("documents_best_fit_in_slices", "ramp_of_rows_in_slices", "averaged_mean_no_zero"),
)
WHOLE = ((4, 2, 2), (4, 4, 1))  # all jobs; of the others every second, of eight processes, which take longest, a third
# CI's cells: of every layout that test_parity.py has not, and every setting but most routers' once.
SAMPLED: dict[Layout, tuple[str, ...]] = {
    (4, 2, 2): (  # what sends tokens in ways of its own, beside what tensor ranks do
        *("muon_clipped", "ted_fused_sharded", "shared_weighted_ted", "experts_alone_ted"),
        *("deepseek_v3_dropless", "global_balance_in_slices", "noisy_jittered_ted"),
        *("overlapped_ted", "overlapped_in_slices", "micro_batches_beside_each_other_ted"),
        *("pos1_every_block_dropless", "pos3_in_slices", "dgmoe_in_slices"),
        *("pilots_ted_fused", "pilots_in_slices", "gathered_in_slices"),
        *("even_ted_fused", "lent_in_slices", *PACKED, "sliced_dropless_shared", "sliced_shortcut"),
        *("ramp_of_rows_in_slices", "ramp_of_documents_and_a_global_balance"),
        *("narrow_moments_to_the_nearest", "muon_latent", "mup_muon"),
    ),
    (2, 2, 1): ("today_sequence", "clamped_in_slices", "averaged_mean_no_zero", "documents_best_fit_in_slices"),
    (2, 1, 2): (
        *("frozen_router_experts_faster", "one_expert_per_rank_sgd", "gathered", "lent"),
        *("micro_batches_beside_each_other", "global_balance_of_kept_choices"),
    ),
    (2, 1, 1): ("averaged", "documents_masked", "narrow_moments", "starved_experts"),
    (4, 4, 1): ("many_dropped_no_zero", "muon_shared_keys_in_slices"),
    (4, 1, 4): ("node_pilots", "hierarchical"),
    (4, 1, 1): ("dropless_top2", "muon_no_zero"),
    (4, 2, 1): ("rotary_ted",),
    (4, 1, 2): ("ramp", "deepspeed_topk"),
    (8, 2, 2): (),
    (8, 4, 2): (),
    (8, 2, 4): ("node_pilots_in_slices",),
    (8, 1, 8): ("deepspeed_top1",),
    (8, 1, 4): ("losses_untied_fused",),
    (8, 1, 1): (),
}
CELLS = [
    (layout, job)
    for (number, layout), (place, job) in itertools.product(enumerate(LAYOUTS), enumerate(JOBS))
    if (number + place) % (3 if layout[0] == 8 else 2) == 0
    or (job in NODES and layout[2] > 2)
    or layout in WHOLE
    or job in SAMPLED[layout]
    if layout[1] > 1 or job not in TENSOR_ONLY
    if layout[2] * int(str(JOBS[job][EXPERTS_PER_RANK])) >= int(str(JOBS[job].get("moe.top_k", 1)))
]
SAMPLE = [(layout, job) for layout, jobs in SAMPLED.items() for job in jobs]
FOLDED: dict[Layout, tuple[str, ...]] = {  # CI's cells of folded layouts, each of which has a fifth of the jobs
    (4, 2, 4, 1): ("gathered_ted_fused", "node_pilots_sliced"),
    (4, 1, 2, 2): ("top2_none_dropped_overlapped",),
    (4, 4, 2, 2): ("pos2_ted",),
    (8, 2, 2, 4): ("dropless_sequence",),
    (8, 4, 4, 1): ("sliced",),
}


def folds(layout: Layout, job: str) -> bool:
    """Whether a folded layout may have the job. If it gathers and does not fuse, it sums rows, which pilots are not."""
    _, tensor, _, expert_tensor = layout
    settings = JOBS[job]
    own = (
        tensor == 1 or "moe.slice" in settings or "parallel.sequence" in settings or settings.get("comm") == "ted_fused"
    )
    return job not in LENDING and (own or expert_tensor == 1 or "comm.dedup" not in settings)


FOLDED_CELLS = [
    (layout, job)
    for place, (layout, sampled) in enumerate(FOLDED.items())
    for number, job in enumerate(JOBS)
    if job in sampled or (number + place) % 5 == 0
    if folds(layout, job) and (layout[1] > 1 or job not in TENSOR_ONLY)
    if layout[2] * int(str(JOBS[job][EXPERTS_PER_RANK])) >= int(str(JOBS[job].get("moe.top_k", 1)))
]
SAMPLE_OF_ALL = {*SAMPLE, *((layout, job) for layout, jobs in FOLDED.items() for job in jobs)}


def marked(layout: Layout, job: str) -> object:
    """CI runs a sample of the cells."""
    marks = [pytest.mark.slow if (layout, job) in SAMPLE_OF_ALL else pytest.mark.exhaustive]
    return pytest.param(layout, job, marks=marks, id=f"{'_'.join(map(str, layout))}-{job}")


def overrides(layout: Layout, job: str) -> list[str]:
    world, tensor, expert, *expert_tensor = layout
    settings = {"data.micro_batch_size": 2, **JOBS[job]}
    per_rank, accumulated = int(str(settings.pop(EXPERTS_PER_RANK))), int(str(settings.pop(ACCUMULATED, 1)))
    batch = int(str(settings["data.micro_batch_size"])) * world // tensor * accumulated
    return [
        *(f"parallel.world_size={world}", f"parallel.tensor={tensor}", f"parallel.expert={expert}"),
        *(f"parallel.expert_tensor={degree}" for degree in expert_tensor),
        *(f"moe.num_experts={expert * per_rank}", f"data.batch_size={batch}"),
        *(f"{key}={value}".replace("ONE_EACH", str(batch // accumulated)) for key, value in settings.items()),
    ]


CHECKPOINTS = (  # of jobs that differ in what a checkpoint holds
    *("global_balance_in_slices", "shared_weighted_ted", "frozen_router_experts_faster", "muon_clipped"),
    *RAMPS,
    *AVERAGED,
    *NARROW,
)


def continuations(layout: Layout, job: str) -> tuple[str, ...]:
    """CI continues these, and one of each layout of up to four processes; the others have half as many steps."""
    of_layout = layout[0] < 8 and job == (SAMPLED | FOLDED)[layout][0]
    left_out = (layout, job) in SAMPLE_OF_ALL and not of_layout and job not in CHECKPOINTS
    return () if left_out else ("in one process",)


Rows = dict[str, list[Row]]  # of each job


def compared(pool: WorkerPool, directory: Path, layout: Layout, jobs: Sequence[str]) -> Rows:
    """The certificates of a layout's cells. Their runs share worlds, in each of which the first costs most."""
    cases = {job: Case(tuple(overrides(layout, job)), continuations=continuations(layout, job)) for job in jobs}
    made = certified(pool, directory, [*cases.values()])
    return {job: made[case] for job, case in cases.items()}


@pytest.fixture(scope="module")
def rows_of(
    pool: WorkerPool, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Layout], Rows]:
    """Of all cells of a layout that this session runs."""
    cells = asked_of(request)

    @cache
    def rows(layout: Layout) -> Rows:
        jobs = [cell["job"] for cell in cells if cell["layout"] == layout]
        return compared(pool, tmp_path_factory.mktemp("matrix"), layout, jobs)

    return rows


@pytest.mark.timeout(600)  # the first cell of a layout waits for all of them
@pytest.mark.parametrize(("layout", "job"), [marked(*cell) for cell in CELLS + FOLDED_CELLS])
def test_a_layout_equals_one_process(rows_of: Callable[[Layout], Rows], layout: Layout, job: str) -> None:
    assert [str(row) for row in rows_of(layout)[job] if not row.ok] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llep", "scmoe"])
def test_an_experiment_equals_one_process(pool: WorkerPool, name: str) -> None:
    found = certify(composed(f"experiment={name}"), in_pool(pool), continuations=[])
    assert found.ok, str(found.culprit)
    assert (found.precision, found.accelerator) == ("64-true", "cpu")


def settings(jobs: Iterable[str]) -> set[str]:
    return {f"{key}={value}" for job in jobs for key, value in JOBS[job].items() if key != EXPERTS_PER_RANK}


def test_the_matrix_is_large_and_reaches_far() -> None:
    assert len(CELLS) >= 100
    elsewhere = {(layout.world_size, layout.tensor, layout.expert) for layout in COMPARED}
    assert {layout for layout, _ in SAMPLE} | elsewhere == {layout for layout, _ in CELLS} == set(LAYOUTS)
    assert settings(job for _, job in SAMPLE_OF_ALL) >= settings(JOBS.keys() - ROUTERS.keys())
    assert set(SAMPLE) <= set(CELLS)
    assert {*CELLS, *FOLDED_CELLS} >= SAMPLE_OF_ALL
    for job in JOBS:
        assert len([layout for layout, its in CELLS if its == job]) >= 4, job
        assert any(layout[0] == 8 for layout, its in CELLS if its == job), job
    assert max(world // tensor // expert for world, tensor, expert in LAYOUTS) == 8


if __name__ == "__main__":
    shared = WorkerPool()
    for place in [*LAYOUTS, *FOLDED]:
        with TemporaryDirectory() as folder:
            results = compared(
                shared, Path(folder), place, [job for layout, job in CELLS + FOLDED_CELLS if layout == place]
            )
        largest = max(row.error for rows in results.values() for row in rows)
        print(f"{place!s:15}  {len(results)} cells  {largest:.1e}", flush=True)
