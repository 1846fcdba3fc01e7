"""Whatever a configuration gets wrong is said before any process is started, in a few lines that say what would do."""

import inspect
import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from tedlab.certify.shrink import shrink
from tedlab.checkpoint import META
from tedlab.commands.train import train
from tedlab.config import TrainConfig, with_values
from tedlab.errors import UsageError
from tedlab.models.families.family import essence
from tedlab.predict.cluster import load_cluster
from tedlab.predict.volumes import ClosedForm
from tedlab.validate import check, complete, complete_simulated, notes
from tedlab.validate.checkpoint import check_checkpoint
from tedlab.validate.comm import ranks_per_node
from tedlab.validate.loggers import check_loggers
from tedlab.validate.trainer import check_trainer
from tests.test_conf import compose

SCREEN = 25  # lines

SMALL = [
    "data=text",
    "model.hidden=32",
    "model.ffn=64",
    "model.sequence_length=16",
    "data.batch_size=8",
    "data.micro_batch_size=2",
    "data.validation_samples=8",
    "data.validation_fraction=0.2",
]
LINES = "".join(f"line {number} of the corpus\n" for number in range(100))  # ~2.4 kB


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with one good file and one of each kind of bad file, and a cache of our own."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "good.txt").write_text(LINES)
    (folder / "empty.txt").write_text("")
    (folder / "binary.bin").write_bytes(b"\x89PNG\0\0" + os.urandom(5000))
    (folder / "short.txt").write_text("too short")
    (folder / "rows.jsonl").write_text('{"content": "a text"}\n' * 200)
    return folder


def small(corpus: Path, *overrides: str, file: str = "good.txt") -> TrainConfig:
    cache = f"data.cache_dir={corpus.parent / 'cache'}"
    output = f"output_dir={corpus.parent / 'run'}"
    return compose(*SMALL, f"data.path={corpus / file}", cache, output, "parallel=single", *overrides)


# What is wrong, and what the message must say: the values, and which would do.
WRONG: dict[str, tuple[list[str], list[str]]] = {
    # parallel degrees
    "world_size_not_divisible": (
        ["parallel.world_size=6", "parallel.tensor=4"],
        ["4×1 = 4", "world size 6", "multiple of 4", "8", "2×3", "6×1"],
    ),
    "tensor_that_does_not_divide_a_folded_world": (
        ["parallel.world_size=8", "parallel.tensor=3", "parallel.expert_tensor=1"],
        ["tensor = 3", "world size 8", "1, 2, 4, 8"],
    ),
    "experts_that_folded_groups_do_not_divide": (
        ["parallel.world_size=8", "parallel.tensor=2", "parallel.expert=8", "parallel.expert_tensor=1"],
        ["moe.num_experts (4)", "parallel.expert (8)", "1, 2, 4"],
    ),
    "experts_too_narrow_to_be_folded_so": (
        ["parallel.world_size=8", "parallel.tensor=2", "parallel.expert_tensor=8", "moe.ffn=12"],
        ["moe.ffn (12)", "parallel.expert_tensor (8)", "1, 2, 3, 4, 6, 12"],
    ),
    "degree_0": (["parallel.tensor=0"], ["tensor is 0", "at least 1"]),
    "negative_degree": (["parallel.expert=-2"], ["expert is -2", "at least 1"]),
    "devices_are_not_the_world": (
        ["parallel=dp4", "trainer.devices=2"],
        ["2×1", "parallel.world_size (4)", "trainer.devices"],
    ),
    "nodes_are_not_the_world": (["parallel=dp4", "trainer.num_nodes=2"], ["4×2", "(4)", "trainer.devices=2"]),
    "more_processes_than_sense": (
        ["parallel.world_size=4096", "data.batch_size=4096", "data.micro_batch_size=1"],
        ["4096 processes", f"{os.cpu_count()} cores", "at most"],
    ),
    "folded_degrees_that_do_not_multiply": (
        ["parallel.world_size=4", "parallel.tensor=2", "parallel.expert=2", "parallel.expert_tensor=4"],
        ["expert_tensor × expert = 4×2 = 8", "world size 4", "8, for instance", "1×4, 2×1"],
    ),
    "experts_not_divisible_by_expert_tensor": (
        ["parallel.world_size=4", "parallel.tensor=2", "parallel.expert_tensor=4", "model.ffn=66"],
        ["model.ffn (66)", "parallel.expert_tensor (4)", "can be 1, 2, 3, 6"],
    ),
    "folded_without_experts": (
        ["parallel=tp2", "parallel.expert_tensor=1", "moe=dense"],
        ["parallel.expert_tensor is 1", "no experts", "leave parallel.expert_tensor null"],
    ),
    "folded_and_lent": (
        ["parallel=tp2_ep2", "parallel.expert_tensor=1", "moe.dispatch=dropless", "moe.lend.policy=even"],
        ["moe.lend.policy=even", "parallel.expert_tensor=1 and parallel.tensor=2", "moe.lend.policy=none"],
    ),
    "folded_pilots_in_the_papers_order": (
        [
            *("parallel.world_size=8", "parallel.tensor=4", "parallel.expert=2", "parallel.expert_tensor=2"),
            *("moe.dispatch=dropless", "moe.top_k=2", "comm.dedup=rank"),
        ],
        [
            *("comm.dedup=rank", "parallel.expert_tensor=2", "comm.fuse_reduce_scatter=true"),
            *("parallel.expert_tensor=1", "comm.dedup=none"),
        ],
    ),
    "unknown_order": (["parallel.order=data"], ["parallel.order=data", "valid: expert, expert_data"]),
    # sliced tokens
    "sliced_twice": (
        ["parallel=tp2", "parallel.sequence=true", "moe.slice=tokens"],
        ["moe.slice=tokens", "parallel.sequence=true", "one of the two"],
    ),
    "sliced_and_dropped": (
        ["parallel=tp2", "comm.dtd=true", "moe.slice=tokens"],
        ["comm.dtd=true", "moe.slice=tokens", "one of the two"],
    ),
    "slices_of_unequal_length": (
        ["parallel=tp4", "model.heads=4", "moe.slice=tokens", "model.sequence_length=10"],
        ["model.sequence_length (10)", "parallel.tensor (4)", "can be 1, 2, 5, 10"],
    ),
    "sliced_by_deepspeed": (
        ["parallel=tp2", "moe.slice=tokens", "moe.gating=deepspeed_top1"],
        ["moe.slice=tokens needs moe.gating=default", "deepspeed_top1"],
    ),
    # model
    "heads_not_divisible_by_tensor": (
        ["parallel=tp4", "model.heads=2"],
        ["model.heads (2)", "parallel.tensor (4)", "can be 1, 2"],
    ),
    "ffn_not_divisible_by_tensor": (
        ["parallel=tp4", "model.ffn=66"],
        ["model.ffn (66)", "parallel.tensor (4)", "can be 1, 2, 3, 6"],
    ),
    "hidden_not_divisible_by_heads": (["model.heads=5"], ["model.hidden (32)", "model.heads (5)"]),
    "vocabulary_not_divisible_by_tensor": (
        ["parallel=tp4", "model.vocab_size=258"],
        ["model.vocab_size (258)", "parallel.tensor (4)", "can be 1, 2, 3, 6"],
    ),
    "vocabulary_smaller_than_the_tokenizers": (["model.vocab_size=100"], ["model.vocab_size (100)", "256"]),
    "unknown_activation": (["model.activation=relu"], ["model.activation=relu", "valid: gelu, swiglu"]),
    "unknown_norm": (["model.norm=batch"], ["model.norm=batch", "valid: layer, rms"]),
    "unknown_positions": (["model.positions=alibi"], ["model.positions=alibi", "valid: learned, rotary"]),
    "odd_heads_rotated": (
        ["model.positions=rotary", "model.hidden=12", "model.heads=4"],
        ["model.positions=rotary", "12 / 4", "even", "learned"],
    ),
    "rotary_base_1": (["model.rotary_base=1"], ["model.rotary_base is 1", "larger than 1"]),
    "unknown_qk_norm": (["model.qk_norm=layer"], ["model.qk_norm=layer", "valid: none, head, full"]),
    "full_blocks_without_a_window": (["model.attention.full_every=2"], ["full_every is 2", "model.attention.window"]),
    "rotary_of_learned_positions": (["model.rotary.scaling=linear"], ["model.positions=learned", "rotary"]),
    "yarn_of_no_length": (
        ["model.positions=rotary", "model.rotary.scaling=yarn", "model.rotary.factor=4"],
        ["model.rotary.scaling=yarn needs model.rotary.original_length"],
    ),
    "factor_of_no_scaling": (
        ["model.positions=rotary", "model.rotary.factor=4"],
        ["model.rotary.factor is 4.0", "scaling=none", "linear, ntk, yarn, llama3"],
    ),
    "ramp_of_another_scaling": (
        ["model.positions=rotary", "model.rotary.scaling=linear", "model.rotary.beta_fast=2"],
        ["model.rotary.beta_fast is 2.0", "scaling=linear", "belongs to yarn"],
    ),
    "ramp_backwards": (
        [
            *("model.positions=rotary", "model.rotary.scaling=yarn", "model.rotary.original_length=8"),
            "model.rotary.beta_slow=40",
        ],
        ["beta_slow (40.0) must be smaller than model.rotary.beta_fast (32.0)"],
    ),
    "compressed_queries_alone": (["model.attention.latent.q_rank=4"], ["q_rank is 4", "latent.kv_rank"]),
    "latent_without_rotation": (["model.attention.latent.kv_rank=4"], ["model.positions=rotary, not learned"]),
    "latent_of_odd_width": (
        ["model.positions=rotary", "model.attention.latent.kv_rank=4", "model.attention.latent.rope_dim=7"],
        ["rope_dim (7) must be even"],
    ),
    "latent_with_heads_of_keys": (
        ["model.positions=rotary", "model.attention.latent.kv_rank=4", "model.kv_heads=2"],
        ["model.kv_heads does not apply to latent attention"],
    ),
    "loss_chunk_0": (["model.loss_chunk=0"], ["model.loss_chunk is 0", "at least 1", "null"]),
    "weights_of_nan": (["model.init_std=nan"], ["model.init_std is nan", "a finite number, positive"]),
    "weights_of_negative_spread": (["model.init_std=-1"], ["model.init_std is -1.0", "positive"]),
    "no_layers": (["model.layers=0"], ["layers is 0", "at least 1"]),
    # experts
    "experts_not_divisible": (
        ["parallel=ep4", "moe.num_experts=6"],
        ["moe.num_experts (6)", "parallel.expert (4)", "can be 1, 2, 3, 6"],
    ),
    "dense_with_expert_parallelism": (["moe=dense", "parallel=ep2"], ["parallel.expert is 2", "dense"]),
    "top_k_larger_than_experts": (["moe.num_experts=2", "moe.top_k=3"], ["moe.top_k (3)", "moe.num_experts (2)"]),
    "top_k_0": (["moe.top_k=0"], ["top_k is 0", "at least 1"]),
    "capacity_factor_0": (["moe.capacity_factor=0"], ["moe.capacity_factor is 0", "positive", "null"]),
    "balance_of_nan": (["moe.aux_loss=nan"], ["moe.aux_loss is nan", "a finite number, at least 0"]),
    "groups_that_do_not_divide_experts": (
        ["moe.num_experts=8", "moe.router.expert_groups=3"],
        ["moe.num_experts (8)", "moe.router.expert_groups (3)", "1, 2, 4, 8"],
    ),
    "more_chosen_groups_than_groups": (
        ["moe.num_experts=8", "moe.router.expert_groups=2", "moe.router.chosen_groups=3"],
        ["moe.router.chosen_groups (3)", "moe.router.expert_groups (2)"],
    ),
    "top_k_over_the_allowed_groups": (
        ["moe.num_experts=8", "moe.top_k=3", "moe.router.expert_groups=4"],
        ["moe.top_k (3)", "the 2 experts in 1 of 4 groups", "chosen_groups to 2 or more"],
    ),
    "score_of_one_group": (
        ["moe.router.group_score=top2"],
        ["moe.router.group_score=top2", "moe.router.expert_groups is 1"],
    ),
    "unknown_scoring": (["moe.router.scoring=tanh"], ["moe.router.scoring", "tanh", "softmax, sigmoid"]),
    "scale_0": (["moe.router.gate_scale=0"], ["moe.router.gate_scale is 0", "positive"]),
    "jitter_1": (["moe.router.jitter=1"], ["moe.router.jitter is 1", "smaller than 1"]),
    "biases_that_never_move": (
        ["moe.router.bias_update=sign", "moe.router.bias_rate=0"],
        ["moe.router.bias_rate is 0", "positive"],
    ),
    "noise_of_a_hash_router": (
        ["moe.gating=hash", "moe.router.noise=gumbel"],
        ["moe.router.noise=gumbel would have no effect with moe.gating=hash", "leave it none", "default"],
    ),
    "balance_of_a_random_router": (
        ["moe.gating=random", "moe.balance.scope=sequence"],
        ["moe.balance", "moe.gating=random", "moe.gating=default"],
    ),
    "expert_choice_without_capacity": (
        ["moe.gating=expert_choice", "moe.dispatch=dropless"],
        ["moe.gating=expert_choice", "moe.dispatch=dropless", "moe.dispatch=capacity"],
    ),
    "dropped_choices_without_capacity": (
        ["moe.dispatch=dropless", "moe.balance.dropped=false"],
        ["moe.balance.dropped=false", "moe.dispatch=dropless", "moe.dispatch=capacity"],
    ),
    "record_of_a_dense_model": (["moe=dense", "routing.record=true"], ["routing.record=true", "moe.num_experts=0"]),
    "record_of_expert_choice": (
        ["moe.gating=expert_choice", "routing.record=true"],
        ["routing.record=true", "moe.gating from default", "hash"],
    ),
    "replay_of_nothing": (["routing.replay=/nowhere"], ["/nowhere is not the record of a run's routing"]),
    "unknown_gating": (
        ["moe.gating=deepspeed_top3"],
        [
            "moe.gating=deepspeed_top3",
            "valid: default",
            "expert_choice",
            "deepspeed_top1, deepspeed_top2, deepspeed_topk",
        ],
    ),
    "top1_gating_of_two_choices": (
        ["moe=top2", "moe.gating=deepspeed_top1"],
        ["moe.gating=deepspeed_top1 needs moe.top_k=1", "moe.top_k is 2", "deepspeed_topk"],
    ),
    "top2_gating_of_one_choice": (
        ["moe=top1", "moe.gating=deepspeed_top2"],
        ["moe.gating=deepspeed_top2 needs moe.top_k=2", "moe.top_k is 1", "deepspeed_topk"],
    ),
    "min_capacity_of_default_gating": (
        ["moe.min_capacity=4"],
        ["moe.min_capacity=4", "moe.gating=default", "null", "deepspeed_top1 or deepspeed_top2 or deepspeed_topk"],
    ),
    "random_token_selection_of_default_gating": (
        ["moe.random_token_selection=false"],
        ["moe.random_token_selection=False", "moe.gating=default", "null", "deepspeed_top1"],
    ),
    "second_expert_sampling_of_top1_gating": (
        ["moe.gating=deepspeed_top1", "moe.second_expert_sampling=true"],
        ["moe.second_expert_sampling=True", "moe.gating=deepspeed_top1", "choose moe.gating=deepspeed_top2"],
    ),
    "drop_policy_of_top2_gating": (
        ["moe=top2", "moe.gating=deepspeed_top2", "moe.drop_policy=probs"],
        ["moe.drop_policy=probs", "moe.gating=deepspeed_top2", "choose moe.gating=default or deepspeed_topk"],
    ),
    "unknown_drop_policy": (
        ["moe.gating=deepspeed_topk", "moe.drop_policy=random"],
        ["moe.drop_policy=random", "probs, position"],
    ),
    "negative_min_capacity": (
        ["moe.gating=deepspeed_top1", "moe.min_capacity=-1"],
        ["moe.min_capacity is -1", "at least 0"],
    ),
    # communication
    "cac_of_nothing": (
        ["comm.cac=true"],
        ["comm.cac=True", "model.recompute.granularity=none", "model.recompute.granularity=block", "comm.cac=false"],
    ),
    "unknown_collective": (
        ["model.recompute.granularity=block", "comm.cac=[dispatch.alltoall]"],
        ["no collective 'dispatch.alltoall'", "Did you mean 'dispatch.all_to_all'?", "combine.gather"],
    ),
    "unknown_cac": (
        ["model.recompute.granularity=block", "comm.cac=everything"],
        ["comm.cac=everything", "true", "shard", "auto", "list"],
    ),
    "auto_without_a_budget": (
        ["model.recompute.granularity=block", "comm.cac=auto"],
        ["comm.cac=auto", "comm.cac_budget_bytes=None"],
    ),
    "budget_without_auto": (
        ["model.recompute.granularity=block", "comm.cac=true", "comm.cac_budget_bytes=1000"],
        ["comm.cac=True", "comm.cac_budget_bytes=1000"],
    ),
    "unknown_checkpointing": (
        ["model.recompute.granularity=layer"],
        ["model.recompute.granularity=layer", "none, block"],
    ),
    "fusion_without_dtd": (
        ["comm.fuse_reduce_scatter=true"],
        ["comm.fuse_reduce_scatter=true", "comm.dtd=true", "comm.fuse_reduce_scatter=false"],
    ),
    "pilots_to_places": (["comm.dedup=rank", "moe.top_k=2"], ["comm.dedup=rank", "moe.dispatch=dropless"]),
    "pilots_of_one_choice": (
        ["comm.dedup=rank", "moe.dispatch=dropless"],
        ["moe.top_k is 1", "moe.top_k=2", "comm.dedup=none"],
    ),
    "pilots_in_the_papers_order": (
        ["parallel=tp2_ep2", "comm=dtd", "comm.dedup=rank", "moe.dispatch=dropless", "moe.top_k=2"],
        ["comm.dtd=true", "comm.fuse_reduce_scatter=true", "comm.dedup=none"],
    ),
    "pilots_to_one_expert_each": (
        ["parallel=ep2", "moe.num_experts=2", "moe.top_k=2", "moe.dispatch=dropless", "comm.dedup=rank"],
        ["comm.dedup=rank", "parallel.expert=2", "one of the 2 experts", "comm.dedup=none"],
    ),
    "loans_without_links": (
        [*("parallel=ep2", "moe.dispatch=dropless", "moe.lend.policy=llep", "moe.lend.cluster=one_h200")],
        ["moe.lend.minimum=auto", "moe.lend.cluster", "moe.lend.minimum=1024"],
    ),
    "pilots_to_nobody": (["comm.dedup=token"], ["comm.dedup=token", "none, rank, node, group"]),
    "pilots_to_unequal_nodes": (
        [*("parallel=ep4", "moe.dispatch=dropless", "moe.top_k=2", "comm.dedup=node", "comm.ranks_per_node=3")],
        ["comm.dedup=node", "ranks 0, 1, 2, 3 has 3 and 1", "comm.ranks_per_node", "comm.dedup=rank"],
    ),
    "pilots_to_one_node_with_an_expert_each": (
        ["parallel=ep4", "moe.num_experts=4", "moe.top_k=2", "moe.dispatch=dropless", "comm.dedup=node"],
        ["comm.dedup=node", "one of the 4 experts", "comm.dedup=none"],
    ),
    "nodes_with_unequal_parts_of_a_group": (
        ["parallel=ep4", "comm.hierarchical=true", "comm.ranks_per_node=3"],
        ["comm.hierarchical=true", "ranks 0, 1, 2, 3 has 3 and 1", "comm.ranks_per_node", "comm.hierarchical=false"],
    ),
    "pilots_by_way_of_nodes": (
        ["parallel=ep2", "moe.dispatch=dropless", "moe.top_k=2", "comm.dedup=rank", "comm.hierarchical=true"],
        ["comm.hierarchical=true", "comm.dedup=rank", "one of the two"],
    ),
    "overlap_without_shared_experts": (
        ["comm.overlap_shared=true"],
        ["comm.overlap_shared=true", "moe.shared.experts is 0", "moe.shared.experts=1", "comm.overlap_shared=false"],
    ),
    "chunks_without_experts": (
        ["comm.chunks=2", "moe=dense", "parallel=tp2"],
        ["comm.chunks=2", "moe.num_experts is 0", "comm.chunks=1"],
    ),
    "chunks_that_exceed_the_slots": (
        ["comm.chunks=60", "moe.capacity_factor=1", "moe.capacity_multiple=1", "data.micro_batch_size=1"],
        ["comm.chunks=60 exceeds", "slots of each expert", "16 tokens", "use at most"],
    ),
    "chunks_that_exceed_the_rows": (
        ["comm.chunks=60", "moe.dispatch=dropless", "data.micro_batch_size=1", "parallel=ep2"],
        ["comm.chunks=60 exceeds the 16 rows", "16 tokens", "use at most 16"],
    ),
    "gathered_to_places": (
        ["comm.dedup=group", "moe.top_k=2"],
        ["comm.dedup=group", "every process of the expert group", "moe.dispatch=dropless"],
    ),
    "gathered_in_the_papers_order": (
        ["parallel=tp2_ep2", "comm=dtd", "comm.dedup=group", "moe.dispatch=dropless"],
        ["comm.dtd=true", "comm.fuse_reduce_scatter=true", "comm.dedup=none"],
    ),
    "gathered_in_chunks": (
        ["comm.chunks=2", "comm.dedup=group", "moe.dispatch=dropless", "parallel=ep2"],
        ["comm.chunks=2", "comm.dedup=group", "one of the two"],
    ),
    "gathered_by_way_of_nodes": (
        ["parallel=ep2", "moe.dispatch=dropless", "moe.top_k=2", "comm.dedup=group", "comm.hierarchical=true"],
        ["comm.hierarchical=true", "comm.dedup=group", "one of the two"],
    ),
    "chunks_of_pilots": (
        ["comm.chunks=2", "comm.dedup=rank", "moe.dispatch=dropless", "moe.top_k=2", "parallel=ep2"],
        ["comm.chunks=2", "comm.dedup=rank", "one of the two"],
    ),
    "chunks_of_lent_experts": (
        ["comm.chunks=2", "moe.lend.policy=even", "moe.dispatch=dropless", "parallel=ep2"],
        ["comm.chunks=2", "moe.lend.policy=even", "one of the two"],
    ),
    "one_micro_batch_beside_nothing": (
        ["comm.interleave=true", "parallel=ep2", "data.batch_size=8", "data.micro_batch_size=4"],
        ["comm.interleave=true", "a step has 1", "data.batch_size", "comm.interleave=false"],
    ),
    "micro_batches_beside_each_other_without_experts": (
        ["comm.interleave=true", "moe=dense", "parallel=tp2", "data.batch_size=16", "data.micro_batch_size=4"],
        ["comm.interleave=true", "moe.num_experts is 0", "comm.interleave=false"],
    ),
    "compiled_blocks_beside_each_other": (
        [
            "comm.interleave=true",
            "parallel=ep2",
            "data.batch_size=16",
            "data.micro_batch_size=4",
            "model.compile=aot_eager",
        ],
        ["comm.interleave=true", "model.compile=aot_eager", "moe.dispatch=dropless", "one of the two"],
    ),
    "dtd_of_a_sharded_sequence": (
        ["parallel.sequence=true", "comm.dtd=true"],
        ["comm.dtd=true", "parallel.sequence=true", "one of the two"],
    ),
    "sequence_not_divisible": (
        ["parallel=tp4", "parallel.sequence=true", "model.sequence_length=10", "model.heads=4"],
        ["model.sequence_length (10)", "parallel.tensor (4)", "1, 2, 5, 10"],
    ),
    "sharded_sequence_under_deepspeed_gating": (
        ["parallel.sequence=true", "moe.gating=deepspeed_top1"],
        ["moe.gating=default", "deepspeed_top1"],
    ),
    "lending_with_a_capacity": (
        ["moe.lend.policy=llep"],
        ["moe.lend.policy=llep", "moe.dispatch=capacity", "moe.dispatch=dropless", "moe.lend.policy=none"],
    ),
    "lending_with_pilots": (
        ["moe.dispatch=dropless", "moe.top_k=2", "moe.lend.policy=even", "comm.dedup=rank"],
        ["moe.lend.policy=even", "comm.dedup=rank", "one of the two"],
    ),
    "unknown_policy_of_lending": (["moe.lend.policy=least"], ["moe.lend.policy=least", "valid: none, llep, even"]),
    "fewer_rows_than_the_mean": (["moe.lend.alpha=0.9"], ["moe.lend.alpha is 0.9", "at least 1"]),
    "lending_below_the_mean": (["moe.lend.threshold=0.5"], ["moe.lend.threshold is 0.5", "at least 1"]),
    "loans_of_no_row": (["moe.lend.minimum=0"], ["moe.lend.minimum=0", "at least 1", "[INSIDE,BETWEEN]", "auto"]),
    "three_kinds_of_links": (["moe.lend.minimum=[1,2,3]"], ["moe.lend.minimum=[1, 2, 3]", "two of them"]),
    "lending_on_no_cluster": (
        ["moe.dispatch=dropless", "moe.lend.policy=llep", "moe.lend.cluster=dgx"],
        ["There is no cluster 'dgx'", "dgx_h200"],
    ),
    "unknown_dispatch": (["moe.dispatch=droples"], ["moe.dispatch=droples", "valid: capacity, dropless"]),
    "dropless_deepspeed_gating": (
        ["moe.dispatch=dropless", "moe.gating=deepspeed_top1"],
        ["moe.gating=deepspeed_top1", "moe.dispatch=dropless has none", "moe.gating=default"],
    ),
    "dropless_capacity_groups": (
        ["moe.dispatch=dropless", "moe.capacity_groups=2"],
        ["moe.capacity_groups=2", "moe.dispatch=dropless has none", "null"],
    ),
    "dropless_compiled": (
        ["moe.dispatch=dropless", "model.compile=inductor", "model.recompute.granularity=block"],
        ["model.compile=inductor", "moe.dispatch=dropless", "model.recompute.granularity=none"],
    ),
    "experts left out": (
        ["moe.kernel=triton", "trainer=gpu", "model.compile=inductor", "model.recompute.granularity=block"],
        ["model.compile=inductor", "moe.kernel=triton", "moe.kernel=auto"],
    ),
    "capacity_groups_not_dividing": (
        ["moe.capacity_groups=3"],
        ["moe.capacity_groups is 3", "model.sequence_length (16)", "1, 2, 4, 8, 16"],
    ),
    "capacity_groups_not_shared": (
        ["parallel=tp4", "parallel.sequence=true", "moe.capacity_groups=2"],
        ["moe.capacity_groups is 2", "parallel.tensor (4)", "4, 8, 16"],
    ),
    "unknown_cluster": (["comm.emulate=sumit"], ["no cluster 'sumit'", "Did you mean 'summit'?", "dgx_h100"]),
    "no_room_on_a_node": (
        ["comm.emulate=summit", "comm.emulate_ranks_per_node=7"],
        ["ranks_per_node is 7", "1 to 6"],
    ),
    "negative_dilation": (["comm.emulate=summit", "comm.emulate_dilation=-1"], ["dilation is -1", "at least 0"]),
    "negative_ledger_interval": (["comm.ledger.every=-1"], ["comm.ledger.every is -1", "0"]),
    "loss_scale_too_small": (["optim.loss_scale=0.5"], ["optim.loss_scale is 0.5", "at least 1", "null"]),
    "unknown_compiler": (["model.compile=max"], ["model.compile=max", "none, inductor, aot_eager"]),
    "shards_of_a_compiled_block": (
        ["model.compile=inductor", "model.recompute.granularity=block", "comm.cac=shard"],
        ["comm.cac=shard", "model.compile=inductor", "true, false or a list"],
    ),
    "all_of_a_compiled_block": (
        ["model.compile=inductor", "model.recompute.granularity=block", "model.recompute.early_stop=false"],
        ["model.recompute.early_stop=false", "model.compile=inductor"],
    ),
    "compiled_deepspeed_gating": (
        ["model.compile=inductor", "moe.gating=deepspeed_top1"],
        ["moe.gating=default", "deepspeed_top1"],
    ),
    "experts_in_no_block": (["moe.every=3"], ["moe.every (3)", "model.layers (2)", "moe=dense"]),
    "experts_after_the_last_block": (
        ["moe.first_dense=2"],
        ["moe.first_dense (2)", "moe.every (2)", "model.layers (2)", "below 2", "moe=dense"],
    ),
    "experts_in_a_block_that_is_not_there": (["moe.blocks=[1,2]"], ["moe.blocks=[1, 2]", "from 0 to 1"]),
    "experts_listed_twice": (["moe.blocks=[1,1]"], ["moe.blocks=[1, 1]", "once"]),
    "experts_listed_nowhere": (["moe.blocks=[]"], ["moe.blocks=[]", "moe=dense"]),
    "experts_of_a_width_that_does_not_divide": (
        ["parallel=tp4", "moe.ffn=66"],
        ["moe.ffn (66)", "parallel.tensor (4)", "can be 1, 2, 3, 6"],
    ),
    "shared_experts_that_are_none": (["moe.shared.combine=cg1"], ["moe.shared.combine=cg1", "moe.shared.experts is 0"]),
    "shortcut_without_shared_experts": (["moe.shortcut=pos1"], ["moe.shortcut=pos1", "moe.shared.experts=1"]),
    "pair_without_a_dense_block": (
        ["moe.shortcut=pos2", "moe.shared.experts=1", "moe.every=1"],
        ["moe.shortcut=pos2", "for block 0 there is none before it", "moe.every=2", "pos1"],
    ),
    "pair_of_two_blocks_with_experts": (
        ["moe.shortcut=pos3", "moe.shared.experts=1", "moe.every=1", "moe.first_dense=1", "model.layers=3"],
        ["moe.shortcut=pos3", "for block 2 block 1 has experts, too", "moe.blocks"],
    ),
    "odd_number_of_layers_for_pairs": (
        ["moe.shortcut=pos2", "moe.shared.experts=1", "model.layers=5"],
        ["model.layers=5 is odd", "model.layers=4 or 6", "moe.blocks=[1, 3]"],
    ),
    "slot_after_the_last_sublayer": (
        ["moe.shortcut=pos2", "moe.shared.experts=1", "comm.shortcut_slot=4"],
        ["comm.shortcut_slot=4", "3 sub-layers", "to 3"],
    ),
    "overlap_of_nothing": (["comm.overlap_shortcut=true"], ["comm.overlap_shortcut=true", "moe.shortcut=pos1"]),
    "overlap_of_shared_experts_alone": (
        ["moe.shortcut=pos1", "moe.shared.experts=1", "comm.overlap_shared=true"],
        ["comm.overlap_shared=true", "moe.shortcut=pos1", "comm.overlap_shortcut=true"],
    ),
    "slot_of_nothing": (["comm.shortcut_slot=0"], ["comm.shortcut_slot=0", "moe.shortcut=pos1"]),
    "shortcut_around_kernels_that_are_not_compiled": (
        ["moe.shortcut=pos1", "moe.shared.experts=1", "moe.kernel=triton", "model.compile=aot_eager"],
        ["moe.kernel=triton", "moe.shortcut=pos1", "model.compile=none", "moe.kernel=auto"],
    ),
    "double_gate_beside_shared_experts": (
        ["moe.shortcut=dgmoe", "moe.shared.experts=1"],
        ["moe.shortcut=dgmoe", "moe.shared.experts=0, not 1", "moe.shortcut=pos2"],
    ),
    "double_gate_of_several_choices": (["moe.shortcut=dgmoe", "moe.top_k=2"], ["moe.top_k=1, not 2"]),
    "double_gate_that_overlaps": (
        ["moe.shortcut=dgmoe", "comm.overlap_shortcut=true"],
        ["comm.overlap_shortcut=false, not true"],
    ),
    "double_gate_with_noise": (["moe.shortcut=dgmoe", "moe.router.noise=gumbel"], ["moe.router.noise=none"]),
    "double_gate_balanced_by_sequence": (
        ["moe.shortcut=dgmoe", "moe.balance.scope=sequence"],
        ["moe.balance.scope=sequence", "micro_batch or global_batch"],
    ),
    "double_gate_without_a_dense_block": (
        ["moe.shortcut=dgmoe", "moe.every=1"],
        ["for block 0 there is none before it"],
    ),
    "record_of_a_double_gate": (["moe.shortcut=dgmoe", "routing.record=true"], ["routing.record=true", "routed twice"]),
    "shortcut_around_experts_that_are_not_compiled": (
        ["moe.shortcut=pos1", "moe.shared.experts=1", "moe.dispatch=dropless", "model.compile=aot_eager"],
        ["model.compile=aot_eager", "moe.dispatch=dropless", "model.compile=none"],
    ),
    "shared_experts_that_do_not_divide": (
        ["parallel=tp4", "moe.shared.experts=3", "moe.shared.ffn=22"],
        ["width of all shared experts (66)", "parallel.tensor (4)"],
    ),
    "a_limit_of_nothing": (["model.swiglu_limit=5"], ["model.swiglu_limit=5", "model.activation=clamped_swiglu"]),
    "a_learned_bias_of_nothing": (
        ["moe.gating=random", "moe.router.bias=true"],
        ["moe.router.bias=True", "moe.gating=random", "default"],
    ),
    # batches
    "batch_not_divisible": (
        ["parallel=dp4", "data.micro_batch_size=2", "data.batch_size=12"],
        ["data.batch_size (12)", "2×4", "can be 1, 3"],
    ),
    "micro_batch_too_large": (["data.micro_batch_size=16"], ["data.batch_size (8)", "16×1", "can be 1, 2, 4, 8"]),
    "no_micro_batch_fits": (["parallel=dp4", "data.batch_size=6"], ["data.batch_size (6)", "multiple of 4"]),
    "micro_batch_0": (["data.micro_batch_size=0"], ["data.micro_batch_size is 0", "at least 1"]),
    "contradictory_accumulation": (
        ["trainer.accumulate_grad_batches=3"],
        ["trainer.accumulate_grad_batches=3", "= 4", "null"],
    ),
    # Lightning's arguments
    "unknown_trainer_argument": (["+trainer.nonsense=1"], ["trainer.nonsense", "lightning.Trainer", "max_time"]),
    "unsupported_precision": (["trainer.precision=8-true"], ["trainer.precision=8-true", "32-true, 64-true"]),
    "max_steps_0": (["trainer.max_steps=0"], ["trainer.max_steps is 0", "at least 1"]),
    "endless": (["trainer.max_steps=-1"], ["trainer.max_steps is -1", "at least 1"]),
    "max_steps_is_a_word": (["trainer.max_steps=ten"], ["trainer.max_steps", "ten"]),
    "max_steps_missing": (["~trainer.max_steps"], ["trainer.max_steps"]),
    "precision_missing": (["~trainer.precision"], ["trainer.precision"]),
    "devices_is_a_word": (["trainer.devices=auto"], ["trainer.devices is auto", "a whole number"]),
    "num_nodes_is_a_word": (["trainer.num_nodes=two"], ["trainer.num_nodes", "two"]),
    "max_steps_is_true": (["trainer.max_steps=true"], ["trainer.max_steps is True", "a whole number"]),
    "no_nodes": (["trainer.num_nodes=0"], ["trainer.num_nodes is 0", "at least 1"]),
    "clip_by_nan": (["trainer.gradient_clip_val=nan"], ["gradient_clip_val is nan", "a finite number", "null"]),
    "strategy_of_lightning": (["+trainer.strategy=ddp"], ["trainer.strategy=ddp", "parallel.…"]),
    "callbacks_of_lightning": (["+trainer.callbacks=[]"], ["trainer.callbacks", "+callbacks.NAME._target_"]),
    "logger_of_lightning": (["+trainer.logger=true"], ["trainer.logger=True", "logger=none"]),
    "validation_by_lightning": (["+trainer.val_check_interval=5"], ["val_check_interval=5", "validate_every"]),
    "fast_dev_run": (["+trainer.fast_dev_run=true"], ["fast_dev_run=True", "trainer.max_steps=1"]),
    "no_training_batch": (["+trainer.limit_train_batches=0"], ["limit_train_batches=0", "trainer.max_steps"]),
    "set_called_loss": (["+eval.sets.loss=x"], ["eval.sets has a set called 'loss'", "call it by letters"]),
    "set_of_nowhere": (["+eval.sets.wiki=nowhere.txt"], ["set 'wiki': its path 'nowhere.txt' does not exist"]),
    "sets_without_validation": (
        ["+eval.sets.wiki=x", "+trainer.limit_val_batches=0"],
        ["eval.sets are evaluated at validations", "limit_val_batches is 0"],
    ),
    "one_validation_batch": (["+trainer.limit_val_batches=1"], ["limit_val_batches=1", "data.validation_samples"]),
    "no_checkpoint_at_all": (["+trainer.enable_checkpointing=false"], ["checkpoint.every=null"]),
    "time_of_another_kind": (["+trainer.max_time=soon"], ["trainer.max_time=soon", "Lightning"]),
    "monitor_without_validation": (
        ["+trainer.limit_val_batches=0", "checkpoint.monitor=val/loss"],
        ["checkpoint.monitor=val/loss", "limit_val_batches is 0"],
    ),
    "part_of_an_epoch": (["+trainer.limit_train_batches=5"], ["trainer.limit_train_batches", "trainer.max_steps"]),
    "validate_never": (["validate_every=0"], ["validate_every", "at least 1"]),
    "replicas_every_0": (["check_replicas_every=0"], ["check_replicas_every is 0", "at least 1", "null"]),
    "picture_every_0": (["router_picture_every=0"], ["router_picture_every is 0", "at least 1", "null"]),
    "checkpoint_every_0": (["checkpoint.every=0"], ["checkpoint.every is 0", "at least 1", "null"]),
    "keep_no_checkpoint": (["checkpoint.keep=0"], ["checkpoint.keep is 0", "at least 1", "-1"]),
    "monitor_what": (["checkpoint.monitor=val/los"], ["checkpoint.monitor=val/los", "val/loss"]),
    "unknown_backend": (["comm.backend=mpi"], ["comm.backend=mpi", "nccl, gloo"]),
    "nccl_on_a_cpu": (["comm.backend=nccl"], ["comm.backend=nccl", "GPUs only", "gloo"]),
    "unknown_objective": (["objective=val/los"], ["val/los", "val/loss"]),
    "seed_beyond_numpys": (["seed=4294967296"], ["seed is 4294967296", "at most 4,294,967,295"]),
    "no_time": (["comm.timeout_s=0"], ["comm.timeout_s is 0", "at least 1"]),
    "output_nowhere": (["output_dir=''"], ["output_dir is empty"]),
    "cache_nowhere": (["data.cache_dir=''"], ["data.cache_dir is empty"]),
    "checkpoint_nowhere": (["ckpt_path=''"], ["ckpt_path", "no last.ckpt"]),
    "checkpoint_of_one_file": (["ckpt_path=/dev/null"], ["ckpt_path=/dev/null", "near it"]),
    "output_below_a_file": (["output_dir=/dev/null/run"], ["output_dir=/dev/null/run", "Not a directory"]),
    "negative_seed": (["seed=-1"], ["seed", "-1", "0"]),
    # loggers
    "unknown_logger": (["+logger.mine._target_=my.Logger"], ["logger.mine._target_=my.Logger", "cannot be imported"]),
    "logger_without_a_class": (["+logger.mine.name=x"], ["logger.mine", "logger.mine._target_=…"]),
    "no_logger_at_all": (["+logger.mine._target_=torch.optim.SGD"], ["logger.mine", "not a logger", "SGD"]),
    "unknown_mode_of_wandb": (["logger.wandb.mode=of"], ["logger.wandb.mode=of", "online, offline, disabled"]),
    "unknown_argument_of_wandb": (["+logger.wandb.projct=x"], ["logger.wandb.projct", "Did you mean 'project'?"]),
    "strategy_is_null": (["+trainer.strategy=null"], ["trainer.strategy=None", "parallel.…"]),
    "masked_and_compiled": (
        ["data.documents=masked", "model.compile=aot_eager"],
        ["data.documents=masked", "model.compile=none", "data.documents=packed"],
    ),
    "a_decay_longer_than_the_run": (
        ["optim.schedule=wsd", "optim.decay_steps=60", "optim.warmup_steps=50", "trainer.max_steps=100"],
        ["optim.decay_steps=60 and optim.warmup_steps=50", "trainer.max_steps=100"],
    ),
    "a_decay_of_a_schedule_that_has_none": (
        ["optim.schedule=cosine", "optim.decay_steps=60"],
        ["optim.decay_steps=60", "cosine", "use wsd, or leave decay_steps out"],
    ),
    "stages_out_of_order": (
        ["data.ramp=[{until:9,batch_size:4},{until:9,batch_size:6}]"],
        ["data.ramp has stages until steps [9, 9]", "later than the one before"],
    ),
    "stage_of_nothing": (["data.ramp=[{until:9}]"], ["data.ramp[0] (until 9) has neither batch_size nor"]),
    "stage_of_an_odd_batch": (
        ["data.ramp=[{until:9,batch_size:3}]"],
        ["data.ramp[0] (until 9): data.batch_size (3) is not a multiple"],
    ),
    "rows_that_do_not_divide_a_sample": (
        ["data.ramp=[{until:9,sequence_length:5}]"],
        ["sequence_length=5", "model.sequence_length=16", "valid: 1, 2, 4, 8"],
    ),
    "rows_that_tensor_ranks_cannot_divide": (
        ["data.ramp=[{until:9,sequence_length:2}]", "parallel.sequence=true", "parallel.world_size=4", "parallel=tp4"],
        ["data.ramp[0] (until 9): model.sequence_length (2)", "parallel.tensor"],
    ),
    "rows_of_compiled_blocks": (
        ["data.ramp=[{until:9,sequence_length:8}]", "model.compile=inductor"],
        ["model.compile=inductor compiles blocks for one length", "change batch_size alone"],
    ),
    "ramp_of_other_data": (
        ["data.ramp=[{until:9,batch_size:4}]", f"data.module={__name__}.BoringDataModuleOfAnyArguments"],
        ["data.ramp changes batch_size, of which", "derive it from tedlab.data.TextDataModule"],
    ),
    "ramp_of_a_record": (
        ["data.ramp=[{until:9,batch_size:4}]", "routing.record=true"],
        ["a record of routing has steps of equally many tokens"],
    ),
    "ramp_beside_each_other": (
        ["data.ramp=[{until:9,batch_size:2}]", "comm.interleave=true", "parallel=ep2", "data.micro_batch_size=1"],
        ["data.ramp[0] (until 9): comm.interleave=true", "a step has 1"],
    ),
    "ramp_of_a_global_batch": (
        [
            *("data.ramp=[{until:9,batch_size:2}]", "moe.balance.scope=global_batch", "moe.dispatch=dropless"),
            *("parallel=ep2", "data.micro_batch_size=1"),
        ],
        ["data.ramp must not change between one and several"],
    ),
    "unknown_packing": (["data.packing=tight"], ["data.packing", "concatenate", "best_fit"]),
    # optimizer
    "not_element_wise": (["optim.optimizer._target_=torch.optim.LBFGS"], ["LBFGS", "element", "AdamW"]),
    "torchs_muon": (
        ["optim.optimizer={_target_: torch.optim.Muon}"],
        ["torch.optim.Muon", "tedlab.optim.Muon", "optim=muon"],
    ),
    "muon_fused": (["optim=muon", "optim.tile=fused"], ["tile=fused", "not Muon", "a number of elements"]),
    "muon_without_matrices": (
        ["optim=muon", "optim.optimizer.adamw=['*']"],
        ["adamw", "leave Muon no matrix", "optim=adamw"],
    ),
    "muon_of_a_pattern_of_nothing": (
        ["optim=muon", "optim.optimizer.adamw=['*embd*']"],
        ["optim.optimizer.adamw", "*embd*", "matches no parameter", "embedding.weight"],
    ),
    "muon_of_one_pattern": (
        ["optim=muon", "optim.optimizer.adamw='*router*'"],
        ["adamw is *router*", "list of patterns"],
    ),
    "muon_in_half_precision": (
        ["optim=muon", "optim.optimizer.dtype=float16"],
        ["dtype is float16", "bfloat16, float32"],
    ),
    "mup_without_rules": (
        ["optim=sgd", "model.parametrization=mup", "model.base_hidden=64", "model.tie_embeddings=false"],
        ["model.parametrization=mup", "no rule for SGD", "optim=adamw", "optim=muon"],
    ),
    "mup_without_a_base": (["model.parametrization=mup"], ["needs model.base_hidden", "optim.lr"]),
    "mup_of_tied_embeddings": (["model.parametrization=mup", "model.base_hidden=16"], ["model.tie_embeddings=false"]),
    "mup_of_a_fraction_of_a_head": (
        ["model.parametrization=mup", "model.base_hidden=4", "model.tie_embeddings=false"],
        ["model.base_hidden=4", "model.heads=4", "Use a multiple of 8"],
    ),
    "mup_of_tables_by_muon": (
        [
            *("optim=muon", "model.parametrization=mup", "model.base_hidden=16", "model.tie_embeddings=false"),
            "optim.optimizer.adamw=[]",
        ],
        ["Muon would step embedding.weight", "a pattern in optim.optimizer.adamw"],
    ),
    "unknown_parametrization": (["model.parametrization=mu"], ["valid: standard, mup, spectral"]),
    "differentiable": (["+optim.optimizer.differentiable=true"], ["AdamW", "differentiable=True"]),
    "clip_by_values": (["+trainer.gradient_clip_algorithm=values"], ["gradient_clip_algorithm", "values", "norm"]),
    "unknown_schedule": (["optim.schedule=linear"], ["optim.schedule=linear", "cosine, constant"]),
    "unknown_optimizer": (["optim.optimizer._target_=torch.optim.AdamWW"], ["optim.optimizer", "AdamWW"]),
    "tile_0": (["optim.tile=0"], ["tile=0", "at least 1", "null", "fused"]),
    "unknown_tile": (["optim.tile=fuse"], ["tile=fuse", "at least 1", "null", "fused", "auto"]),
    "half_a_tile": (["optim.tile=0.5"], ["tile=0.5", "at least 1", "null", "fused"]),
    "fused_sgd": (["optim=sgd", "optim.tile=fused"], ["SGD", "torch.optim.AdamW and torch.optim.Adam", "null"]),
    "fused_amsgrad": (["optim.tile=fused", "+optim.optimizer.amsgrad=true"], ["amsgrad", "null", "auto"]),
    "learning_rate_infinite": (["optim.lr=inf"], ["optim.lr is inf", "a finite number, positive"]),
    "learning_rate_nan": (["optim.lr=nan"], ["optim.lr is nan", "a finite number, positive"]),
    "negative_warm_up": (["optim.warmup_steps=-5"], ["optim.warmup_steps is -5", "at least 0"]),
    "fifty_times_the_rate": (["optim.final_lr_fraction=50"], ["final_lr_fraction is 50", "at least 0 and at most 1"]),
    "empty_buckets": (["optim.bucket_elements=0"], ["optim.bucket_elements is 0", "at least 1"]),
    "betas_of_1": (["optim.optimizer.betas=[0.9,1.0]"], ["optim.optimizer", "beta", "1.0"]),
    "one_beta": (["optim.optimizer.betas=[0.9]"], ["optim.optimizer"]),
    "infinite_decay": (["optim.optimizer.weight_decay=inf"], ["optim.optimizer.weight_decay is inf", "finite"]),
    "decay_is_true": (["optim.optimizer.weight_decay=true"], ["weight_decay is True", "a number"]),
    "unknown_argument_of_the_optimizer": (
        ["+optim.optimizer.amsgrid=true"],
        ["optim.optimizer.amsgrid", "AdamW", "Did you mean 'amsgrad'?"],
    ),
    "a_flag_of_words": (["+optim.optimizer.amsgrad=word"], ["amsgrad is word", "true, false or null"]),
    "a_flag_that_is_a_number": (["+optim.optimizer.fused=2"], ["fused is 2", "true, false or null"]),
    "rate_of_the_optimizer": (["+optim.optimizer.lr=1"], ["optim.optimizer.lr=1", "use optim.lr"]),
    "momentum_of_1": (["optim=sgd", "optim.optimizer.momentum=1.5"], ["momentum is 1.5", "smaller than 1"]),
    "fused_for_each": (["+optim.optimizer={fused: true, foreach: true}"], ["fused", "foreach"]),
    "learning_rate_0": (["optim.lr=0"], ["optim.lr is 0", "positive"]),
    # data
    "nothing_at_the_path": (["data.path=/nowhere/at/all"], ["/nowhere/at/all", "does not exist"]),
    "validation_fraction_1": (
        ["data.validation_fraction=1.0"],
        ["data.validation_fraction is 1.0", "positive and smaller than 1"],
    ),
    "validation_samples_too_small": (
        ["data.validation_samples=4"],
        ["data.validation_samples=4", "data.batch_size=8", "Raise"],
    ),
    "unknown_tokenizer": (["data.tokenizer=bytes"], ["'bytes'", "byte, bpe", "Did you mean 'byte'?"]),
    "bpe_vocabulary_too_small": (
        ["data.tokenizer=bpe", "data.bpe_vocab_size=100"],
        ["data.bpe_vocab_size is 100", "at least 257"],
    ),
    "cache_below_a_file": (["data.cache_dir=/dev/null/cache"], ["data.cache_dir=/dev/null/cache", "Not a directory"]),
    "negative_workers": (["data.num_workers=-1"], ["data.num_workers is -1", "at least 0"]),
    # checkpoints
    "no_checkpoint": (["ckpt_path=/nowhere/last.ckpt"], ["/nowhere/last.ckpt", "does not exist"]),
}
WRONG_FILES: dict[str, tuple[str, list[str]]] = {
    "empty": ("empty.txt", ["empty"]),
    "binary": ("binary.bin", ["binary.bin", "cannot be used", "NUL", "JSONL"]),
    "short": ("short.txt", ["too short", "model.sequence_length=16", "17"]),
    "field_missing": ("rows.jsonl", ["Line 1", "rows.jsonl", "no field 'text'", "'content'", "data.field"]),
}


@pytest.fixture
def complaint(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command's task up to its UsageError; that a process were launched before fails the test."""

    def launch(*_: object) -> None:
        raise AssertionError("processes were launched for a wrong configuration")

    monkeypatch.setattr("tedlab.launch.launcher.launch", launch)

    def complain(config: TrainConfig) -> str:
        with pytest.raises(UsageError) as caught:
            train(config)
        message = str(caught.value)
        assert len(message.splitlines()) < SCREEN, message
        assert all(len(line) < 1000 for line in message.splitlines()), message
        return message

    return complain


@pytest.mark.parametrize(("overrides", "fragments"), WRONG.values(), ids=WRONG)
def test_wrong_configurations_are_refused(
    corpus: Path, complaint: Any, overrides: list[str], fragments: list[str]
) -> None:
    message = complaint(small(corpus, *overrides))
    assert [fragment for fragment in fragments if fragment not in message] == [], message


ODD = (math.nan, math.inf, -1, 0, 2**40, 0.5, True, "word", [1], {"a": 1}, None)
# What Lightning's Trainer may be given of these; of any other argument nothing.
ACCEPTED: dict[str, tuple[object, ...]] = {
    "max_epochs": (-1, None),
    "limit_val_batches": (0, None),
    "overfit_batches": (0, None),
    "num_sanity_val_steps": (-1, 0, None),
    "gradient_clip_val": (0, 2**40, 0.5, None),
    "reload_dataloaders_every_n_epochs": (0, None),
    **dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), (True, None)),
    **dict.fromkeys(("deterministic", "benchmark"), (True, None)),
    **dict.fromkeys(("inference_mode", "use_distributed_sampler", "detect_anomaly", "enable_autolog_hparams"), (True,)),
    **dict.fromkeys(("min_epochs", "min_steps", "max_time", "log_every_n_steps", "accumulate_grad_batches"), (None,)),
    **dict.fromkeys(("gradient_clip_algorithm", "profiler", "fast_dev_run", "limit_train_batches"), (None,)),
    **dict.fromkeys(("barebones", "sync_batchnorm"), (None,)),
}


@pytest.mark.parametrize("name", inspect.signature(Trainer).parameters)
def test_every_argument_of_the_trainer_is_refused_where_it_makes_no_sense(name: str) -> None:
    """Also those of a Lightning to come: of an argument that is not known here a word and a list are refused, too."""
    accepted, config = [], compose("parallel=single", "logger=none")
    usual = config.trainer
    for value in ODD:
        try:
            check_trainer(replace(config, trainer={**usual, name: value}))
        except ValueError as error:
            sentence = str(error)
        else:
            accepted.append(value)
            continue
        assert sentence.count(f"trainer.{name}") == 1
        assert "\n" not in sentence
    assert tuple(accepted) == ACCEPTED.get(name, ())


def test_building_a_trainer_leaves_this_process_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    before = dict(os.environ), torch.are_deterministic_algorithms_enabled(), rank_zero_only.rank
    config = compose("parallel=single", "logger=none", "+trainer.deterministic=true", "+trainer.max_time=00:00:01:07")
    check_trainer(config)
    assert (dict(os.environ), torch.are_deterministic_algorithms_enabled(), rank_zero_only.rank) == before
    assert "".join(capfd.readouterr()) == ""


def test_more_processes_than_gpus_need_gloo(corpus: Path, complaint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    two = ["trainer=gpu", "parallel.world_size=2"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert "trainer=cpu needs none" in complaint(small(corpus, *two, "comm.backend=gloo"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    message = complaint(small(corpus, *two))
    fragments = [
        "trainer.devices is 2",
        "1 GPU:",
        "two processes on one GPU NCCL refuses",
        "comm.backend=gloo",
        "at most 1",
    ]
    assert [fragment for fragment in fragments if fragment not in message] == [], message
    check(small(corpus, *two, "comm.backend=gloo"))
    check(small(corpus, "trainer=gpu"))
    check(small(corpus, "trainer=gpu", "optim=sgd"))  # which cannot be fused


@pytest.mark.parametrize(("file", "fragments"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_unusable_files_are_refused(corpus: Path, complaint: Any, file: str, fragments: list[str]) -> None:
    message = complaint(small(corpus, file=file))
    assert [fragment for fragment in fragments if fragment not in message] == [], message


def write_checkpoint(path: Path, meta: dict[str, Any]) -> Path:
    path.mkdir(parents=True)
    torch.save(meta, path / META)
    (path / ".metadata").write_bytes(b"")
    return path


def hyper_parameters(config: TrainConfig) -> dict[str, Any]:
    config = complete(config)
    return {"global_step": 5, "hyper_parameters": {"model": asdict(config.model), "moe": asdict(config.moe)}}


def test_a_checkpoint_of_another_model_is_refused_by_what_differs(corpus: Path, complaint: Any) -> None:
    other = hyper_parameters(small(corpus, "model.hidden=64", "moe.num_experts=8", "moe.every=1"))
    path = write_checkpoint(corpus / "other.ckpt", other)
    message = complaint(small(corpus, f"ckpt_path={path}"))
    assert str(path) in message
    assert "model.hidden: 64 in the checkpoint, 32 here" in message
    assert "moe.num_experts: 8 in the checkpoint, 4 here" in message
    assert "moe.every: 1 in the checkpoint, 2 here" in message
    assert "layers" not in message


@pytest.mark.parametrize(
    "meta",
    [
        {"global_step": 5},
        {"global_step": 5, "hyper_parameters": {"width": 8}},
        {"global_step": 5, "hyper_parameters": {"model": "gpt", "moe": None}},
        {"hyper_parameters": {"model": {}, "moe": {}}},
    ],
    ids=["no hyper-parameters", "others", "others by these names", "no step"],
)
def test_a_checkpoint_of_another_program_is_refused(corpus: Path, complaint: Any, meta: dict[str, Any]) -> None:
    path = write_checkpoint(corpus / "own.ckpt", meta)
    assert f"{path} is not a checkpoint of this command" in complaint(small(corpus, f"ckpt_path={path}"))


def test_a_checkpoint_of_this_model_passes_whatever_the_layout(corpus: Path) -> None:
    path = write_checkpoint(corpus / "same.ckpt", hyper_parameters(small(corpus)))
    check(small(corpus, "parallel=tp2_ep2", f"ckpt_path={path}"))
    check(small(corpus, "moe.aux_loss=0.5", "moe.capacity_factor=null", f"ckpt_path={path}"))
    check(small(corpus, "moe.gating=deepspeed_top1", "moe.min_capacity=0", f"ckpt_path={path}"))


def test_a_checkpoint_of_another_tokenizer_is_refused_and_its_own_named(
    corpus: Path, complaint: Any, tmp_path: Path
) -> None:
    of_model = hyper_parameters(small(corpus))
    for folder, tokenizer in (("one", "byte"), ("two", "0123")):
        meta = {**of_model, "TextDataModule": {"tokenizer": tokenizer}}
        write_checkpoint(tmp_path / folder / "checkpoints" / "last.ckpt", meta)
    check(small(corpus, f"ckpt_path={tmp_path}/one/checkpoints/last.ckpt"))
    (tmp_path / "two" / "tokenizer.json").touch()
    message = complaint(small(corpus, f"ckpt_path={tmp_path}/two/checkpoints/last.ckpt"))
    assert "tokenizer 0123, and data.tokenizer=byte is byte: the same ids would mean other text. Use" in message
    assert f"data.tokenizer={tmp_path}/two/tokenizer.json" in message


@pytest.mark.parametrize("max_steps", [4, 5])
def test_a_checkpoint_with_nothing_left_to_train_is_refused(corpus: Path, complaint: Any, max_steps: int) -> None:
    path = write_checkpoint(corpus / "done.ckpt", hyper_parameters(small(corpus)))
    message = complaint(small(corpus, f"ckpt_path={path}", f"trainer.max_steps={max_steps}"))
    assert f"trainer.max_steps ({max_steps})" in message or f"trainer.max_steps is {max_steps}" in message
    assert "5 steps" in message or "step 5" in message
    check(small(corpus, f"ckpt_path={path}", "trainer.max_steps=6"))


@pytest.mark.parametrize("lacking", [META, ".metadata"])
def test_an_incomplete_checkpoint_is_refused_and_its_neighbours_named(
    corpus: Path, complaint: Any, lacking: str
) -> None:
    path = write_checkpoint(corpus / "half.ckpt", {})
    neighbour = write_checkpoint(corpus / "step_5.ckpt", {})
    (path / lacking).unlink()
    message = complaint(small(corpus, f"ckpt_path={path}"))
    assert "not a complete checkpoint" in message
    assert lacking in message
    assert str(neighbour) in message


def test_a_damaged_checkpoint_is_refused(corpus: Path, complaint: Any) -> None:
    path = write_checkpoint(corpus / "damaged.ckpt", hyper_parameters(small(corpus)))
    (path / META).write_bytes((path / META).read_bytes()[:100])
    assert str(path) in complaint(small(corpus, f"ckpt_path={path}"))


def test_a_checkpoint_that_is_not_tedlabs_is_refused(corpus: Path, complaint: Any) -> None:
    path = write_checkpoint(corpus / "foreign.ckpt", {"state_dict": {}})
    assert str(path) in complaint(small(corpus, f"ckpt_path={path}"))


@pytest.mark.parametrize(
    ("parallel", "accumulate"),
    [("single", 4), ("dp2", 2), ("dp4", 1), ("ep2", 2), ("tp2", 4), ("tp2_ep2", 2), ("tp2_ep2_dp2", 1), ("tp4", 4)],
)
def test_batches_and_vocabulary_of_every_layout_are_completed(corpus: Path, parallel: str, accumulate: int) -> None:
    config = small(corpus, f"parallel={parallel}")
    assert config.model.vocab_size is None
    config = complete(config)
    assert config.trainer["accumulate_grad_batches"] == accumulate
    assert config.model.vocab_size == 256


@pytest.mark.parametrize(
    "overrides",
    [
        ["moe.gating=default"],
        ["moe.gating=deepspeed_top1", "moe.min_capacity=0", "moe.random_token_selection=false"],
        ["moe=top2", "moe.gating=deepspeed_top2", "moe.min_capacity=8", "moe.second_expert_sampling=false"],
        ["moe.top_k=1", "moe.gating=deepspeed_topk", "moe.drop_policy=probs"],
        ["moe.top_k=3", "moe.gating=deepspeed_topk", "moe.drop_policy=position", "moe.capacity_factor=null"],
    ],
    ids=lambda overrides: overrides[-1],
)
def test_every_gating_passes_with_its_own_options(corpus: Path, overrides: list[str]) -> None:
    check(small(corpus, *overrides))


class BoringDataModuleOfAnyArguments(LightningDataModule):
    """Has loaders of its own, and nothing else."""

    def __init__(self, *arguments: object) -> None:
        super().__init__()


def test_micro_batches_run_beside_each_other_where_experts_are_not_compiled(corpus: Path) -> None:
    rows = ["moe.dispatch=dropless", "parallel=ep2", "data.batch_size=4", "data.micro_batch_size=1"]
    check(complete(small(corpus, "comm.interleave=true", "model.compile=aot_eager", *rows)))


def test_data_that_keeps_no_position_is_told(corpus: Path) -> None:
    config = small(corpus, PLAIN_DATA, "model.vocab_size=250")
    assert complete(config).model.vocab_size == 250
    said = "has no state_dict and load_state_dict of its own: a run that is resumed reads its data from the beginning."
    assert [said in note for note in notes(config)] == [True]
    assert notes(small(corpus)) == []


def test_tensorboard_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in ("tensorboard", "tensorboardX"):
        monkeypatch.setattr("tedlab.validate.loggers.find_spec", lambda name, there=there: name == there or None)
        check_loggers(compose("logger=many"))
    monkeypatch.setattr("tedlab.validate.loggers.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"^logger\.tensorboard needs a package .*: pip install 'tedlab\[tensorboard\]'$"
    ):
        check_loggers(compose("logger=many"))


def test_presets_that_look_for_trouble_pass_in_every_job(corpus: Path) -> None:
    for preset, (name, value) in {
        "fast": ("max_steps", 3),
        "profile": ("profiler", "simple"),
        "anomaly": ("detect_anomaly", True),
        "overfit": ("max_steps", 100),
    }.items():
        config = small(corpus, f"debug={preset}")
        check(config)
        assert config.trainer[name] == value
        assert not compose(f"debug={preset}").logger


PLAIN_DATA = f"data.module={__name__}.BoringDataModuleOfAnyArguments"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["+callbacks.mine=1"], "callbacks.mine=1 is no callback"),
        (["+callbacks.mine._target_=no.such.Class"], "callbacks.mine._target_=no.such.Class cannot be imported"),
        (["+callbacks.mine._target_=torch.nn.Linear"], "is not a callback of Lightning, but a Linear"),
        (["data.module=torch.nn.Linear"], "data.module=torch.nn.Linear is not a LightningDataModule"),
        ([PLAIN_DATA], "BoringDataModuleOfAnyArguments has no vocab_size; give it one, or model.vocab_size=…"),
        (["model.architecture=llama"], "model.architecture=llama is unknown; valid: gpt"),
    ],
    ids=lambda given: given[0] if isinstance(given, list) else "",
)
def test_a_part_that_is_none_is_refused(corpus: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        check(small(corpus, *overrides))
    assert said in str(refused.value)


@pytest.mark.parametrize(("tokens", "rounded"), [(257, 384), (300, 384), (384, 384)])
def test_the_vocabulary_is_the_tokenizers_rounded_up_to_128(corpus: Path, tokens: int, rounded: int) -> None:
    (corpus / "good.txt").write_text(LINES + " ".join(f"w{n:x}{n * 7919:x}" for n in range(4000)))
    config = small(corpus, "data.tokenizer=bpe", f"data.bpe_vocab_size={tokens}", "parallel=tp4")
    config = complete(config)
    assert config.model.vocab_size == rounded


def test_a_check_and_a_completion_leave_the_configuration_as_it_is(corpus: Path) -> None:
    emulated = [
        "comm.emulate=summit",
        "parallel=tp2_ep2",
        "parallel.sequence=true",
        "model.recompute.granularity=block",
    ]
    config = small(corpus, *emulated, "comm.cac=auto", "comm.cac_budget_bytes=3000")
    before = asdict(config)
    check(config)
    completed = complete(config)
    assert asdict(config) == before
    assert (completed.comm.ledger.time, completed.moe.capacity_groups) == (True, 2)
    assert completed.comm.cac != "auto"


def test_a_certificate_is_of_what_was_composed_not_completed_for_the_size_of_the_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[TrainConfig] = []

    def certify(config: TrainConfig) -> SimpleNamespace:
        given.append(config)
        return SimpleNamespace(ok=False)

    monkeypatch.setattr("tedlab.certify.show.certify_visibly", certify)
    kept = ["model.recompute.granularity=block", "comm.cac=auto", "comm.cac_budget_bytes=3000"]
    with pytest.raises(UsageError, match="failed its certificate"):
        train(small(corpus, "parallel=tp2", "certificate=true", *kept))
    assert isinstance(complete(shrink(given[0], tmp_path)).comm.cac, list)


def test_a_complete_configuration_is_completed_by_itself(corpus: Path) -> None:
    once = complete(small(corpus, "parallel=tp2", "parallel.sequence=true"))
    assert complete(once) == once


def test_a_given_vocabulary_and_the_right_accumulation_are_kept(corpus: Path) -> None:
    config = small(corpus, "model.vocab_size=260", "trainer.accumulate_grad_batches=4", "parallel=tp2")
    config = complete(config)
    assert (config.model.vocab_size, config.trainer["accumulate_grad_batches"]) == (260, 4)


def test_what_has_no_effect_is_noted_and_no_error(corpus: Path) -> None:
    config = small(corpus, "comm.dtd=true")
    check(config)
    assert notes(config) == ["comm.dtd=true does nothing here: with parallel.tensor=1 there are no duplicates."]
    assert notes(small(corpus, "parallel=tp2", "comm.dtd=true")) == []


def test_folding_that_changes_a_toggle_or_leaves_one_without_effect_is_noted(corpus: Path) -> None:
    folded = ["parallel.world_size=4", "parallel.tensor=2", "parallel.expert=2", "parallel.expert_tensor=1"]
    (said,) = notes(small(corpus, *folded))
    assert "comm.dtd=false is like true" in said
    assert notes(small(corpus, *folded, "comm.dtd=true", "parallel.order=expert_data")) == []
    (said,) = notes(small(corpus, *folded, "moe.slice=tokens", "parallel.expert=4", "parallel.order=expert_data"))
    assert "parallel.order=expert_data does nothing here" in said
    assert "expert 4 × expert_data 1" in said


def test_a_folded_layout_may_fuse_whatever_dtd_says_because_it_deals_anyway(corpus: Path) -> None:
    folded = ["parallel.world_size=4", "parallel.tensor=4", "parallel.expert=2", "parallel.expert_tensor=2"]
    with_dtd, without = (
        small(corpus, *folded, "comm.fuse_reduce_scatter=true", f"comm.dtd={dtd}") for dtd in ("true", "false")
    )
    calls, same = (list(ClosedForm(complete(config)).micro_batch()) for config in (without, with_dtd))
    assert calls == same
    with pytest.raises(UsageError, match=r"comm\.dtd is false"):
        check(with_values(without, {"parallel.expert": 1, "parallel.expert_tensor": None}))


@pytest.mark.parametrize(
    "lent",
    [
        ["parallel=ep2", "moe.dispatch=dropless", "moe.kernel=torch", "moe.lend.policy=llep"],
        ["parallel=tp2", "moe.dispatch=capacity", "moe.slice=tokens"],
    ],
    ids=["loans", "slices"],
)
def test_how_experts_are_computed_is_no_part_of_the_model_that_a_checkpoint_is_of(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, lent: list[str]
) -> None:
    stored = complete_simulated(small(corpus, *lent, "model.vocab_size=384"))
    assert stored.moe.lend.minimum != "auto" or stored.moe.capacity_groups == 2
    meta = {"hyper_parameters": asdict(stored), "global_step": 1}
    monkeypatch.setattr("tedlab.validate.checkpoint.read_meta", lambda path: meta)
    for again in (lent, lent[:2]):
        resumed = small(corpus, *again, "model.vocab_size=384", "trainer.max_steps=5")
        check_checkpoint(resumed, Path("last.ckpt"))
        assert essence(resumed.model, resumed.moe) == essence(stored.model, stored.moe)
    with pytest.raises(ValueError, match=r"moe.num_experts: 4 in the checkpoint, 8 here"):
        check_checkpoint(
            small(corpus, *lent, "model.vocab_size=384", "trainer.max_steps=5", "moe.num_experts=8"), Path("last.ckpt")
        )


def test_overlap_of_an_exchange_that_there_is_not_is_noted(corpus: Path) -> None:
    (said,) = notes(small(corpus, "comm.chunks=2"))
    assert "comm.chunks does nothing here" in said
    compiled = ["parallel=ep2", "model.compile=aot_eager", "comm.chunks=2", "comm.overlap_shared=true"]
    said = notes(small(corpus, *compiled, "moe.shared.experts=1"))
    assert [note.split(":")[0] for note in said] == [
        f"comm.{name} hides nothing here" for name in ("overlap_shared", "chunks")
    ]
    assert notes(small(corpus, *compiled, "moe.shared.experts=1", "moe.kernel=triton")) == []
    (said,) = notes(
        small(corpus, *compiled[:2], "moe.shared.experts=1", "moe.shortcut=pos2", "comm.overlap_shortcut=true")
    )
    assert "comm.overlap_shortcut hides nothing here: with model.compile=aot_eager" in said
    assert notes(small(corpus, "comm.chunks=2", "parallel=ep2")) == []


PILOTS_TO_NODES = ["comm.dedup=node", "moe.dispatch=dropless", "moe.top_k=2", "moe.num_experts=8"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (["parallel=ep4", "comm.hierarchical=true"], "each expert group is on one node of 4 ranks"),
        (["parallel=ep2", "comm.hierarchical=true", "comm.ranks_per_node=1"], "on a node of its own"),
        (["parallel=tp2", "comm.hierarchical=true"], "nothing is exchanged"),
        (["parallel=ep4", "comm.ranks_per_node=2"], "no exchange goes by way of nodes"),
        (["parallel=ep4", "comm.hierarchical=true", "comm.ranks_per_node=2"], None),
        (["parallel=ep4", *PILOTS_TO_NODES], "does what rank does here: each expert group is on one node"),
        (["parallel=ep4", *PILOTS_TO_NODES, "comm.ranks_per_node=1"], "does what rank does here"),
        (["parallel=ep4", *PILOTS_TO_NODES, "comm.ranks_per_node=2", "comm.hierarchical=true"], "anyway"),
        (["parallel=ep4", *PILOTS_TO_NODES, "comm.ranks_per_node=2"], None),
    ],
    ids=str,
)
def test_exchanges_that_cannot_go_by_way_of_nodes_are_noted(corpus: Path, how: list[str], said: str | None) -> None:
    found = notes(small(corpus, *how))
    assert [said in note for note in found] == [True] if said else not found


def test_ranks_of_a_node_are_those_of_this_machine_of_an_emulated_network_or_of_the_cluster(corpus: Path) -> None:
    here = small(corpus, "parallel=ep4", "comm.hierarchical=true")
    assert ranks_per_node(here) == 4
    assert ranks_per_node(here, load_cluster("summit")) == 6
    emulated = with_values(here, {"comm.emulate": "summit", "comm.emulate_ranks_per_node": 2})
    assert ranks_per_node(emulated, load_cluster("dgx_a100")) == 2
    assert ranks_per_node(with_values(emulated, {"comm.ranks_per_node": 1})) == 1
    assert ranks_per_node(small(corpus, "parallel=ep4")) is None


def test_how_attention_is_computed_is_noted_where_no_fused_kernel_can(corpus: Path) -> None:
    window = ["model.attention.window=4", "model.attention.full_every=2", "model.layers=4", "trainer.accelerator=cpu"]
    (said,) = notes(small(corpus, *window))
    assert "2 blocks by tedlab's own operation" in said
    assert "2 blocks by scaled_dot_product_attention" in said
    assert notes(small(corpus, *window, "model.attention.window=1000")) == []  # longer than the text


def test_what_is_easily_overlooked_in_routing_is_noted(corpus: Path) -> None:
    (future,) = notes(small(corpus, "moe.gating=expert_choice"))
    assert "sees the future" in future
    (twice,) = notes(small(corpus, "moe.router.bias_update=sign"))
    assert "moe.aux_loss=0.01" in twice
    assert notes(small(corpus, "moe.router.bias_update=sign", "moe.aux_loss=0")) == []
    as_deepseek = ("moe.router.bias_update=sign", "moe.aux_loss=0.0001", "moe.balance.scope=sequence")
    assert notes(small(corpus, *as_deepseek)) == []


def test_auto_becomes_what_it_keeps(corpus: Path) -> None:
    settings = ["parallel=tp2_ep2", "model.recompute.granularity=block", "comm.cac=auto"]
    for budget, kept in ((0, 0), (3000, 1), (10**9, 4)):
        config = complete(small(corpus, *settings, f"comm.cac_budget_bytes={budget}"))
        assert len(config.comm.cac) >= kept
        assert bool(config.comm.cac) == bool(kept)
