"""The loop in plain torch that ``benchmarks.expert_parallel`` times computes what tedlab computes."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.plain_experts import Decoder
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
IDS = torch.randint(48, (3, 9), generator=torch.Generator().manual_seed(0))


def weights() -> dict[str, Tensor]:
    """Those of the loop in one process, drawn by name."""
    shapes = {name: parameter.shape for name, parameter in Decoder(MODEL, MOE, 1, False).named_parameters()}
    draw = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=draw) * 0.3 for name, shape in sorted(shapes.items())}


def loss_of_the_loop(processes: int, rank: int = 0) -> float:
    model = Decoder(MODEL, MOE, processes, compiled=False)
    here = MOE.num_experts // processes
    for name, parameter in model.named_parameters():
        whole = weights()[name]
        own = whole[rank * here :][:here] if name.endswith((".up", ".down")) else whole
        parameter.data.copy_(own)
    loss: Tensor = model(IDS)
    loss.backward()
    return loss.item()


def in_two_processes() -> float:
    return loss_of_the_loop(2, torch.distributed.get_rank())


def test_its_loss_is_that_of_tedlab(single: Topology) -> None:
    theirs = weights()
    network = GPT(MODEL, MOE, single, seed=0)
    ours: dict[str, Any] = dict(network.named_parameters())

    def put(name: str, value: Tensor) -> None:
        ours.pop(name).detach().to_local().copy_(value)

    put("embedding.weight", theirs["embedding.weight"])
    put("output.weight", theirs["output.weight"])
    put("norm.weight", theirs[f"norms.{2 * MODEL.layers}.weight"])
    for i in range(MODEL.layers):
        qkv = theirs[f"attention.{i}.qkv.weight"].unflatten(0, (3, MODEL.heads, -1))
        put(f"blocks.{i}.norm1.weight", theirs[f"norms.{2 * i}.weight"])
        put(f"blocks.{i}.norm2.weight", theirs[f"norms.{2 * i + 1}.weight"])
        put(f"blocks.{i}.attention.qkv.weight", qkv.transpose(0, 1).flatten(0, 2))
        put(f"blocks.{i}.attention.out.weight", theirs[f"attention.{i}.out.weight"])
        put(f"blocks.{i}.feed_forward.router.weight", theirs[f"experts.{i}.router.weight"])
        gate, linear = theirs[f"experts.{i}.up"].chunk(2, -1)
        put(f"blocks.{i}.feed_forward.experts.up", torch.stack((gate, linear), -1).flatten(-2))
        put(f"blocks.{i}.feed_forward.experts.down", theirs[f"experts.{i}.down"])
    assert not ours
    loss = network.loss(IDS[:, :-1], IDS[:, 1:])[0].item()
    torch.testing.assert_close(loss_of_the_loop(1), loss, rtol=1e-5, atol=0)


def test_two_processes_that_share_its_experts_have_the_loss_of_one(pool: WorkerPool) -> None:
    torch.testing.assert_close(pool.run(2, in_two_processes), [loss_of_the_loop(1)] * 2, rtol=1e-5, atol=0)
