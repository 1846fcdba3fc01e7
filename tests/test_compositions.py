"""What tests compose is what Hydra composes, though they remember most of it."""

from pathlib import Path

import hydra
import pytest
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import OmegaConf

from tedlab.cli import CONF
from tests.compositions import COMPOSE, LIST_DEFAULTS, remembered, use

CHOICES = [
    (),
    ("parallel=ep4", "moe.top_k=2", "hydra.job.num=3"),
    ("experiment=ablation_comm", "seed=3", "~logger"),
    ("optim=sgd", "+trainer.profiler=simple", "experiment_name=again"),
]


def composed(*overrides: str, folder: Path = CONF) -> str:
    """All of it, Hydra's own node too, as text that resolves nothing."""
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        return OmegaConf.to_yaml(hydra.compose("train", [*overrides], return_hydra_config=True))


@pytest.mark.parametrize("overrides", CHOICES, ids=" ".join)
def test_a_remembered_composition_is_hydras(monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]) -> None:
    with remembered():
        found = [composed(*overrides), composed(*overrides)]
        others = composed(*overrides, "moe.every=3")
        found.append(composed(*overrides))  # nothing of the one before is left in it
    use(monkeypatch, LIST_DEFAULTS, COMPOSE)
    assert found == [composed(*overrides)] * 3
    assert others == composed(*overrides, "moe.every=3") != found[0]


def test_what_hydra_refuses_is_refused_again() -> None:
    composed("parallel=ep4")
    for _ in range(2):
        with pytest.raises(MissingConfigException, match="parallel/ep5"):
            composed("parallel=ep5")
        with pytest.raises(ConfigCompositionException, match="Could not override 'nonsense'"):
            composed("parallel=ep4", "nonsense=1")


def test_files_that_may_change_are_read_again(tmp_path: Path) -> None:
    for value in (1, 2):
        (tmp_path / "train.yaml").write_text(f"value: {value}\n")
        assert f"value: {value}\n" in composed(folder=tmp_path)
