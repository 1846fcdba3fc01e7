"""The benchmark beside DeepSpeed: everybody trains the same model, and DeepSpeed's bytes are all accounted for."""

import importlib.util

import pytest

from benchmarks import vs_deepspeed
from tedlab.config import ModelConfig, MoEConfig
from tests.pool import WorkerPool

LAYERS, HIDDEN, FFN, SEQUENCE, BATCH, VOCABULARY, EXPERTS = 2, 32, 64, 32, 2, 256, 4


@pytest.fixture(scope="module")
def measured() -> dict[str, vs_deepspeed.Row]:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("the benchmark beside DeepSpeed needs the extra: pip install 'tedlab[deepspeed]'")
    vs_deepspeed.require_deepspeed()
    problem = vs_deepspeed.Problem(
        ModelConfig(LAYERS, HIDDEN, 4, FFN, SEQUENCE, vocab_size=VOCABULARY),
        MoEConfig(EXPERTS, every=2, capacity_factor=1.0, gating="deepspeed_top1", random_token_selection=False),
        BATCH,
        {},
    )
    # Not the shared pool: its workers would be without what require_deepspeed prepares.
    processes = WorkerPool().run(4, vs_deepspeed.measure, problem, 2, timeout=250)
    return {row.name: row for row in vs_deepspeed.rows(processes)}  # raises if losses or gradient norms differ


@pytest.mark.slow
def test_a_closed_form_gives_every_byte_that_deepspeed_sends(measured: dict[str, vs_deepspeed.Row]) -> None:
    tokens = BATCH * SEQUENCE
    x = 4 * tokens * HIDDEN  # bytes of an activation, and of the experts' slots: the capacity factor is 1
    block = {"all_to_all": x / 2, "all_gather": x, "all_reduce": 4 * x}  # one dense layer, one with experts
    attention = (4 * HIDDEN**2 + 3 * HIDDEN) // 2 + HIDDEN
    dense = HIDDEN * FFN + FFN // 2 + HIDDEN
    ends = (VOCABULARY // 2 + SEQUENCE + 2) * HIDDEN
    weights = 4 * (LAYERS * (attention + 4 * HIDDEN) + dense + EXPERTS * HIDDEN + ends)
    numbers = {  # the norm and whether there is one, of each process
        ("update", "tensor", "all_reduce"): 8,
        ("update", "data", "all_reduce"): weights + 8,
        ("update", "data", "all_gather"): weights / 2,
        ("forward", "tensor", "all_reduce"): block["all_reduce"] + x + 3 * 4 * tokens,  # embedding, loss
        ("backward", "tensor", "all_reduce"): block["all_reduce"] + x,  # logits
        **{(phase, "expert", "all_to_all"): block["all_to_all"] for phase in ("forward", "backward")},
        **{(phase, "tensor", "all_gather"): block["all_gather"] for phase in ("forward", "backward")},
    }
    assert sent(measured["DeepSpeed"]) == numbers
    again = {
        ("recompute", "expert", "all_to_all"): block["all_to_all"],
        ("recompute", "tensor", "all_gather"): block["all_gather"],
        # Recomputation stops early: nothing in backward wants the dense layer's result.
        ("recompute", "tensor", "all_reduce"): block["all_reduce"] - x,
    }
    assert sent(measured["DeepSpeed ckpt"]) == numbers | again


@pytest.mark.slow
def test_cac_communicates_nothing_in_recomputation(measured: dict[str, vs_deepspeed.Row]) -> None:
    assert sent(measured["DTD+CAC ckpt"]) == sent(measured["DTD"])


def sent(row: vs_deepspeed.Row) -> dict[tuple[str, str, str], float]:
    return {(v["phase"], v["group"], v["operation"]): v["sent"] for v in row.volumes}
