"""A run starts from an import's weights, in any layout, with the model and the tokenizer that the import has."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

from tedlab import Topology, checkpoint
from tedlab.checkpoint.pieces import PieceReader
from tedlab.commands.checkpoint import main
from tedlab.commands.generate import main as generate
from tedlab.commands.train import main as train
from tedlab.config import with_values
from tedlab.errors import UsageError
from tedlab.exchange.exports import export
from tedlab.exchange.imports import import_folder
from tedlab.models import GPT, GPTSpec
from tedlab.run import _first_weights
from tedlab.weights import PREFIX, load_into, start_from
from tests.commands import run_command
from tests.exchange.families import draw
from tests.test_conf import compose

WORDS = ["<eos>", *(f"w{index}" for index in range(40))]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral with a tokenizer of words."""
    place = tmp_path_factory.mktemp("imported")
    folder = draw(place / "folder", "mixtral")
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    import_folder(folder, place / "run", ["model.sequence_length=8"])
    return place / "run"


def test_weights_decide_what_the_model_is_and_its_tokenizer(imported: Path) -> None:
    config, said = start_from(
        compose(f"weights={imported}", "model.compile=inductor", "seed=3"), {"model.compile", "seed"}
    )
    assert (config.model.hidden, config.model.kv_heads, config.model.norm, config.model.vocab_size) == (
        24,
        2,
        "rms",
        50,
    )
    assert (config.moe.num_experts, config.moe.top_k, config.moe.dispatch) == (4, 2, "dropless")
    assert config.model.compile == "inductor"
    assert config.data.tokenizer == str(imported / "tokenizer.json")
    assert config.weights == str(imported / "checkpoints" / "last.ckpt")
    assert "2 blocks of 24 features" in said[0]
    stated = {parameter.name for parameter in GPTSpec(config.model, config.moe).parameters()}
    assert {f"{PREFIX}{name}" for name in stated} == checkpoint.stored_names(imported / "checkpoints" / "last.ckpt")


def test_a_tokenizer_goes_in_and_out_as_it_is(imported: Path, tmp_path: Path) -> None:
    export(imported / "checkpoints" / "last.ckpt", tmp_path / "out")
    given, kept, written = (
        place / "tokenizer.json" for place in (imported.parent / "folder", imported, tmp_path / "out")
    )
    assert given.read_bytes() == kept.read_bytes() == written.read_bytes()


def test_what_is_named_counts_and_must_fit(imported: Path) -> None:
    config = with_values(compose(f"weights={imported}"), {"moe.top_k": 1, "model.ffn": 7, "data.tokenizer": "byte"})
    found, _ = start_from(config, {"moe.top_k", "data.tokenizer"})
    assert (found.moe.top_k, found.model.ffn, found.data.tokenizer) == (1, 28, "byte")
    with pytest.raises(UsageError, match=r"feed_forward.experts.up has the shape \(4, 24, 56\) .*and \(4, 24, 14\)"):
        start_from(config, {"model.ffn"})
    with pytest.raises(UsageError, match=r"has blocks.1.*, and a model with what is named here has not"):
        start_from(with_values(config, {"model.layers": 1}), {"model.layers"})


def test_a_run_begins_with_the_weights_and_goes_on_with_its_own(imported: Path, single: Topology) -> None:
    config, _ = start_from(compose(f"weights={imported}"), set())
    module: Any = nn.Module()
    module.network = GPT(config.model, config.moe, single, seed=0)
    (loading,) = _first_weights(config)
    loading.on_fit_start(None, module)  # type: ignore[arg-type]
    stored = PieceReader(Path(str(config.weights))).read(f"{PREFIX}norm.weight")
    assert stored.std() > 0.1  # new ones are 1
    assert torch.equal(module.network.norm.weight.to_local(), stored)
    assert _first_weights(with_values(config, {"ckpt_path": "its own"})) == []


def test_biases_that_balance_choices_begin_at_0_where_weights_have_none(imported: Path, single: Topology) -> None:
    path = imported / "checkpoints" / "last.ckpt"
    config, _ = start_from(compose(f"weights={imported}"), set())
    config = with_values(config, {"moe.router.bias_update": "sign"})
    module = nn.Module()
    module.network = GPT(config.model, config.moe, single, seed=0)
    load_into(module, path)
    state = module.network.state_dict()
    assert not any(state[f"blocks.{n}.feed_forward.router.bias"].to_local().any() for n in range(2))
    stored = PieceReader(path).read(f"{PREFIX}blocks.1.feed_forward.experts.up")
    assert torch.equal(state["blocks.1.feed_forward.experts.up"].to_local(), stored)
    module.other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"is of another model: it lacks other.weight, other.bias"):
        load_into(module, path)


def test_biases_that_balance_choices_come_with_the_weights(tmp_path: Path, single: Topology) -> None:
    import_folder(draw(tmp_path / "folder", "deepseek_v3"), tmp_path / "run")
    config, _ = start_from(compose(f"weights={tmp_path / 'run'}"), set())
    module = nn.Module()
    module.network = GPT(config.model, config.moe, single, seed=0)
    load_into(module, Path(str(config.weights)))
    name = "blocks.1.feed_forward.router.bias"
    stored = PieceReader(Path(str(config.weights))).read(PREFIX + name)
    assert stored.any()
    assert torch.equal(module.network.state_dict()[name].to_local(), stored)


@pytest.mark.parametrize("where", ["nowhere", "."])
def test_a_place_without_weights_is_refused(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"^weights="):
        start_from(compose(f"weights={where}"), set())


def test_a_folder_of_transformers_is_to_be_imported_first(imported: Path) -> None:
    with pytest.raises(
        UsageError, match=r"is a folder of transformers: `tedlab checkpoint import hf=.*for weights=DIR"
    ):
        start_from(compose(f"weights={imported.parent / 'folder'}"), set())


def test_it_is_not_said_that_a_run_starts_which_may_go_on(imported: Path) -> None:
    _, (said,) = start_from(compose(f"weights={imported}", "resume=auto"), set())
    assert "one that goes on is of the model of" in said


@pytest.mark.slow
def test_a_run_of_four_processes_starts_from_an_import_and_is_exported(
    imported: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], single: Topology
) -> None:
    (tmp_path / "text.txt").write_text(" ".join(WORDS[1 + index * index % 40] for index in range(20_000)))
    settings = [f"weights={imported}", f"hydra.run.dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}"]
    settings += ["data=text", f"data.path={tmp_path / 'text.txt'}", "data.batch_size=4", "data.micro_batch_size=2"]
    settings += ["parallel=tp2_ep2", "trainer.max_steps=1", "optim.lr=1e-9", "logger=none", "validate_every=10"]
    settings += ["trainer.precision=bf16-true"]  # a step writes its fp32 copy of the weights over them
    assert run_command(train, *settings) is None
    assert "Starting from the weights of" in capfd.readouterr().out
    assert run_command(generate, f"run={tmp_path / 'run'}", "prompt=w1 w2", "tokens=4") is None
    assert capfd.readouterr().out.startswith("w1")
    first = export(imported / "checkpoints" / "last.ckpt", tmp_path / "first")
    last = export(tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path / "last")
    assert first.family == last.family == "mixtral"
    from safetensors.torch import load_file

    before, after = (load_file(done.folder / "model.safetensors") for done in (first, last))
    assert before.keys() == after.keys()
    for name, values in before.items():
        torch.testing.assert_close(after[name], values.bfloat16(), atol=1e-6, rtol=0)


def test_an_import_generates_text_and_no_run_goes_on_from_it(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], single: Topology
) -> None:
    assert run_command(generate, f"run={imported}", "prompt=w1 w2", "tokens=4", "seed=1") is None
    assert capsys.readouterr().out.startswith("w1")
    found: Any = run_command(train, f"ckpt_path={imported}", f"hydra.run.dir={tmp_path / 'run'}", "logger=none")
    assert found is not None
    assert "is an import, which has no optimizer to go on with; weights=" in capsys.readouterr().err
    main(["inspect", str(imported / "checkpoints" / "last.ckpt")])
