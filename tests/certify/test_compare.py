"""What only one of two records has is a difference, whatever it is, and so is what processes do not agree on."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tedlab.certify.compare import Row, compare
from tedlab.certify.record import QUANTITIES, Record, Shard, assembled, packed, read, unpacked, write
from tedlab.degrees import ParallelDegrees


def a_record(*steps: int) -> Record:
    return {step: {name: {"all": torch.tensor([1.0, float(step)])} for name in QUANTITIES} for step in steps}


def wrong(record: Record, reference: Record, **options: Any) -> dict[str, Row]:
    return {row.quantity: row for row in compare(record, reference, ParallelDegrees(2), **options) if not row.ok}


def test_equal_records_are_equal() -> None:
    assert not wrong(a_record(1, 2, 3), a_record(1, 2, 3))


@pytest.mark.parametrize(("ours", "theirs", "step"), [((1,), (1, 2, 3), 2), ((1, 2, 3), (1,), 2), ((2,), (1, 2), 1)])
def test_a_step_that_one_of_them_has_not_is_a_difference(
    ours: tuple[int, ...], theirs: tuple[int, ...], step: int
) -> None:
    found = wrong(a_record(*ours), a_record(*theirs))
    assert found.keys() == set(QUANTITIES)
    for row in found.values():
        assert (row.error, row.step) == (math.inf, step)
        assert row.hint.startswith("absent")


def test_a_continued_run_has_the_steps_that_are_left_and_no_other() -> None:
    assert not wrong(a_record(3, 4), a_record(1, 2, 3, 4), steps=(3, 4))
    assert wrong(a_record(3), a_record(1, 2, 3, 4), steps=(3, 4))
    assert wrong(a_record(2, 3, 4), a_record(1, 2, 3, 4), steps=(3, 4))
    assert wrong(a_record(3, 4), a_record(1, 2, 3), steps=(3, 4))
    assert wrong({}, {}).keys() == set(QUANTITIES)  # nothing was compared


@pytest.mark.parametrize("whose", [0, 1])
def test_a_quantity_or_a_tensor_that_one_of_them_has_not_is_a_difference(whose: int) -> None:
    for remove in (lambda record: record[2].pop("gradients"), lambda record: record[2]["gradients"].pop("all")):
        records = a_record(1, 2), a_record(1, 2)
        remove(records[whose])
        found = wrong(*records)
        assert found.keys() == {"gradients"}
        assert (found["gradients"].step, found["gradients"].error) == (2, math.inf)
        assert wrong(*records, tolerance=0.3, together=True).keys() == {"gradients"}


def test_a_number_that_is_none_is_a_difference() -> None:
    record = a_record(1)
    record[1]["next weights"]["all"][0] = math.nan
    assert wrong(record, a_record(1)).keys() == {"next weights"}
    assert wrong(a_record(1), record).keys() == {"next weights"}


def parts(*values: float, offset: int = 0, name: str = "all") -> dict[int, dict[str, dict[str, Shard]]]:
    """What one of two processes holds of a tensor of four elements."""
    return {1: {"next weights": {name: Shard(torch.Size((4,)), (offset,), torch.tensor(values, dtype=torch.float64))}}}


def test_parts_are_put_together() -> None:
    whole = assembled([parts(1, 2), parts(3, 4, offset=2)])[1]["next weights"]["all"]
    assert whole.tolist() == [1, 2, 3, 4]


def test_parts_are_unpacked_as_they_were_packed() -> None:
    """Of every dtype, one after another of as many bytes as no other dtype has."""
    values = {
        "flags": torch.tensor([True, False, True]),
        "number": torch.tensor(0.1, dtype=torch.float64),
        "halves": torch.tensor([[1.5, -2.0, math.inf]], dtype=torch.bfloat16),
        "columns": torch.arange(6).view(2, 3).T,
        "nothing": torch.empty(0, 2),
    }
    of_step = {
        name: Shard(torch.Size((9, 9)), (number,), tensor) for number, (name, tensor) in enumerate(values.items())
    }
    given = {1: {"gradients": of_step, "loss scale": {}}, 3: {"gradients": parts(1, 2)[1]["next weights"]}}
    found = unpacked(*packed(given))
    assert {step: [*quantities] for step, quantities in found.items()} == {
        1: ["gradients", "loss scale"],
        3: ["gradients"],
    }
    for step, quantities in given.items():
        for quantity, shards in quantities.items():
            assert [*found[step][quantity]] == [*shards]
            for name, (shape, offset, tensor) in shards.items():
                its = found[step][quantity][name]
                assert (its.shape, its.offset, its.values.dtype) == (shape, offset, tensor.dtype)
                assert its.values.equal(tensor)
    assert unpacked(*packed({})) == {}


def test_what_two_processes_hold_and_do_not_agree_on_is_no_number() -> None:
    whole = assembled([parts(1, 2, 3, 4), parts(3, 5, offset=2)])[1]["next weights"]["all"]
    assert whole.isnan().tolist() == [False, False, False, True]


def test_processes_agree_where_rounding_is_all_that_differs() -> None:
    """An element in which large terms cancel has an error as large as theirs, however small it is itself."""
    whole = assembled([parts(1, 2, 3e-6, 4), parts(1, 2, 3e-6 + 4e-16, 4)])[1]["next weights"]["all"]
    assert not whole.isnan().any()


def test_no_two_processes_agree_because_a_third_value_is_infinite() -> None:
    whole = assembled([parts(math.inf, 2, 3, 4), parts(math.inf, 2, 5, 4)])[1]["next weights"]["all"]
    assert whole.isnan().tolist() == [False, False, True, False]


def test_a_value_on_which_processes_disagree_is_named_so() -> None:
    record = a_record(1)
    record[1]["next weights"]["all"][0] = math.nan
    assert "different on processes that should agree" in wrong(record, a_record(1))["next weights"].hint


def test_what_a_process_lacks_is_no_number() -> None:
    assert assembled([parts(1, 2, 3), parts(1, 2)])[1]["next weights"]["all"].isnan().tolist() == [0, 0, 0, 1]
    for everybody in ([parts(1, 2, 3, 4), {}], [{}, parts(1, 2, 3, 4)], [parts(1, 2, 3, 4), parts(1, name="other")]):
        for tensor in assembled(everybody)[1]["next weights"].values():
            assert tensor.isnan().all()


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    written: Record = {
        1: {"gradients": {}, "next weights": {"a": torch.randn(2, 3, dtype=torch.float64), "b": torch.tensor(3)}},
        4: {"outputs": {"logits": torch.full((2, 0, 1), 1.5)}, "losses": {"loss": torch.tensor(math.nan).bfloat16()}},
    }
    write(written, tmp_path / "record.pt")
    found = read(tmp_path / "record.pt")
    assert {step: {quantity: list(its) for quantity, its in of_step.items()} for step, of_step in found.items()} == {
        1: {"gradients": [], "next weights": ["a", "b"]},
        4: {"outputs": ["logits"], "losses": ["loss"]},
    }
    for step, quantities in written.items():
        for quantity, tensors in quantities.items():
            for name, tensor in tensors.items():
                torch.testing.assert_close(found[step][quantity][name], tensor, rtol=0, atol=0, equal_nan=True)


def test_a_factor_of_the_processes_that_divide_an_expert_is_named_where_they_are_not_a_tensor_group() -> None:
    record = a_record(1)
    record[1]["gradients"]["all"] *= 3
    for degrees, meaning in (
        (ParallelDegrees(12, expert=2, expert_tensor=3), "3 × what one process has = expert_tensor"),
        (ParallelDegrees(12, tensor=3, expert=2), "3 × what one process has = tensor"),
    ):
        (row,) = (row for row in compare(record, a_record(1), degrees) if not row.ok)
        assert row.hint == meaning
