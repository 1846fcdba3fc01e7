"""Every preset in ``conf/`` composes, into the typed configuration, with the values that it promises."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from typing import Any, get_type_hints

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from tedlab.cli import CONF
from tedlab.commands.train import without_absent_loggers
from tedlab.config import TrainConfig
from tedlab.degrees import ParallelDegrees
from tedlab.validate import complete_simulated
from tedlab.validate.loggers import check_loggers

ELSEWHERE = ("cluster", "hydra")  # of predictions; of Hydra itself, see tests/launch/test_slurm.py
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name not in ELSEWHERE)
PRESETS = [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]
if find_spec("optuna") is None:
    PRESETS.remove(("hparams_search", "optuna"))
NEEDED = {
    "data=text": ["data.path=corpus.txt"],
    "data=stream": ["data.stream.dataset=owner/name", "data.stream.tokens=1000"],
}  # values without which a preset is incomplete on purpose


def compose_config(*overrides: str, name: str = "train") -> DictConfig:
    """What ``tedlab train``, or another command, composes, with ``${hydra:…}`` resolvable as in a job."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose(
            name,
            overrides=["hydra.runtime.output_dir=/run", "hydra.job.num=0", *overrides],
            return_hydra_config=True,
        )
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


def compose(*overrides: str, name: str = "train") -> Any:
    """That, typed."""
    return OmegaConf.to_object(compose_config(*overrides, name=name))


@pytest.fixture(autouse=True)
def _no_hydra_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    yield
    HydraConfig.instance().cfg = None
    GlobalHydra.instance().clear()


def missing(value: Any, path: str = "") -> list[str]:
    """Fields of nested dataclasses that nothing has set."""
    if value == "???":
        return [path]
    if not is_dataclass(value):
        return []
    return [m for f in fields(value) for m in missing(getattr(value, f.name, "???"), f"{path}.{f.name}".strip("."))]


@pytest.mark.parametrize(("group", "option"), PRESETS, ids=lambda name: name)
def test_every_preset_composes_into_a_complete_typed_configuration(group: str, option: str) -> None:
    choice = f"{group}={option}"
    config = compose(choice, *NEEDED.get(choice, []))
    assert missing(config) == []
    assert config.choices[group] == option
    for name, kind in get_type_hints(TrainConfig).items():
        if is_dataclass(kind):
            assert isinstance(getattr(config, name), kind), name


def test_there_are_presets() -> None:
    groups = ["comm", "data", "debug", "experiment", "hparams_search", "logger", "model", "moe", "optim", "parallel"]
    assert [*groups, "preset", "trainer"] == GROUPS
    assert len(PRESETS) >= 30


def test_own_text_needs_a_path() -> None:
    with pytest.raises(Exception, match=r"data\.path"):
        compose("data=text")


@pytest.mark.parametrize("option", [option for group, option in PRESETS if group == "parallel"])
def test_parallel_presets_are_valid_and_named_after_their_degrees(option: str) -> None:
    preset = compose(f"parallel={option}").parallel
    degrees = ParallelDegrees(preset.world_size, preset.tensor, preset.expert)
    named = {part[:2]: int(part[2:]) for part in option.split("_") if option != "single"}
    assert named.get("tp", 1) == degrees.tensor
    assert named.get("ep", 1) == degrees.expert
    assert named.get("dp", 1) == degrees.expert_data


@pytest.mark.parametrize(("option", "billions"), [("1.3b", 1.3), ("2.7b", 2.7), ("6.7b", 6.7), ("13b", 13.0)])
def test_model_presets_have_the_size_of_their_name(option: str, billions: float) -> None:
    """Within 5 % with GPT-3's vocabulary: attention 4·H², feed-forward 2·H·F, the norms and biases, embeddings."""
    model = compose(f"model=gpt_{option}", "moe=dense").model
    hidden, ffn = model.hidden, model.ffn
    block = 4 * hidden**2 + 2 * hidden * ffn + 9 * hidden + ffn
    parameters = model.layers * block + (50257 + model.sequence_length) * hidden
    assert ffn == 4 * hidden
    assert hidden % model.heads == 0
    assert parameters == pytest.approx(billions * 1e9, rel=0.05)


def test_the_papers_40_billion_model() -> None:
    """6.7 B base, 16 experts in every second block: each adds 15 copies of two H×4H matrices."""
    config = compose("model=gpt_6.7b", "moe=paper16")
    model, moe = config.model, config.moe
    base = 12 * model.layers * model.hidden**2
    extra = model.layers // moe.every * (moe.num_experts - 1) * 2 * model.hidden * model.ffn
    assert (base + extra) / 1e9 == pytest.approx(40, rel=0.05)


def test_the_main_job() -> None:
    config = compose()
    assert (config.parallel.world_size, config.parallel.tensor, config.parallel.expert) == (4, 2, 2)
    assert (config.moe.num_experts, config.moe.every, config.moe.top_k) == (4, 2, 1)
    assert config.choices["model"] == "gpt_tiny"
    assert config.choices["data"] == "stdlib"
    assert config.data.path is None
    assert config.trainer["accelerator"] == "cpu"
    assert config.trainer["devices"] == config.parallel.world_size
    assert config.trainer["precision"] == "32-true"
    assert config.trainer["num_sanity_val_steps"] == 0
    assert config.output_dir == "/run"
    assert config.objective == "val/loss"
    assert config.ckpt_path is None
    assert config.seed == 0


@pytest.mark.parametrize("group", ["cpu", "gpu"])
def test_trainer_follows_the_world_size(group: str) -> None:
    config = compose(f"trainer={group}", "parallel=tp4_ep2")
    assert config.trainer["devices"] == 8
    assert config.trainer["accelerator"] == group


@pytest.mark.parametrize(("environment", "mode"), [(None, "offline"), ("online", "online"), ("disabled", "disabled")])
def test_wandb_is_offline_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, environment: str | None, mode: str
) -> None:
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    assert compose().logger["wandb"]["mode"] == mode


def test_wandb_runs_of_an_experiment_form_a_group_and_are_named_after_what_differs() -> None:
    settings = compose("experiment_name=mine", "parallel=tp2", "seed=3").logger["wandb"]
    assert settings["group"].startswith("runs/mine/")  # the sweep's directory
    assert settings["name"].startswith("tp2 ")
    assert "parallel=tp2" in settings["tags"]
    assert settings["save_dir"] == "/run"


def test_presets_for_loggers_have_those_of_their_name() -> None:
    kinds = {option: [*compose(f"logger={option}").logger] for group, option in PRESETS if group == "logger"}
    both = ["wandb", "tensorboard"]
    assert kinds == {"none": [], "csv": [], "wandb": both[:1], "tensorboard": both[1:], "many": both}
    assert compose("logger=many").logger["tensorboard"]["save_dir"] == "/run"


@pytest.mark.parametrize(("group", "option"), PRESETS, ids=lambda name: name)
def test_every_value_of_a_preset_has_a_field(group: str, option: str) -> None:
    """Hydra's schema would refuse it anyway; this names the file and the key."""
    hints = get_type_hints(TrainConfig)
    if group in ("debug", "experiment", "hparams_search", "preset") or not is_dataclass(hints[group]):
        return  # these are checked by composing them; trainer and logger hold others' arguments
    kind = hints[group]
    keys = set(OmegaConf.load(CONF / group / f"{option}.yaml"))
    assert keys <= {f.name for f in fields(kind)}


@pytest.mark.parametrize("wrong", ["model.nonsense=1", "nonsense=1", "model.layers=two", "moe.every=1.5"])
def test_the_schema_refuses_what_has_no_field_or_another_type(wrong: str) -> None:
    with pytest.raises(Exception, match=wrong.split("=")[0].split(".")[-1]):
        compose(wrong)


@pytest.mark.parametrize("option", [option for group, option in PRESETS if group == "debug"])
def test_presets_for_debugging_take_few_steps_and_yield_to_the_command_line(option: str) -> None:
    assert compose(f"debug={option}").trainer["max_steps"] <= (100 if option == "overfit" else 20)
    assert compose(f"debug={option}", "trainer.max_steps=7").trainer["max_steps"] == 7


@pytest.mark.parametrize("option", [option for group, option in PRESETS if group == "experiment"])
def test_experiments_are_valid_rename_the_run_and_yield_to_the_command_line(option: str) -> None:
    assert complete_simulated(compose(f"experiment={option}")).experiment_name == option
    config = compose(f"experiment={option}", "trainer.max_steps=7", "experiment_name=other")
    assert config.trainer["max_steps"] == 7
    assert config.experiment_name == "other"


@pytest.mark.parametrize("logger", ["none", "csv"])
def test_an_experiment_that_names_its_wandb_runs_also_works_without_wandb(logger: str) -> None:
    config = compose("experiment=ablation_comm", f"logger={logger}")
    with pytest.raises(ValueError, match="is no logger"):
        check_loggers(config)  # its file says how runs are called there
    check_loggers(without_absent_loggers(config))
    assert "wandb" in without_absent_loggers(compose("experiment=ablation_comm")).logger
    mistaken = compose("+logger.mine.path=x")
    assert "mine" in without_absent_loggers(mistaken).logger, "which validation refuses"
