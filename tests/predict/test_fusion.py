"""The closed form of compiled kernels moves what inductor's do, which it counts itself; a simulation does so, too."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch
from torch._inductor import compile_fx, metrics
from torch._inductor import config as inductor

from tedlab.comm.rows import Rows
from tedlab.config import TrainConfig
from tedlab.degrees import ParallelDegrees
from tedlab.models import BlockSpec
from tedlab.models.block import Block
from tedlab.nn import localised, rotation
from tedlab.predict.sim.fusion import Fusion
from tedlab.spec import Layout, MicroBatch
from tedlab.topology import Topology
from tests.predict.sim.test_simulation import checked
from tests.predict.test_estimate import TODAY

SAMPLES, LENGTH, HIDDEN = 2, 256, 128
SIZES = ["model.layers=1", f"model.hidden={HIDDEN}", "model.heads=4", "model.ffn=512", "moe=dense", "parallel=single"]
SIZES += [f"model.sequence_length={LENGTH}", f"data.batch_size={SAMPLES}", f"data.micro_batch_size={SAMPLES}"]
MODELS = {"gpt": [], "qwen": [*TODAY, "model.qk_norm=head", "model.kv_heads=2"]}


@contextmanager
def counting() -> Iterator[None]:
    """Inductor counts bytes only if it may log them, and nothing that it finds in a cache. A CPU's kernels would join
    parts of tensors (here halves of heads) by themselves; on a GPU the kernels that make the parts do."""
    log = compile_fx.inductor_metrics_log
    level, propagates = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        with (
            inductor.patch(fx_graph_cache=False, force_pointwise_cat=True),
            functorch.patch(enable_autograd_cache=False),
        ):
            yield
    finally:
        log.setLevel(level)
        log.propagate = propagates
        metrics.reset()


def bytes_of_kernels() -> int:
    """What all generated kernels read and write, since the last call; products and attention are torch's own."""
    made = [node for node, _ in metrics.nodes_num_elem if not type(node).__name__.startswith(("Extern", "Nop"))]
    metrics.reset()
    return sum(node.get_read_write_buffers_sizes() for node in made)


def bytes_by_inductor(config: TrainConfig) -> int:
    topology, spec = Topology(ParallelDegrees(1), torch.device("cpu")), BlockSpec(config.model, None)
    block = Block(spec, topology).to(torch.bfloat16)
    turns = rotation(LENGTH, config.model.hidden // config.model.heads, 1e4, torch.device("cpu"), torch.bfloat16)
    by = turns if config.model.positions == "rotary" else None
    x = torch.randn(SAMPLES, LENGTH, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    with counting(), localised(block):
        y: Tensor = torch.compile(lambda x: block(x, by)[0])(x)
        y.sum().backward()  # may have been compiled before
        return bytes_of_kernels()


def bytes_by_closed_form(config: TrainConfig, compiled: bool) -> float:
    spec, half = BlockSpec(config.model, None), torch.bfloat16
    tokens = SAMPLES * LENGTH
    b = MicroBatch(Layout(ParallelDegrees(1)), tokens, LENGTH, half, half, torch.float32, Rows(), compiled=compiled)

    return sum(work.bytes for work in (*spec.forward(b), *spec.backward(b)) if not work.flops)


@pytest.mark.slow
@pytest.mark.usefixtures("single")
@pytest.mark.parametrize("model", MODELS)
def test_compiled_kernels_move_what_inductors_do(model: str) -> None:
    config = checked(*SIZES, *MODELS[model])
    counted = bytes_by_inductor(config)
    stated = bytes_by_closed_form(config, compiled=True)
    assert stated == pytest.approx(counted, rel=0.1)
    if model != "gpt":  # whose kernels torch has fused already
        assert bytes_by_closed_form(config, compiled=False) > 2.5 * counted


def test_a_fused_kernel_reads_once_and_writes_what_is_still_there() -> None:
    fusion = Fusion()
    x = torch.zeros(8)
    doubled = x + x
    fusion.takes([x, x], [doubled])
    shifted = doubled + 1
    fusion.takes([doubled], [shifted])
    del doubled
    ended = fusion.ends()
    assert ended is not None
    kernel, left = ended
    assert kernel.bytes == x.nbytes + shifted.nbytes
    assert [storage.nbytes() for storage in left] == [shifted.nbytes]  # nothing else is ever allocated
    assert fusion.ends() is None
