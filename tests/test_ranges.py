"""Every number of a configuration declares its range, and what is accepted is inside of it, whatever is tried."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest
from omegaconf import OmegaConf

from tedlab.config import (
    Activation,
    CalibrateConfig,
    GenerateConfig,
    PlanConfig,
    ServeConfig,
    SimulationConfig,
    TrainConfig,
    with_values,
)
from tedlab.errors import UsageError
from tedlab.ranges import Range, check_ranges, number_fields, real, whole, word
from tedlab.validate import check_simulated
from tests.test_conf import compose

INF = math.inf
TRIED = (INF, -INF, math.nan, -1, -1.5, 0, 1, 0.5, 2**31, 10**30, 10**400, 1e300, True, "two", [], None)
SCREEN = 25  # lines


def sections(kind: type, path: str = "") -> Iterator[tuple[type, str]]:
    """A dataclass and those inside of it, with the dotted names that they have there."""
    yield kind, path
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            yield from sections(hint, f"{path}{name}.")


OF_OTHER_COMMANDS = (CalibrateConfig, GenerateConfig, PlanConfig, ServeConfig, SimulationConfig)
SECTIONS = [*sections(TrainConfig), *((kind, f"{kind.__name__}.") for kind in OF_OTHER_COMMANDS)]
NUMBERS = [(kind, f"{path}{number.name}", number) for kind, path in SECTIONS for number in number_fields(kind)]


@pytest.mark.parametrize("kind", [kind for kind, _ in SECTIONS], ids=lambda kind: kind.__name__)
def test_every_number_declares_its_range(kind: type) -> None:
    declared = {number.name for number in number_fields(kind)}
    hints = get_type_hints(kind).items()
    assert {name for name, hint in hints if {int, float} & {hint, *get_args(hint)}} == declared
    for number in number_fields(kind):
        if number.range.whole:
            assert number.range.most is not None, number.name


def test_a_number_without_a_range_is_not_possible() -> None:
    @dataclass
    class Careless:
        steps: int = 3

    with pytest.raises(TypeError, match=r"Careless\.steps is a number without a range"):
        number_fields(Careless)


@dataclass
class Example:
    """One of each kind."""

    steps: int = whole(2, least=1, most=9, also=(-1,))
    share: float = real(0.5, above=0, below=1)
    rate: float | None = real(None, above=0)


@dataclass
class Words:
    """One that must be given, one that need not."""

    kind: str = word(Activation.GELU)
    other: str | None = word(None, Activation)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 0, "x.steps is 0; it must be at least 1, or -1"),
        ("steps", 10, "x.steps is 10; it must be at least 1 and at most 9, or -1"),
        ("steps", True, "x.steps is True; it must be a whole number, at least 1, or -1"),
        ("steps", 1.0, "x.steps is 1.0; it must be a whole number, at least 1, or -1"),
        ("steps", None, "x.steps is None; it must be a whole number, at least 1, or -1"),
        ("share", 1.0, "x.share is 1.0; it must be positive and smaller than 1"),
        ("share", math.nan, "x.share is nan; it must be a finite number, positive and smaller than 1"),
        ("rate", INF, "x.rate is inf; it must be a finite number, positive, or null"),
        ("rate", -1, "x.rate is -1; it must be positive, or null"),
        ("rate", 10**400, None),
    ],
)
def test_a_number_outside_is_refused_with_what_would_do(name: str, value: Any, message: str | None) -> None:
    example = Example(**{name: value})
    with pytest.raises(ValueError, match="must be") as caught:
        check_ranges(example, "x.")
    assert message is None or str(caught.value) == message


@pytest.mark.parametrize(("name", "value"), [("steps", -1), ("steps", 9), ("share", 1e-9), ("rate", None), ("rate", 3)])
def test_a_number_inside_is_accepted(name: str, value: Any) -> None:
    check_ranges(Example(**{name: value}))


@pytest.mark.parametrize(("name", "value"), [("kind", "gelu"), ("kind", Activation.SWIGLU), ("other", None)])
def test_a_word_of_an_enumeration_is_accepted_and_equals_its_member(name: str, value: Any) -> None:
    check_ranges(Words(**{name: value}))
    assert Words().kind == Activation.GELU
    assert OmegaConf.to_yaml(OmegaConf.structured(Words())) == "kind: gelu\nother: null\n"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kind", "relu", "x.kind=relu is unknown; valid: gelu, swiglu, clamped_swiglu"),
        ("kind", None, "x.kind=None is unknown; valid: gelu, swiglu, clamped_swiglu"),
        ("other", "relu", "x.other=relu is unknown; valid: gelu, swiglu, clamped_swiglu, or null"),
    ],
)
def test_another_word_is_refused_with_those_that_would_do(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match="unknown") as caught:
        check_ranges(Words(**{name: value}), "x.")
    assert str(caught.value) == message


def test_a_word_of_a_command_line_is_a_number_in_range_or_refused() -> None:
    assert Range(1, 9, whole=True).parse("n", "7") == 7
    assert Range(0).parse("n", "1.5") == 1.5
    for text in ("0", "10", "1.5", "seven", "", "nan", "inf"):
        with pytest.raises(ValueError, match="n is"):
            Range(1, 9, whole=True).parse("n", text)


def test_whatever_number_is_tried_is_in_range_or_refused_in_a_sentence() -> None:
    """Every field of the whole configuration, one at a time, through the check that needs no machine and no data."""
    base = compose("parallel=single", "comm=ted", "model.recompute.granularity=block", "logger=none", "choices={}")
    check_simulated(base)
    sentences = {}
    for kind, name, number in NUMBERS:
        for value in TRIED if kind not in OF_OTHER_COMMANDS else ():
            try:
                check_simulated(with_values(base, {name: value}))
            except UsageError as error:
                sentences[name, str(value)] = str(error)
                continue
            if not (value is None and number.optional):
                assert type(value) in ((int,) if number.range.whole else (int, float)), (name, value)
                assert abs(value) < 1e301, (name, value)
    assert len(sentences) > len(NUMBERS) * len(TRIED) / 2
    for tried, sentence in sentences.items():
        assert len(sentence.splitlines()) < SCREEN, tried
        assert len(sentence) < 2000, tried
