"""A mixture made of a dense model begins as that model, in any layout; what cannot be made is refused."""

import shutil
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from tedlab import ParallelDegrees, Topology, checkpoint
from tedlab.checkpoint.pieces import Piece, PieceReader, write_pieces
from tedlab.commands.checkpoint import main
from tedlab.config import ModelConfig, MoEConfig, RouterConfig
from tedlab.errors import UsageError
from tedlab.exchange.upcycle import Recipe, scale_of, upcycle
from tedlab.models import GPT
from tedlab.opened import model_of
from tedlab.resume import resume
from tests.pool import WorkerPool
from tests.test_conf import compose

GPT3 = ModelConfig(layers=2, hidden=12, heads=4, ffn=24, sequence_length=8, vocab_size=32, init_std=0.3)
TODAY = replace(GPT3, activation="swiglu", bias=False, norm="rms", positions="rotary", tie_embeddings=False)
DENSE = MoEConfig(num_experts=0)
LAST = Path("checkpoints", "last.ckpt")
IDS = torch.randint(32, (3, 8), generator=torch.Generator().manual_seed(5))


def mixture(top_k: int, experts: int, ffn: int | None = None, router: dict[str, Any] | None = None, **moe: Any) -> Any:
    settings = {"capacity_factor": None, "every": 1, **moe}
    return MoEConfig(num_experts=experts, top_k=top_k, ffn=ffn, router=RouterConfig(**(router or {})), **settings)


def network(model: ModelConfig, moe: MoEConfig, topology: Topology, seed: int | None) -> GPT:
    torch.set_default_dtype(torch.float64)
    try:
        return GPT(model, moe, topology, seed)
    finally:
        torch.set_default_dtype(torch.float32)


def dense_run(folder: Path, model: ModelConfig, topology: Topology) -> Tensor:
    """Writes a dense model whose biases and norms are not those of a new one, and returns its logits."""
    dense = network(model, DENSE, topology, seed=3)
    draws = torch.Generator().manual_seed(1)
    for parameter in dense.parameters():
        if parameter.dim() == 1:
            parameter.data.to_local().add_(torch.randn(parameter.shape, generator=draws, dtype=torch.float64))
    tensors = {name: p.detach().to_local() for name, p in dense.named_parameters()}
    pieces = (Piece(f"model.network.{name}", tuple(p.shape), None, p) for name, p in tensors.items())
    meta = {"hyper_parameters": {"model": asdict(model), "moe": asdict(DENSE), "seed": 3}}
    write_pieces(pieces, meta, folder / LAST)
    return dense(IDS)[0].detach()


def logits(path: Path, topology: Topology) -> Tensor:
    model, moe = model_of(path)
    made = network(model, moe, topology, seed=None)
    checkpoint.load({"model": {f"network.{name}": tensor for name, tensor in made.state_dict().items()}}, path)
    made.eval()
    return made(IDS)[0].detach()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, single: Topology) -> dict[str, tuple[Path, Tensor]]:
    """Runs of dense models, and their logits."""
    place = tmp_path_factory.mktemp("dense")
    models = {"gpt3": GPT3, "today": TODAY}
    return {name: (place / name / LAST, dense_run(place / name, model, single)) for name, model in models.items()}


def errors(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


EXACT: dict[str, MoEConfig] = {
    "top1": mixture(1, 4, router={"gates": "normalized"}),
    "top2_in_every_second_block": mixture(2, 4, every=2),
    "top2_softmax_dropless": mixture(2, 8, router={"gates": "softmax"}, dispatch="dropless"),
    "halves_one_set": mixture(2, 8, 12),
    "halves_two_sets_scaled": mixture(4, 8, 12, router={"gate_scale": 2.5}),
    "quarters_of_sigmoids_in_groups": mixture(
        4,
        16,
        6,
        router={"scoring": "sigmoid", "gates": "normalized", "expert_groups": 2, "bias_update": "sign"},
        dispatch="dropless",
    ),
    "thirds_softmax": mixture(6, 12, 8, router={"gates": "softmax"}),
}


@pytest.mark.parametrize("scale", ["weights", "gates"])
@pytest.mark.parametrize("model", ["gpt3", "today"])
@pytest.mark.parametrize("case", EXACT)
def test_an_upcycled_model_computes_what_the_dense_one_does(
    dense: Any, single: Topology, tmp_path: Path, case: str, model: str, scale: str
) -> None:
    source, expected = dense[model]
    done = upcycle(source, tmp_path / "run", EXACT[case], Recipe(scale=scale, router_std=0.5))
    assert done.exact
    assert errors(logits(done.checkpoint, single), expected) < 1e-12


RAW: dict[str, tuple[MoEConfig, float]] = {  # and the scale, worked by hand
    "top1": (mixture(1, 4), 4.0),
    "top2": (mixture(2, 8, router={"gates": "raw"}), 4.0),
    "halves_of_sigmoids": (mixture(4, 8, 12, router={"gates": "raw", "scoring": "sigmoid"}), 1.0),
    "halves": (mixture(4, 8, 12, router={"gates": "raw"}), 4.0),
}


@pytest.mark.parametrize("scale", ["weights", "gates"])
@pytest.mark.parametrize("case", RAW)
def test_with_raw_weights_of_choices_the_difference_is_that_of_nearly_equal_scores(
    dense: Any, single: Topology, tmp_path: Path, case: str, scale: str
) -> None:
    (source, expected), (moe, factor) = dense["gpt3"], RAW[case]
    done = upcycle(source, tmp_path / "near", moe, Recipe(scale=scale))
    assert done.scale == scale_of(moe, done.pieces) == factor
    assert not done.exact
    # Logits have a standard deviation of 0.01 for tokens of norm √H; these norms' weights are not 1.
    assert 1e-6 < errors(logits(done.checkpoint, single), expected) < 0.05
    nearer = upcycle(source, tmp_path / "nearer", moe, Recipe(scale=scale, router_std=1e-9))
    assert errors(logits(nearer.checkpoint, single), expected) < 1e-7


def test_the_router_chooses_among_whole_sets_of_pieces(dense: Any, tmp_path: Path) -> None:
    done = upcycle(dense["gpt3"][0], tmp_path / "run", mixture(4, 8, 12), Recipe())
    reader = PieceReader(done.checkpoint)
    for block in range(2):
        rows = reader.read(f"model.network.blocks.{block}.feed_forward.router.weight").unflatten(0, (4, 2))
        assert torch.equal(rows[:, 0], rows[:, 1])
        assert len({row.sum().item() for row in rows[:, 0]}) == 4
        up = reader.read(f"model.network.blocks.{block}.feed_forward.experts.up").unflatten(0, (4, 2))
        assert all(torch.equal(up[0], of_set) for of_set in up)
        assert not torch.equal(up[0, 0], up[0, 1])
    assert (done.pieces, done.groups) == (2, 4)


def in_layout(path: Path) -> Tensor:
    topology = Topology(ParallelDegrees(4, 2, 2))
    return torch.cat(
        [*topology.comm.all_gather(logits(path, topology).movedim(-1, 0), "tensor", tag="t", phase="metrics")]
    )


def test_an_upcycled_model_loads_in_a_layout_of_tensor_and_expert_ranks(
    dense: Any, tmp_path: Path, pool: WorkerPool
) -> None:
    source, expected = dense["today"]
    done = upcycle(source, tmp_path / "run", EXACT["halves_one_set"], Recipe())
    for found in pool.run(4, in_layout, done.checkpoint):
        assert errors(found.view(expected.movedim(-1, 0).shape), expected.movedim(-1, 0)) < 1e-12


def test_no_more_than_two_matrices_of_the_dense_model_are_in_memory(
    dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is made into experts, and the last that was written as it is."""
    read, alive, most = PieceReader.read, [], []

    def reading(reader: PieceReader, name: str, rows: range | None = None) -> Tensor:
        alive[:] = [storage for storage in alive if storage() is not None]
        found = read(reader, name, rows)
        alive.append(weakref.ref(found.untyped_storage()))
        most.append(len(alive))
        return found

    monkeypatch.setattr(PieceReader, "read", reading)
    upcycle(dense["gpt3"][0], tmp_path / "run", mixture(4, 8, 12), Recipe(noise=0.1, reinit=0.5))
    assert len(most) > 20
    assert max(most) == 2


# ---- what makes experts differ --------------------------------------------------------------------------------------


def experts(path: Path, which: str) -> Tensor:
    return PieceReader(path).read(f"model.network.blocks.1.feed_forward.experts.{which}")


def test_noise_is_of_the_size_that_is_asked_for_and_another_in_each_expert(dense: Any, tmp_path: Path) -> None:
    source, moe = dense["gpt3"][0], mixture(2, 8, 12)
    plain, noisy = (upcycle(source, tmp_path / f"{noise}", moe, Recipe(noise=noise)) for noise in (0.0, 0.25))
    assert plain.exact
    assert not noisy.exact
    for which in ("up", "down"):
        before, after = (experts(done.checkpoint, which) for done in (plain, noisy))
        added = after - before
        share = added.std((1, 2)) / before.std((1, 2))
        assert ((share - 0.25).abs() < 0.05).all()
        assert len({x.sum().item() for x in added}) == 8


@pytest.mark.parametrize("model", ["gpt3", "today"])
def test_drawn_anew_are_as_many_features_as_asked_for_and_the_same_of_all_matrices(
    dense: Any, tmp_path: Path, model: str
) -> None:
    source, moe = dense[model][0], mixture(2, 6)
    plain, new = (upcycle(source, tmp_path / f"{share}", moe, Recipe(reinit=share)) for share in (0.0, 0.25))
    changed = {}
    for which, features in (("up", -1), ("down", 1)):
        before, after = (experts(done.checkpoint, which).movedim(features, 1) for done in (plain, new))
        before, after = (x.unflatten(1, (24, -1)).flatten(2) for x in (before, after))  # SwiGLU has two of each in up
        changed[which] = (before != after).all(-1)
        assert torch.equal(changed[which], (before != after).any(-1))
        ratio = after[changed[which]].std() / before[changed[which]].std()
        assert 0.7 < ratio < 1.4
    assert torch.equal(changed["up"], changed["down"])
    assert (changed["up"].sum(1) == 6).all()
    assert len({tuple(features.tolist()) for features in changed["up"]}) == 6  # others in each expert


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_makes_a_run_directory(dense: Any, tmp_path: Path, capsys: Any, single: Topology) -> None:
    source, expected = dense["today"]
    run, out = source.parents[1], tmp_path / "made"
    main(["upcycle", f"run={run}", f"out={out}", "moe=mixtral", "moe.ffn=12", "moe.top_k=4", "seed=7"])
    said = capsys.readouterr().out
    assert "4 copies of the dense layer, each in 2 pieces, scaled by 2." in said
    assert "what the dense model does" in said
    assert errors(logits(out / LAST, single), expected) < 1e-12
    assert (out / "config.yaml").is_file()
    with pytest.raises(UsageError, match=rf"is an upcycled model, which has no optimizer .*; weights={out} starts"):
        resume(compose(f"ckpt_path={out}"), set())


def test_the_tokenizer_of_the_dense_run_goes_along(dense: Any, tmp_path: Path) -> None:
    shutil.copytree(dense["today"][0].parents[1], tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("data: {tokenizer: words}")
    upcycle(tmp_path / "run" / LAST, tmp_path / "named", mixture(1, 4), Recipe())
    assert yaml.safe_load((tmp_path / "named" / "config.yaml").read_text())["data"] == {"tokenizer": "words"}
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    upcycle(tmp_path / "run" / LAST, tmp_path / "copied", mixture(1, 4), Recipe())
    there = tmp_path / "copied" / "tokenizer.json"
    assert there.read_text() == "{}"
    assert yaml.safe_load((tmp_path / "copied" / "config.yaml").read_text())["data"] == {"tokenizer": str(there)}


def test_nothing_is_left_of_what_does_not_finish(dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, out = PieceReader.read, tmp_path / "made"

    def fails(reader: PieceReader, name: str, *rows: Any) -> Tensor:
        if "blocks.1" in name:
            raise OSError("no space left")
        return read(reader, name, *rows)

    monkeypatch.setattr(PieceReader, "read", fails)
    with pytest.raises(OSError, match="no space left"):
        upcycle(dense["today"][0], out, mixture(1, 4), Recipe())
    assert not list(tmp_path.iterdir())


WRONG: dict[str, tuple[list[str], list[str]]] = {
    "no_experts": (["moe=dense"], ["moe.num_experts is 0"]),
    "no_preset": (["moe.num_experts=8"], ["needs moe=PRESET"]),
    "an_odd_width": (["moe=mixtral", "moe.ffn=7"], ["moe.ffn=7 does not divide", "model.ffn=24"]),
    "a_part_of_a_set": (["moe=mixtral", "moe.ffn=6"], ["moe.top_k is 2", "4 pieces", "multiple of 4, such as 4"]),
    "sets_in_parts": (["moe=mixtral", "moe.ffn=8", "moe.top_k=3"], ["moe.num_experts is 8", "6 or 9"]),
    "another_gating": (["moe=top2", "moe.gating=hash"], ["moe.gating=hash", "default only"]),
    "shared_experts": (["moe=mixtral", "moe.shared.experts=1"], ["moe.shared.experts=1", "set it to 0"]),
    "a_shortcut": (["moe=mixtral", "moe.shortcut=dgmoe"], ["moe.shortcut=dgmoe", "moe.shortcut=none"]),
    "another_model": (["model.hidden=8"], ["model.hidden=8", "stays as it is"]),
    "a_slip": (["moe=mixtral", "moe.num_expert=8"], ["num_experts"]),
    "a_share_above_1": (["moe=mixtral", "reinit=2"], ["reinit is 2.0", "at most 1"]),
    "an_unknown_scale": (["moe=mixtral", "scale=half"], ["scale=half", "weights, gates"]),
    "no_such_block": (["moe=mixtral", "moe.blocks=[9]"], ["moe.blocks"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_made_is_refused_and_nothing_is_written(dense: Any, tmp_path: Path, case: str) -> None:
    given, said = WRONG[case]
    with pytest.raises(SystemExit) as caught:
        main(["upcycle", f"run={dense['gpt3'][0].parents[1]}", f"out={tmp_path / 'made'}", *given])
    for words in said:
        assert words in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_a_model_with_experts_is_not_upcycled_again(dense: Any, tmp_path: Path) -> None:
    done = upcycle(dense["gpt3"][0], tmp_path / "once", mixture(2, 4), Recipe())
    with pytest.raises(ValueError, match="4 experts; only a dense model"):
        upcycle(done.checkpoint, tmp_path / "twice", mixture(2, 4), Recipe())
    with pytest.raises(FileExistsError, match="exists"):
        upcycle(dense["gpt3"][0], tmp_path / "once", mixture(2, 4), Recipe())
