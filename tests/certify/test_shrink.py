"""A small likeness has what a large run has: several of all pieces, padding, tokens of every rank, an epoch's end."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tedlab.certify.certificate import CONTINUATIONS, runs_for
from tedlab.certify.record import _PIECE, CertificateRecorder
from tedlab.certify.shrink import MOST_PROCESSES, SAVED, STEPS, STEPS_PER_EPOCH, largest_alike, reference, shrink
from tedlab.config import OptimConfig, TrainConfig, with_values
from tedlab.data import MicroBatchSampler, PackedSamples, TextDataModule
from tedlab.degrees import ParallelDegrees
from tedlab.models import gpt
from tedlab.moe.router import Router
from tedlab.run import build
from tedlab.spec import Layout
from tedlab.validate import check, complete
from tests.certify.runs import composed
from tests.pool import WorkerPool

SMALL = ["data.micro_batch_size=2", "data.batch_size=32", "moe.num_experts=16"]


@pytest.mark.parametrize("tensor", [1, 2, 3, 4, 8, 16])
def test_every_tensor_rank_has_tokens_of_its_own(tmp_path: Path, tensor: int) -> None:
    heads = [f"model.heads={2 * tensor}", f"model.hidden={16 * tensor}", f"model.ffn={tensor}"]
    layout = [f"parallel.world_size={tensor}", f"parallel.tensor={tensor}", "parallel.expert=1"]
    small = shrink(composed(*SMALL, *heads, *layout), tmp_path)
    small = complete(small, 16)
    data = TextDataModule(small.data, small.model.sequence_length, small.seed)
    samples = PackedSamples(data.corpus.train, small.model.sequence_length)
    batch = small.data.batch_size
    order = list(MicroBatchSampler(samples, num_replicas=1, rank=0, batch_size=batch, micro_batch_size=batch))
    assert len(order) == STEPS_PER_EPOCH * batch < len(samples)
    assert small.model.vocab_size is not None
    steps = STEPS_PER_EPOCH if tensor < 16 else 1  # with 16 ranks in an epoch, which is long enough
    for numbers in np.array_split(order, steps):
        tokens = torch.stack([samples[i] for i in numbers])
        owners = tokens.div(small.model.vocab_size // tensor, rounding_mode="floor")
        assert set(owners[:, :-1].flatten().tolist()) == set(owners[:, 1:].flatten().tolist()) == set(range(tensor))


def test_a_run_that_is_continued_goes_on_into_the_next_epoch() -> None:
    assert SAVED % STEPS_PER_EPOCH  # saved in the middle of one
    assert SAVED < STEPS_PER_EPOCH < STEPS
    assert STEPS - SAVED >= 2


@pytest.mark.parametrize(
    ("continuations", "saving"),
    [
        ([], []),
        (["in one process"], ["layout"]),
        (["from one process"], ["one"]),
        ([*CONTINUATIONS], ["layout", "one"]),
    ],
    ids=str,
)
def test_a_run_saves_only_if_another_continues_it(tmp_path: Path, continuations: list[str], saving: list[str]) -> None:
    runs = runs_for(composed("parallel=tp2_ep2"), tmp_path, tuple(continuations), most_processes=4)
    every = {"layout": runs.layout.checkpoint.every, "one": runs.one.checkpoint.every}
    assert [name for name, steps in every.items() if steps is not None and steps <= STEPS] == saving


def test_the_reference_is_the_plainest(tmp_path: Path) -> None:
    fancy = ["parallel=tp2_ep2", "model.loss_chunk=7", "trainer.precision=16-true", "optim.tile=fused", "comm=ted"]
    fancy += ["optim.overlap=true", "model.recompute.granularity=block", "checkpoint.async_save=true"]
    small = shrink(composed(*SMALL, *fancy), tmp_path)
    one = reference(small, tmp_path)
    assert (one.model.loss_chunk, one.model.recompute.granularity, one.model.compile) == (None, "none", "none")
    optim = one.optim
    assert (optim.loss_scale, optim.zero, optim.tile, optim.overlap) == (None, False, None, False)
    assert optim.bucket_elements == OptimConfig.bucket_elements
    assert (one.parallel.world_size, one.parallel.tensor, one.parallel.expert) == (1, 1, 1)
    assert (one.comm.dtd, one.comm.cac, one.checkpoint.async_save) == (False, False, False)
    assert small.optim.loss_scale == 2.0**16


class Pieces(Callback):
    """Counts, in one process, the pieces of everything that is divided."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (sharded,) = trainer.strategy.sharded_optimizers  # type: ignore[attr-defined]
        groups = {p: index for index, group in enumerate(sharded.optimizer.param_groups) for p in group["params"]}
        kinds = Counter((bucket.kind, groups[bucket.parameters[0]]) for bucket in sharded.buckets)
        whole = [b for b in sharded.buckets if b.sharded]
        self.seen |= {
            "buckets": kinds,
            "padded": {b.kind for b in whole if len(b.flat) > sum(b.sizes)},
            "tiles": {
                tuple(len(t) for t in segment.tiles) for b in sharded.buckets for segment in sharded.state.segments[b]
            },
            "norm": [len(b.shard) for b in sharded.buckets],
            "piece": sharded.piece,
        }


def pieces(configs: list[TrainConfig]) -> list[dict[str, Any]]:
    """Of one step of each configuration."""
    return [_pieces(config) for config in configs]


def _pieces(config: TrainConfig) -> dict[str, Any]:
    counter = Pieces()
    chunks: list[tuple[int, int]] = []  # rows in all, and at a time
    capacities: list[tuple[int, int]] = []  # of an expert, and choices without a slot
    decide, chunked = Router.decide, gpt.linear_cross_entropy

    def deciding(self: Router, *arguments: Any) -> Any:
        decision = decide(self, *arguments)
        capacities.append((len(decision.choice_EC) // self.num_experts, int((decision.slot_TK < 0).sum())))
        return decision

    def chunking(x: Any, weight: Any, targets: Any, comm: Any, chunk: int, backend: str) -> Any:
        chunks.append((len(x), chunk))
        return chunked(x, weight, targets, comm, chunk, backend)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Router, "decide", deciding)
        patch.setattr(gpt, "linear_cross_entropy", chunking)
        trainer, module, data = build(config, [CertificateRecorder(piece=_PIECE), counter], logged=False)
        trainer.fit(module, data)
    return counter.seen | {"chunks": chunks, "capacities": capacities}


LAYOUTS = {
    "tensor 2, expert 2": ["parallel=tp2_ep2", "comm.dtd=true"],
    "expert 2, expert_data 2": ["parallel.world_size=4", "parallel.tensor=1", "parallel.expert=2"],
    "dropless": ["parallel=tp2_ep2", "comm.dtd=true", "moe.dispatch=dropless"],
}


@pytest.fixture(scope="module")
def counted(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    configs = []
    for number, overrides in enumerate(LAYOUTS.values()):
        config = shrink(composed(*overrides, "model.loss_chunk=4096"), tmp_path_factory.mktemp(str(number)))
        configs.append(complete(with_values(config, {"trainer.max_steps": 1})))
    return dict(zip(LAYOUTS, pool.run(4, pieces, configs)[0], strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whatever_is_divided_has_several_pieces_and_an_uneven_last_one(
    counted: dict[str, dict[str, Any]], layout: str
) -> None:
    seen = counted[layout]
    assert seen["buckets"]["data", 0] >= 3
    assert seen["buckets"]["data", 1] >= 3  # what is not decayed
    assert sum(number for (kind, _), number in seen["buckets"].items() if kind == "expert_data") >= 3
    assert any(len(tiles) >= 3 and tiles[-1] < tiles[0] for tiles in seen["tiles"])
    assert any(len(shard) >= 3 * seen["piece"] for shard in [range(n) for n in seen["norm"]])
    assert any(n % seen["piece"] for n in seen["norm"])
    assert seen["chunks"]
    for rows, chunk in seen["chunks"]:
        assert rows > 2 * chunk
        assert rows % chunk


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_of_dense_and_expert_parameters_are_padded(counted: dict[str, dict[str, Any]], layout: str) -> None:
    assert "data" in counted[layout]["padded"]
    if layout.endswith("expert_data 2"):
        assert "expert_data" in counted[layout]["padded"]


def test_tensor_ranks_cannot_divide_slots_or_rows_and_some_tokens_are_dropped(
    counted: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    capacities = counted["tensor 2, expert 2"]["capacities"]
    assert all(capacity % 2 for capacity, _ in capacities)
    assert sum(dropped for _, dropped in capacities) > 0
    small = shrink(composed(*LAYOUTS["dropless"]), tmp_path)
    assert small.data.micro_batch_size * small.model.sequence_length * small.moe.top_k % 2


DEEPSEEK_V3 = [
    *("moe.num_experts=256", "moe.top_k=8", "moe.dispatch=dropless", "moe.router.scoring=sigmoid"),
    *("moe.router.expert_groups=8", "moe.router.chosen_groups=4", "moe.router.group_score=top2"),
    *("moe.router.bias_update=sign", "moe.router.bias_rate=0.001"),
]
TWO_GROUPS = "moe.router.expert_groups=2"


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "parallel.world_size=5",
            "parallel.tensor=5",
            "model.heads=5",
            "model.hidden=40",
            "model.ffn=40",
            "parallel.expert=1",
        ],
        ["moe.capacity_groups=4", "model.sequence_length=32"],
        ["moe.capacity_groups=32", "model.sequence_length=64"],
        ["parallel=tp4", "parallel.sequence=true", "moe.capacity_groups=8"],
        ["moe.num_experts=64", "moe.top_k=8", "moe.dispatch=dropless"],
        ["moe.num_experts=64", "moe.top_k=2", "moe.gating=deepspeed_top2", "parallel.expert=2"],
        ["moe=dense", "parallel=tp2", "data.micro_batch_size=1", "data.batch_size=1"],
        ["parallel=tp2", "model.sequence_length=2", "parallel.sequence=true"],
        [*DEEPSEEK_V3, "parallel.expert=1"],
        [*DEEPSEEK_V3, "parallel.world_size=64", "parallel.tensor=1", "parallel.expert=64"],
        [*DEEPSEEK_V3, "parallel.world_size=512", "parallel.tensor=2", "parallel.expert=256", "data.batch_size=1024"],
        [*DEEPSEEK_V3, "parallel=ep2", "moe.num_experts=2", "moe.top_k=1", "moe.router.chosen_groups=1", TWO_GROUPS],
        [*DEEPSEEK_V3, "parallel=tp2_ep2", "moe.top_k=64", "moe.router.chosen_groups=8", "parallel.sequence=true"],
    ],
    ids=" ".join,
)
def test_what_is_valid_is_valid_when_small(tmp_path: Path, overrides: list[str]) -> None:
    small = shrink(composed("data.batch_size=32", "data.micro_batch_size=4", "model.hidden=160", *overrides), tmp_path)
    check(small, 16)
    check(reference(small, tmp_path), 16)


@pytest.mark.parametrize(
    ("given", "small"),
    [
        # Experts are over more processes than a tensor group, over as many, and over fewer; and divided more than it.
        (ParallelDegrees(512, 8, 64, expert_tensor=1), (16, 4, 8, 1, 2)),
        (ParallelDegrees(64, 8, 8, expert_tensor=1), (16, 8, 8, 1, 2)),
        (ParallelDegrees(64, 8, 2, expert_tensor=1), (16, 8, 2, 1, 8)),
        (ParallelDegrees(64, 1, 8, expert_tensor=4), (16, 1, 4, 2, 2)),
        (ParallelDegrees(64, 8, 16, expert_tensor=4), (16, 8, 8, 2, 1)),
        (ParallelDegrees(8, 4, 4, expert_tensor=1, order="expert_data"), (8, 4, 4, 1, 2)),
    ],
    ids=str,
)
def test_a_folded_layout_stays_folded_when_small(given: ParallelDegrees, small: tuple[int, ...]) -> None:
    alike = largest_alike(given, MOST_PROCESSES)
    assert (alike.world_size, alike.tensor, alike.expert, alike.expert_tensor, alike.expert_data) == small
    assert alike.order == given.order


BY_NODE = ["moe.dispatch=dropless", "moe.top_k=2", "data.micro_batch_size=1"]


def on_nodes(degrees: tuple[int, ...], ranks_per_node: int, *overrides: str) -> TrainConfig:
    """With one expert in each process; ``degrees``: tensor, expert, processes, and expert_tensor if it is another."""
    tensor, expert, processes, *expert_tensor = degrees
    layout = [f"parallel.world_size={processes}", f"parallel.tensor={tensor}", f"parallel.expert={expert}"]
    layout += [f"parallel.expert_tensor={width}" for width in expert_tensor]
    sizes = [f"moe.num_experts={expert}", f"model.heads={tensor}", f"model.hidden={16 * tensor}", "model.ffn=120"]
    nodes = f"comm.ranks_per_node={ranks_per_node}"
    return composed(*layout, *sizes, *BY_NODE, nodes, f"data.batch_size={processes}", *overrides)


ON_SEVERAL_NODES = [  # degrees; ranks per node; and when small: tensor, expert, expert_data, nodes
    ((4, 8, 64), 8, (2, 4, 2, 2)),
    ((8, 8, 64), 16, (4, 4, 1, 2)),
    ((4, 16, 128), 8, (2, 4, 2, 2)),
    ((8, 4, 64), 16, (2, 4, 2, 2)),
    ((2, 6, 24), 4, (2, 4, 2, 2)),  # no divisor of 6 would do
    ((1, 9, 9), 3, (1, 9, 1, 3)),  # three nodes
]
OTHERS = [
    ((2, 32, 64), 64, (2, 8, 1, 1)),  # one node
    ((2, 32, 64), 2, (2, 8, 1, 8)),  # each process of an expert group is on a node of its own
    ((8, 32, 64, 1), 8, (4, 8, 2, 2)),  # folded
]


@pytest.mark.parametrize(
    ("how", "degrees", "ranks_per_node", "small"),
    [
        *(("comm.dedup=node", *case) for case in ON_SEVERAL_NODES),
        *(("comm.hierarchical=true", *case) for case in ON_SEVERAL_NODES + OTHERS),
    ],
)
def test_what_goes_by_way_of_nodes_does_so_when_small(
    tmp_path: Path, how: str, degrees: tuple[int, ...], ranks_per_node: int, small: tuple[int, ...]
) -> None:
    config = shrink(on_nodes(degrees, ranks_per_node, how), tmp_path)
    alike = check(config, 16)
    assert config.comm.ranks_per_node is not None
    nodes = alike.nodes(config.comm.ranks_per_node)
    assert (alike.tensor, alike.expert, alike.expert_data, nodes) == small
    assert Layout(alike, config.comm).nodes == (1 if nodes == alike.expert else nodes)


def test_a_layout_on_nodes_without_a_small_one_like_it_is_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no layout of at most 16 .* an expert degree of 4 or more; certify it"):
        shrink(on_nodes((3, 4, 24), 6, "comm.hierarchical=true"), tmp_path)
    directly = shrink(on_nodes((3, 4, 24), 7), tmp_path)  # 7 do not divide, but nothing goes by way of nodes
    assert (directly.parallel.world_size, directly.comm.ranks_per_node) == (12, 7)


def test_a_folded_model_is_valid_when_small(tmp_path: Path) -> None:
    layout = ["parallel.world_size=512", "parallel.tensor=8", "parallel.expert=64", "parallel.expert_tensor=2"]
    sizes = ["model.heads=8", "model.hidden=160", "moe.num_experts=64", "data.batch_size=512"]
    for width in ([], ["moe.ffn=24", "moe.slice=tokens"], ["model.ffn=64", "moe.shared.experts=1"]):
        small = shrink(composed(*layout, *sizes, "data.micro_batch_size=4", *width), tmp_path)
        assert (small.parallel.tensor, small.parallel.expert_tensor, small.parallel.expert) == (4, 2, 4)
        check(small, 16)
        check(reference(small, tmp_path), 16)
        assert reference(small, tmp_path).parallel.expert_tensor is None


def test_windows_and_stretched_positions_matter_when_small_and_ranks_go_on_sharing_keys(tmp_path: Path) -> None:
    large = ["parallel.world_size=512", "parallel.tensor=16", "parallel.expert=8", "data.batch_size=512"]
    config = composed("preset=gpt_oss_20b", *large)
    small = shrink(config, tmp_path)
    assert config.model.attention.window == 128
    assert small.model.attention.window is not None
    assert 1 < small.model.attention.window < small.model.sequence_length / 2
    assert small.model.rotary.original_length is not None
    assert 1 < small.model.rotary.original_length < small.model.sequence_length
    assert replace(small.model.rotary, original_length=4096) == config.model.rotary
    assert (config.model.kv_heads, config.parallel.tensor) == (8, 16)
    assert small.model.kv_heads is not None
    assert small.parallel.tensor == 2 * small.model.kv_heads
    check(small, 16)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_latents_have_widths_of_their_own_when_small(tmp_path: Path, precision: str) -> None:
    large = ["parallel.world_size=8", "parallel.tensor=2", "parallel.expert=4", "data.batch_size=8"]
    small = shrink(composed("preset=deepseek_v3", *large, f"certificate_precision={precision}"), tmp_path)
    latent = small.model.attention.latent
    widths = [latent.kv_rank, latent.q_rank, latent.nope_dim, latent.rope_dim, latent.v_dim]
    assert max(width or 0 for width in widths) < 50
    assert len(set(widths)) >= 4
    assert latent.rope_dim % 2 == 0
    check(small, 16)


@pytest.mark.parametrize("expert", [1, 2, 4])
def test_groups_of_experts_stay_groups_and_some_are_left_out(tmp_path: Path, expert: int) -> None:
    layout = [f"parallel.world_size={expert}", "parallel.tensor=1", f"parallel.expert={expert}"]
    moe = shrink(composed(*DEEPSEEK_V3, *layout, "data.batch_size=32"), tmp_path).moe
    assert moe.num_experts == 6 * expert
    size = moe.num_experts // moe.router.expert_groups
    assert size >= 2
    assert moe.router.chosen_groups < moe.router.expert_groups
    assert 2 <= moe.top_k < size * moe.router.chosen_groups
    assert moe.router.group_score == "top2"


def biases_and_choices(config: TrainConfig) -> list[tuple[list[float], float]]:
    """After each step: the biases of a router, and the share of tokens that would choose others without them."""
    seen: list[tuple[list[float], float]] = []
    changed: list[float] = []
    choose = Router.choose

    def choosing(self: Router, *arguments: Any) -> Any:
        chosen = choose(self, *arguments)
        biases, plain = self.bias.to_local().clone(), torch.zeros(self.num_experts)
        self.bias.to_local().copy_(plain)
        others = choose(self, *arguments)
        self.bias.to_local().copy_(biases)
        changed.append((chosen.sort(-1).values != others.sort(-1).values).any(1).double().mean().item())
        return chosen

    class Watching(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
            (biases,) = (b.to_local().tolist() for name, b in pl_module.named_buffers() if name.endswith("router.bias"))
            seen.append((biases, changed[-1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Router, "choose", choosing)
        trainer, module, data = build(config, [Watching()], logged=False)
        trainer.fit(module, data)
    return seen


@pytest.mark.parametrize("update", ["sign", "proportional"])
def test_biases_matter_within_the_steps_of_a_certificate_and_are_saved(
    pool: WorkerPool, tmp_path: Path, update: str
) -> None:
    overrides = [*DEEPSEEK_V3, "parallel=single", "data.batch_size=8", "data.micro_batch_size=4"]
    small = complete(shrink(composed(*overrides, f"moe.router.bias_update={update}"), tmp_path))
    seen = pool.run(1, biases_and_choices, small)[0][1::2]  # after the second micro-batch of each step
    assert len(seen) == STEPS
    assert seen[0][1] == 0  # they start at zero
    assert all(changed > 0.05 for _, changed in seen[1:]), seen
    assert any(seen[SAVED - 1][0]), seen
