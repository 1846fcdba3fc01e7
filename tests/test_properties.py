"""What holds for any numbers: of slots, of rows that are dealt, spread and arranged, and of buckets."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tedlab.comm import Splits
from tedlab.comm.rows import dealt, hands, in_chunks, listed, rows_of, spread
from tedlab.moe.chunks import by_chunk
from tedlab.moe.ragged import Exchange, arrange
from tedlab.moe.router import RouterReport, Routing
from tedlab.moe.slots import assign_slots, sort_choices
from tedlab.optim.bucket import Bucket, lay_out

always = settings(derandomize=True, database=None, max_examples=80)  # the same examples every time


@st.composite
def choices(draw: Any) -> tuple[torch.Tensor, int]:
    """(T, K) experts, of which a token chooses none twice; and how many there are."""
    experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, min(3, experts)))
    token = st.permutations(range(experts)).map(lambda order: order[:top_k])
    tokens = draw(st.lists(token, max_size=20))
    return torch.tensor(tokens, dtype=torch.int64).view(-1, top_k), experts


@always
@given(choices(), st.integers(0, 8))
def test_every_kept_choice_has_one_slot_of_its_expert_and_none_is_dropped_while_there_are_free_ones(
    chosen: tuple[torch.Tensor, int], capacity: int
) -> None:
    expert_TK, experts = chosen
    slot_TK, choice_EC, load_E = assign_slots(expert_TK, experts, capacity)
    expert, slot = expert_TK.flatten(), slot_TK.flatten()
    kept = slot >= 0
    assert load_E.tolist() == expert.bincount(minlength=experts).tolist()
    assert len(slot[kept].unique()) == kept.sum()
    assert (slot[kept].div(max(capacity, 1), rounding_mode="floor") == expert[kept]).all()
    assert (choice_EC[slot[kept]] == kept.nonzero().flatten()).all()
    assert (choice_EC >= 0).sum() == kept.sum()
    assert expert[kept].bincount(minlength=experts).tolist() == load_E.clamp(max=capacity).tolist()


@always
@given(choices(), st.integers(0, 8))
def test_an_expert_fills_its_slots_in_order_of_choice_and_token(
    chosen: tuple[torch.Tensor, int], capacity: int
) -> None:
    expert_TK, experts = chosen
    slot_TK, _, _ = assign_slots(expert_TK, experts, capacity)
    expert, slot = expert_TK.t().flatten(), slot_TK.t().flatten()  # all first choices, then all second ones
    for own in range(experts):
        queue = slot[expert == own].tolist()
        served = queue[:capacity]
        assert served == list(range(own * capacity, own * capacity + len(served)))
        assert set(queue[capacity:]) <= {-1}


@always
@given(choices(), st.integers(0, 8), st.integers(1, 1000))
def test_a_full_expert_keeps_the_choices_of_highest_priority(
    chosen: tuple[torch.Tensor, int], capacity: int, priorities: int
) -> None:
    expert_TK, experts = chosen
    draw = torch.Generator().manual_seed(priorities)
    priority_TK = torch.randint(priorities, expert_TK.shape, generator=draw).double()  # some equal, or all
    slot_TK, choice_EC, load_E = assign_slots(expert_TK, experts, capacity, priority_TK)
    expert, slot, priority = expert_TK.flatten(), slot_TK.flatten(), priority_TK.flatten()
    assert load_E.tolist() == expert.bincount(minlength=experts).tolist()
    for own in range(experts):
        here, kept = expert == own, (expert == own) & (slot >= 0)
        assert priority[kept].sort().values.tolist() == sorted(priority[here].tolist(), reverse=True)[:capacity][::-1]
        assert slot[kept].sort().values.tolist() == list(range(own * capacity, own * capacity + int(kept.sum())))
        assert (choice_EC[slot[kept]] == kept.nonzero().flatten()).all()


@always
@given(choices(), st.integers(0, 8))
def test_later_tokens_take_no_slot_from_a_first_choice(chosen: tuple[torch.Tensor, int], capacity: int) -> None:
    expert_TK, experts = chosen
    half = len(expert_TK) // 2
    slot_TK, _, _ = assign_slots(expert_TK, experts, capacity)
    alone_TK, _, _ = assign_slots(expert_TK[:half], experts, capacity)
    assert slot_TK[:half, 0].tolist() == alone_TK[:, 0].tolist()


@always
@given(choices())
def test_sorted_choices_are_all_there_by_expert_and_then_by_token(chosen: tuple[torch.Tensor, int]) -> None:
    expert_TK, experts = chosen
    place_TK, choice_N, load_E = sort_choices(expert_TK, experts)
    key = expert_TK.flatten()[choice_N] * (expert_TK.numel() + 1) + choice_N
    assert (key.diff() > 0).all()
    assert (choice_N[place_TK.flatten()] == torch.arange(expert_TK.numel())).all()
    assert load_E.sum() == expert_TK.numel()


@st.composite
def counts(draw: Any) -> np.ndarray:
    """(senders, E) rows."""
    senders, experts = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    flat = draw(st.lists(st.integers(0, 20), min_size=senders * experts, max_size=senders * experts))
    return np.array(flat, dtype=np.int64).reshape(senders, experts)


@always
@given(counts(), st.integers(1, 8))
def test_rows_that_are_dealt_are_all_dealt_and_evenly(counts_sE: np.ndarray, sharers: int) -> None:
    each = np.stack([dealt(counts_sE, sharers, rank) for rank in range(sharers)])
    assert (each.sum(0) == counts_sE).all()
    assert (each.max(0) - each.min(0) <= 1).all()
    assert (each.sum(-1).max(0) - each.sum(-1).min(0) <= 1).all()


@always
@given(counts(), st.integers(1, 8))
def test_hands_differ_from_the_list_by_the_padding_of_its_end(counts_sE: np.ndarray, sharers: int) -> None:
    sent = hands(counts_sE, sharers)
    added = sent.sum(0) - counts_sE
    assert (added[:, :-1] == 0).all()
    assert ((added[:, -1] >= 0) & (added[:, -1] < sharers)).all()
    rows = np.array([listed(int(row.sum()), sharers) for row in counts_sE])
    assert (sent.sum(-1) * sharers == rows).all()  # all who share send as many


@always
@given(counts(), st.integers(1, 4))
def test_what_a_tensor_group_computes_is_what_its_ranks_received(counts_sE: np.ndarray, sharers: int) -> None:
    arriving = hands(counts_sE, sharers)
    ranks = [rows_of(arriving, 0, rank) for rank in range(sharers)]
    assert {rows.computed for rows in ranks} == {sum(rows.received for rows in ranks)}
    assert all(rows.received * sharers <= rows.gathered for rows in ranks)
    assert max(rows.received for rows in ranks) * sharers == ranks[0].gathered


@always
@given(choices(), st.integers(1, 4), st.integers(1, 5))
def test_a_chunk_has_an_equal_part_of_every_experts_rows_in_their_order(
    chosen: tuple[torch.Tensor, int], sharers: int, chunks: int
) -> None:
    """Of a list that tensor ranks deal, each rank's part of it; numbers of rows alone say how many are in a chunk."""
    expert_TK, experts = chosen
    place_TK, choice_R, load_E = sort_choices(expert_TK, experts)
    zero = torch.zeros(())
    counts_iE = hands(load_E.numpy()[None], sharers)[:, 0]
    routing = Routing(zero, place_TK, choice_R, RouterReport(zero, zero, load_E, zero))
    listing = by_chunk(routing, torch.from_numpy(counts_iE), chunks)
    row_R, expert = listing.choice_EC, expert_TK.flatten()
    assert row_R[listing.slot_TK.flatten()].tolist() == list(range(expert_TK.numel()))
    for rank, counts_E in enumerate(counts_iE):
        own = choice_R[rank::sharers].tolist()
        queues = [[c for c in own if expert[c] == e] + [None] * counts_E[e] for e in range(experts)]
        queues = [queue[: counts_E[e]] for e, queue in enumerate(queues)]  # None: rows that pad the list
        wanted = []
        for parts_E in in_chunks(counts_E, chunks).tolist():
            assert all(abs(part * chunks - count) < chunks for part, count in zip(parts_E, counts_E, strict=True))
            for queue, part in zip(queues, parts_E, strict=True):
                wanted += queue[:part]
                del queue[:part]
        assert not any(queues)
        assert row_R[rank::sharers].tolist() == [c for c in wanted if c is not None]
        assert wanted[: len(own)] == row_R[rank::sharers].tolist()  # padding comes last


@st.composite
def proportions(draw: Any) -> tuple[list[int], int, int]:
    """Shares, a number of rows, and the most that one may get of them."""
    shares = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=8))
    most = draw(st.integers(0, 50))
    return shares, draw(st.integers(0, len(shares) * most)), most


@always
@given(proportions())
def test_spread_rows_add_up_and_a_larger_share_gets_no_less(case: tuple[list[int], int, int]) -> None:
    shares, rows, most = case
    found = spread(shares, rows, most)
    assert found.sum() == rows
    assert ((found >= 0) & (found <= most)).all()
    for i, own in enumerate(shares):
        for j, other in enumerate(shares):
            assert found[i] >= found[j] or own <= other


@always
@given(proportions(), st.integers(-900, 900))
def test_only_proportions_matter_to_a_spread(case: tuple[list[int], int, int], exponent: int) -> None:
    shares, rows, most = case
    scaled = np.ldexp(np.array(shares, dtype=float), exponent)
    assert spread(list(scaled), rows, most).tolist() == spread(shares, rows, most).tolist()


@always
@given(counts(), st.integers(1, 3))
def test_arranged_rows_are_sorted_by_expert_and_go_back_to_their_places(counts_se: np.ndarray, ranks: int) -> None:
    counts_ise = torch.from_numpy(np.stack([np.roll(counts_se, rank) for rank in range(ranks)]))
    sent = counts_ise.sum((1, 2))
    width, total = int(sent.max()), int(sent.sum())
    # As they come: of each tensor rank by sender, then by expert. A row says which it is.
    x = torch.zeros(ranks, width, 4, dtype=torch.float64)
    for rank, runs in enumerate(counts_ise.tolist()):
        rows = [
            (expert, sender, rank, 1 + place)
            for sender, of_sender in enumerate(runs)
            for expert, number in enumerate(of_sender)
            for place in range(number)
        ]
        x[rank, : len(rows)] = torch.tensor(rows, dtype=torch.float64).view(-1, 4)
    x = x.flatten(0, 1)
    arrangement = arrange(Exchange(Splits((0,), (0,)), counts_ise, width, total, None, "torch"))
    arranged = arrangement.sort(x)
    assert arranged.tolist() == sorted(arranged.tolist())
    assert arranged[:, 0].long().tolist() == arrangement.groups.expert_N.tolist()
    assert len(arranged) == total
    assert torch.equal(arrangement.restore(arranged), x)


parameters_by_key = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 30)), max_size=12)  # key, elements


@always
@given(parameters_by_key, st.integers(1, 60))
def test_buckets_hold_every_parameter_once_in_order_and_as_many_as_fit(
    parameters: list[tuple[int, int]], most: int
) -> None:
    numbered = [(*parameter, number) for number, parameter in enumerate(parameters)]
    buckets = list(lay_out(numbered, key=lambda p: (p[0],), elements=lambda p: p[1], most=most))
    assert [p for _, bucket in buckets for p in bucket] == sorted(numbered, key=lambda p: p[0])
    for key, bucket in buckets:
        assert bucket
        assert {(p[0],) for p in bucket} == {key}
        assert len(bucket) == 1 or sum(p[1] for p in bucket) <= most
    for (key, bucket), (next_key, following) in pairwise(buckets):
        assert key < next_key or sum(p[1] for p in bucket) + following[0][1] > most


@always
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5))
def test_the_shards_of_a_bucket_hold_every_element_once_and_the_least_padding(sizes: list[int], ranks: int) -> None:
    ends = np.cumsum(sizes)
    values = [torch.arange(end - size, end).double() + 1 for end, size in zip(ends, sizes, strict=True)]
    shards, owned = [], [0] * len(sizes)
    for rank in range(ranks):
        parameters = [nn.Parameter(value.clone()) for value in values]
        comm: Any = SimpleNamespace(size=lambda kind: ranks, rank=lambda kind, own=rank: own)
        bucket = Bucket(parameters, comm, sharded=True)
        assert all(torch.equal(p, value) for p, value in zip(parameters, values, strict=True))
        assert torch.equal(bucket.shard_of(values), bucket.shard)
        shards.append(bucket.shard)
        for number, parameter in enumerate(parameters):
            for where in bucket.ranges({parameter}):
                inside = bucket.shard[where]
                assert (torch.isin(inside, values[number]) | (inside == 0)).all()  # 0: what pads the end
                owned[number] += where.stop - where.start
    flat = torch.cat(shards)
    assert torch.equal(flat[: ends[-1]], torch.cat(values))
    padding = len(flat) - int(ends[-1])
    assert 0 <= padding < ranks
    assert not flat[ends[-1] :].any()
    owned[-1] -= padding  # the last parameter's
    assert owned == sizes
