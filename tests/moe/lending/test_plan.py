"""Plans of who computes which rows: what must hold of any, on random loads, and cases worked by hand.

Each test of random loads makes 10,000 plans: small groups of processes and heavily skewed loads, among them none.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from tedlab.moe.lending import Loan, Plan, even, least_loaded

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


def test_plans_of_least_loaded_lend_no_less_than_the_minimum_but_an_experts_last_rows() -> None:
    for load_E, processes, generator in loads():
        minimum, keep = int(generator.integers(1, 3000)), bool(generator.random() < 0.5)
        plan = least_loaded(load_E, processes, threshold=1.0, minimum=minimum, keep_small=keep)
        check_partition(plan)
        for loan in plan.loans:
            assert loan.stop - loan.start >= minimum or loan.stop == load_E[loan.expert]
        if keep:
            assert all(load_E[loan.expert] - plan.kept_E[loan.expert] >= minimum for loan in plan.loans)
        limit = -(-load_E.sum() // processes)
        # Who borrows over the limit took all of the last rows of an expert, because nobody had room for a minimum.
        for process in np.flatnonzero(plan.loads_P > limit):
            local = slice(process * len(load_E) // processes, (process + 1) * len(load_E) // processes)
            small = keep and plan.kept_E[local].sum() > limit
            assert small or any(loan.stop == load_E[loan.expert] for loan in plan.loans if loan.borrower == process)


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
    plan = least_loaded(np.array([511, 0]), 2, threshold=1.0)
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
    plan = least_loaded(np.array([70, 30, 35, 25]), 4, minimum=20)
    assert plan.loans == (Loan(0, 3, 40, 70),)
    assert plan.loads_P.tolist() == [40, 30, 35, 55]


def test_each_pair_of_home_and_borrower_has_a_minimum_of_its_own() -> None:
    minimum = np.array([[1, 1, 20, 20], [1, 1, 20, 20], [20, 20, 1, 1], [20, 20, 1, 1]])  # two nodes
    # 25 rows each. Process 3 has the most room, but too little for what comes from another node; 12 of process 0's 18
    # rows too many fit into process 1, and process 3 takes the last 6, since these are all that is left.
    plan = least_loaded(np.array([43, 13, 33, 11]), 4, minimum=minimum)
    assert plan.loans == (Loan(0, 1, 25, 37), Loan(0, 3, 37, 43), Loan(2, 3, 25, 33))


def test_no_rows_at_all_and_one_process_lend_nothing() -> None:
    for policy in (least_loaded, even):
        assert policy(np.zeros(4, dtype=np.int64), 2).loans == ()
        assert policy(np.array([9, 1]), 1).loans == ()
