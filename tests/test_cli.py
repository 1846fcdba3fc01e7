"""Misspelt and ill-typed overrides end in a message of a few lines that names the nearest and the valid ones."""

import errno
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from rich.console import Console

import tedlab
from tedlab import config as config_module
from tedlab.__main__ import COMMANDS
from tedlab.__main__ import main as tedlab_command
from tedlab.cli import CONF, check_overrides, check_run_directory, options_first, renamed, with_plan, with_sources
from tedlab.commands import checkpoint, train
from tedlab.commands.application import hydra_entry
from tedlab.commands.completion import _OTHERS, script
from tedlab.commands.differences import difference_tree
from tedlab.commands.help import field_comments, help_text
from tedlab.config import TrainConfig, value_of
from tedlab.errors import UsageError
from tedlab.renamed import RENAMED, nested
from tedlab.resume import named_values
from tests.commands import run_command
from tests.test_conf import compose as compose_typed

SCREEN = 25  # lines
SOURCE = Path(tedlab.__file__).parent

MISSPELT = {
    "key_of_a_section": (
        "model.hiden=3",
        ["model.hiden", "Did you mean 'hidden'?", "head_dim, heads, hidden"],
    ),
    "key_of_lightning": ("trainer.max_stepz=3", ["'max_stepz'", "Did you mean 'max_steps'?", "log_every_n_steps"]),
    "key_of_a_listed_value": (
        "optim.groups=[{patern: x}]",
        ["optim.groups=[{patern: x}]: there is no key 'patern'", "Did you mean 'pattern'?", "lr_factor"],
    ),
    "key_of_a_source": (
        "++data.sources={a: {path: x, weigth: 1}}",
        ["data.sources=", "Did you mean 'weight'?", "field"],
    ),
    "type_in_a_listed_value": ("optim.groups=[{pattern: x, lr_factor: a}]", ["optim.groups: lr_factor", "Float"]),
    "key_of_the_top": ("sed=1", ["'sed'", "Did you mean 'seed'?", "ckpt_path"]),
    "key_with_nothing_near": ("moe.xyzzy=1", ["'xyzzy'", "Valid: ", "num_experts"]),
    "section": ("mdel.hidden=3", ["'mdel'", "Did you mean 'model'?", "parallel"]),
    "nested_key": ("optim.optimizer.beta=[0.9]", ["'beta'", "Did you mean 'betas'?", "weight_decay"]),
    "deeply_nested_key": ("logger.wandb.projekt=x", ["'projekt'", "Did you mean 'project'?", "group"]),
    "below_a_value": ("model.layers.foo=3", ["model.layers.foo", "'model.layers' is a value"]),
    "group": ("paralel=tp2", ["'paralel'", "Did you mean 'parallel'?", "trainer"]),
    "option": ("parallel=tp2ep2", ["parallel=tp2ep2", "Did you mean 'tp2_ep2'?", "single"]),
    "option_with_nothing_near": ("optim=xyzzy", ["optim=xyzzy", "Valid: adamw, adamw_bf16, muon, sgd"]),
    "experiment": ("experiment=layout", ["experiment=layout", "Did you mean 'layouts'?"]),
    "one_choice_of_a_sweep": ("parallel=single,tp2,epp2", ["parallel=epp2", "Did you mean 'ep2'?", "tp4"]),
    "key_of_a_sweep": ("model.hiden=16,32", ["'hiden'", "Did you mean 'hidden'?"]),
    "key_of_a_range": ("sead=range(0,3)", ["'sead'", "Did you mean 'seed'?"]),
}


@pytest.mark.parametrize(("override", "fragments"), MISSPELT.values(), ids=MISSPELT)
def test_misspelt_overrides_are_refused_with_the_nearest_and_the_valid(override: str, fragments: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        check_overrides(["seed=1", override, "parallel=tp2"])
    message = str(caught.value)
    assert [fragment for fragment in fragments if fragment not in message] == [], message
    assert len(message.splitlines()) < SCREEN


@pytest.mark.parametrize(
    ("override", "said"),
    [("hydra/launcher=nope", "Could not find 'hydra/launcher/nope'"), ("hydra.sweep.dirr=x", "'hydra.sweep.dirr'")],
)
def test_settings_of_hydra_that_a_sweep_has_in_vain_are_a_sentence(override: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"Hydra's own settings: .*{said}") as caught:
        check_overrides([override, "seed=1,2"])
    assert len(str(caught.value).splitlines()) == 1


VALID = {
    "nothing": [],
    "value": ["model.layers=4"],
    "preset": ["parallel=tp4"],
    "value_of_the_chosen_preset": ["optim=sgd", "optim.optimizer.momentum=0.9"],
    "optional_value": ["data.path=corpus.txt", "checkpoint.every=null"],
    "list": ["optim.optimizer.betas=[0.8,0.9]"],
    "sweep_of_presets": ["parallel=single,tp2,ep2"],
    "sweep_of_values": ["model.layers=1,2", "optim.lr=choice(0.1,0.2)", "seed=range(0,3)"],
    "addition": ["+trainer.fast_dev_run=true"],
    "addition_or_override": ["++trainer.max_time=00:01:00:00"],
    "deletion": ["~logger.wandb"],
    "deletion_of_a_group": ["~logger"],
    "experiment": ["experiment=layouts", "trainer.max_steps=3"],
    "hydra_value": ["hydra.run.dir=/tmp/run", "hydra.mode=MULTIRUN"],
    "hydra_preset": ["hydra/job_logging=none", "hydra/launcher=basic"],
    "text": ["data=text", "data.path=corpus.txt"],
    "interpolation": ["trainer.devices=${parallel.world_size}"],
    "quoted": ["experiment_name='a, b = c'"],
}


@pytest.mark.parametrize("overrides", VALID.values(), ids=VALID)
def test_valid_overrides_pass(overrides: list[str]) -> None:
    check_overrides(overrides)


def test_old_names_are_taken_and_the_new_ones_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["++model.checkpoint=none,block", "checkpoint.early_stop=false", "checkpoint.every=5", "-m"]
    words = renamed(given)
    assert words == ["++model.recompute.granularity=none,block", "model.recompute.early_stop=false", *given[2:]]
    check_overrides(words[:-1])
    notes = capsys.readouterr().err.splitlines()
    assert [note.partition(";")[0] for note in notes] == [
        "model.checkpoint is now model.recompute.granularity",
        "checkpoint.early_stop is now model.recompute.early_stop",
    ]
    plan = tmp_path / "plan.overrides"
    plan.write_text("model.checkpoint=block\nmodel.layers=3\n")
    assert with_plan([f"+plan={plan}"]) == ["model.recompute.granularity=block", "model.layers=3"]
    assert with_plan([f"+plan={plan}", words[0]]) == ["model.layers=3", words[0]]


def test_files_with_old_names_are_taken_and_the_new_ones_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "experiment").mkdir()
    (tmp_path / "model" / "old.yaml").write_text("defaults: [gpt_tiny]\ncheckpoint: block\n")
    content = "# @package _global_\nexperiment_name: ${model.activation}\ncheckpoint: {every: 5, early_stop: false}\n"
    (tmp_path / "experiment" / "old.yaml").write_text(content)
    seen: list[tuple[TrainConfig, set[str]]] = []

    def see(config: TrainConfig) -> None:
        seen.append((config, named_values(HydraConfig.get())))

    arguments = (f"hydra.searchpath=[file://{tmp_path}]", "model=old", "experiment=old", f"hydra.run.dir={tmp_path}")
    assert run_command(hydra_entry(see, "train", TrainConfig), *arguments) is None
    ((config, named),) = seen
    assert (config.model.recompute.granularity, config.model.recompute.early_stop) == ("block", False)
    assert (config.checkpoint.every, config.experiment_name) == (5, "gelu")
    assert "model.recompute.early_stop" in named
    notes = capsys.readouterr().err
    assert notes.count(f"file://{tmp_path}: model.checkpoint is now model.recompute.granularity;") == 1
    assert notes.count("checkpoint.early_stop is now model.recompute.early_stop;") == 1


def test_a_switch_that_is_a_word_now_is_taken_as_it_was() -> None:
    assert renamed(["model.qk_norm=true", "+model.qk_norm=false,head"]) == [
        "model.qk_norm=head",
        "+model.qk_norm=none,head",
    ]
    assert renamed(["moe.shared.gated=true", "+moe.shared.gated=false,true", "moe.shared.combine=cg2"]) == [
        "moe.shared.combine=cg1",
        "+moe.shared.combine=add,cg1",
        "moe.shared.combine=cg2",
    ]
    assert nested({"moe": {"shared": {"gated": True}}}) == {"moe": {"shared": {"combine": "cg1"}}}
    for old, new in ((True, "head"), (False, "none"), ("full", "full")):
        assert nested({"model": {"qk_norm": old, "layers": 2}}) == {"model": {"qk_norm": new, "layers": 2}}


def test_every_name_that_moved_has_become_one_that_is() -> None:
    config = compose_typed()
    for old, new in RENAMED.items():
        assert value_of(config, new) is not None
        with pytest.raises(AttributeError):
            value_of(config, old)


def test_what_an_old_run_has_stored_is_read_by_the_names_of_now() -> None:
    old = {"model": {"layers": 2, "checkpoint": "block"}, "checkpoint": {"every": 5, "early_stop": False}, "seed": 1}
    new = {"model": {"layers": 2, "recompute": {"granularity": "block", "early_stop": False}}}
    assert nested(old) == {**new, "checkpoint": {"every": 5}, "seed": 1}
    assert nested(new) == new
    assert old["model"] == {"layers": 2, "checkpoint": "block"}


def test_a_value_that_the_chosen_preset_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match="momentum"):
        check_overrides(["optim=adamw", "optim.optimizer.momentum=0.9"])
    with pytest.raises(UsageError, match="wandb"):
        check_overrides(["logger=none", "logger.wandb.mode=online"])


SWEPT = {
    "optim.lr=abc,0.1": "optim.lr: Value 'abc'",
    "moe.top_k=choice(1,x)": "moe.top_k: Value 'x'",
    "moe.num_experts=4,8.5": "moe.num_experts: Value '8.5'",
    "comm.dtd=yes,maybe": "comm.dtd: Value 'maybe'",
    "model.layers=range(1,3,0.5)": "model.layers: Value '1.0'",
    "optim.lr=interval(0.1,1)": "needs a search that draws from the interval, such as hparams_search=optuna",
    "model.layers=glob(*)": "glob finds options of a group, and model.layers is none",
    "parallel=glob(x*)": "fits no option of parallel: dp2, dp4",
}


def test_each_value_of_a_sweep_must_be_of_its_type() -> None:
    for override, message in SWEPT.items():
        with pytest.raises(UsageError, match=re.escape(message)) as caught:
            check_overrides(["seed=1,2", override])
        assert "\n" not in str(caught.value)
    check_overrides(
        ["optim.lr=1e-4,1", "seed=range(0,3)", "moe.lend.policy=none,llep", "parallel=glob(tp*)", "logger=none"]
    )


@pytest.mark.skipif(find_spec("optuna") is None, reason="needs the extra 'optuna'")
def test_the_ends_of_an_interval_must_be_of_its_type() -> None:
    with pytest.raises(UsageError, match=re.escape("moe.top_k: Value '1.5'")):
        check_overrides(["hparams_search=optuna", "moe.top_k=interval(1.5,4)"])


def test_several_values_without_a_sweep_are_told_what_they_need() -> None:
    with pytest.raises(UsageError, match=r"optim.lr=1e-3,3e-3 has several values: -m makes a sweep of them"):
        check_overrides(["optim.lr=1e-3,3e-3"], multirun=False)
    check_overrides(["experiment=layouts", "seed=1,2"], multirun=False)  # it asks for a sweep itself


REFUSED = {
    "-x": "unrecognized arguments: -x; `tedlab train --help` shows what it takes",
    "--cfg jo": "argument --cfg/-c: invalid choice: 'jo'",
    "-m seed=1,2 --cfg job": "--multirun and --cfg exclude each other: give one of them",
    "--resolve": "--resolve belongs to --cfg",
    "--config-dir nowhere seed=1": "--config-dir=nowhere is no folder",
    "seed=1,2": "seed=1,2 has several values",
}


def test_options_that_cannot_be_are_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for typed, message in REFUSED.items():
        monkeypatch.setattr(sys, "argv", ["tedlab", *typed.split()])
        with pytest.raises(SystemExit, match=re.escape(message)) as ended:
            train.main()
        assert "\n" not in str(ended.value.code)


def test_options_may_stand_among_overrides() -> None:
    typed = ["seed=1,2", "-m", "~logger", "--config-dir", "mine", "optim.lr=1"]
    assert options_first(typed) == ["-m", "--config-dir", "mine", "seed=1,2", "~logger", "optim.lr=1"]


@pytest.mark.parametrize("override", ["+model.hiden=3", "++model.hiden=3", "+sed=1"])
def test_nothing_can_be_added_that_the_typed_configuration_has_no_field_for(override: str) -> None:
    """Only arguments of the Trainer, of loggers and of the optimizer are open: elsewhere it would go unnoticed."""
    with pytest.raises(UsageError, match="Did you mean"):
        check_overrides([override])


@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra.sweep.dir"])
def test_a_run_directory_that_cannot_be_made_is_refused(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(dir: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "file").touch()
    for value in (f"{tmp_path}/file/run", f"'{tmp_path}/file'", f"{tmp_path}/file/${{now:%Y}}"):
        with pytest.raises(UsageError, match=rf"^{key}=.* cannot be made: {tmp_path}/file is not a folder$"):
            check_run_directory(["seed=1", f"{key}={value}"])
    with monkeypatch.context() as full:
        full.setattr("tedlab.places.TemporaryFile", no_space)
        with pytest.raises(
            UsageError, match=rf"cannot be made: {tmp_path} takes no files \(No space left on device\)$"
        ):
            check_run_directory([f"{key}={tmp_path}/new"])
    check_run_directory([f"{key}={tmp_path}/new/run", f"hydra.run.dir={tmp_path}/${{now:%Y}}"])


def count_layers(config: TrainConfig) -> float:
    """A task that some configurations are wrong for, in each of the ways in which a task can end."""
    if config.model.layers == 3:
        raise UsageError("three layers are one too many")
    if config.model.layers == 4:
        raise ValueError("four layers fall over")
    if config.model.layers == 5:
        sys.exit("five layers have a mistake")
    return config.model.layers


def run_sweep(folder: Path, overrides: str) -> int | str | None:
    """The exit code of a sweep in this process."""
    arguments = ["-m", overrides, f"hydra.sweep.dir={folder}", f"output_dir={folder}/${{hydra:job.num}}"]
    return run_command(hydra_entry(count_layers, "train", TrainConfig), *arguments) or 0


def test_a_sweep_tells_each_failed_job_at_once_and_all_of_them_at_the_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_sweep(tmp_path, "model.layers=2,3,4,5,6") == 1
    shown = capfd.readouterr().err
    told, _, listed = shown.partition("Failed jobs of this sweep: 3")
    for job, layers, cause in ((1, 3, "one too many"), (2, 4, "four layers fall over"), (3, 5, "have a mistake")):
        line = f"job {job} (model.layers={layers}"
        assert line in told
        assert [cause in listed_line for listed_line in listed.splitlines() if line in listed_line] == [True]
        assert cause in told
    assert "raise ValueError" in told  # an error that nobody expected is told with its traceback
    assert (tmp_path / "4").is_dir()  # the jobs after them have run


def test_a_sweep_without_failures_ends_well(tmp_path: Path) -> None:
    assert run_sweep(tmp_path, "model.layers=1,2") == 0


@pytest.mark.skipif(find_spec("optuna") is None, reason="needs tedlab[optuna]")
def test_a_search_tries_values_within_its_bounds_and_ends_with_the_best(tmp_path: Path) -> None:
    tried: dict[float, float] = {}

    def distance(config: TrainConfig) -> float:
        lr = config.optim.lr
        return tried.setdefault(lr, abs(math.log(lr / 3e-3)))

    main = hydra_entry(distance, "train", TrainConfig)
    fewer = "hydra.sweeper.n_trials=7"  # the first five are drawn at random
    assert run_command(main, "hparams_search=optuna", fewer, f"hydra.sweep.dir={tmp_path}") is None
    assert len(tried) == 7
    assert all(3e-4 <= lr <= 3e-2 for lr in tried)
    found = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert found.best_value == min(tried.values())
    assert tried[found.best_params["optim.lr"]] == found.best_value


def test_a_sweep_on_slurm_without_submitit_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tedlab.cli.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"^hydra/launcher needs a package .*: pip install 'tedlab\[slurm\]'$"):
        check_overrides(["hydra/launcher=submitit_slurm", "optim.lr=1e-3,2e-3"])
    check_overrides(["optim.lr=1e-3,2e-3"])


def test_a_search_without_optuna_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"].get("sweeper", {}), "optuna.yaml", raising=False)
    with pytest.raises(UsageError, match=r"^hydra/sweeper/optuna needs a package .*: pip install 'tedlab\[optuna\]'$"):
        check_overrides(["hparams_search=optuna"])


def command(*arguments: str, cwd: Path, timeout: float = 60) -> "subprocess.CompletedProcess[str]":
    """``tedlab train …`` as a user types it; stdout and stderr together, as on a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "tedlab.train", *arguments],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        env=os.environ | {"COLUMNS": "120"},
        check=False,
    )


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("parallel.tensor=two", ["parallel.tensor", "two", "Integer"]),
        pytest.param("data=text", ["data.path"], marks=pytest.mark.slow),
    ],
)
def test_wrong_overrides_end_the_command_within_a_screen(tmp_path: Path, override: str, fragments: list[str]) -> None:
    done = command(override, cwd=tmp_path)
    assert done.returncode not in (0, None)
    assert [fragment for fragment in fragments if fragment not in done.stdout] == [], done.stdout
    assert "Traceback" not in done.stdout
    assert len(done.stdout.splitlines()) < SCREEN, done.stdout


def test_every_value_has_a_comment_or_is_named_in_that_of_another() -> None:
    """Nested sections say what they are in the comments of their own values."""
    bare = set()
    for kind in vars(config_module).values():
        if isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == config_module.__name__:
            comments = field_comments(kind)
            said = " ".join(" ".join((*comment.above, comment.beside)) for comment in comments.values())
            named = set(re.findall(r"\w+", said)) | comments.keys()
            bare |= {field.name for field in fields(kind) if field.name not in named and not is_dataclass(field.type)}
    assert bare == {"rope_dim", "v_dim", "expert_gpus"}, "the comment above the first of their lines is theirs as well"


def test_help_lists_groups_presets_and_values_with_their_comments() -> None:
    shown = help_text("train", ["model.hidden=96", "optim=sgd"]).splitlines()
    assert [line for line in shown if line.startswith("parallel: dp2, dp4, ep2")]
    beside = [tuple(part.strip() for part in line.split("  # ")) for line in shown if "  # " in line]
    for said in (
        ("hidden: 96", "features of a token between layers"),
        ("every: 2", "experts in blocks every-1, 2·every-1, … (the paper: every second layer)"),  # in config.py
        ("accumulate_grad_batches: null", "follows from data.batch_size"),  # in trainer/cpu.yaml
        ("group: ${hydra:sweep.dir}", "one group per sweep, with the name of its directory"),  # in logger/wandb.yaml
    ):
        assert said in beside
    above = shown.index("  # Standard deviation of initial weights; residual outputs are scaled by 1/sqrt(2·layers).")
    assert shown[above + 1].startswith("  init_std: ")
    above = shown.index("  # null: the tokenizer's size, rounded up to a multiple of 128.")  # config.py says None
    assert shown[above + 1].startswith("  vocab_size: null")
    assert [line for line in shown if line.startswith("    momentum: 0.0")]
    assert not [line for line in shown if line.startswith("cluster") or "hydra.help" in line]


def test_sources_are_given_whole_or_in_parts_under_names_of_the_users_own() -> None:
    whole = ["data.sources={web:{path:w,weight:0.7},code:{path:c,weight:0.3,epochs:2}}"]
    parts = ["data.sources.web.path=w", "data.sources.web.weight=0.7", "data.sources.code={path:c,weight:0.3,epochs:2}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        one, other = (compose("train", with_sources(words)).data.sources for words in (whole, parts))
        assert one == other
        assert (one.web.path, one.web.weight, one.web.field, one.web.epochs) == ("w", 0.7, None, None)
        streamed = compose("train", with_sources(["data.sources.web.stream.dataset=who/set"])).data.sources.web
        assert streamed.stream.dataset == "who/set"
        with pytest.raises(ConfigCompositionException):
            compose("train", with_sources(["data.sources.web.wieght=0.7"]))
    assert with_sources(["data.sourcesx=1", "seed=1"]) == ["data.sourcesx=1", "seed=1"]


@pytest.mark.parametrize("name", ["simulate", "plan", "calibrate", "generate", "compare", "certify", "doctor", "data"])
def test_every_command_has_help_of_every_value_that_it_takes(name: str) -> None:
    import_module(f"tedlab.commands.{name}")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(name)
    shown = help_text(name, [])
    assert f"tedlab {name} " in shown
    values = shown.partition("Values (KEY=VALUE)")[2].rpartition("\n\n")[0]
    assert sorted(re.findall(r"^(\w+):", values, re.MULTILINE)) == sorted(config)


def test_help_that_does_not_compose_says_why() -> None:
    with pytest.raises(UsageError, match="two"):
        help_text("train", ["parallel.tensor=two"])


@dataclass
class Commented:
    """A class whose source is read."""

    # Two lines
    # above.
    above: int = 1
    beside: str = "# no comment"  # one beside
    lines: list[int] = field(  # the first
        default_factory=list
    )  # and the last
    none: int = 3

    def method(self) -> None:
        """# No comment either."""
        # nor this


def test_comments_of_fields_are_found_where_they_stand() -> None:
    assert field_comments(Commented) == {
        "above": (("Two lines", "above."), ""),
        "beside": ((), "one beside"),
        "lines": ((), "the first and the last"),
    }


def test_presets_of_ones_own_folder_are_known(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [gpt_tiny]\nhidden: 64  # of mine\n")
    check_overrides(["model=mine", "model.hidden=32"], folder=str(tmp_path))
    with pytest.raises(UsageError, match=r"model=mien.*Did you mean 'mine'"):
        check_overrides(["model=mien"], folder=str(tmp_path))
    assert "gpt_tiny, mine, " in help_text("train", [], str(tmp_path))


@pytest.mark.slow
def test_the_composed_configuration_is_printed_as_yaml_and_nothing_else_happens(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    done = command("--cfg", "job", "parallel=ep4", "model.hidden=64", cwd=tmp_path)
    assert done.returncode == 0
    config = OmegaConf.create(done.stdout)
    assert config.parallel.expert == 4
    assert config.model.hidden == 64
    assert list(tmp_path.iterdir()) == []


COMPOSING = {
    "help": ("tedlab", "--help"),
    "train": ("tedlab", "train", "--cfg", "job"),
    "train_as_before": ("tedlab.train", "--cfg", "job"),
    "simulate": ("tedlab", "simulate", "cluster=summit", "--cfg", "job"),
}


@pytest.mark.parametrize("arguments", COMPOSING.values(), ids=COMPOSING)
def test_a_command_composes_without_torch_and_lightning(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """They are nearly all of what starting takes, and neither help nor a configuration needs them."""
    started = [sys.executable, "-X", "importtime", "-m", *arguments]
    done = subprocess.run(started, cwd=tmp_path, text=True, capture_output=True, timeout=60, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "tedlab" in imported
    assert not imported & {"torch", "lightning", "matplotlib", "wandb"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "original", "command"),
    [
        ("/venv/bin/tedlab", ["python", "/venv/bin/tedlab", "train"], True),
        ("-m", ["python", "-u", "-m", "tedlab.train"], True),
        ("-m", ["python", "-mtedlab", "train"], True),
        ("-m", ["python", "-m", "tedlab_of_mine", "tedlab"], False),
        ("-m", ["python", "-m", "pytest", "-m", "slow"], False),
        ("/home/me/script.py", ["python", "/home/me/script.py", "-m", "tedlab"], False),
        ("", [""], False),
    ],
)
def test_only_our_commands_put_off_what_importing_tedlab_does(
    monkeypatch: pytest.MonkeyPatch, program: str, original: list[str], command: bool
) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(sys, "orig_argv", original)
    assert tedlab._runs_a_command() is command


def test_a_name_of_the_package_that_a_command_did_not_import_is_there_when_it_is_used() -> None:
    assert [getattr(tedlab.__getattr__(name), "__name__", None) for name in tedlab.__all__] == tedlab.__all__
    with pytest.raises(AttributeError, match="no attribute 'TEDStrat'"):
        tedlab.__getattr__("TEDStrat")


def test_the_commands_are_listed_with_what_they_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tedlab"])
    tedlab_command()
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if line.startswith("  ")] == list(COMMANDS)
    assert {f"{name}.py" for name in COMMANDS} <= {file.name for file in (SOURCE / "commands").iterdir()}


def test_an_unknown_command_is_told_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tedlab", "simulat", "cluster=summit"])
    with pytest.raises(SystemExit, match=r"(?s)no command 'simulat'.* Did you mean 'simulate'\?.*checkpoint"):
        tedlab_command()


def test_a_command_gets_the_rest_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tedlab", "checkpoint", "inspect", "/nowhere"])
    with pytest.raises(SystemExit, match="/nowhere"):
        tedlab_command()


@pytest.fixture(scope="module")
def completion_script() -> str:
    return script()


def test_completion_knows_the_commands_of_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        checkpoint.main(["--help"])
    commands = capsys.readouterr().out.partition("{")[2].partition("}")[0].replace("\n", "").split(",")
    assert sorted(_OTHERS["checkpoint "].split()) == sorted(["--help", *map(str.strip, commands)])


COMPLETED = {
    "tedlab tr": ["train"],
    "tedlab train parallel=tp2_ep": ["tp2_ep2", "tp2_ep2_dp2", "tp2_ep4"],
    "tedlab train comm.dt": ["comm.dtd="],
    "tedlab plan parallel=single plan.la": ["plan.largest="],
    "tedlab generate tem": ["temperature="],
    "tedlab train moe=no_such": [],
    "tedlab train data=text data.path=no": ["notes.md"],
    "tedlab train data.path=": ["notes.md", "runs"],
    "tedlab runs ": ["--all", "--help", "runs/"],
    "tedlab runs ru": ["runs/"],
    "tedlab runs runs/m": ["runs/my", "main/"],
    "tedlab compare ru": ["runs=", "runs/"],
    "tedlab checkpoint ": ["inspect", "consolidate", "import", "verify", "export", "upcycle", "--help"],
    "tedlab checkpoint inspect r": ["runs/"],
    "tedlab checkpoint export r": ["run="],
    "tedlab checkpoint export run=r": ["runs"],
    "tedlab data ": ["prepare", "inspect", "--help"],
    "tedlab data prepare proc": ["processes="],
    "tedlab completion ": ["bash", "--help"],
    "tedlab models ": ["--help"],
    ".venv/bin/tedlab  tr": ["train"],
    "./tedlab train comm.dt": ["comm.dtd="],
}


@pytest.mark.parametrize(("typed", "offered"), COMPLETED.items(), ids=COMPLETED)
def test_bash_completes_commands_presets_and_values(
    completion_script: str, typed: str, offered: list[str], tmp_path: Path
) -> None:
    ask = f"COMP_LINE={shlex.quote(typed)}; COMP_POINT=${{#COMP_LINE}}; _tedlab; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    (tmp_path / "notes.md").touch()
    (tmp_path / "runs" / "my main").mkdir(parents=True)
    done = subprocess.run(
        ["bash", "-c", f"{completion_script}\n{ask}"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == offered


def test_a_run_begins_with_what_its_command_line_changes() -> None:
    overrides = [
        "moe=top2",
        "moe.num_experts=8",
        "trainer.max_steps=5",
        "+trainer.benchmark=true",
        "hydra.run.dir=x",
        "seed=3",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        preset = compose("train", ["moe=top2"])
    tree = difference_tree(overrides, ["moe", "model"], preset)
    console = Console(width=80)
    with console.capture() as shown:
        console.print(tree)
    before = preset.moe.num_experts, preset.trainer.max_steps, preset.seed
    assert [line.strip(" │├└─") for line in shown.get().splitlines()] == [
        "moe=top2",
        f"trainer: max_steps {before[1]} → 5, benchmark true",
        f"moe.num_experts {before[0]} → 8, seed {before[2]} → 3",
    ]
    assert difference_tree(["hydra.run.dir=x"], ["moe"], preset) is None
