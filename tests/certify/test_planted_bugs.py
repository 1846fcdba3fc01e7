"""What the field has shipped, and what is easily written: each mistake of ``bugs.py``, planted, is found.

By the certificate of a layout, which also names and measures it; by the oracle, if one process has the mistake, too; or
by a test that is named here, and fails with it. All certificates are made in a few worlds.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.optim import AdamW

from tedlab import Topology
from tedlab.certify import Row
from tedlab.certify.compare import first_difference
from tedlab.optim.fused import _TILE
from tests.certify import bugs
from tests.certify.runs import Case, Plant, certified, planted
from tests.data import test_sampler
from tests.moe import test_router, test_routers
from tests.moe.lending import test_plan
from tests.nn import test_attention, test_sharded
from tests.optim import test_fused, test_loss_scale, test_schedule
from tests.pool import WorkerPool
from tests.selection import asked_of
from tests.test_oracle import Errors, first_wrong, judged

Overrides = tuple[str, ...]
TP2: Overrides = ("parallel=tp2", "moe.capacity_factor=1.05")
EP2: Overrides = ("parallel=ep2", "moe.top_k=2", "moe.z_loss=0.1", "data.micro_batch_size=4")
DP2: Overrides = ("parallel=dp2", "optim.overlap=true", "data.micro_batch_size=4")
MUON: Overrides = ("parallel.world_size=4", "parallel.tensor=2", "parallel.expert=1", "optim=muon")
MUP: Overrides = (*("parallel=tp2", "model.parametrization=mup", "model.base_hidden=64", "model.tie_embeddings=false"),)
EP2_DP2: Overrides = ("parallel.world_size=4", "parallel.tensor=1", "parallel.expert=2")
CHUNKED: Overrides = ("parallel=tp2", "model.loss_chunk=7")
FP16: Overrides = ("parallel=tp2", "trainer.precision=16-true")
BF16: Overrides = ("parallel=dp2", "certificate_precision=bf16-true")
SEQUENCE: Overrides = ("parallel=tp2", "parallel.sequence=true")
TODAY: Overrides = (
    *("parallel=tp2", "parallel.sequence=true", "model.activation=swiglu", "model.bias=false", "model.norm=rms"),
    "model.positions=rotary",
)
KEYS: Overrides = ("parallel=tp2", "model.positions=rotary", "model.kv_heads=1", "model.qk_norm=full")
LATENT: Overrides = ("parallel=tp2", "model.positions=rotary", "model.attention.latent.kv_rank=8")
SHARED: Overrides = (*TODAY, "moe.every=1", "moe.shared.experts=2", "moe.shared.combine=cg1")
PAIRS: Overrides = ("parallel=tp2", "moe.shared.experts=1", "moe.shortcut=pos2", "comm.overlap_shortcut=true")
SLICED_PAIRS: Overrides = (*PAIRS, "parallel.sequence=true", "moe.shared.combine=cg2")
SHARDS: Overrides = ("parallel=tp2", "model.recompute.granularity=block", "comm.dtd=true", "comm.cac=shard")
WHOLE: Overrides = ("parallel=tp2", "parallel.sequence=true", "model.recompute.granularity=block", "comm.cac=true")
DEALT: Overrides = ("parallel=tp2_ep2", "moe.dispatch=dropless", "comm.dtd=true")
DIVIDED: Overrides = ("parallel=tp2", "moe.dispatch=dropless", "moe.top_k=2")
DROPLESS: Overrides = ("parallel=ep2", "moe.dispatch=dropless")
GATHERED: Overrides = ("parallel=ep2", "moe.dispatch=dropless", "moe.top_k=2", "comm.dedup=group")
PILOTS: Overrides = ("parallel=ep2", "moe.dispatch=dropless", "moe.top_k=2", "comm.dedup=rank")
BY_NODE: Overrides = ("parallel=ep4", "moe.dispatch=dropless", "moe.top_k=2", "comm.ranks_per_node=2")
NODES: Overrides = (*BY_NODE, "moe.num_experts=8", "comm.dedup=node", "data.micro_batch_size=4")
LENT: Overrides = ("moe.dispatch=dropless", "moe.lend.policy=llep", "moe.top_k=2", "data.micro_batch_size=4")
LENT_EP4: Overrides = ("parallel=ep4", *LENT)
LENT_EP2_DP2: Overrides = ("parallel.world_size=4", "parallel.tensor=1", "parallel.expert=2", *LENT)
RAMP: Overrides = ("parallel=tp2", "data.micro_batch_size=4", "data.ramp=[{until:3,batch_size:32}]")
NARROW: Overrides = ("parallel=tp2", "optim=adamw_bf16")
AVERAGED: Overrides = ("parallel=tp2", "average.kind=ema")
BIASED: Overrides = ("parallel=dp2", "moe.router.bias_update=proportional", "moe.top_k=2", "data.micro_batch_size=4")
GLOBAL: Overrides = (
    *("parallel=dp2", "moe.balance.scope=global_batch", "moe.top_k=2", "moe.aux_loss=0.1", "data.micro_batch_size=4"),
    "model.recompute.granularity=block",
)
GROUPS: Overrides = (
    *("parallel=ep2", "moe.num_experts=16", "moe.top_k=2", "moe.router.expert_groups=4"),
    *("moe.router.chosen_groups=2", "data.micro_batch_size=4"),
)
NOISY: Overrides = (
    *("parallel=dp2", "moe.router.noise=gumbel", "moe.router.jitter=0.2", "data.micro_batch_size=4"),
    "model.recompute.granularity=block",
)
FOLDED: Overrides = ("parallel=tp2_ep2", "parallel.expert=4", "parallel.expert_tensor=1", "moe.capacity_factor=1.05")
SLICED: Overrides = (*FOLDED, "moe.slice=tokens")
SLICED_NODES: Overrides = (
    *("parallel=tp2_ep2", "parallel.expert=4", "parallel.expert_tensor=1", "moe.slice=tokens", "moe.num_experts=8"),
    *("moe.dispatch=dropless", "moe.top_k=2", "comm.dedup=node", "comm.ranks_per_node=2", "data.micro_batch_size=4"),
)
FROM_ONE, AGAIN = "from one process", "in this layout"


class Found(NamedTuple):
    """By a certificate.

    Attributes:
        overrides: of its configuration.
        quantity: the first that is wrong; of a run that was continued, ``FROM_ONE`` or ``AGAIN``.
        said: part of the sentence about it.
    """

    overrides: Overrides
    quantity: str
    said: str


CERTIFIED: dict[Plant, Found] = {
    bugs.expert_gradient_divided_by_expert_data: Found(
        EP2_DP2,
        "gradients",
        "in step 1: network.blocks.1.feed_forward.experts.up is 0.5 × what one process has = 1/exp",
    ),
    bugs.expert_gradient_scaled_by_expert: Found(
        ("parallel=ep4",),
        "gradients",
        "in step 1: network.blocks.1.feed_forward.experts.up is 4 × what one process has = expert or data",
    ),
    bugs.replicated_gradient_summed_over_tensor: Found(TP2, "gradients", "is 2 × what one process has = tensor"),
    bugs.experts_reduced_over_all_data_ranks: Found(EP2, "gradients", "experts"),
    bugs.input_gradient_not_summed_over_tensor: Found(TP2, "gradients", "no multiple of what one process has"),
    bugs.step_of_a_stale_gradient: Found(EP2, "gradients", "is no multiple"),
    bugs.accumulated_gradients_lost: Found(DP2, "gradients", "in step 1"),
    bugs.reduced_before_the_last_micro_batch: Found(DP2, "gradients", "in step 1"),
    bugs.micro_batches_not_averaged: Found(EP2, "gradients", "is 2 × what one process has"),
    bugs.bucket_filled_in_another_order: Found(DP2, "gradients", "in step 1"),
    bugs.router_gradient_not_summed_when_sliced: Found(SEQUENCE, "gradients", "in step 1"),
    bugs.partial_gradients_summed_twice: Found(SEQUENCE, "gradients", "is 2 × what one process has = tensor"),
    bugs.replicated_parameter_counted_by_each_tensor_rank: Found(TP2, "gradient norm", "all parameters is 1."),
    bugs.norm_of_the_first_piece: Found(DP2, "gradient norm", "all parameters is 0."),
    bugs.norm_of_this_process_alone: Found(DP2, "gradient norm", "in step 1"),
    bugs.norm_of_an_earlier_step: Found(DP2, "gradient norm", "in step 2"),
    bugs.padding_counted_in_the_norm: Found(DP2, "gradient norm", "in step 1"),
    bugs.tied_embedding_counted_twice: Found(TP2, "gradient norm", "all parameters is 1."),
    bugs.clipped_before_unscaling: Found(FP16, "clip factor", "in step 2"),
    bugs.overflow_that_is_not_skipped: Found(FP16, "gradients", "is absent in one process"),
    bugs.last_tile_left_out: Found(DP2, "optimizer state", "in step 1"),
    bugs.rates_by_the_width_of_the_shard: Found(MUP, "optimizer settings", "in step 1"),
    bugs.initial_weights_of_the_base: Found(MUP, "outputs", "in step 1: logits"),
    bugs.matrices_not_joined: Found(MUON, "next weights", "in step 1"),
    bugs.fused_matrices_taken_for_one: Found(MUON, "next weights", "in step 1"),
    bugs.folded_expert_gradient_divided_by_expert_data: Found(
        FOLDED, "gradients", "in step 1: network.blocks.1.feed_forward.experts.up is 2 × what one process has"
    ),
    bugs.folded_experts_summed_over_the_tensor_group: Found(
        FOLDED, "gradients", "in step 1: network.blocks.1.feed_forward.experts.up is no multiple"
    ),
    bugs.tokens_sent_by_every_tensor_rank: Found(
        FOLDED, "gradients", "in step 1: network.blocks.1.feed_forward.experts.up is 2 × what one process has"
    ),
    bugs.folded_experts_counted_once_for_each_tensor_rank: Found(FOLDED, "gradient norm", "all parameters is 1."),
    bugs.gradient_of_a_router_that_slices_kept_by_each_rank: Found(
        SLICED, "gradients", "in step 1: network.blocks.1.feed_forward.router.weight"
    ),
    bugs.parameters_not_gathered: Found(DP2, "next weights", "in step 1"),
    bugs.replicas_that_drift: Found(DP2, "next weights", "in step 1: network."),
    bugs.tensor_ranks_with_different_seeds: Found(TP2, "outputs", "in step 1: logits"),
    bugs.experts_seeded_by_their_local_index: Found(EP2, "outputs", "in step 1: logits"),
    bugs.vocabulary_shard_off_by_one: Found(TP2, "outputs", "in step 1: logits"),
    bugs.targets_of_other_ranks_off_by_one: Found(TP2, "losses and drops", "in step 1: train/loss"),
    bugs.embedding_gradient_of_other_shards_tokens: Found(TP2, "gradients", "in step 1: network.embedding.weight"),
    bugs.chunk_means_averaged: Found(CHUNKED, "losses and drops", "in step 1: train/loss"),
    bugs.learned_positions_start_anew_in_each_slice: Found(SEQUENCE, "outputs", "in step 1"),
    bugs.rotary_positions_start_anew_in_each_slice: Found(TODAY, "outputs", "in step 1"),
    bugs.slices_gathered_in_another_order: Found(SEQUENCE, "outputs", "in step 1"),
    bugs.attention_scaled_by_the_number_of_heads: Found(TP2, "outputs", "in step 1"),
    bugs.shared_keys_gradient_of_this_rank_alone: Found(KEYS, "gradients", "in step 1: network.blocks.0.attention.kv"),
    bugs.queries_of_this_rank_normed_by_themselves: Found(KEYS, "outputs", "in step 1"),
    bugs.norm_of_all_heads_differentiated_for_own_heads: Found(KEYS, "gradients", "in step 1"),
    bugs.latent_s_gradient_of_own_heads: Found(LATENT, "gradients", "in step 1"),
    bugs.gate_of_shared_experts_of_this_slice_alone: Found(
        SHARED, "gradients", "in step 1: network.blocks.0.feed_forward.shared.gate.weight"
    ),
    bugs.sum_of_shared_experts_taken_twice: Found(PAIRS, "outputs", "in step 1: logits"),
    bugs.shortcut_from_the_block_s_own_tokens: Found(PAIRS, "outputs", "in step 1: logits"),
    bugs.coefficients_of_this_slice_alone: Found(
        SLICED_PAIRS, "gradients", "in step 1: network.blocks.1.feed_forward.shared.gate.weight"
    ),
    bugs.swiglu_in_halves: Found(TODAY, "outputs", "in step 1"),
    bugs.bias_added_by_each_tensor_rank: Found(DIVIDED, "outputs", "in step 2: logits"),
    bugs.gates_gradient_of_this_tensor_rank_alone: Found(DIVIDED, "gradients", "in step 1"),
    bugs.choices_counted_for_another_pilot: Found(PILOTS, "outputs", "in step 1"),
    bugs.weights_applied_where_experts_are_and_again: Found(PILOTS, "outputs", "in step 1"),
    bugs.weights_gradient_stays_where_experts_are: Found(PILOTS, "gradients", "in step 1"),
    bugs.gathered_tokens_gradient_of_this_process_alone: Found(GATHERED, "gradients", "in step 1"),
    bugs.weights_gradient_stays_on_the_node: Found(NODES, "gradients", "in step 1"),
    bugs.own_pilots_behind_replicas_on_the_way_back: Found(NODES, "losses and drops", "in step 1: train/loss"),
    bugs.replicas_sent_to_another_rank_of_the_node: Found(NODES, "outputs", "in step 1"),
    bugs.logits_as_weights_of_choices: Found(NODES, "outputs", "in step 1"),
    bugs.pilots_of_a_slice_sent_as_if_tensor_ranks_had_the_same: Found(SLICED_NODES, "gradients", "in step 1"),
    bugs.pilots_drawn_anew_in_recomputation: Found(
        (*NODES, "model.recompute.granularity=block"), "gradients", "in step 1"
    ),
    bugs.rows_by_way_of_nodes_stay_sorted_by_place: Found((*BY_NODE, "comm.hierarchical=true"), "outputs", "in step 1"),
    bugs.bias_gradient_of_this_slice_alone: Found(SEQUENCE, "gradients", "in step 1"),
    bugs.capacity_not_padded: Found(TP2, "outputs", "in step 1"),
    bugs.capacity_rounded_down: Found(TP2, "outputs", "in step 1"),
    bugs.capacity_of_all_data_ranks: Found(EP2, "losses and drops", "in step 1: train/loss"),
    bugs.last_tokens_served_first: Found(EP2, "losses and drops", "in step 1: train/loss"),
    bugs.second_choices_beside_first_ones: Found(EP2, "losses and drops", "in step 1: train/loss"),
    bugs.dropped_tokens_get_somebody_elses_result: Found(EP2, "losses and drops", "in step 1: train/loss"),
    bugs.gates_detached: Found(TP2, "gradients", "in step 1"),
    bugs.gates_not_renormalised: Found(EP2, "outputs", "in step 1"),
    bugs.auxiliary_loss_divided_twice: Found(
        EP2, "losses and drops", "in step 1: train/aux_loss is 0.5 × what one process has = 1/expert or 1/data"
    ),
    bugs.auxiliary_loss_times_tensor: Found(
        TP2, "losses and drops", "in step 1: train/aux_loss is 2 × what one process has = tensor"
    ),
    bugs.z_loss_without_a_gradient: Found(EP2, "gradients", "in step 1"),
    bugs.dropped_tokens_gradient_averaged: Found(SHARDS, "gradients", "in step 1"),
    bugs.exchange_that_is_not_awaited: Found(EP2, "outputs", "in step 1"),
    bugs.chunks_returned_in_another_order: Found((*EP2, "comm.chunks=2"), "outputs", "in step 1"),
    bugs.rows_of_chunks_swapped: Found((*DROPLESS, "comm.chunks=2"), "outputs", "in step 1"),
    bugs.chunk_computed_before_it_has_arrived: Found((*DROPLESS, "comm.chunks=2"), "outputs", "in step 1"),
    bugs.exchange_not_inverted_in_backward: Found(EP2, "gradients", "in step 1"),
    bugs.padding_of_dropped_slots_cut_at_the_wrong_end: Found(SHARDS, "outputs", "in step 1"),
    bugs.padding_of_dealt_rows_cut_at_the_wrong_end: Found(DEALT, "outputs", "in step 1"),
    bugs.rows_returned_in_the_order_of_experts: Found(DROPLESS, "outputs", "in step 1"),
    bugs.counts_of_experts_swapped: Found(DROPLESS, "outputs", "in step 1"),
    bugs.lent_gradients_not_returned: Found(LENT_EP4, "gradients", "in step 1: network.blocks.1.feed_forward.experts"),
    bugs.lent_gradients_returned_twice: Found(
        LENT_EP4, "gradients", "in step 1: network.blocks.1.feed_forward.experts"
    ),
    bugs.lent_gradients_of_one_borrower_alone: Found(LENT_EP4, "gradients", "feed_forward.experts"),
    bugs.lent_gradients_divided_by_expert_data: Found(LENT_EP2_DP2, "gradients", "in step 1"),
    bugs.lent_twice_to_the_same_borrower: Found(
        LENT_EP4, "gradients", "in step 1: network.blocks.1.feed_forward.experts"
    ),
    bugs.lent_from_a_stale_copy: Found(LENT_EP4, "outputs", "in step 2: logits"),
    bugs.recompute_that_routes_anew: Found(WHOLE, "gradients", "in step 1"),
    bugs.kept_result_of_another_rank: Found(SHARDS, "gradients", "in step 1"),
    bugs.kept_results_in_another_order: Found(WHOLE, "gradients", "in step 1"),
    bugs.groups_of_this_rank: Found(GROUPS, "outputs", "in step 1: logits"),
    bugs.biases_of_this_data_rank_alone: Found(
        BIASED, "next weights", "in step 1: network.blocks.1.feed_forward.router.bias"
    ),
    bugs.biases_of_the_last_micro_batch: Found(
        BIASED, "next weights", "in step 1: network.blocks.1.feed_forward.router.bias"
    ),
    bugs.biases_start_anew_on_resume: Found(BIASED, AGAIN, "in step 3"),
    bugs.global_balance_of_this_micro_batch: Found(GLOBAL, "losses and drops", "in step 1: train/aux_loss"),
    bugs.global_balance_of_the_first_data_rank: Found(GLOBAL, "losses and drops", "in step 1: train/aux_loss"),
    bugs.global_balance_of_this_data_rank: Found(GLOBAL, "losses and drops", "in step 1: train/aux_loss"),
    bugs.noise_seeded_by_rank: Found(NOISY, "losses and drops", "in step 1: train/loss"),
    bugs.noise_the_same_for_all_micro_batches: Found(NOISY, "losses and drops", "in step 1: train/loss"),
    bugs.noise_drawn_anew_in_recomputation: Found(NOISY, "gradients", "in step 1"),
    bugs.data_order_by_layout: Found(EP2, "losses and drops", "in step 1: train/loss"),
    bugs.optimizer_state_of_another_shard: Found(EP2, FROM_ONE, "in step 3: optimizer state: network."),
    bugs.experts_loaded_from_another_rank: Found(EP2, FROM_ONE, "in step 3: outputs: logits"),
    bugs.experts_dealt_out_in_turn_on_loading: Found(EP2, FROM_ONE, "in step 3: outputs: logits"),
    bugs.positions_off_by_one_on_resume: Found(DP2, AGAIN, "in step 3: outputs: logits"),
    bugs.step_count_starts_anew_on_resume: Found(DP2, AGAIN, "in step 3: optimizer state"),
    bugs.moments_start_anew_on_resume: Found(DP2, AGAIN, "in step 3: optimizer state"),
    bugs.masters_not_restored: Found(BF16, AGAIN, "in step 3: optimizer state"),
    bugs.loss_scale_starts_anew_on_resume: Found(FP16, AGAIN, "in step 3: loss scale: all processes is 2 ×"),
    bugs.base_learning_rates_not_restored: Found(DP2, AGAIN, "in step 4: optimizer settings: lr of group 0 is 2 ×"),
    bugs.schedule_off_by_one_on_resume: Found(DP2, AGAIN, "optimizer settings: lr of group 0"),
    bugs.epoch_starts_anew_on_resume: Found(DP2, AGAIN, "in step 3: losses and drops: train/loss"),
    bugs.next_epoch_is_the_first_again_on_resume: Found(DP2, AGAIN, "in step 4: losses and drops: train/loss"),
    bugs.micro_batches_of_a_stage_counted_by_all_processes: Found(RAMP, "losses and drops", "in step 1"),
    bugs.stages_start_anew_on_resume: Found((*DP2, "data.ramp=[{until:3,sequence_length:16}]"), AGAIN, "in step 3"),
    bugs.elements_numbered_by_this_rank: Found(NARROW, "optimizer state", "in step 1"),
    bugs.averages_of_the_first_rank_s_shard: Found(AVERAGED, "next weights", "in step 2"),
    bugs.samples_counted_by_this_rank_on_saving: Found(DP2, AGAIN, "in step 3: losses and drops: train/loss"),
}
EVERY_DAY = {  # the others are planted where whole runs are tested, too
    bugs.replicated_parameter_counted_by_each_tensor_rank,
    bugs.capacity_not_padded,
    bugs.exchange_not_inverted_in_backward,
    bugs.micro_batches_not_averaged,
    bugs.last_tile_left_out,
    bugs.accumulated_gradients_lost,
    # which one process has, too
    bugs.norms_decayed,
    bugs.schedule_one_step_late,
    bugs.gates_renormalised_after_dropping,
}
ORACLE: dict[Plant, tuple[str, str]] = {  # what one process has, too: the setting, and what is wrong in it
    bugs.norms_decayed: ("top1_clipped", "next weights"),
    bugs.schedule_one_step_late: ("top1_clipped", "learning rate"),
    bugs.norms_with_another_epsilon: ("dropless_today", "losses and drops"),
    bugs.linear_part_without_the_one: ("clamped_with_biases", "losses and drops"),
    bugs.shortcut_from_the_block_s_own_tokens: ("pos2", "losses and drops"),
    bugs.swiglu_in_halves: ("dropless_today", "losses and drops"),
    bugs.rotary_pairs_are_neighbours: ("dropless_today", "losses and drops"),
    bugs.gates_are_logits: ("top2_dropping_in_groups", "losses and drops"),
    bugs.gates_renormalised_after_dropping: ("top2_dropping_in_groups", "losses and drops"),
    bugs.balance_of_first_choices: ("top2_dropping_in_groups", "losses and drops"),
    bugs.balance_of_dropped_choices_too: ("global_of_kept_choices_recomputed", "losses and drops"),
    bugs.balance_of_sequences_over_the_micro_batch: ("deepseek_v3_sequence_wise", "losses and drops"),
    bugs.probabilities_of_sigmoid_scores_not_normalised: ("deepseek_v3_sequence_wise", "losses and drops"),
    bugs.gates_scaled_twice: ("deepseek_v3_sequence_wise", "losses and drops"),
    bugs.biases_in_the_weights: ("deepseek_v3_sequence_wise", "losses and drops"),
    bugs.groups_scored_by_their_best_expert: ("deepseek_v3_sequence_wise", "losses and drops"),
    bugs.full_experts_keep_their_worst_choices: ("deepseek_v2_by_score", "losses and drops"),
    bugs.biases_move_towards_the_load: ("deepseek_v3_sequence_wise", "biases"),
    bugs.global_balance_of_an_earlier_step: ("global_of_kept_choices_recomputed", "losses and drops"),
    bugs.last_tokens_served_first: ("top2_dropping_in_groups", "losses and drops"),
    bugs.z_loss_summed_over_tokens: ("top1_clipped", "gradients"),
    bugs.chunk_means_averaged: ("dense_chunked_scaled", "losses and drops"),
    bugs.clipped_before_unscaling: ("dense_chunked_scaled", "clip factor"),
    bugs.tied_embedding_counted_twice: ("top1_clipped", "gradient norm"),
    bugs.last_tile_left_out: ("top1_clipped", "first moments"),
    bugs.norm_of_the_first_piece: ("dense_chunked_scaled", "gradient norm"),
}
TESTED: dict[Plant, Callable[[Topology], None]] = {  # what fails with it
    bugs.biases_counted_again_in_recomputation: (
        lambda single: test_routers.test_each_choice_of_a_training_step_is_counted_once(single, "block")
    ),
    bugs.warm_up_from_zero: (
        lambda single: test_schedule.test_the_first_step_already_moves_and_the_peak_is_reached_once_warm()
    ),
    bugs.every_epoch_in_the_same_order: (
        lambda single: test_sampler.test_an_epoch_reads_no_sample_twice_and_epochs_and_seeds_differ()
    ),
    bugs.limit_of_rows_rounded_down: (lambda single: test_plan.test_an_odd_row_is_lent_in_one_piece()),
    bugs.expert_numbers_in_one_byte: (lambda single: test_router.test_choices_of_any_number_of_experts_are_sorted()),
    bugs.ties_to_the_last_expert: (
        lambda single: test_router.test_ties_are_decided_alike_however_many_tokens_there_are(single, 1)
    ),
    bugs.loss_scale_that_never_grows: (
        lambda single: test_loss_scale.test_the_scale_doubles_after_so_many_steps_without_overflow()
    ),
    bugs.window_of_the_tokens_before: (lambda single: test_attention.test_attention_in_blocks_is_attention_at_once(3)),
    bugs.last_piece_of_the_fused_step_left_out: (
        lambda single: test_fused.test_steps_equal_torchs_in_float64(AdamW, torch.float64, None, _TILE + 5)
    ),
    bugs.second_block_of_initial_weights_like_the_first: (
        lambda single: test_sharded.test_no_two_places_hold_the_same_values(
            test_sharded.initialized(single, big=True), single
        )
    ),
}


def _case(plant: Plant | None, found: Found) -> Case:
    continuations = (found.quantity,) if found.quantity in (FROM_ONE, AGAIN) else ()
    return Case(found.overrides, plant, continuations, steps=1 if "in step 1" in found.said else 2)


def _shown(found: Any) -> set[str]:
    """What a sample should have once: a certificate's overrides and quantity, what the oracle finds wrong."""
    return {found.quantity, *found.overrides} if isinstance(found, Found) else {found[1]}


def _runs(found: Any) -> int:
    """What a plant takes: where it shows in a continued run, that one, too."""
    return 2 if isinstance(found, Found) and found.quantity in (FROM_ONE, AGAIN) else 1


def _sampled(bugs_of: dict[Plant, Any]) -> list[Plant]:
    """As few as, beside those of every day, show all that any shows; the next shows most of what is left."""
    left = set[str]().union(*map(_shown, bugs_of.values()))
    left -= set[str]().union(*(_shown(found) for plant, found in bugs_of.items() if plant in EVERY_DAY))
    sample: list[Plant] = []
    while left:
        sample.append(max(bugs_of, key=lambda plant: len(_shown(bugs_of[plant]) & left) / _runs(bugs_of[plant])))
        left -= _shown(bugs_of[sample[-1]])
    return sample


def _asked(request: pytest.FixtureRequest, otherwise: dict[Plant, Any]) -> list[Plant]:
    return [parameters["plant"] for parameters in asked_of(request)] or _sampled(otherwise)


def _made(pool: WorkerPool, directory: Path, plants: Iterable[Plant]) -> dict[Case, list[Row]]:
    """Certificates of bugs, of no more steps than show them, and of their configurations without one."""
    cases = [_case(plant, CERTIFIED[plant]) for plant in plants]
    return certified(pool, directory, [*cases, *dict.fromkeys(replace(case, plant=None) for case in cases)])


@pytest.fixture(scope="module")
def certificates(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, list[Row]]:
    return _made(pool, tmp_path_factory.mktemp("certificates"), [plant for plant in CERTIFIED if plant in EVERY_DAY])


@pytest.fixture(scope="module")
def more_certificates(
    pool: WorkerPool, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[Case, list[Row]]:
    return _made(pool, tmp_path_factory.mktemp("certificates"), _asked(request, CERTIFIED))


def _assert_caught_and_named(made: dict[Case, list[Row]], plant: Plant) -> None:
    found = CERTIFIED[plant]
    rows = made[_case(plant, found)]
    culprit = first_difference(rows)
    assert culprit is not None
    assert culprit.quantity.removeprefix("checkpoint continued ") == found.quantity, rows
    assert found.said in str(culprit)
    assert culprit.error > 1e-7


def _assert_that_without_a_bug_all_is_well(made: dict[Case, list[Row]]) -> None:
    sound = {case: rows for case, rows in made.items() if case.plant is None}
    assert {case.overrides for case in sound} == {case.overrides for case in made}
    for case, rows in sound.items():
        assert all(row.ok for row in rows), (case, rows)
        assert min(row.compared for row in rows) >= 1


def _each(bugs_of: dict[Plant, Any], every_day: bool) -> pytest.MarkDecorator:
    """Those of every day, or the others, of which CI runs a sample."""
    sample = _sampled(bugs_of)
    params = [
        pytest.param(plant, marks=() if every_day else pytest.mark.slow if plant in sample else pytest.mark.exhaustive)
        for plant in bugs_of
        if (plant in EVERY_DAY) == every_day
    ]
    return pytest.mark.parametrize("plant", params, ids=lambda plant: plant.__name__)


@_each(CERTIFIED, every_day=True)
def test_a_planted_bug_is_caught_and_named(certificates: dict[Case, list[Row]], plant: Plant) -> None:
    _assert_caught_and_named(certificates, plant)


@pytest.mark.timeout(600)  # the first waits for all certificates
@_each(CERTIFIED, every_day=False)
def test_so_is_every_other(more_certificates: dict[Case, list[Row]], plant: Plant) -> None:
    _assert_caught_and_named(more_certificates, plant)


def test_without_a_bug_the_same_configurations_pass(certificates: dict[Case, list[Row]]) -> None:
    _assert_that_without_a_bug_all_is_well(certificates)


@pytest.mark.slow
def test_without_a_bug_the_other_configurations_pass(more_certificates: dict[Case, list[Row]]) -> None:
    _assert_that_without_a_bug_all_is_well(more_certificates)


Verdicts = dict[tuple[str, Plant | None], Errors]


def _judged(pool: WorkerPool, plants: Iterable[Plant]) -> Verdicts:
    return judged(pool, "one process", [(ORACLE[plant][0], plant) for plant in plants])


@pytest.fixture(scope="module")
def verdicts(pool: WorkerPool) -> Verdicts:
    return _judged(pool, [plant for plant in ORACLE if plant in EVERY_DAY])


@pytest.fixture(scope="module")
def more_verdicts(pool: WorkerPool, request: pytest.FixtureRequest) -> Verdicts:
    return _judged(pool, _asked(request, ORACLE))


@_each(ORACLE, every_day=True)
def test_what_one_process_has_too_is_caught_by_the_oracle(verdicts: Verdicts, plant: Plant) -> None:
    setting, quantity = ORACLE[plant]
    assert first_wrong(verdicts[setting, plant]) == quantity


@_each(ORACLE, every_day=False)
def test_so_is_every_other_that_one_process_has_too(more_verdicts: Verdicts, plant: Plant) -> None:
    setting, quantity = ORACLE[plant]
    assert first_wrong(more_verdicts[setting, plant]) == quantity


@pytest.mark.parametrize("plant", TESTED, ids=lambda plant: plant.__name__)
def test_what_no_small_run_meets_is_caught_by_a_test(single: Topology, plant: Plant) -> None:
    TESTED[plant](single)
    with planted(plant), pytest.raises(AssertionError):
        TESTED[plant](single)


def test_the_bugs_are_many_and_each_is_planted() -> None:
    everything = {
        value
        for name, value in vars(bugs).items()
        if callable(value) and value.__module__ == bugs.__name__ and not name.startswith("_")
    }
    assert everything == {*CERTIFIED, *ORACLE, *TESTED}
    assert len(everything) >= 80
    assert everything > EVERY_DAY
