"""What may come from others runs no code: a payload is planted in each kind of file, and nothing happens.

The payload creates a file. ``test_the_payload_works`` shows that it would.
"""

import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import LightningModule
from omegaconf import OmegaConf
from torch.distributed.checkpoint.metadata import Metadata

from tedlab import Topology, checkpoint
from tedlab.checkpoint.directory import META
from tedlab.checkpoint.reading import read_metadata
from tedlab.cli import with_plan
from tedlab.commands.checkpoint import main as checkpoint_main
from tedlab.compare.runs import read_runs
from tedlab.config import OptimConfig
from tedlab.data import load_tokenizer
from tedlab.data.tokenizers import FileTokenizer
from tedlab.errors import UsageError
from tedlab.predict.cluster import CONF, load_cluster
from tedlab.predict.plan.file import KEYS
from tedlab.predict.sim.routing import _traced
from tedlab.resume import take_over
from tedlab.untrusted import typed
from tests.checkpoint.small import Payload, age, payload, read, seal, write
from tests.compare.sweep import write_run
from tests.pool import WorkerPool
from tests.test_conf import compose
from tests.training import Job, Layout, language_model, loader, trainer


@pytest.fixture
def fired(tmp_path: Path) -> Path:
    """What the payload creates."""
    return tmp_path / "fired"


def test_the_payload_works(fired: Path) -> None:
    pickle.loads(payload(fired)).close()
    assert fired.exists()


# ---- checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [True, False], ids=["with a manifest", "without"])
@pytest.mark.parametrize("file", [META, ".metadata", "a number of the optimizer"])
@pytest.mark.filterwarnings("ignore:.*has no manifest.json", "ignore:Detected an existing checkpoint")
def test_a_checkpoint_runs_no_code(single: Topology, tmp_path: Path, fired: Path, file: str, sealed: bool) -> None:
    path = tmp_path / "sent"
    write(path, 1)
    if file == META:
        torch.save({"global_step": 1, "value": Payload(fired)}, path / META)
    elif file == ".metadata":
        (path / file).write_bytes(payload(fired))
    else:
        there = path / META, path / "manifest.json"
        kept = [part.read_bytes() for part in there]
        tensors = {"model": {"weight": torch.ones(300)}, "optimizer_0": {"param_groups": [{"lr": Payload(fired)}]}}
        dcp.save(tensors, checkpoint_id=path)
        for part, content in zip(there, kept, strict=True):
            part.write_bytes(content)
    if sealed:
        seal(path)
    elif file == META:
        (path / "manifest.json").unlink()
    else:
        age(path)
    with pytest.raises(ValueError, match="sent"):
        read(path)
    for command in {META: ["inspect"], ".metadata": ["inspect", "consolidate"]}.get(file, []):  # others do not read it
        with pytest.raises(SystemExit, match="sent"):
            checkpoint_main([command, str(path)])
    assert not fired.exists()


@pytest.mark.parametrize("elsewhere", ["../secret", "/etc/passwd", ".."])
def test_a_checkpoint_reads_its_own_files_only(single: Topology, tmp_path: Path, elsewhere: str) -> None:
    write(tmp_path / "sent", 1)
    metadata: Metadata = pickle.loads((tmp_path / "sent" / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = elsewhere
    (tmp_path / "sent" / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(tmp_path / "sent")
    with pytest.raises(ValueError, match=r"looks for .* elsewhere"):
        read(tmp_path / "sent")


class Python3112(pickle.Pickler):
    """Saves members of enumerations as Python 3.11.2 does, Debian 12's."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_a_checkpoint_of_python_3_11_2_is_read(single: Topology, tmp_path: Path) -> None:
    write(tmp_path / "sent", 1)
    file = tmp_path / "sent" / ".metadata"
    found = pickle.loads(file.read_bytes())
    with file.open("wb") as stream:
        Python3112(stream).dump(found)
    assert b"getattr" in file.read_bytes()
    assert read_metadata(file) == found


@pytest.mark.parametrize("of", ["torch.distributed.checkpoint.metadata\nMetadataIndex", "torch\nSize"])
def test_a_checkpoint_gets_no_attributes_but_members_of_enumerations(tmp_path: Path, of: str) -> None:
    file = tmp_path / ".metadata"
    file.write_bytes(f"cbuiltins\ngetattr\n(c{of}\nX\x07\x00\x00\x00__new__tR.".encode())
    assert callable(pickle.loads(file.read_bytes()))
    with pytest.raises(ValueError, match="it asks for an attribute of <class"):
        read_metadata(file)


SHARED = {
    "a class": b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n",
    "a function": b"ctorch.serialization\n_get_layout\n",
    "a member of an enumeration": b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nK\x00\x85R",
}


@pytest.mark.parametrize("shared", SHARED.values(), ids=SHARED)
def test_a_checkpoint_changes_nothing_that_others_use(single: Topology, tmp_path: Path, shared: bytes) -> None:
    write(tmp_path / "sent", 1)
    file = tmp_path / "sent" / ".metadata"
    change = shared + b"N}X\x07\x00\x00\x00planted\x88s\x86b0"  # setattr(shared, "planted", True)
    file.write_bytes(change + file.read_bytes())
    seal(tmp_path / "sent")
    changed = pickle.loads(shared + b".")
    try:
        with pytest.raises(ValueError, match=r"sent.*it would change .*, which is not part of it"):
            read(tmp_path / "sent")
        assert not hasattr(changed, "planted")
    finally:
        if hasattr(changed, "planted"):
            del changed.planted


class Kind(Enum):
    WIDE = "wide"


@dataclass
class Shape:
    width: int
    where: Path


class WithHyperParameters(LightningModule):
    def __init__(self, **values: Any) -> None:
        super().__init__()
        self.save_hyperparameters(values)


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (OmegaConf.create({"a": {"b": "${c}"}, "c": [1]}), {"a": {"b": [1]}, "c": [1]}),
        (Path("some/where"), "some/where"),
        (Kind.WIDE, "wide"),
        (Namespace(a=1, b=Namespace(c=2)), {"a": 1, "b": {"c": 2}}),
        (Shape(3, Path("x")), {"width": 3, "where": "x"}),
        ((1, [Path("x")], {"k": Kind.WIDE}), (1, ["x"], {"k": "wide"})),
        (np.float32(0.5), np.float32(0.5)),
        (torch.float32, torch.float32),
    ],
    ids=lambda value: type(value).__name__,
)
def test_usual_hyper_parameters_are_stored_as_plain_values(value: Any, stored: Any) -> None:
    content = checkpoint.encode({"hyper_parameters": checkpoint.plain({"value": value})})
    found = checkpoint.values.decode(content)["hyper_parameters"]["value"]
    assert found == stored
    assert type(found) is type(stored)


def test_numpy_arrays_and_random_states_are_stored_as_they_are() -> None:
    np.random.seed(3)
    state = {"numpy": np.random.get_state(), "torch": torch.get_rng_state(), "flags": np.array([True, False])}
    found = checkpoint.values.decode(checkpoint.encode(state))
    assert found["numpy"][0] == "MT19937"
    assert np.array_equal(found["numpy"][1], state["numpy"][1])  # type: ignore[index]
    assert torch.equal(found["torch"], state["torch"])  # type: ignore[call-overload]
    assert found["flags"].tolist() == [True, False]


class Mine:
    """Somebody's own class, which holds nothing dangerous."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mine)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"callbacks": {"Watch": {"seen": [1, Mine()]}}}, r"^callbacks.Watch.seen.1 is of type tests.*Mine, which no"),
        ({"hyper_parameters": {"activation": lambda x: x}}, r"^hyper_parameters.activation is of type function"),
        ({"a": {"layer": torch.nn.Linear(1, 1)}}, r"^a.layer is of type torch.nn.modules.linear.Linear"),
        ({"optimizer": torch.optim.Adam}, r"^optimizer is of type type"),
    ],
)
def test_what_could_not_be_read_again_is_refused_on_saving(
    single: Topology, tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    with pytest.raises(TypeError, match=said) as refused:
        checkpoint.save({"model": {"weight": torch.ones(3)}}, values, tmp_path / "new")
    assert "add_safe_globals" in str(refused.value)
    with pytest.raises(TypeError, match=r"optimizer_0.note is of type"):
        checkpoint.save({"model": {}, "optimizer_0": {"note": Mine()}}, {}, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_class_that_the_user_allows_is_saved_and_read(single: Topology, tmp_path: Path) -> None:
    with torch.serialization.safe_globals([Mine]):
        checkpoint.save({"model": {"weight": torch.ones(3)}}, {"own": Mine()}, tmp_path / "new")
        assert checkpoint.read_meta(tmp_path / "new")["own"] == Mine()
    with pytest.raises(ValueError, match="asks for code to be run, and was not read"):
        checkpoint.read_meta(tmp_path / "new")


def hyper_parameters_refused(folder: Path) -> tuple[str, int]:
    from lightning.pytorch.callbacks import ModelCheckpoint

    job, module = Job(), language_model(Job())
    module.save_hyperparameters({"activation": torch.nn.GELU()}, logger=False)
    callbacks = [ModelCheckpoint(folder, every_n_train_steps=1)]
    fit = trainer(Layout(), job, max_steps=1, enable_checkpointing=True, callbacks=callbacks)
    with pytest.raises(TypeError, match=r"hyper_parameters.activation is of type torch.nn") as refused:
        fit.fit(module, loader(Layout(), job, 0))
    return str(refused.value), fit.global_step


def test_hyper_parameters_that_no_checkpoint_could_hold_are_refused_before_the_first_step(
    pool: WorkerPool, tmp_path: Path
) -> None:
    assert pool.run(1, hyper_parameters_refused, tmp_path)[0][1] == 0


# ---- traces, tokenizers, clusters, plans -------------------------------------------------------------------------


def test_a_trace_runs_no_code(tmp_path: Path, fired: Path) -> None:
    np.savez(tmp_path / "trace.npz", load=np.array([[Payload(fired)]], dtype=object))
    with pytest.raises(UsageError, match=r"is not a router_trace.npz"):
        _traced(tmp_path / "trace.npz", 1, 1)
    assert not fired.exists()


@pytest.mark.parametrize("read_it", [load_tokenizer, lambda folder: FileTokenizer(folder / "tokenizer.json")])
def test_a_tokenizer_runs_no_code(tmp_path: Path, fired: Path, read_it: Callable[[Path], object]) -> None:
    (tmp_path / "tokenizer.json").write_bytes(payload(fired))
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer"):
        read_it(tmp_path)
    assert not fired.exists()


@pytest.fixture
def resolver(fired: Path) -> Any:
    """As users register them: ``${fire:}`` calls a function."""
    OmegaConf.register_new_resolver("fire", lambda: fired.touch())
    yield
    OmegaConf.clear_resolver("fire")


@pytest.mark.parametrize(
    "planted", ["!!python/object/apply:builtins.open [{fired}, w]", "${{fire:}}", "${{oc.env:HOME}}"]
)
def test_a_cluster_file_runs_and_looks_up_nothing(tmp_path: Path, fired: Path, resolver: None, planted: str) -> None:
    text = (CONF / "cluster" / "summit.yaml").read_text()
    line = next(line for line in text.splitlines() if line.startswith("memory_bandwidth"))
    path = tmp_path / "sent.yaml"
    path.write_text(text.replace(line, f"memory_bandwidth: {planted.format(fired=fired)}"))
    with pytest.raises(UsageError, match=r"sent.yaml") as refused:
        load_cluster(path)
    assert len(str(refused.value).splitlines()) == 1
    assert not fired.exists()


REFUSED = (
    "optim.optimizer._target_=os.system",
    "+optim.optimizer.x={_target_:os.system}",
    "logger=wandb",
    "+logger.mine._target_=os.system",
    "hydra.launcher._target_=os.system",
    "hydra/launcher=submitit_slurm",
    "hydra.run.dir=/tmp",
    "--config-dir=/tmp/evil",
    "-m",
    "~optim",
    "output_dir=/home",
    "ckpt_path=/tmp/sent.ckpt",
    "data.path=/etc",
    "data.tokenizer=/etc/passwd",
    "data.module=evil_module.It",
    "model=../../../tmp/evil",
    "model=/tmp/evil",
    "model.layers=${oc.env:HOME}",
    "+trainer.plugins=[{_target_:os.system}]",
    "trainer.plugins=x",
    "experiment=x,y(z)",
    "optim.lr",
)


@pytest.mark.parametrize("line", REFUSED)
def test_a_plan_sets_what_plans_set_and_nothing_else(tmp_path: Path, line: str) -> None:
    path = tmp_path / "plan.overrides"
    path.write_text(f"# predicted\nparallel.tensor=2\n{line}\n")
    with pytest.raises(UsageError) as refused:
        with_plan([f"+plan={path}"])
    assert f"{line!r} (override 2)" in str(refused.value)
    assert with_plan([line]) == [line]  # on the command line it is the user's


def test_a_plan_may_say_what_a_model_is_and_how_it_is_laid_out(tmp_path: Path) -> None:
    lines = ["model=gpt_tiny", "experiment=gpu/olmoe_1b_7b", "parallel.tensor=2", "comm.cac=shard", "optim.tile=fused"]
    lines += ["comm.cac=[moe.exchange,linear.reduce]", "trainer.precision=bf16-true", "data.batch_size=32"]
    path = tmp_path / "plan.overrides"
    path.write_text("\n".join(lines))
    assert with_plan([f"+plan={path}"]) == lines
    assert not {key for key in KEYS if "_target_" in key or key.startswith(("logger", "hydra", "optim.optimizer"))}
    assert "data.module" not in KEYS  # it is imported


def test_what_a_plan_may_not_have_is_left_to_the_command_line(tmp_path: Path) -> None:
    from tedlab.predict.plan.file import allowed, read

    (tmp_path / "plan").write_bytes(payload(tmp_path / "fired"))
    with pytest.raises(ValueError, match="is no plan: it is not text"):
        read(tmp_path / "plan")
    assert not allowed("data.path=my/corpus")
    assert allowed("data.batch_size=8")


# ---- resuming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "planted",
    [
        {"optimizer": {"_target_": "builtins.open", "file": "{fired}", "mode": "w"}},
        {"optimizer": {"_target_": "torch.optim.AdamW", "weight_decay": "${fire:}"}},
        {"optimizer": {"_target_": "torch.optim.AdamW", "betas": ("${fire:}", 0.9)}},
        {"schedule": "${fire:}"},
    ],
    ids=["a class", "an option that is looked up", "a tuple that is looked up", "a value that is looked up"],
)
def test_a_checkpoint_that_is_resumed_chooses_no_class_and_looks_nothing_up(
    fired: Path, resolver: None, planted: dict[str, Any]
) -> None:
    config = compose("logger=none", "optim.optimizer._target_=torch.optim.AdamW")
    for options in (values for values in planted.values() if isinstance(values, dict)):
        options |= {name: text.format(fired=fired) for name, text in options.items() if "fired" in text}
    with pytest.raises(ValueError, match=r"_target_ is torch.optim.AdamW, but|not looked up for a checkpoint"):
        take_over(config, {"hyper_parameters": {"optim": planted}}, set())
    assert not fired.exists()


def test_a_checkpoint_that_is_resumed_gives_an_optimizer_plain_options_alone() -> None:
    stored = {"_target_": "torch.optim.AdamW", "eps": 0.5, "_partial_": False, "foreach": {"_target_": "os.system"}}
    config = compose("logger=none", "optim.optimizer={_target_:torch.optim.AdamW}")
    config, _ = take_over(config, {"hyper_parameters": {"optim": {"optimizer": stored}}}, set())
    assert config.optim.optimizer == {"_target_": "torch.optim.AdamW", "eps": 0.5}


@pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
def test_values_of_a_checkpoint_are_not_looked_up_in_whatever_holds_them(
    fired: Path, resolver: None, kind: Callable[[list[str]], object]
) -> None:
    with pytest.raises(ValueError, match=r"^optimizer\.betas\.0 has"):
        typed(OptimConfig, {"optimizer": {"_target_": "torch.optim.AdamW", "betas": kind(["${fire:}"])}})
    assert not fired.exists()


# ---- run directories ---------------------------------------------------------------------------------------------


def test_a_run_directory_given_to_compare_runs_and_looks_up_nothing(
    tmp_path: Path, fired: Path, resolver: None
) -> None:
    write_run(tmp_path / "runs" / "0")
    planted: dict[str, Any] = {"model.note": "${fire:}", "seed": "${oc.env:HOME}"}
    for place in ("optim.optimizer", "logger.wandb", "model"):
        planted |= {f"{place}._target_": "builtins.open", f"{place}._args_": [str(fired), "w"]}
    write_run(tmp_path / "runs" / "1", planted)
    tagged = write_run(tmp_path / "runs" / "2") / "config.yaml"
    tagged.write_text(tagged.read_text() + f"evil: !!python/object/apply:builtins.open [{fired}, w]\n")
    (write_run(tmp_path / "runs" / "3") / "summary.json").write_bytes(payload(fired))
    runs, notes = read_runs([tmp_path / "runs"])
    assert [run.name for run in runs] == ["0", "1"]
    assert runs[1].config["model.note"] == "${fire:}"
    assert runs[1].config["seed"] == "${oc.env:HOME}"
    assert ["config.yaml" in notes[0], "summary.json" in notes[1]] == [True, True]
    assert not fired.exists()


def generated(directory: Path, planted: str) -> str:
    from tedlab.config import GenerateConfig
    from tedlab.generate import generate

    OmegaConf.register_new_resolver("fire", lambda: (directory / "fired").touch())
    job, module = Job(moe=Job().moe), language_model(Job())
    fit = trainer(Layout(), job, max_steps=1)
    fit.fit(module, loader(Layout(), job, 0))
    path = directory / "checkpoints" / "last.ckpt"
    fit.save_checkpoint(path)
    meta = checkpoint.read_meta(path)
    meta["hyper_parameters"]["model"]["activation"] = planted
    torch.save(meta, path / META)
    seal(path)
    (directory / "config.yaml").write_text(
        f"optim: {{optimizer: {{_target_: builtins.open, _args_: [{directory}/fired, w]}}}}"
    )
    try:
        return "".join(generate(GenerateConfig(run=str(directory), tokens=1)))
    except ValueError as error:
        return str(error)


def test_a_run_directory_given_to_generate_runs_and_looks_up_nothing(pool: WorkerPool, tmp_path: Path) -> None:
    (said,) = pool.run(1, generated, tmp_path, "${fire:}")
    assert "activation has ${…} in it" in said
    shutil.rmtree(tmp_path / "checkpoints")
    (text,) = pool.run(1, generated, tmp_path, "gelu")
    assert "says nothing of a model" not in text
    assert not (tmp_path / "fired").exists()
