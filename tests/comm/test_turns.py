"""Two passes take turns where they would wait, find what they left, and end together if one of them fails."""

from collections.abc import Callable
from typing import Any

import pytest

from tedlab.comm.turns import Turns


class State:
    """What the process knows of the pass that runs."""

    name = "nobody"

    def keep(self) -> Callable[[], None]:
        name = self.name

        def restore() -> None:
            self.name = name

        return restore


def passes(own_waits: int, other_waits: int, own_fails: int = -1, other_fails: int = -1) -> tuple[list[str], Any]:
    """What happened, and the result; each pass fails before its wait of this number."""
    turns, state, events = Turns(), State(), []

    def run(name: str, waits: int, fails: int) -> str:
        state.name = name
        for number in range(waits):
            if number == fails:
                raise ArithmeticError(name)
            events.append(f"{state.name} {number}")
            turns.give()
            assert state.name == name
        events.append(f"{state.name} ends")
        return "result"

    try:
        result = turns.beside(
            lambda: void(run("other", other_waits, other_fails)), lambda: run("own", own_waits, own_fails), state.keep
        )
        assert state.name == "own"
    except ArithmeticError as error:
        result = error
    turns.give()  # alone
    turns.close()
    return events, result


def void(value: Any) -> None:
    pass


def test_passes_take_turns_and_the_longer_one_goes_on_alone() -> None:
    assert passes(2, 2) == (["own 0", "other 0", "own 1", "other 1", "own ends", "other ends"], "result")
    assert passes(1, 3)[0] == ["own 0", "other 0", "own ends", "other 1", "other 2", "other ends"]
    assert passes(3, 1)[0] == ["own 0", "other 0", "own 1", "other ends", "own 2", "own ends"]
    assert passes(0, 1)[0] == ["own ends", "other 0", "other ends"]
    assert passes(1, 0)[0] == ["own 0", "other ends", "own ends"]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_what_either_pass_raises_is_raised_and_ends_the_other_at_its_next_wait(number: int) -> None:
    for name, arguments in (("own", {"own_fails": number}), ("other", {"other_fails": number})):
        events, error = passes(3, 3, **arguments)
        assert isinstance(error, ArithmeticError)
        assert str(error) == name
        assert events == [f"{who} {n}" for n in range(number) for who in ("own", "other")] + (
            [] if name == "own" else [f"own {number}"]
        )


def test_an_error_after_the_last_wait_of_the_other_is_raised_too() -> None:
    events, error = passes(0, 2, other_fails=1)
    assert events == ["own ends", "other 0"]
    assert str(error) == "other"
