"""The arithmetic of rows: nothing is lost, and nobody who shares gets more than their share."""

from math import comb

import numpy as np
import pytest

from tedlab.comm.rows import dealt, hands, listed, pilots, rows_of, sent_as_pilots, spread

COUNTS = np.array([[5, 0, 1, 7], [0, 0, 13, 0]])  # senders × experts


@pytest.mark.parametrize("sharers", [1, 2, 3, 4, 16])
def test_a_list_is_dealt_like_a_hand_of_cards(sharers: int) -> None:
    experts = np.repeat(np.arange(4), COUNTS[0])
    for rank in range(sharers):
        mine = np.bincount(experts[rank::sharers], minlength=4)
        assert dealt(COUNTS[0], sharers, rank).tolist() == mine.tolist()


@pytest.mark.parametrize("sharers", [1, 2, 3, 4, 16])
def test_all_who_share_send_as_many_rows_as_each_other(sharers: int) -> None:
    sent = hands(COUNTS, sharers)
    assert (sent.sum(-1) == listed(13, sharers) // sharers).all()
    total = sent.sum(0)
    assert (total[:, :-1] == COUNTS[:, :-1]).all()
    assert (total[:, -1] - COUNTS[:, -1] == -13 % sharers).all()  # what makes the list long enough
    assert (sent.max(0) - sent.min(0)).max() <= 1


def test_the_buffer_of_a_tensor_group_is_as_wide_as_its_widest_part() -> None:
    arriving = np.array([[[3, 1], [0, 2]], [[2, 0], [1, 1]]])  # two tensor ranks, two senders, two experts
    first, second = (rows_of(arriving, 9, rank) for rank in (0, 1))
    assert (first.sent, first.received, first.gathered, first.computed) == (9, 6, 12, 10)
    assert second.received == 4
    assert (first + second).computed == (first * 2).computed == 20


@pytest.mark.parametrize(
    ("shares", "rows", "most", "expected"),
    [
        ([1, 1, 1], 7, 7, [3, 2, 2]),
        ([3, 1, 0], 8, 8, [6, 2, 0]),
        ([100, 1, 1], 10, 5, [5, 3, 2]),  # nobody chooses an expert twice
        ([1, 0, 0], 6, 2, [2, 2, 2]),
        ([0, 0], 3, 3, [2, 1]),
        ([0.2, 0.3, 0.5], 1, 1, [0, 0, 1]),
    ],
)
def test_rows_are_spread_in_proportion_as_far_as_whole_numbers_allow(
    shares: list[float], rows: int, most: int, expected: list[int]
) -> None:
    assert spread(shares, rows, most).tolist() == expected


@pytest.mark.parametrize(("nodes", "redundant"), [(2, 0.7509), (4, 0.5482)])
def test_tokens_that_choose_at_random_go_to_as_many_nodes_as_expected(nodes: int, redundant: float) -> None:
    """1 - D/K, with D = n(1 - C(256 - 256/n, 8) / C(256, 8)): 1.993 of 2 nodes, and 3.615 of 4."""
    expected = nodes * (1 - comb(256 - 256 // nodes, 8) / comb(256, 8))
    assert 1 - expected / 8 == pytest.approx(redundant, abs=5e-5)
    chosen_TK = np.random.default_rng(0).random((4096, 256)).argpartition(8, 1)[:, :8] // (256 // nodes)
    measured = np.mean([len(set(token)) for token in chosen_TK.tolist()])
    assert measured == pytest.approx(expected, rel=0.01)
    counts_E = np.full(256, 8 * 4096 // 256)
    assert pilots(counts_E, 4096, 8, nodes).sum() / 4096 == pytest.approx(expected, abs=1e-3)


def test_pilots_of_balanced_choices_are_those_of_the_closed_form() -> None:
    """D of K = 8 choices among 256 experts, as X-MoE (arXiv 2508.13337) counts it, and its bounds."""
    for processes, share in ((2, 0.2491), (4, 0.4518)):
        found = pilots(np.full(256, 8 * 3200 // 256), 3200, 8, processes)
        assert found.sum() / (8 * 3200) == pytest.approx(share, abs=2e-4)
        to_nodes = sent_as_pilots([1.0] * 256, 3200, 8, 1, 8, processes)[0]  # on so many nodes, of eight processes
        assert to_nodes[:, -1].tolist() == found.tolist()
    assert pilots(np.array([10, 10, 0, 0]), 10, 2, 2).tolist() == [10, 0]
    assert pilots(np.array([10, 0, 10, 0]), 10, 2, 2).tolist() == [10, 10]
