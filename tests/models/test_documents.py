"""A sample of several documents, masked, trains a model as the documents apart do, in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from tedlab import Topology
from tedlab.config import AttentionConfig, LatentConfig, ModelConfig, MoEConfig, RecomputeConfig
from tedlab.models import GPT
from tedlab.nn import Reading, documents_of
from tedlab.nn.attend import _by_flex, attend, attention_path
from tedlab.optim.bucket import local

SEPARATOR, VOCABULARY, LENGTH = 0, 32, 24
LENGTHS = ([5, 1, 9, 9], [24], [11, 2, 3], [1, 1, 1])  # tokens of each sample's documents, with their separators
SHAPE = ModelConfig(
    layers=2, hidden=16, heads=4, ffn=24, sequence_length=LENGTH, vocab_size=VOCABULARY, init_std=0.2, bias=True
)
ROTARY = replace(SHAPE, positions="rotary", norm="rms", activation="swiglu")
LATENT = LatentConfig(kv_rank=8, nope_dim=6, rope_dim=4, v_dim=8)
WINDOW = AttentionConfig(window=4, full_every=2, sinks=True)
MODELS = {
    "learned": SHAPE,
    "rotary": ROTARY,
    "shared_keys": replace(ROTARY, kv_heads=2, qk_norm="head"),
    "windows_and_sinks": replace(ROTARY, kv_heads=2, attention=WINDOW),
    "latent": replace(ROTARY, attention=AttentionConfig(latent=LATENT)),
    "recomputed": replace(ROTARY, recompute=RecomputeConfig(granularity="block")),
    "loss_in_chunks": replace(SHAPE, loss_chunk=7),
}
EXPERTS = MoEConfig(num_experts=4, top_k=2, dispatch="dropless", every=2, aux_loss=0.0)


def batch() -> Tensor:
    """(B, S+1), the last sample with padding, and all with a separator at the end of each document."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for lengths in LENGTHS:
        row = torch.cat(
            [
                torch.cat((torch.randint(1, VOCABULARY, (n - 1,), generator=draw), torch.tensor([SEPARATOR])))
                for n in lengths
            ]
        )
        rows.append(torch.cat((row, row.new_full((LENGTH + 1 - len(row),), -1))))
    return torch.stack(rows)


def model(
    shape: ModelConfig, topology: Topology, experts: MoEConfig = EXPERTS, dtype: torch.dtype = torch.float64
) -> GPT:
    torch.set_default_dtype(dtype)
    try:
        return GPT(shape, experts, topology, 0)
    finally:
        torch.set_default_dtype(torch.float32)


def gradients(network: GPT) -> dict[str, Tensor]:
    return {name: local(p.grad).clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
def test_masked_documents_train_as_apart(single: Topology, shape: ModelConfig) -> None:
    """Losses weigh each target alike; experts have no capacity, which documents would share."""
    together = model(shape, single)
    together.separator = SEPARATOR
    ids, targets, padding = Reading(SEPARATOR, masked=True, padded=True).of(batch())
    loss, _ = together.loss(ids, targets, padding)
    loss.backward()
    apart, total, count = model(shape, single), torch.zeros(()).double(), 0
    for row in batch():
        for document in torch.tensor_split(row[row >= 0], (row[row >= 0] == SEPARATOR).nonzero()[:, 0] + 1):
            if len(document) > 1:
                one, _ = apart.loss(document[None, :-1], document[None, 1:])
                total, count = total + one * (len(document) - 1), count + len(document) - 1
    (total / count).backward()
    assert count == int((targets != -100).sum()) == 20 + 23 + 13
    assert torch.allclose(loss, total / count, rtol=1e-12)
    ours, theirs = gradients(together), gradients(apart)
    assert ours.keys() == theirs.keys()
    errors = {name: float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs}
    assert max(errors.values()) < 1e-10, errors


def test_without_a_mask_it_is_another_loss(single: Topology) -> None:
    network, reading = model(ROTARY, single), Reading(SEPARATOR, masked=True, padded=True)
    ids, targets, padding = reading.of(batch())
    plain = network.loss(ids, targets, padding)[0]
    network.separator = SEPARATOR
    assert (network.loss(ids, targets, padding)[0] - plain).abs() > 1e-4


def test_positions_begin_anew_after_each_separator() -> None:
    ids = torch.tensor([[3, 0, 4, 5, 0, 0, 6], [0, 1, 1, 1, 1, 1, 1]])
    found = documents_of(ids, SEPARATOR, [None, 2], flex=False)
    assert found.position_BS.tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 4, 5]]
    seen = found.masks[None][:, 0]
    assert seen[0].long().sum(1).tolist() == [1, 2, 1, 2, 3, 1, 1]
    assert found.masks[2][1, 0].long().sum(1).tolist() == [1, 1, 2, 2, 2, 2, 2]
    assert not seen.triu(1).any()


def test_reading_takes_padding_and_what_follows_separators_from_the_targets() -> None:
    sample = torch.tensor([[5, 6, 0, 7, 0, -1, -1]])
    ids, targets, padding = Reading(0, masked=True, padded=True).of(sample)
    assert ids.tolist() == [[5, 6, 0, 7, 0, 0]]
    assert targets.tolist() == [[6, 0, -100, 0, -100, -100]]
    assert padding is not None
    assert padding.tolist() == [[False] * 5 + [True]]
    ids, targets, padding = Reading().of(sample[:, :5])
    assert (ids.tolist(), targets.tolist(), padding) == ([[5, 6, 0, 7]], [[6, 0, 7, 0]], None)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("sinks", [False, True])
def test_flex_attention_with_its_mask_is_attention_with_a_mask(
    monkeypatch: pytest.MonkeyPatch, window: int | None, sinks: bool
) -> None:
    """Uncompiled, as a CPU can run it; on a GPU the same masks go to compiled kernels."""
    monkeypatch.setattr("tedlab.nn.attend._compiled_flex", lambda: flex_attention)
    ids, _, _ = Reading(SEPARATOR, padded=True).of(batch())
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(len(ids), heads, LENGTH, 16, generator=draw) for heads in (4, 2, 2))
    logits = torch.randn(4, generator=draw) if sinks else None
    masks = [documents_of(ids, SEPARATOR, [window], flex) for flex in (False, True)]
    plain = attend(q, k, v, window, logits, documents=masks[0])
    flex = _by_flex(q, k, v, masks[1].masks[window], logits, 16**-0.5)
    assert torch.allclose(flex, plain, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "dtype", "path"),
    [("cuda", torch.bfloat16, "flex"), ("cuda", torch.float64, "mask"), ("cpu", torch.float32, "mask")],
)
def test_documents_take_kernels_of_variable_length_where_there_are_any(device: str, dtype: Any, path: str) -> None:
    assert attention_path(device, dtype, (64, 64), documents=True) == path
