"""Plans of who computes which rows: what must hold of any, on random loads, and cases worked by hand.

Each test of random loads makes 10,000 plans: small groups of processes and heavily skewed loads, among them none.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from tedlab.config import LendConfig
from tedlab.moe.lending import Loan, Plan, even, least_loaded, policy_of

CASES = 10_000


def loads() -> Iterator[tuple[np.ndarray, int, np.random.Generator]]:
    """Yields loads of experts, the number of processes, and a source of other random values."""
    generator = np.random.default_rng(0)
    for _ in range(CASES):
        processes = int(generator.integers(1, 9))
        experts = processes * int(generator.integers(1, 5))
        most = int(generator.choice([2, 20, 600, 40_000]))
        load_E = generator.integers(0, most, experts)
        load_E[generator.random(experts) < generator.random()] = 0
        if generator.random() < 0.5:
            load_E[generator.integers(experts)] *= int(generator.integers(1, 50))
        yield load_E, processes, generator


def check_partition(plan: Plan) -> None:
    """Each expert's rows are divided without gap or overlap, home first, and nobody has two ranges of one expert."""
    assert list(plan.loans) == sorted(plan.loans, key=lambda loan: (loan.expert, loan.start))
    pairs = [(loan.expert, loan.borrower) for loan in plan.loans]
    assert len(set(pairs)) == len(pairs)
    local = len(plan.load_E) // plan.processes
    for expert in {loan.expert for loan in plan.loans}:
        ranges = [loan for loan in plan.loans if loan.expert == expert]
        assert all(loan.start < loan.stop and loan.borrower != expert // local for loan in ranges)
        assert all(one.stop == other.start for one, other in pairwise(ranges))
        assert ranges[0].start == plan.kept_E[expert] >= 0
        assert ranges[-1].stop == plan.load_E[expert]
    assert plan.loads_P.sum() == plan.load_E.sum()
    assert sum(map(plan.lent, range(plan.processes))) == sum(map(plan.borrowed, range(plan.processes)))


def test_plans_of_least_loaded_divide_all_rows_and_keep_the_limit_where_any_number_of_rows_may_be_lent() -> None:
    for load_E, processes, generator in loads():
        alpha = float(generator.choice([1.0, 1.1, 1.5]))
        plan = least_loaded(load_E, processes, threshold=1.0, alpha=alpha)
        check_partition(plan)
        assert plan.loads_P.max() <= np.ceil(alpha * load_E.sum() / processes)


def test_plans_of_least_loaded_make_no_loan_below_the_minimum_of_its_two_processes() -> None:
    for load_E, processes, generator in loads():
        minimum = generator.integers(1, int(generator.choice([3, 50, 3000])), (processes, processes))
        plan = least_loaded(load_E, processes, threshold=1.0, minimum=minimum)
        check_partition(plan)
        limit = -(-load_E.sum() // processes)
        for loan in plan.loans:
            assert loan.stop - loan.start >= minimum[plan.home(loan.expert), loan.borrower]
            assert plan.loads_P[loan.borrower] <= limit
        # Homes are over the limit only by what nobody has room for: none of them took so much from its own.
        at_home = plan.load_E.reshape(processes, -1).sum(1)
        assert (plan.loads_P <= np.maximum(at_home, limit)).all()


def test_without_keeping_small_excesses_homes_stay_within_the_limit_and_last_rows_may_be_few() -> None:
    """The paper's Algorithm 3: who borrows over the limit took the last rows of an expert."""
    for load_E, processes, generator in loads():
        minimum = int(generator.integers(1, 3000))
        plan = least_loaded(load_E, processes, threshold=1.0, minimum=minimum, keep_small=False)
        check_partition(plan)
        last = {loan.borrower for loan in plan.loans if loan.stop == load_E[loan.expert]}
        assert all(loan.stop - loan.start >= minimum or loan.borrower in last for loan in plan.loans)
        assert last >= {*np.flatnonzero(plan.loads_P > -(-load_E.sum() // processes)).tolist()}


def test_plans_of_even_give_equal_loads_and_each_process_borrows_from_one_home() -> None:
    for load_E, processes, _ in loads():
        plan = even(load_E, processes)
        check_partition(plan)
        assert plan.loads_P.max() - plan.loads_P.min() <= 1
        homes = {(plan.home(loan.expert), loan.borrower) for loan in plan.loans}
        borrowers = [borrower for _, borrower in homes]
        assert len(set(borrowers)) == len(borrowers) <= processes - 1
        assert all(plan.borrowed(process) <= len(load_E) // processes for process in range(processes))


def test_an_odd_row_is_lent_in_one_piece() -> None:
    """The authors' code rounds the limit down, and names the pair of expert 0 and process 1 twice here."""
    for keep_small in (False, True):
        plan = least_loaded(np.array([511, 0]), 2, threshold=1.0, keep_small=keep_small)
        assert plan.loans == (Loan(0, 1, 256, 511),)
        assert plan.loads_P.tolist() == [256, 255]


def test_a_hot_expert_is_divided_over_all_processes_by_hand() -> None:
    # Four processes of two experts and 100 rows: 25 each. Expert 1 keeps 25 - 10 rows; process 2 has the fewest rows.
    plan = least_loaded(np.array([10, 60, 10, 0, 0, 5, 10, 5]), 4)
    assert plan.loans == (Loan(1, 2, 15, 35), Loan(1, 1, 35, 50), Loan(1, 3, 50, 60))
    assert plan.loads_P.tolist() == [25, 25, 25, 25]


def test_a_process_below_the_mean_takes_all_it_lacks_from_one_home_by_hand() -> None:
    # 8 rows each. Process 2 lacks 8 and takes them of process 0, which then lacks 5 and takes them of process 1.
    plan = even(np.array([11, 13, 0]), 3)
    assert plan.loads_P.tolist() == [8, 8, 8]
    assert {(loan.expert, loan.borrower, loan.stop - loan.start) for loan in plan.loans} in (
        {(1, 0, 5), (0, 2, 8)},
        {(1, 2, 8), (0, 1, 3)},
    )


@pytest.mark.parametrize(("threshold", "lends"), [(1.5, True), (1.51, False)])
def test_nothing_is_lent_below_the_threshold_of_loads_of_processes(threshold: float, lends: bool) -> None:
    # Loads of processes are 6 and 2, the mean 4; loads of experts would be 3 times their mean.
    plan = least_loaded(np.array([6, 0, 2, 0]), 2, threshold=threshold)
    assert bool(plan.loans) == lends


def test_an_excess_below_the_minimum_stays_at_home_or_goes_as_a_whole() -> None:
    load_E = np.array([16, 4])  # an excess of 6
    assert least_loaded(load_E, 2, minimum=7).loans == ()
    assert least_loaded(load_E, 2, minimum=7, keep_small=False).loans == (Loan(0, 1, 10, 16),)
    assert least_loaded(load_E, 2, minimum=6).loans == (Loan(0, 1, 10, 16),)


def test_where_nobody_has_room_for_a_minimum_the_least_loaded_takes_all_and_exceeds_the_limit() -> None:
    # 40 rows each; process 0 has 30 more. The others have room for 10, 5 and 15 of them, and 20 are worth a loan.
    # Process 3 takes all 30, then lends 15 of its own, for which again nobody has room.
    plan = least_loaded(np.array([70, 30, 35, 25]), 4, minimum=20, keep_small=False)
    assert plan.loans == (Loan(0, 3, 40, 70), Loan(3, 1, 10, 25))
    assert plan.loads_P.tolist() == [40, 45, 35, 40]
    assert least_loaded(np.array([70, 30, 35, 25]), 4, minimum=20).loans == ()  # which 15 rows less would not pay


def test_each_pair_of_home_and_borrower_has_a_minimum_of_its_own() -> None:
    minimum = np.array([[1, 1, 20, 20], [1, 1, 20, 20], [20, 20, 1, 1], [20, 20, 1, 1]])  # two nodes
    # 25 rows each. Process 3 has the most room, but too little for what comes from another node; 12 of process 0's 18
    # rows too many fit into process 1, and the other 6 stay.
    plan = least_loaded(np.array([43, 13, 33, 11]), 4, minimum=minimum)
    assert plan.loans == (Loan(0, 1, 31, 43), Loan(2, 3, 25, 33))
    plan = least_loaded(np.array([43, 13, 33, 11]), 4, minimum=minimum, keep_small=False)
    assert plan.loans == (Loan(0, 1, 25, 37), Loan(0, 3, 37, 43), Loan(2, 3, 25, 33))


def test_no_rows_at_all_and_one_process_lend_nothing() -> None:
    for policy in (least_loaded, even):
        assert policy(np.zeros(4, dtype=np.int64), 2).loans == ()
        assert policy(np.array([9, 1]), 1).loans == ()


def test_a_loan_is_inside_a_node_if_it_is_for_every_tensor_rank() -> None:
    """Nodes of six ranks, tensor groups of four: the second group is on two nodes. With twelve, the first three fit."""
    config = LendConfig("llep", threshold=1.0, minimum=[1, 100], ranks_per_node=6)
    load_E = np.array([40, 0, 0, 0])  # 10 each
    apart, together = (policy_of(replace(config, ranks_per_node=n), range(0, 16, 4), 4) for n in (6, 12))
    assert apart is not None
    assert together is not None
    assert apart(load_E).loans == ()
    assert together(load_E).loans == (Loan(0, 1, 20, 30), Loan(0, 2, 30, 40))
