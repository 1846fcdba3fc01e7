"""Generate, score, train: a loop as in reinforcement learning, which trains in one layout and generates in another.

``python examples/rollout.py`` starts four processes. They train with tensor 2 × expert 2, and generate with four data
ranks that share the experts, for which weights move by one exchange in each step (docs/generate.md). The task is a toy:
texts are worth the share of their tokens that are even, and the policy gradient (REINFORCE with the mean as baseline)
finds that.
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tedlab import ParallelDegrees, TEDStrategy, Topology
from tedlab.config import ModelConfig, MoEConfig
from tedlab.decode import continuations
from tedlab.models import GPT
from tedlab.nn import vocab_parallel_cross_entropy
from tedlab.relayout import relayout
from tedlab.sampling import Sampling

MODEL = ModelConfig(layers=2, hidden=32, heads=4, ffn=64, sequence_length=16, vocab_size=32, init_std=0.1)
MOE = MoEConfig(num_experts=4, top_k=2, dispatch="dropless", capacity_factor=None)
TEXTS, PROMPT, ADDED = 32, 4, 8


def score(text: list[int]) -> float:
    """What a continuation is worth: the share of its tokens that are even."""
    return sum(token % 2 == 0 for token in text) / len(text)


class Rollout(LightningModule):
    """A policy that learns from the texts that it generates.

    Args:
        generating: The layout in which it generates, of as many processes as it trains in.

    Attributes:
        rewards: The mean of all texts' scores, in each step.
    """

    def __init__(self, generating: ParallelDegrees) -> None:
        super().__init__()
        self.generating = generating
        self.rewards: list[float] = []

    def configure_model(self) -> None:
        if hasattr(self, "network"):
            return
        self.topology = self.trainer.strategy.topology
        self.network = GPT(MODEL, MOE, self.topology, seed=0)
        # In a list, so that it is no part of this module: it has no gradients, optimizer state or checkpoint.
        self.other = [GPT(MODEL, MOE, Topology(self.generating, self.device), seed=None)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        texts = self.generate()
        scores = torch.tensor([score(text[PROMPT:]) for text in texts])
        self.rewards.append(float(scores.mean()))
        comm = self.topology.comm
        own = slice(comm.rank("data"), None, comm.size("data"))
        ids = torch.tensor(texts, device=self.device)[own]
        advantage_B1 = (scores - scores.mean())[own].unsqueeze(1).to(self.device)
        logits, _ = self.network(ids[:, :-1])
        losses = vocab_parallel_cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), comm)
        return (advantage_B1 * losses.view(len(ids), -1)[:, PROMPT - 1 :]).sum(1).mean()

    def generate(self) -> list[list[int]]:
        """Returns texts, the same in every process, by the weights as they are now."""
        parameters = list(self.network.spec(MODEL, MOE).parameters())
        layouts = self.topology.degrees, self.generating
        relayout(parameters, self.network, self.other[0], layouts, self.topology.comm)
        draw = torch.Generator().manual_seed(self.global_step)
        texts = torch.randint(MODEL.vocab_size or 0, (TEXTS, PROMPT), generator=draw).tolist()
        sampling = Sampling(seed=1000 * self.global_step)
        for news in continuations(self.other[0], [*map(list, texts)], ADDED, sampling):
            for text, token in zip(texts, news, strict=True):
                text.append(token)
        return texts

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def learn(steps: int, generating: ParallelDegrees, **options: Any) -> Rollout:
    """Trains a policy for some steps."""
    policy = Rollout(generating)
    settings = {"accelerator": "cpu", "devices": 4, "logger": False, "enable_checkpointing": False}
    strategy = TEDStrategy(tensor_parallel_size=2, expert_parallel_size=2)
    trainer = Trainer(strategy=strategy, max_steps=steps, **(settings | options))
    trainer.fit(policy, DataLoader(TensorDataset(torch.zeros(4 * steps)), batch_size=1))  # steps without data
    return policy


if __name__ == "__main__":
    learned = learn(20, ParallelDegrees(4, tensor=1, expert=4))
    if learned.global_rank == 0:
        print(" ".join(f"{reward:.2f}" for reward in learned.rewards))
