"""Targets that do not count, and ids that no token has: judged by torch's own cross-entropy on the whole logits."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from tedlab import ParallelDegrees, Topology
from tedlab.config import ModelConfig, MoEConfig
from tedlab.models import GPT
from tedlab.nn import (
    Init,
    VocabParallelEmbedding,
    VocabParallelEmbeddingSpec,
    linear_cross_entropy,
    mean_over_counted,
    vocab_parallel_cross_entropy,
)
from tests.pool import WorkerPool

ROWS, VOCABULARY, WIDTH = 11, 16, 6
DRAW = torch.Generator().manual_seed(5)
X, W = (torch.randn(n, WIDTH, generator=DRAW, dtype=torch.float64) for n in (ROWS, VOCABULARY))
SOME = torch.tensor([0, -100, 4, 7, 8, -100, -100, 15, 3, 3, -100])  # with chunks of 2, one of which counts nothing
TARGETS = {
    "none_ignored": (SOME.clamp(min=0), -100),
    "some_ignored": (SOME, -100),
    "a_token_ignored": (SOME.clamp(min=0), 3),  # padding that is a token of the vocabulary
    "all_ignored": (torch.full((ROWS,), -100), -100),
}
CHUNKS = (1, 2, 5, ROWS, 100)


def losses_of_everything() -> dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]]:
    """Loss, gradients of the input and of this process's part of the weight, for all targets, in both ways."""
    size = dist.get_world_size()
    comm = Topology(ParallelDegrees(size, tensor=size)).comm
    found = {}
    for kind, (targets, ignored) in TARGETS.items():
        for way in ("all", *CHUNKS, "compiled"):
            x, w = X.clone().requires_grad_(), W.chunk(size)[dist.get_rank()].clone().requires_grad_()
            if way == "all":
                losses = vocab_parallel_cross_entropy(x @ w.mT, targets, comm, ignored)
                assert not losses[targets == ignored].any()
                loss = mean_over_counted(losses, targets, ignored)
            else:
                chunk, backend = (5, "aot_eager") if way == "compiled" else (way, "none")
                loss = linear_cross_entropy(x, w, targets, comm, chunk, backend, ignored)
            (3 * loss).backward()
            assert x.grad is not None
            assert w.grad is not None
            found[kind, str(way)] = loss.detach(), x.grad, w.grad
    return found


@pytest.mark.parametrize("tensor", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_ignored_targets_count_neither_in_the_loss_nor_in_gradients(pool: WorkerPool, tensor: int) -> None:
    answers = pool.run(tensor, losses_of_everything)
    for (kind, way), (loss, _, _) in answers[0].items():
        targets, ignored = TARGETS[kind]
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
        expected = F.cross_entropy(x @ w.mT, targets, ignore_index=ignored, reduction="sum")
        expected = expected / max(1, int((targets != ignored).sum()))
        (3 * expected).backward()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=0, msg=f"{kind} {way}")
        of_x = sum(answer[kind, way][1] for answer in answers)
        of_w = torch.cat([answer[kind, way][2] for answer in answers])
        torch.testing.assert_close(of_x, x.grad, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(of_w, w.grad, rtol=1e-12, atol=1e-15)
        assert all(torch.equal(answer[kind, way][0], loss) for answer in answers)
        if kind == "all_ignored":
            assert loss == 0
            assert not of_x.any()
            assert not of_w.any()


def refusals() -> dict[str, str]:
    size = dist.get_world_size()
    topology = Topology(ParallelDegrees(size, tensor=size))
    embedding = VocabParallelEmbedding(VocabParallelEmbeddingSpec(VOCABULARY, WIDTH, Init(std=1.0)), topology)
    logits, weight = torch.zeros(ROWS, VOCABULARY // size), torch.zeros(VOCABULARY // size, WIDTH)
    said = {}
    for value in (VOCABULARY, -1, 10**6):
        wrong = SOME.clamp(min=0).index_fill(0, torch.tensor([4]), value)
        for name, attempt in (
            ("logits", lambda wrong=wrong: vocab_parallel_cross_entropy(logits, wrong, topology.comm)),
            ("chunks", lambda wrong=wrong: linear_cross_entropy(X.float(), weight, wrong, topology.comm, 3)),
            ("ids", lambda wrong=wrong: embedding(wrong.view(1, -1))),
        ):
            with pytest.raises(IndexError) as caught:
                attempt()
            said[f"{name} {value}"] = str(caught.value)
    with pytest.raises(IndexError, match="a token id is -100"):  # which only a target may be
        embedding(SOME.view(1, -1))
    return said


@pytest.mark.parametrize("tensor", [1, 2])
def test_an_id_outside_the_vocabulary_is_named_with_the_vocabulary(pool: WorkerPool, tensor: int) -> None:
    for said in pool.run(tensor, refusals):
        for case, message in said.items():
            name, value = case.split()
            assert f"{'a token id' if name == 'ids' else 'a target'} is {value}, but" in message
            assert "the vocabulary has 16 tokens: valid are 0 to 15" in message
            assert ("-100 to be ignored" in message) == (name != "ids")


# ---- in the model ------------------------------------------------------------------------------------------------


def losses_of_the_model(sequence: bool) -> dict[str, Any]:
    size = dist.get_world_size()
    topology = Topology(ParallelDegrees(size, tensor=size, sequence=sequence))
    torch.set_default_dtype(torch.float64)
    ids = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    targets[0, 2:7] = -100
    found: dict[str, Any] = {}
    for chunk in (None, 5):
        model = ModelConfig(1, 8, 2, 16, 8, vocab_size=32, init_std=0.5, loss_chunk=chunk)
        network = GPT(model, MoEConfig(num_experts=0), topology, seed=0)
        loss, _ = network.loss(ids[:, :-1], targets)
        loss.backward()
        logits = network(ids[:, :-1])[0]
        logits = topology.comm.all_gather(logits.movedim(-1, 0), "tensor", tag="test", phase="metrics").movedim(0, -1)
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        gradient = network.embedding.weight.grad
        assert isinstance(gradient, DTensor)
        found[str(chunk)] = loss.item(), expected.item(), gradient.to_local()
    return found


def test_the_model_s_loss_is_the_mean_over_counted_targets_in_every_layout(pool: WorkerPool) -> None:
    (alone,) = pool.run(1, losses_of_the_model, False)
    for layout in ((2, False), (2, True)):
        answers = pool.run(layout[0], losses_of_the_model, layout[1])
        for chunk, (loss, expected, gradient) in alone.items():
            assert loss == pytest.approx(expected, rel=1e-13)
            for answer in answers:
                assert answer[chunk][:2] == pytest.approx((loss, expected), rel=1e-13)
            together = torch.cat([answer[chunk][2] for answer in answers])
            torch.testing.assert_close(together, gradient, rtol=1e-11, atol=1e-14)
