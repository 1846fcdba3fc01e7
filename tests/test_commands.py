"""Every command refuses a value that makes no sense with a sentence that names it, before it does anything."""

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from tedlab.cli import UsageError
from tedlab.commands import certify, plan, simulate
from tedlab.commands.calibrate import parse
from tedlab.generate import GenerateConfig, generate
from tests.test_conf import compose

SCREEN = 25  # lines


@pytest.fixture(autouse=True)
def _no_hydra_left_behind() -> Iterator[None]:
    yield
    HydraConfig.instance().cfg = None
    GlobalHydra.instance().clear()


SIMULATED = {
    "no_cluster": ({}, "cluster=NAME"),
    "unknown_cluster": ({"cluster": "sumit"}, "summit"),
    "negative_rank": ({"cluster": "summit", "sim.rank": "-1"}, "sim.rank=-1"),
    "rank_beyond_the_world": ({"cluster": "summit", "sim.rank": "4"}, "sim.rank=4 is no rank of 4 processes"),
    "rank_of_words": ({"cluster": "summit", "sim.rank": "first"}, "sim.rank=first"),
    "unknown_routing": ({"cluster": "summit", "sim.routing": "random"}, "sim.routing=random"),
    "zipf_of_nan": ({"cluster": "summit", "sim.routing": "zipf", "sim.zipf": "nan"}, "sim.zipf=nan"),
    "zipf_of_infinity": ({"cluster": "summit", "sim.routing": "zipf", "sim.zipf": "inf"}, "sim.zipf=inf"),
    "negative_zipf": ({"cluster": "summit", "sim.routing": "zipf", "sim.zipf": "-1"}, "sim.zipf=-1"),
    "zipf_without_routing": ({"cluster": "summit", "sim.zipf": "1"}, "sim.zipf"),
    "no_trace": ({"cluster": "summit", "sim.routing": "trace", "sim.trace": "/nowhere.npz"}, "sim.trace=/nowhere.npz"),
    "unknown_values": ({"sim.values": "complex"}, "sim.values=complex"),
    "a_rank_of_real_values": ({"sim.values": "real", "sim.rank": "0"}, "sim.rank"),
}


@pytest.mark.parametrize(("own", "said"), SIMULATED.values(), ids=SIMULATED)
def test_simulate_refuses(own: dict[str, str], said: str) -> None:
    config = compose("logger=none", "moe.dispatch=dropless")
    with pytest.raises(UsageError) as caught:
        simulate.task(own, config)
    assert said in str(caught.value)


PLANNED = {
    "no_cluster": ({}, "cluster=NAME"),
    "unknown_cluster": ({"cluster": "sumit"}, "summit"),
    **{
        f"reserve_{value}": ({"cluster": "summit", "plan.reserve_gib": value}, f"plan.reserve_gib is {value}")
        for value in ("nan", "inf", "much", "1.2.3", "")
    },
    "negative_reserve": (
        {"cluster": "summit", "plan.reserve_gib": "-1"},
        "plan.reserve_gib is -1.0; it must be at least",
    ),
    **{
        f"simulate_{value}": ({"cluster": "summit", "plan.simulate": value}, f"plan.simulate is {value}")
        for value in ("0", "-1", "1.5", "some", "100000000000", "nan")
    },
    "largest_of_words": ({"cluster": "summit", "plan.largest": "yes"}, "plan.largest=yes"),
}


@pytest.mark.parametrize(("own", "said"), PLANNED.values(), ids=PLANNED)
def test_plan_refuses(own: dict[str, str], said: str) -> None:
    config = compose("logger=none")
    with pytest.raises(UsageError) as caught:
        plan.task({**plan._OWN, **own}, config)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        *((f"processes={value}", f"processes is {value}") for value in ("-1", "nan", "1.5", "many", "", "1000000000")),
        ("out=/dev/null/x.yaml", "out=/dev/null"),
        ("out=x", "out=x"),
        ("quick=maybe", "quick=maybe"),
        ("device=abacus", "device=abacus"),
    ],
)
def test_calibrate_refuses(tmp_path: Path, argument: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse([f"out={tmp_path}/x.yaml", "device=cpu", argument])
    assert said in str(caught.value)


GENERATED = [
    *(("temperature", value) for value in (math.nan, math.inf, -1.0, 1e-9, True)),
    *(("tokens", value) for value in (-1, 2**40, True)),
    *(("seed", value) for value in (-1, 2**63)),
]


@pytest.mark.parametrize(("name", "value"), GENERATED)
def test_generate_refuses(name: str, value: Any) -> None:
    config = GenerateConfig(run="/nowhere")
    setattr(config, name, value)
    with pytest.raises(ValueError, match=f"^{name} is {value}; it must be"):
        generate(config)


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (simulate.main, ["cluster=summit", "world_size=0"], "parallel.world_size is 0; it must be at least 1"),
        (plan.main, ["cluster=summit", "data.micro_batch_size=0"], "data.micro_batch_size is 0"),
        (certify.main, ["data.micro_batch_size=0"], "data.micro_batch_size is 0"),
        (certify.main, ["~trainer.accelerator"], "trainer.accelerator is missing"),
    ],
    ids=["simulate", "plan", "certify", "certify_trainer"],
)
def test_a_number_out_of_range_ends_every_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    main: Callable[[], None],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *arguments, f"hydra.run.dir={tmp_path}/run", "logger=none"])
    with pytest.raises(SystemExit) as end:
        main()
    shown = capfd.readouterr().err
    assert end.value.code == 1
    assert said in shown
    assert "Traceback" not in shown
    assert len(shown.splitlines()) < SCREEN
