"""A pass of generation: bytes worked out by hand and counted in a real run, FLOPs and memory measured."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tedlab import ParallelDegrees, Topology
from tedlab.comm import Ledger
from tedlab.comm.ledger import counted
from tedlab.config import TrainConfig, with_values
from tedlab.decode import _Steps, continuations
from tedlab.models import GPT
from tedlab.predict.cluster import load_cluster
from tedlab.predict.serve.passes import Pass, Tokens, remembered_bytes, weight_bytes
from tedlab.predict.sim.memory import StorageTracker
from tedlab.sampling import Sampling
from tests.certify.runs import composed
from tests.pool import WorkerPool

N = 8
SMALL = ["model.layers=2", "model.hidden=32", "model.heads=8", "model.ffn=64", "model.sequence_length=64"]
SMALL += ["model.vocab_size=64", "moe.num_experts=8", "moe.top_k=2", "moe.dispatch=dropless", "moe.every=1"]
SMALL += ["moe.capacity_factor=null", "parallel=single", "trainer.precision=64-true"]


def job(*overrides: str) -> TrainConfig:
    return composed(*SMALL, *overrides)


def degrees(tensor: int, width: int, expert: int, world: int = N) -> ParallelDegrees:
    return ParallelDegrees(world, tensor, expert, expert_tensor=width)


# Attention T × D and experts T_e × E_p on eight processes; K = 2; w = 7/8; Z bytes of all tokens' activations.
W, K = 7 / 8, 2
BY_HAND = {
    "tensor, tensor": ((N, N, 1), 4 * W),
    "data, tensor": ((1, N, 1), 2 * W * K),  # a token's two choices are two rows, where HAP counts one: 2wZ
    "data, expert": ((1, 1, N), 2 * W * K / N),
    # HAP needs no more than 2wZ + 2wKZ/n: our tensor ranks also gather all results, of each choice.
    "tensor, expert": ((N, 1, N), 2 * W + 2 * W * K / N + W * K),
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("length", [16, 1])
def test_bytes_of_a_layer_are_those_worked_out_by_hand(name: str, length: int) -> None:
    layout, by_hand = BY_HAND[name]
    tokens = Tokens(64, length, 0 if length > 1 else 20)
    even = Pass(job(), degrees(*layout), tokens, even=True)
    z = 64 * length * 32 * 8
    sites = [call for call in even.calls(even.sites[0].forward, "forward", even._rows[0]) if "counts" not in call.tag]
    assert sum(call.wire_bytes for call in sites) == pytest.approx(by_hand * z, rel=1e-12)
    modules = even.modules(load_cluster("dgx_a100"), even)
    counts = sum(call.wire_bytes for call in even.collectives() if "counts" in call.tag)
    assert modules["attention"].sent + modules["experts"].sent - counts == pytest.approx(2 * by_hand * z, rel=1e-12)


RUNS = {  # tensor, width of experts, expert, DTD
    "T2, E2": (2, 2, 2, False),
    "T2, E2, DTD": (2, 2, 2, True),
    "E4": (1, 1, 4, False),
    "T4": (4, 4, 1, False),
    "experts by width": (1, 4, 1, False),
    "experts over tensor ranks": (4, 1, 4, False),
    "T2, E4": (2, 1, 4, False),
    "E2 by width": (1, 2, 2, False),
    "T2, T4": (2, 4, 1, False),
    "replicas": (2, 1, 2, False),
    # Of two processes:
    "T2": (2, 2, 1, False),
    "E2": (1, 1, 2, False),
    "experts over two tensor ranks": (2, 1, 2, False),
}


def ledgers(
    config: TrainConfig, world: int, runs: list[tuple[int, int, int, bool]], tokens: int
) -> list[dict[Any, Any]]:
    """What a real generation of two texts in each data rank sends."""
    found = []
    for tensor, width, expert, dtd in runs:
        options = replace(config.comm, dtd=dtd)
        topology = Topology(degrees(tensor, width, expert, world), options=options)
        ledger = Ledger()
        topology.comm.register_hook(ledger)
        torch.set_default_dtype(torch.float64)
        model = GPT(config.model, config.moe, topology, seed=0)
        torch.set_default_dtype(torch.float32)
        prompts = [[number % 64] * 8 for number in range(2 * (world // tensor))]
        list(continuations(model, prompts, tokens, Sampling(0)))
        found.append({entry: (count.calls, count.payload_bytes) for entry, count in ledger.totals.items()})
    return found


@pytest.mark.parametrize(
    ("world", "names"),
    [(2, ["T2", "E2", "experts over two tensor ranks"]), pytest.param(4, [*RUNS][:-3], marks=pytest.mark.slow)],
)
def test_a_real_generation_sends_what_the_closed_form_says(pool: WorkerPool, world: int, names: list[str]) -> None:
    # Every expert is chosen equally often: token t of a process chooses experts 2t and 2t + 1.
    config = job("moe.gating=round_robin", "moe.num_experts=4")
    runs = [RUNS[name] for name in names]
    for rank in pool.run(world, ledgers, config, world, runs, 3):
        for name, (tensor, width, expert, dtd), measured in zip(names, runs, rank, strict=True):
            layout, texts = degrees(tensor, width, expert, world), 2 * (world // tensor)
            of_run = with_values(config, {"comm.dtd": dtd})
            passes = [Tokens(texts, 8), Tokens(texts, 1, 8), Tokens(texts, 1, 9)]
            calls = [call for tokens in passes for call in Pass(of_run, layout, tokens, even=True).collectives()]
            expected = {entry: (count.calls, count.payload_bytes) for entry, count in counted(calls).items()}
            assert measured == expected, name


def test_weights_and_what_is_remembered_are_those_worked_out_by_hand() -> None:
    config = job("model.positions=rotary", "model.bias=false", "model.norm=rms", "model.tie_embeddings=false")
    form = Pass(config, degrees(2, 1, 4), Tokens(8, 16))
    attention, router, norms = 4 * 32 * 32 // 2, 32 * 8, 2 * 32
    experts = 2 * (2 * 32 * 64)  # two of eight, whole
    table = 64 * 32 // 2
    by_hand = 2 * (attention + router + norms + experts) + 2 * table + 32
    assert weight_bytes(form.spec, form.degrees, torch.bfloat16) == 2 * by_hand
    assert remembered_bytes(form.blocks, 2, torch.bfloat16) == 2 * 2 * 2 * 32 // 2  # 2 layers, keys and values
    grouped = Pass(with_values(config, {"model.kv_heads": 2}), degrees(4, 1, 2), Tokens(8, 16))
    assert remembered_bytes(grouped.blocks, 4, torch.bfloat16) == 2 * 2 * 2 * 4  # one head of four features


SHAPES: dict[str, list[str]] = {
    "heads": [],
    "grouped": ["model.kv_heads=2", "model.positions=rotary"],
    "window": ["model.attention.window=8"],
    "latents": [
        *("model.positions=rotary", "model.attention.latent.kv_rank=6", "model.attention.latent.nope_dim=6"),
        *("model.attention.latent.rope_dim=4", "model.attention.latent.v_dim=5"),
    ],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_has_the_flops_that_torch_counts(single: Topology, shape: str) -> None:
    config = job(*SHAPES[shape], "moe.gating=round_robin")
    model = GPT(config.model, config.moe, single, seed=0)
    texts, prompt = 8, 24
    steps = _Steps(model, [[1] * prompt for _ in range(texts)], prompt, 40, torch.device("cpu"))
    with torch.inference_mode():
        steps.remembered()
        for text in steps.texts:
            text.append(1)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            steps.remembered()
    form = Pass(config, ParallelDegrees(1), Tokens(texts, 1, prompt), even=True)
    b = form.at()
    works = [work for n, block in enumerate(form.blocks) for work in block.forward(form.at(n))]
    works += form.spec.logits.forward(replace(b, tokens=texts, length=1))
    said, scores = sum(work.flops for work in works), sum(work.flops for work in works if work.kind == "attention")
    # The closed form counts half a pair for a token itself; torch computes all slots, of a window the hidden ones, too.
    seen = 8 if shape == "window" else prompt + 0.5
    assert counter.get_total_flops() == pytest.approx(said + scores * ((prompt + 1) / seen - 1), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("skew", [False, True])
def test_activations_of_a_prefill_are_at_most_what_is_said(single: Topology, shape: str, skew: bool) -> None:
    config = job(*SHAPES[shape], *([] if skew else ["moe.gating=round_robin"]), "trainer.precision=32-true")
    model = GPT(config.model, config.moe, single, seed=0)
    tracker = StorageTracker(lambda: 0)
    tracker.see((parameter.detach().to_local() for parameter in model.parameters()), "parameters")

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            results = out if isinstance(out, tuple | list) else (out,)
            tracker.see((result for result in results if isinstance(result, torch.Tensor)), "activations")
            return out

    ids, at = torch.arange(8 * 48).view(8, 48) % 64, torch.full((8,), 47)
    with torch.inference_mode(), Watch():
        model.next_logits(ids, at)
    peak = int(tracker.timeline().held["activations"].max())
    said = Pass(config, ParallelDegrees(1), Tokens(8, 48)).activations
    assert 0.5 * said < peak <= said  # the most is what a GPU holds, whose experts compute all rows together
