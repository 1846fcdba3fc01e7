"""Weights that move between two layouts are those that the other layout would have, and as many bytes as planned."""

import importlib.util
import subprocess
import sys
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tedlab import ParallelDegrees, Topology
from tedlab.comm import Ledger
from tedlab.config import ModelConfig, MoEConfig
from tedlab.models import GPT
from tedlab.relayout import TAG, moved_elements, relayout
from tests.pool import WorkerPool
from tests.training import full

MODEL = ModelConfig(2, 16, 4, 24, sequence_length=8, vocab_size=32, kv_heads=2)
MOE = MoEConfig(num_experts=4, top_k=2, dispatch="dropless", capacity_factor=None)
LAYOUTS = [  # tensor, expert, expert_tensor
    *((2, 2, 2), (1, 4, 1), (4, 1, 4), (1, 1, 1)),
    *((2, 4, 1), (1, 2, 2)),
]
EXAMPLE = Path(__file__).parents[1] / "examples" / "rollout.py"


def moved(pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[str]:
    """What is wrong with weights that moved between each pair of layouts, or with the bytes."""
    world = torch.distributed.get_world_size()
    topologies = {}
    for layout in {layout for pair in pairs for layout in pair}:
        tensor, expert, width = layout
        topologies[layout] = Topology(ParallelDegrees(world, tensor, expert, expert_tensor=width))
    wrong = []
    parameters = list(GPT.spec(MODEL, MOE).parameters())
    for old, new in pairs:
        source, target, right = (
            GPT(MODEL, MOE, topologies[layout], seed) for layout, seed in ((old, 1), (new, 2), (new, 1))
        )
        ledger, comm = Ledger(), topologies[old].comm
        handle = comm.register_hook(ledger)
        degrees = topologies[old].degrees, topologies[new].degrees
        relayout(parameters, source, target, degrees, comm)
        handle.remove()
        for (name, ours), theirs in zip(target.named_parameters(), right.parameters(), strict=True):
            if not torch.equal(ours.detach().to_local(), theirs.detach().to_local()):
                wrong.append(f"{old} to {new}: {name}")
        counts_sr = moved_elements(parameters, *degrees)
        rank = comm.rank("world")
        planned = 4 * (counts_sr[rank].sum() - counts_sr[rank, rank])
        (count,) = [count for entry, count in ledger.totals.items() if entry.tag == TAG]
        if (count.calls, count.payload_bytes, count.wire_bytes) != (1, planned, planned):
            wrong.append(f"{old} to {new}: {count} instead of {planned} bytes")
    return wrong


GENERATING = ParallelDegrees(4, tensor=1, expert=4)
PAIRS = list(product(LAYOUTS, LAYOUTS))


@pytest.mark.parametrize(
    "pairs", [[*PAIRS[1:6], PAIRS[12], PAIRS[25]], pytest.param(PAIRS, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_weights_that_moved_are_those_of_the_other_layout(pool: WorkerPool, pairs: list[Any]) -> None:
    for found in pool.run(4, moved, pairs):
        assert found == []


def test_layouts_of_different_worlds_and_dtypes_are_refused(single: Topology) -> None:
    one, other = (GPT(MODEL, MOE, single, seed) for seed in (1, 2))
    parameters = list(GPT.spec(MODEL, MOE).parameters())
    with pytest.raises(ValueError, match="between 1 and 2 processes"):
        relayout(parameters, one, other, (ParallelDegrees(1), ParallelDegrees(2)), single.comm)
    with pytest.raises(ValueError, match=r"float32 and torch\.float64 cannot move together"):
        relayout(parameters, one, other.double(), (ParallelDegrees(1), ParallelDegrees(1)), single.comm)


def example() -> Any:
    spec = importlib.util.spec_from_file_location("rollout", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    rollout = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rollout)
    return rollout


class Listening(Callback):
    """Counts what the policy's processes exchange."""

    def __init__(self) -> None:
        self.ledger = Ledger()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.topology.comm.register_hook(self.ledger)


def rolled_out(steps: int) -> tuple[list[float], list[str], int]:
    """Rewards of the example, weights that differ between its layouts after another exchange, and bytes it sent."""
    rollout, listening = example(), Listening()
    warnings.filterwarnings("ignore")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "precision": "64-true"}
    policy = rollout.learn(steps, GENERATING, callbacks=[listening], **quiet)
    sent = sum(count.payload_bytes for entry, count in listening.ledger.totals.items() if entry.tag == TAG)
    network, other = policy.network, policy.other[0]
    parameters = list(GPT.spec(rollout.MODEL, rollout.MOE).parameters())
    relayout(parameters, network, other, (policy.topology.degrees, GENERATING), policy.topology.comm)
    pairs = zip(network.named_parameters(), other.parameters(), strict=True)
    return policy.rewards, [name for (name, a), b in pairs if not torch.equal(full(a), full(b))], sent


@pytest.mark.exhaustive
def test_the_example_runs_as_its_first_lines_say() -> None:
    ended = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    rewards = [float(word) for word in ended.stdout.splitlines()[-1].split()]
    assert len(rewards) == 20
    assert rewards[0] < 0.6
    assert sum(rewards[-3:]) / 3 > 0.8


@pytest.mark.slow
def test_the_example_learns_with_weights_that_moved(pool: WorkerPool) -> None:
    ranks = pool.run(4, rolled_out, 20)
    rewards, differing, _ = ranks[0]
    assert differing == []
    assert all(found[:2] == (rewards, []) for found in ranks)
    assert len(rewards) == 20
    assert rewards[0] < 0.6
    assert sum(rewards[-3:]) / 3 > 0.8
    rollout, layouts = example(), (ParallelDegrees(4, tensor=2, expert=2), GENERATING)
    counts_sr = moved_elements(list(GPT.spec(rollout.MODEL, rollout.MOE).parameters()), *layouts)
    for rank, (_, _, sent) in enumerate(ranks):
        assert sent == 20 * 8 * (counts_sr[rank].sum() - counts_sr[rank, rank])
