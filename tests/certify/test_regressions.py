"""What other frameworks got wrong, by the thread that reports it: each as a run that must equal one process.

``test_planted_bugs.py`` has the same mistakes the other way round: planted here, they are found.
"""

import pytest

from tedlab.certify import Row
from tedlab.certify.certificate import CONTINUATIONS
from tests.certify.runs import Case, certified
from tests.pool import WorkerPool

THREADS: dict[str, Case] = {
    # Expert gradients grow with expert parallelism; also pytorch #160285 (2× at E_p = 2), Megatron #5956 (/ E_p).
    "deepspeed 5618": Case(("parallel=ep2",)),
    # The gradient norm counts something twice, and clipping depends on it; also DeepSpeed #8475.
    "megatron 5916": Case(("parallel=tp2_ep2", "trainer.gradient_clip_val=0.01")),
    # Tensor-parallel experts without expert parallelism.
    "megatron 1628": Case(("parallel=tp2",)),
    # The loss looks right, the router's gradient is a part; also Automodel #2995, transformers #48205.
    "automodel 1260": Case(("parallel=tp2", "moe.top_k=2", "moe.aux_loss=0", "moe.z_loss=0")),
    # Auxiliary losses divided by D, by T, or by the accumulated micro-batches; also Megatron #5047, Automodel #1412.
    **{
        f"megatron 3672, {layout}": Case((f"parallel={layout}", "moe.aux_loss=1.0", "moe.z_loss=1.0"))
        for layout in ("tp2", "dp2", "ep2")
    },
    # Experts without a token hang or diverge; also DeepSpeed #4808, #5794, torchtitan #1166. Three tokens, six experts.
    "deepspeed 5066": Case(
        (
            *("parallel=ep2", "moe.num_experts=8", "model.sequence_length=3"),
            *("data.micro_batch_size=1", "data.batch_size=2"),
        )
    ),
    # "input dimension 1 (17) is not divisible by tensor parallel world size (2)"; here it is padded alike.
    "deepspeed, a capacity that T does not divide": Case(("parallel=tp2", "moe.capacity_factor=1.05")),
    # Random token selection under different seeds made replicas drift. One data rank: one process draws the same.
    "deepspeed, tensor ranks that draw random numbers": Case(
        ("parallel=tp2", "moe.gating=deepspeed_top1", "moe.capacity_factor=0.5")
    ),
    # Each rank must load its own experts.
    "deepspeed 6589": Case(("parallel=ep2",), continuations=tuple(CONTINUATIONS)),
}


@pytest.fixture(scope="module")
def certificates(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, list[Row]]:
    return certified(pool, tmp_path_factory.mktemp("certificates"), list(THREADS.values()))


@pytest.mark.slow
@pytest.mark.parametrize("thread", THREADS)
def test_what_others_got_wrong_equals_one_process(certificates: dict[Case, list[Row]], thread: str) -> None:
    rows = certificates[THREADS[thread]]
    assert all(row.ok for row in rows), rows
    assert sum("checkpoint" in row.quantity for row in rows) == len(THREADS[thread].continuations)
