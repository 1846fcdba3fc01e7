"""Rows that go between two pools make the logits of one process, and as many bytes as the closed form says."""

import json
from pathlib import Path

import pytest
import torch

import experiments.megascale.__main__ as study
from experiments.megascale.two_pools import TwoPools, sent_bytes
from tedlab import ParallelDegrees, Topology
from tedlab.comm import Ledger
from tedlab.config import ModelConfig, MoEConfig
from tedlab.models import GPT
from tests.pool import WorkerPool

MODEL = ModelConfig(2, 16, 4, 24, sequence_length=8, vocab_size=32, init_std=0.3)
GATINGS = ("default", "round_robin")
RESULTS = json.loads((Path(study.__file__).parent / "results.json").read_text())


def network(gating: str, topology: Topology) -> GPT:
    torch.set_default_dtype(torch.float64)
    moe = MoEConfig(num_experts=4, top_k=2, dispatch="dropless", capacity_factor=None, every=1, gating=gating)
    model = GPT(MODEL, moe, topology, seed=0).eval()
    torch.set_default_dtype(torch.float32)
    return model


def ids(rank: int, number: int) -> torch.Tensor:
    return torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(10 * rank + number))


def two_pools(attention: int) -> list[tuple[list[torch.Tensor], list[torch.Tensor], dict[str, tuple[int, int]]]]:
    """For each router: logits by way of two pools, those of this process alone, and what was sent."""
    found = []
    for gating in GATINGS:
        topology = Topology(ParallelDegrees(torch.distributed.get_world_size()))
        model = network(gating, topology)
        ledger = Ledger()
        topology.comm.register_hook(ledger)
        rank = topology.comm.rank("world")
        batches = [ids(rank, number) for number in range(3)]
        logits = TwoPools(model, topology.comm, attention).logits(batches)
        sent = {entry.tag: (count.calls, count.payload_bytes) for entry, count in ledger.totals.items()}
        with torch.inference_mode():
            found.append((logits, [model(batch)[0] for batch in batches], sent))
    return found


@pytest.mark.parametrize(("world", "attention"), [(3, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_two_pools_make_the_logits_of_one_process_and_send_what_the_closed_form_says(
    pool: WorkerPool, world: int, attention: int
) -> None:
    ranks = pool.run(world, two_pools, attention)
    experts = world - attention
    choices = 2 * 8 * 2
    for rank, routers in enumerate(ranks):
        for gating, (logits, alone, sent) in zip(GATINGS, routers, strict=True):
            assert len(logits) == (3 if rank < attention else 0)
            for ours, theirs in zip(logits, alone, strict=False):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
            each = sent_bytes(rank, attention, experts, choices, 4, 16 * 8)
            if gating == "default":  # which expert gets how many is the router's choice
                each.pop("combine.all_to_all") if rank >= attention else None
            assert {tag: sent[tag] for tag in each} == {tag: (6, 6 * size) for tag, size in each.items()}
    back = sum(routers[0][2]["combine.all_to_all"][1] for routers in ranks)
    assert back == sum(routers[0][2]["dispatch.all_to_all"][1] for routers in ranks) == attention * 6 * choices * 128


def test_pools_must_not_be_empty_and_must_divide_experts(single: Topology) -> None:
    with pytest.raises(ValueError, match="1 of 1 processes for attention leave a pool empty"):
        TwoPools(network("default", single), single.comm, 1)


def test_the_readme_has_each_prediction_beside_what_was_reported() -> None:
    text = (Path(study.__file__).parent / "README.md").read_text()
    assert [*RESULTS] == [*study.MODELS]
    for name, found in RESULTS.items():
        one, two, three, four = (found["per_gpu"][f"{m}"] for m in (1, 2, 3, 4))
        beside = max(found["per_gpu"].values()) / found["one_pool_per_gpu"]
        gains = f"{two / one:.2f} | {three / two:.2f} | {four / three:.2f} | {beside:.2f}"
        assert f"| {name} | {one:,.0f} | {two:,.0f} | {three:,.0f} | {four:,.0f} | {gains} |" in text
        assert all(seconds <= study.REQUEST.latency for seconds in found["token_seconds"].values())


def test_more_micro_batches_decode_more_at_toy_size() -> None:
    toy = (*study.MODELS["Mixtral-8x22B"], "model.layers=2", "model.vocab_size=4096")
    found = study.row(toy, gpus=4)["per_gpu"]
    assert found["3"] > found["2"] > found["1"]
