"""MoE layers of other frameworks that ``benchmarks.expert_parallel`` times compute what the plain loop computes."""

import math
import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import expert_parallel
from benchmarks.peer_layers import PACKAGES, PEERS, missing
from benchmarks.plain_experts import Decoder, feed_forward
from tedlab.config import ModelConfig, MoEConfig

MOE = MoEConfig(num_experts=8, top_k=2, every=1, dispatch="dropless")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one, on a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("these layers need a GPU")
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}.items():
        monkeypatch.setitem(os.environ, name, value)
    dist.init_process_group("nccl")
    yield
    dist.destroy_process_group()


def put(layer: nn.Module, router: Tensor, up: Tensor, down: Tensor) -> None:
    """Sets the weights of a peer to those of a plain loop."""
    own = dict(layer.named_parameters())
    gate, linear = up.chunk(2, -1)
    values = {"up": up, "down": down, "router.weight": router, "layer.router.gate.weight": router}
    values |= {"layer.experts.w1": gate.mT, "layer.experts.w3": linear.mT, "layer.experts.w2": down.mT}
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(values[name])


@pytest.mark.parametrize("peer", PACKAGES)
@pytest.mark.usefixtures("alone")
def test_a_peer_computes_what_the_plain_loop_computes(peer: str) -> None:
    if missing(peer) is not None:
        pytest.skip(f"{missing(peer)} is not installed")
    results = []
    for name in ("plain loop", peer):
        torch.manual_seed(0)
        with torch.device("cuda"):
            up, down, router = torch.randn(8, 256, 256), torch.randn(8, 128, 256), torch.randn(8, 256)
            x = torch.randn(1024, 256)
            layer = PEERS[name](256, 128, MOE, 1)
        put(layer, router, up * 0.05, down * 0.05)
        layer, x = layer.bfloat16(), x.bfloat16().requires_grad_()
        y = layer(x)
        y.float().square().sum().backward()
        assert x.grad is not None
        results.append((y.float(), x.grad.float()))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02 * expected.abs().max().item())


def test_rows_of_peers_that_are_not_installed_are_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["expert_parallel", "A", "--tiny", "--rows", "Megatron-Core, expert 2"])
    monkeypatch.setitem(PACKAGES, "Megatron-Core", "no-such-package")
    expert_parallel.main()
    assert "A, Megatron-Core, expert 2: no-such-package is not installed" in capsys.readouterr().out


def test_an_output_that_is_torch_s_embedding_makes_the_loss_large() -> None:
    """As in DeepSpeed's rows, whose loss is 1416."""
    torch.manual_seed(0)
    model = ModelConfig(hidden=256, heads=4, layers=2, vocab_size=64, sequence_length=32, tie_embeddings=True)
    decoder = Decoder(model, MOE, 1, False, lambda hidden, _inner, _moe, _processes: feed_forward(hidden, 4 * hidden))
    ids = torch.randint(64, (4, 33))
    assert float(decoder(ids)) == pytest.approx(256 / math.sqrt(2), rel=0.1)
    nn.init.normal_(decoder.embedding.weight, std=0.02)
    assert float(decoder(ids)) == pytest.approx(math.log(64), rel=0.1)
