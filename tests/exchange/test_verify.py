"""Every family is what transformers computes, number by number; and each mistake in a mapping is found and named."""

import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tedlab import Topology
from tedlab.commands.checkpoint import main
from tedlab.config import ModelConfig, MoEConfig
from tedlab.exchange.exports import export
from tedlab.exchange.folder import Folder
from tedlab.exchange.imports import import_folder
from tedlab.exchange.verify import Verdict, verify
from tedlab.models import families
from tedlab.models.families import Rule, UnknownField, configured, essence
from tedlab.models.families.mapping import ByHead, Each, PairsApart, Same, Then, Transposed
from tests.exchange.families import CONFIGS, packed

pytestmark = pytest.mark.slow  # importing transformers alone takes some seconds

CHECKPOINT = Path("checkpoints", "last.ckpt")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a random model of each family, which transformers has written."""
    transformers = pytest.importorskip("transformers")
    place = tmp_path_factory.mktemp("folders")
    generator = torch.Generator().manual_seed(0)
    for name, fields in CONFIGS.items():
        config = transformers.AutoConfig.for_model(name, **deepcopy(dict(fields)))  # it changes what it is given
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # norms are 1 and biases 0 by themselves
            parameter.data.normal_(0.1, 0.3, generator=generator)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1, generator=generator)
        model.save_pretrained(place / name)
    return {name: place / name for name in CONFIGS}


@pytest.fixture(scope="module")
def runs(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("runs")
    for name, folder in folders.items():
        import_folder(folder, place / name)
    return {name: place / name for name in folders}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_import_computes_what_transformers_computes(
    folders: dict[str, Path], runs: dict[str, Path], name: str, dtype: str, single: Topology
) -> None:
    verdict = verify(runs[name] / CHECKPOINT, folders[name], dtype)
    assert verdict.ok, verdict
    assert [row.quantity for row in verdict.rows] == ["logits", "loss", "gradients", "weights after a step of AdamW"]
    assert all(row.error < (1e-12 if dtype == "float64" else 1e-4) for row in verdict.rows), verdict


@pytest.mark.parametrize("name", CONFIGS)
def test_a_field_that_is_left_out_means_what_it_means_to_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    without = {"num_experts_per_tok": 2} if name == "deepseek_v2" else {}  # what has no default
    fields = transformers.AutoConfig.for_model(name, **without).to_dict()
    family = families.FAMILIES[name]
    whole = essence(*configured(family.read(deepcopy(fields))))
    for field in fields.keys() - {"model_type"}:
        try:
            values = family.read(deepcopy({key: value for key, value in fields.items() if key != field}))
        except UnknownField as error:
            assert str(error) == f"it lacks {family.aliases.get(field, field)}"  # noqa: PT017
        else:
            assert essence(*configured(values)) == whole, field


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_what_is_written_as_it_is_meant(name: str) -> None:
    """Positions that are not stretched are not, in a family whose published models stretch them."""
    transformers = pytest.importorskip("transformers")
    family = families.FAMILIES[name]
    model, moe = configured(family.read({**CONFIGS[name], "rope_scaling": {"rope_type": "default"}}))
    assert model.rotary.scaling == "none"
    read = transformers.AutoConfig.for_model(**family.write(model, moe)).to_dict()
    assert essence(*configured(family.read(read))) == essence(model, moe)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_an_export_and_has_the_same_logits(
    folders: dict[str, Path], runs: dict[str, Path], name: str, tmp_path: Path
) -> None:
    load = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained
    export(runs[name] / CHECKPOINT, tmp_path / "back")
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        first, second = (load(place)(input_ids=ids).logits for place in (folders[name], tmp_path / "back"))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_the_first_blocks_of_a_large_model_can_be_compared(
    folders: dict[str, Path], runs: dict[str, Path], name: str, single: Topology
) -> None:
    """These are dense."""
    assert verify(runs[name] / CHECKPOINT, folders[name], layers=1).ok


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1}
    folder = packed(tmp_path / "folder", sizes)
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    tensors, ours = load_file(folder / "model.safetensors"), Folder(folder)
    for name in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{name}"
        theirs = convert(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
        assert torch.equal(ours.tensor(name), theirs)
        assert torch.equal(ours.tensor(name, 2), theirs[2])
    import_folder(folder, tmp_path / "run")
    with pytest.raises(ValueError, match="is quantised, and dequantised by an import"):
        verify(tmp_path / "run" / CHECKPOINT, folder)


def test_the_command_prints_what_is_equal_and_exits_with_what_is_not(
    folders: dict[str, Path],
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    single: Topology,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tedlab.progress.time", SimpleNamespace(monotonic=itertools.count(0.0, 6.0).__next__))
        main(["verify", f"run={runs['llama']}", f"hf={folders['llama']}", "layers=1"])
    shown, progress = capsys.readouterr()
    assert "the same as transformers" in shown
    assert shown.count("equal") == 4
    lines = re.findall(r"^(verifying|comparing)  (\d+)%", progress, re.MULTILINE)
    assert {doing for doing, _ in lines} == {"verifying", "comparing"}
    shares = [int(share) for doing, share in lines if doing == "comparing"]
    assert shares == sorted(shares)
    assert shares[0] < 34, "while weights are read"
    assert shares[-1] == 100
    other = shutil.copytree(folders["llama"], tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.01
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(SystemExit, match=r"blocks.1.feed_forward computes something else; look at .*down.weight"):
        main(["verify", f"run={runs['llama']}", f"hf={other}"])
    assert "not what transformers computes" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="they are other models"):
        main(["verify", f"run={runs['llama']}", f"hf={folders['qwen3']}"])


# ---- planted mistakes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plant:
    """A mistake in the mapping of a family.

    Attributes:
        family: The family.
        ours: How the names of the parameters begin whose rules are changed.
        change: Makes the wrong rule of the right one.
        named: What must be said of it.
    """

    family: str
    ours: str
    change: Callable[[Rule], Rule]
    named: str


def swapped(first: int, second: int) -> Callable[[Rule], Rule]:
    def change(rule: Rule) -> Rule:
        other = {first: second, second: first}.get(rule.expert or 0, rule.expert or 0)
        names = (name.replace(f"experts.{rule.expert}.", f"experts.{other}.") for name in rule.theirs)
        return replace(rule, theirs=tuple(names))

    return change


def in_turn(*order: int) -> Callable[[Rule], Rule]:
    return lambda rule: replace(rule, theirs=tuple(rule.theirs[index] for index in order))


def of_pairs(*heads: int) -> Callable[[Rule], Rule]:
    """Puts rotary pairs apart that are apart already, but those of values."""
    apart = (*(PairsApart(count) for count in heads[:-1]), Same())
    return lambda rule: replace(rule, transform=Each(apart, rule.transform)) if "weight" in rule.ours else rule


def transposed(rule: Rule) -> Rule:
    return replace(rule, transform=Then(rule.transform, Transposed()))


@dataclass(frozen=True)
class Backwards(Same):
    """Takes gates for linear parts where both are columns of one matrix."""

    def join(self, theirs: Any) -> torch.Tensor:
        return theirs[0].unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def backwards(rule: Rule) -> Rule:
    return replace(rule, transform=Backwards()) if rule.ours == UP else rule


def other_norm(name: str) -> str:
    others = {"q_norm": "k_norm", "k_norm": "q_norm"}
    return next((name.replace(one, other) for one, other in others.items() if one in name), name)


UP, DOWN = "blocks.1.feed_forward.experts.up", "blocks.1.feed_forward.experts.down"
QKV, OUT = "blocks.0.attention.qkv.weight", "blocks.0.attention.out.weight"
PLANTS = {
    "swapped experts": Plant("mixtral", UP, swapped(1, 3), f"experts 1 and 3 are swapped in {UP}"),
    "swapped outputs of experts": Plant("qwen3_moe", DOWN, swapped(0, 2), f"experts 0 and 2 are swapped in {DOWN}"),
    "swapped halves of experts": Plant("qwen3_moe", UP, in_turn(1, 0), f"{UP} has gate and linear part swapped"),
    "swapped halves": Plant(
        "llama", "blocks.0.feed_forward.up.weight", in_turn(1, 0), "up.weight has gate and linear part swapped"
    ),
    "a transposed matrix": Plant("llama", OUT, transposed, f"{OUT} is transposed"),
    "keys for values": Plant("llama", QKV, in_turn(0, 2, 1), f"{QKV} has keys and values swapped"),
    "rotary order": Plant("llama", QKV, of_pairs(6, 6, 6), f"{QKV} has rotary features in the wrong order"),
    "rotary order of shared keys": Plant(
        "qwen3",
        "blocks.1.attention.kv.",
        of_pairs(2, 2),
        "blocks.1.attention.kv.weight has rotary features in the wrong",
    ),
    "rotary order of latent attention": Plant(
        "deepseek_v3",
        "blocks.1.attention.",
        lambda rule: replace(rule, transform=Same()) if isinstance(rule.transform, PairsApart) else rule,
        "q_up.weight, blocks.1.attention.kv_down.weight has rotary features in the wrong order",
    ),
    "values for shared keys": Plant(
        "mixtral", "blocks.1.attention.kv.", in_turn(1, 0), "blocks.1.attention.kv.weight has keys and values swapped"
    ),
    "heads one after the other": Plant(
        "llama", QKV, lambda rule: replace(rule, transform=ByHead(1, (24, 24, 24))), f"{QKV} has all queries before"
    ),
    "swapped halves of clamped experts": Plant("gpt_oss", UP, backwards, f"{UP} has gate and linear part swapped"),
    "norms": Plant(
        "qwen3",
        "blocks.1.attention.",
        lambda rule: replace(rule, theirs=tuple(map(other_norm, rule.theirs))),
        "blocks.1.attention.q_norm.weight and blocks.1.attention.k_norm.weight are swapped",
    ),
}


def found_of(plant: Plant, folder: Path, out: Path) -> Verdict:
    kind: Any = type(families.FAMILIES[plant.family])

    class Wrong(kind):
        def rules(self, model: ModelConfig, moe: MoEConfig) -> Iterator[Rule]:
            for rule in super().rules(model, moe):
                yield plant.change(rule) if rule.ours.startswith(plant.ours) else rule

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.FAMILIES, plant.family, Wrong())
        import_folder(folder, out)
        return verify(out / CHECKPOINT, folder)


@pytest.mark.parametrize("name", PLANTS)
def test_a_mistake_in_the_mapping_is_found_and_named(
    folders: dict[str, Path], name: str, tmp_path: Path, single: Topology
) -> None:
    plant = PLANTS[name]
    verdict = found_of(plant, folders[plant.family], tmp_path / "out")
    assert not verdict.ok
    assert not verdict.rows[0].ok  # the logits
    (found,) = verdict.found  # that layer and no other
    assert plant.named in found


def test_a_matrix_that_is_missing_is_named(folders: dict[str, Path], tmp_path: Path, single: Topology) -> None:
    def spoil(rule: Rule) -> Rule:
        return replace(rule, transform=Then(rule.transform, Emptied()))

    class Emptied(Same):
        def join(self, theirs: Any) -> torch.Tensor:
            return torch.full_like(theirs[0], torch.nan)

    verdict = found_of(Plant("mixtral", DOWN, spoil, ""), folders["mixtral"], tmp_path / "out")
    assert not verdict.ok
    assert verdict.found == [f"{DOWN} has numbers that are not finite: it is missing or damaged"]
