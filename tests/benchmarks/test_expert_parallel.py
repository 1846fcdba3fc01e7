"""``benchmarks.expert_parallel``: its loop in plain torch computes what tedlab computes, and its rows can be run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import expert_parallel
from benchmarks.expert_parallel import CASES, rows
from benchmarks.plain_experts import Decoder
from benchmarks.steps import composed
from tedlab import Topology
from tedlab.config import ModelConfig, MoEConfig, RouterConfig
from tedlab.models import GPT
from tests.pool import WorkerPool

MODEL = ModelConfig(
    *(2, 32, 4, 16, 8),
    activation="swiglu",
    bias=False,
    norm="rms",
    norm_eps=torch.finfo(torch.float32).eps,  # what torch's RMSNorm adds
    positions="rotary",
    vocab_size=48,
    tie_embeddings=False,
)
MOE = MoEConfig(num_experts=4, every=1, top_k=2, dispatch="dropless", router=RouterConfig(gates="raw"))
DENSE = ModelConfig(1, 32, 4, 16, 8, vocab_size=48)  # as of case C, whose experts DeepSpeed has
SECOND = MoEConfig(num_experts=4, every=2)  # of one block none
IDS = torch.randint(48, (3, 9), generator=torch.Generator().manual_seed(0))


def weights(model: ModelConfig = MODEL, moe: MoEConfig = MOE) -> dict[str, Tensor]:
    """Those of the loop in one process, drawn by name."""
    shapes = {name: parameter.shape for name, parameter in Decoder(model, moe, 1, False).named_parameters()}
    draw = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=draw) * 0.3 for name, shape in sorted(shapes.items())}


def loss_of_the_loop(processes: int, rank: int = 0, of: ModelConfig = MODEL, moe: MoEConfig = MOE) -> float:
    model = Decoder(of, moe, processes, compiled=False)
    here = moe.num_experts // processes
    for name, parameter in model.named_parameters():
        whole = weights(of, moe)[name]
        own = whole[rank * here :][:here] if name.endswith((".up", ".down")) else whole
        parameter.data.copy_(own)
    loss: Tensor = model(IDS)
    loss.backward()
    return loss.item()


def in_two_processes() -> float:
    return loss_of_the_loop(2, torch.distributed.get_rank())


def loss_of_tedlab(model: ModelConfig, moe: MoEConfig, theirs: dict[str, Tensor], single: Topology) -> float:
    network = GPT(model, moe, single, seed=0)
    ours: dict[str, Any] = dict(network.named_parameters())

    def put(name: str, value: Tensor) -> None:
        ours.pop(name).detach().to_local().copy_(value)

    kinds = ("weight", "bias") if model.bias else ("weight",)
    put("embedding.weight", theirs["embedding.weight"])
    if not model.tie_embeddings:
        put("output.weight", theirs["output.weight"])
    if model.positions == "learned":
        put("positions.weight", theirs["positions.weight"])
    for kind in kinds:
        put(f"norm.{kind}", theirs[f"norms.{2 * model.layers}.{kind}"])
    for i in range(model.layers):
        block = f"blocks.{i}"
        for kind in kinds:
            qkv = theirs[f"attention.{i}.qkv.{kind}"].unflatten(0, (3, model.heads, -1))
            put(f"{block}.norm1.{kind}", theirs[f"norms.{2 * i}.{kind}"])
            put(f"{block}.norm2.{kind}", theirs[f"norms.{2 * i + 1}.{kind}"])
            put(f"{block}.attention.qkv.{kind}", qkv.transpose(0, 1).flatten(0, 2))
            put(f"{block}.attention.out.{kind}", theirs[f"attention.{i}.out.{kind}"])
            if i % moe.every != moe.every - 1:
                put(f"{block}.feed_forward.up.{kind}", theirs[f"experts.{i}.0.{kind}"])
                put(f"{block}.feed_forward.down.{kind}", theirs[f"experts.{i}.2.{kind}"])
        if i % moe.every == moe.every - 1:
            put(f"{block}.feed_forward.router.weight", theirs[f"experts.{i}.router.weight"])
            gate, linear = theirs[f"experts.{i}.up"].chunk(2, -1)
            put(f"{block}.feed_forward.experts.up", torch.stack((gate, linear), -1).flatten(-2))
            put(f"{block}.feed_forward.experts.down", theirs[f"experts.{i}.down"])
    assert not ours
    return network.loss(IDS[:, :-1], IDS[:, 1:])[0].item()


@pytest.mark.parametrize(("model", "moe"), [(MODEL, MOE), (DENSE, SECOND)], ids=["experts", "dense"])
def test_its_loss_is_that_of_tedlab(model: ModelConfig, moe: MoEConfig, single: Topology) -> None:
    loss = loss_of_tedlab(model, moe, weights(model, moe), single)
    torch.testing.assert_close(loss_of_the_loop(1, of=model, moe=moe), loss, rtol=1e-5, atol=0)


def test_two_processes_that_share_its_experts_have_the_loss_of_one(pool: WorkerPool) -> None:
    torch.testing.assert_close(pool.run(2, in_two_processes), [loss_of_the_loop(1)] * 2, rtol=1e-5, atol=0)


def test_every_row_on_four_gpus_is_a_valid_layout_of_as_many_tokens_for_each_data_rank() -> None:
    for row in rows(4):
        if not row.peer:
            config = composed(list(row.configured(["trainer=gpu", "parallel=single", *CASES[row.cases[0]]], 8)))
            layout = config.parallel
            assert (layout.world_size, layout.tensor) == (row.processes, row.tensor)
            assert layout.expert == row.processes // row.tensor
            assert config.data.batch_size == 8 * layout.expert * row.micro_batches


@pytest.mark.slow
def test_a_row_is_measured_and_says_on_how_many_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, name = tmp_path / "found.json", "tedlab, expert 2, comm.dedup=group"
    words = ["expert_parallel", "A", "--tiny", "--rows", name, "--steps", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*words, "--set", "model.layers=1"])
    expert_parallel.main()
    (row,) = json.loads(out.read_text())["results"]["A"]
    assert (row["name"], row["processes"], row.get("error")) == (name, 2, None)
    assert row["passes_s"] == row["phases_s"]["forward"] + row["phases_s"]["backward"] > 0


def test_rows_that_do_not_exist_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["expert_parallel", "A", "--processes", "4", "--rows", "tedlab, expert 2"])
    with pytest.raises(SystemExit):
        expert_parallel.main()
    assert "no rows: ['tedlab, expert 2']" in capsys.readouterr().err
