"""Folders become checkpoints of any layout, and folders again; what is no model is refused, and nothing written."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from tedlab import ParallelDegrees, Topology, checkpoint
from tedlab.checkpoint.pieces import PieceReader
from tedlab.commands.checkpoint import main
from tedlab.config import ModelConfig
from tedlab.exchange.exports import export
from tedlab.exchange.folder import Folder
from tedlab.exchange.imports import import_folder
from tedlab.models import GPT
from tedlab.models.families import FAMILIES, family_for
from tedlab.models.families.deepseek import DeepSeekV3
from tedlab.models.families.family import Family, UnknownField
from tedlab.opened import model_of
from tests.certify.runs import composed
from tests.exchange.families import CONFIGS, draw, packed
from tests.pool import WorkerPool

CHECKPOINT = Path("checkpoints", "last.ckpt")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a random model of each family."""
    place = tmp_path_factory.mktemp("folders")
    return {name: draw(place / name, name) for name in CONFIGS}


@pytest.fixture(scope="module")
def runs(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What is imported from each."""
    place = tmp_path_factory.mktemp("runs")
    for name, folder in folders.items():
        import_folder(folder, place / name)
    return {name: place / name for name in folders}


def numbers(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_of_an_import_has_every_bit_and_every_field(
    folders: dict[str, Path], runs: dict[str, Path], name: str, tmp_path: Path
) -> None:
    done = export(runs[name] / CHECKPOINT, tmp_path / "back", shard_bytes=10_000)
    assert done.family == name
    there, back = numbers(folders[name]), numbers(tmp_path / "back")
    assert there.keys() == back.keys()
    assert all(torch.equal(there[tensor], back[tensor]) for tensor in there)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert Folder(tmp_path / "back").tensors.keys() == there.keys()
    given, written = (json.loads((place / "config.json").read_text()) for place in (folders[name], tmp_path / "back"))
    assert {field: written[field] for field in given} == given
    balancing = "e_score_correction_bias"  # a buffer of transformers', no parameter
    assert done.parameters == sum(values.numel() for tensor, values in there.items() if balancing not in tensor)


def logits(path: Path, degrees: tuple[int, int, int], out: Path | None) -> Tensor:
    """Of a checkpoint's model in this process's layout, the whole vocabulary; ``out``: where to save it from there."""
    model, moe = model_of(path)
    topology = Topology(ParallelDegrees(*degrees), "cpu")
    network = GPT(model, moe, topology, seed=None)
    state = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    checkpoint.load({"model": state}, path)
    if out is not None:
        checkpoint.save({"model": state}, checkpoint.read_meta(path), out)
    ids = torch.arange(2 * 12).view(2, 12) % 50
    with torch.no_grad():
        part = network(ids)[0]
    parts = [torch.empty_like(part) for _ in range(degrees[1])]
    torch.distributed.all_gather(parts, part.contiguous(), group=topology.dense.get_group("tensor"))
    return torch.cat(parts, -1)


def everywhere(paths: dict[str, Path], degrees: tuple[int, int, int], out: Path | None) -> dict[str, Tensor]:
    return {name: logits(path, degrees, None if out is None else out / name) for name, path in paths.items()}


@pytest.fixture(scope="module")
def divided(
    runs: dict[str, Path], pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Tensor], dict[str, Tensor], Path]:
    """Logits in one process and in tensor 2 × expert 2, and the checkpoints that four processes have saved."""
    paths = {name: run / CHECKPOINT for name, run in runs.items() if CONFIGS[name].get("num_experts", 4) % 2 == 0}
    saved = tmp_path_factory.mktemp("saved")
    whole = pool.run(1, everywhere, paths, (1, 1, 1), None)[0]
    return whole, pool.run(4, everywhere, paths, (4, 2, 2), saved)[0], saved


def test_an_import_loads_in_every_layout(divided: tuple[dict[str, Tensor], dict[str, Tensor], Path]) -> None:
    whole, parts, _ = divided
    assert len(whole) == len(CONFIGS) - 1
    for name, expected in whole.items():
        assert expected.std() > 0.1, name
        assert torch.allclose(expected, parts[name], atol=1e-5), name


def test_an_export_of_what_four_processes_saved_has_every_bit(
    folders: dict[str, Path], divided: tuple[dict[str, Tensor], dict[str, Tensor], Path], tmp_path: Path
) -> None:
    whole, _, saved = divided
    for name in whole:
        export(saved / name, tmp_path / name)
        there, back = numbers(folders[name]), numbers(tmp_path / name)
        assert there.keys() == back.keys()
        assert all(torch.equal(there[tensor], back[tensor]) for tensor in there)


def test_the_dtype_of_an_export_is_a_choice(runs: dict[str, Path], tmp_path: Path) -> None:
    export(runs["deepseek_v3"] / CHECKPOINT, tmp_path / "precise", dtype="bfloat16")
    kinds = {tensor.dtype: name for name, tensor in numbers(tmp_path / "precise").items()}
    assert kinds.pop(torch.float32).endswith("e_score_correction_bias")
    assert kinds.keys() == {torch.bfloat16}
    export(runs["llama"] / CHECKPOINT, tmp_path / "half", dtype="bfloat16")
    assert {tensor.dtype for tensor in numbers(tmp_path / "half").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_tensors_that_are_no_part_of_the_model_are_left_out(
    folders: dict[str, Path], runs: dict[str, Path], tmp_path: Path
) -> None:
    """What transformers leaves out as well: old buffers, tied outputs, blocks that predict further tokens."""
    further = {
        "llama": ["model.layers.0.self_attn.rotary_emb.inv_freq"],
        "qwen3": ["lm_head.weight"],
        "deepseek_v3": ["model.layers.3.eh_proj.weight", "model.layers.3.mlp.experts.0.up_proj.weight"],
    }
    for name, names in further.items():
        folder = shutil.copytree(folders[name], tmp_path / name)
        changed_tensors(lambda tensors, names=names: tensors.update((n, torch.ones(2)) for n in names))(folder)
        import_folder(folder, tmp_path / f"{name} run")
        given, found = (PieceReader(place / CHECKPOINT).tensors for place in (runs[name], tmp_path / f"{name} run"))
        assert given.keys() == found.keys()


def by_hand(half: int, scale: int) -> float:
    """What four bits and a scale mean: sign, two bits of exponent, one of mantissa."""
    sign, exponent, mantissa = half >> 3, half >> 1 & 3, half & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
    return (-1) ** sign * size * 2.0 ** (scale - 127)


def test_experts_in_mxfp4_are_dequantised_while_they_are_read(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 2}
    folder = packed(tmp_path / "folder", sizes)
    blocks, scales = (
        load_file(folder / "model.safetensors")[f"model.layers.0.mlp.experts.gate_up_proj_{part}"]
        for part in ("blocks", "scales")
    )
    import_folder(folder, tmp_path / "run")
    up = PieceReader(tmp_path / "run" / CHECKPOINT).read("model.network.blocks.0.feed_forward.experts.up")
    assert up.dtype == torch.bfloat16
    assert up.shape == (2, 64, 64)
    for expert, feature, row in ((0, 0, 0), (1, 5, 17), (1, 63, 63), (0, 33, 2), (1, 40, 9)):
        byte = int(blocks[expert, row, feature // 32, feature % 32 // 2])
        half = byte >> 4 if feature % 2 else byte & 15
        assert up[expert, feature, row].item() == by_hand(half, int(scales[expert, row, feature // 32]))
    export(tmp_path / "run" / CHECKPOINT, tmp_path / "back")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


# ---- memory ----------------------------------------------------------------------------------------------------------

LARGE = {  # 96 MiB in pieces of at most 3 MiB
    **{"vocab_size": 256, "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8},
    **{"max_position_embeddings": 16, "intermediate_size": 256, "num_local_experts": 32, "num_experts_per_tok": 2},
}
FILE_BYTES = 8 << 20


def peaks(place: Path) -> tuple[int, dict[str, int], dict[str, int]]:
    """Bytes of a large model, of the largest piece, and by how much this process grew at most, of both directions."""
    large = draw(place / "large", "mixtral", LARGE, shard_bytes=FILE_BYTES)
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    import_folder(draw(place / "small", "mixtral"), place / "first")  # what is imported and allocated once
    export(place / "first" / CHECKPOINT, place / "second")
    largest, grown = {}, {}
    for what, task in (
        ("import", lambda: import_folder(large, place / "in")),
        ("export", lambda: export(place / "in" / CHECKPOINT, place / "out", shard_bytes=FILE_BYTES)),
    ):
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        before = _status("VmRSS")
        largest[what] = task().largest_bytes  # type: ignore[attr-defined]
        grown[what] = _status("VmHWM") - before
    return size, largest, grown


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
def test_neither_direction_holds_more_than_a_few_pieces(pool: WorkerPool, tmp_path: Path) -> None:
    """One file of the folder is mapped while it is read, and counts: here 8 MiB."""
    size, largest, grown = pool.run(1, peaks, tmp_path)[0]
    assert size > 90 << 20
    for what in ("import", "export"):
        assert largest[what] == 3 << 20
        assert grown[what] < FILE_BYTES + 6 * largest[what], (what, grown)


# ---- bad input -------------------------------------------------------------------------------------------------------


def changed_config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return change


def changed_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def reindexed(file: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}))

    return change


def split(change: Callable[[dict[str, Tensor], dict[str, str]], Any]) -> Callable[[Path], None]:
    """Divides a folder into a.safetensors and b.safetensors, once the second and the index have been changed."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        second = {name: tensors.pop(name) for name in (W2, "model.norm.weight")}
        placed = dict.fromkeys(tensors, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
        change(second, placed)
        save_file(tensors, folder / "a.safetensors")
        save_file(second, folder / "b.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))

    return apply


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def vocabulary(size: int) -> Callable[[Path], None]:
    """Gives a folder a tokenizer of so many tokens."""

    def change(folder: Path) -> None:
        words = {"<eos>": 0} | {f"w{index}": index for index in range(1, size)}
        Tokenizer(WordLevel(words, unk_token="<eos>")).save(str(folder / "tokenizer.json"))

    return change


W2 = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a folder without config": (lambda f: (f / "config.json").unlink(), r"no folder with a model: it has no config"),
    "no folder": (shutil.rmtree, r"there is no such folder"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), r"config.json is no JSON file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no weights"),
    "pickled weights": (pickled, r"can run code when they are read"),
    "damaged weights": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 40), r"damaged, or is no safetensors"),
    "an index that leads elsewhere": (
        reindexed("../../x"),
        r"must have, as weight_map, the name of a file in this folder",
    ),
    "an index of absent files": (reindexed("x.safetensors"), r"not complete: its index names x.safetensors"),
    "an index of another file": (
        split(lambda _, placed: placed.update({W2: "a.safetensors"})),
        rf"says that {W2} is in a.safetensors, which does not have it",
    ),
    "an index of a tensor that is nowhere": (
        split(lambda _, placed: placed.update(x="b.safetensors")),
        r"says that x is in b.safetensors, which does not have it",
    ),
    "a tensor in two files": (
        split(lambda second, _: second.update({"lm_head.weight": torch.ones(2)})),
        r"lm_head.weight twice, in a.safetensors and in b.safetensors",
    ),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("x")), r"it is a file; give the folder"),
    "more choices than experts": (
        changed_config(num_experts_per_tok=9),
        r"config.json: moe.top_k \(9\) is larger than moe.num_experts \(4\)",
    ),
    "an unknown family": (changed_config(model_type="bert"), r"'bert'; tedlab knows .*llama, mixtral, "),
    "a field without a counterpart": (changed_config(attn_clip=3), r"no counterpart of attn_clip=3"),
    "another activation": (changed_config(hidden_act="relu"), r"hidden_act='relu' \(it can be 'silu'\)"),
    "a quantised model": (
        changed_config(quantization_config={"quant_method": "fp8"}),
        r"\(fp8\). Dequantise .*FP8Config",
    ),
    "a number out of range": (changed_config(num_hidden_layers=0), r"config.json: .*layers"),
    "a word for a number": (changed_config(hidden_size="wide"), r"describes a model that tedlab has not: hidden: "),
    "a missing tensor": (changed_tensors(lambda t: t.pop(W2)), rf"lacks 1 tensor: {W2}"),
    "an unexpected tensor": (changed_tensors(lambda t: t.update(x=torch.ones(2))), r"has, beside .* 1 tensor: x"),
    "another shape": (
        changed_tensors(lambda t: t.update({W2: t[W2].T.contiguous()})),
        r"shape \(28, 24\); .*\(24, 28\)",
    ),
    "a tokenizer of another size": (vocabulary(51), r"has 51 tokens, and the model 50: it is of another model"),
    "integers": (changed_tensors(lambda t: t.update({W2: t[W2].to(torch.int8)})), r"stored as I8.*dequantise"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_model_is_refused_and_nothing_is_written(
    folders: dict[str, Path], case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = BAD[case]
    folder = shutil.copytree(folders["mixtral"], tmp_path / "folder")
    spoil(folder)
    with pytest.raises(SystemExit, match=f"(?s){message}"):
        main(["import", f"hf={folder}", f"out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.tensor=3"], r"kv_heads \(2\) .*parallel.tensor \(3\).*can be 1, 2, 6$"),
        (["parallel.expert=3"], r"moe.num_experts \(4\)"),
        (["model.norm=layer"], r"model.norm is rms in .*leave it out"),
        (["model.hiden=3"], r"no value model.hiden. Did you mean 'model.hidden'\?"),
        (["parallel.tensor=0"], r"parallel.tensor is 0"),
        (["moe.dispatch=[a"], r"expected ',' or ']'"),
        (["model.sequence_length=null"], r"^model.sequence_length: "),
        (["moe.top_k=5"], r"moe.top_k"),
        (["hf=elsewhere"], r"hf is given twice"),
        (["trainer.max_steps=3"], r"no override of an import"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(
    folders: dict[str, Path], overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["import", f"hf={folders['mixtral']}", f"out={tmp_path / 'out'}", *overrides])
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    folder = draw(tmp_path / "odd", "mixtral", {**CONFIGS["mixtral"], "vocab_size": 51})
    with pytest.raises(SystemExit, match=r"model.vocab_size \(51\) is not divisible by parallel.tensor \(2\)"):
        main(["import", f"hf={folder}", f"out={tmp_path / 'out'}", "parallel.tensor=2"])


def test_a_place_that_is_taken_is_refused(folders: dict[str, Path], runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="exists; an import goes into a folder of its own"):
        main(["import", f"hf={folders['llama']}", f"out={tmp_path}"])
    with pytest.raises(SystemExit, match="exists; an export goes into a folder of its own"):
        main(["export", f"run={runs['llama']}", f"out={tmp_path}"])
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    with pytest.raises(SystemExit, match="exists; an import"):
        main(["import", f"hf={folders['llama']}", f"out={link}"])
    assert link.is_symlink()


def test_a_place_below_a_file_is_refused(folders: dict[str, Path], runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for what, source in (("import", f"hf={folders['llama']}"), ("export", f"run={runs['llama']}")):
        with pytest.raises(SystemExit, match=r"out=.* cannot be made: .*/file is not a folder"):
            main([what, source, f"out={tmp_path / 'file' / 'run'}"])
    with pytest.raises(SystemExit, match=r"out=.* cannot be made: .*/file is not a folder"):
        main(["upcycle", f"run={runs['llama']}", f"out={tmp_path / 'file' / 'run'}", "moe=mixtral"])


def test_the_original_length_of_yarn_is_the_longest_text_where_no_field_says_it() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0}
    values = FAMILIES["llama"].read({**CONFIGS["llama"], "rope_scaling": rope, "max_position_embeddings": 24})
    assert values["model.rotary.original_length"] == 24


@pytest.mark.parametrize("what", ["import", "export"])
def test_nothing_is_left_of_what_does_not_finish(
    folders: dict[str, Path], runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def fails(*_: Any) -> Any:
        raise OSError("no space left")

    monkeypatch.setattr("tedlab.exchange.imports.read_pieces", fails)
    monkeypatch.setattr("tedlab.checkpoint.pieces.PieceReader.read", fails)
    source = f"hf={folders['llama']}" if what == "import" else f"run={runs['llama']}"
    with pytest.raises(SystemExit, match="no space left"):
        main([what, source, f"out={tmp_path / 'out'}"])
    assert not list(tmp_path.iterdir())
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(SystemExit, match=r"out.partial exists, .* delete it"):
        main([what, source, f"out={tmp_path / 'out'}"])


def test_a_model_of_no_family_is_refused_with_what_is_different(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"no family of llama can express .*model.qk_norm=head \(there none\)"):
        main(["export", f"run={runs['qwen3']}", f"out={tmp_path / 'out'}", "family=llama"])
    main(["export", f"run={runs['qwen3']}", f"out={tmp_path / 'out'}"])
    assert "in the form of qwen3" in capsys.readouterr().out


def test_blocks_that_predict_further_tokens_are_no_part_of_the_model() -> None:
    """DeepSeek-V3 has one after its 61; as many as eight would be left out, and no block of the model is."""
    family, model = DeepSeekV3(), ModelConfig(3, 8, 2, 8, 4)
    (pattern,) = set(family.left_out_of(model)) - set(Family.left_out_of(family, model))
    left_out = [n for n in range(40) if re.fullmatch(pattern, f"model.layers.{n}.mlp.gate.weight")]
    assert left_out == list(range(3, 11))


def test_what_follows_from_other_numbers_is_written_as_a_number() -> None:
    """For transformers a null is none."""
    config = composed("preset=olmoe_1b_7b")
    assert config.model.kv_heads is config.model.head_dim is None
    written = family_for(config.model, config.moe).write(config.model, config.moe)
    assert (written["num_key_value_heads"], written["head_dim"]) == (16, 128)


def test_a_number_of_layers_that_no_model_has_is_refused() -> None:
    config = composed("preset=olmoe_1b_7b")
    family = family_for(config.model, config.moe)
    written = family.write(config.model, config.moe)
    assert family.read({**written, "num_hidden_layers": 10_000})["model.layers"] == 10_000
    with pytest.raises(UnknownField, match="10001 layers; there can be 1 to 10000"):
        family.read({**written, "num_hidden_layers": 10_001})
