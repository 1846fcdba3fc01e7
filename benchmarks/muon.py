"""What steps of Muon and of AdamW with narrow moments cost beside AdamW's, in one process: time and memory.

See ``python -m benchmarks.muon --help``. Gradients are drawn once. Steps of both take turns, so that what else the
machine does meets both; medians are compared.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.optimizer import PAPER_TILE, temporary_bytes
from benchmarks.steps import drawn_there
from benchmarks.surroundings import surroundings
from tedlab import Topology
from tedlab.config import ModelConfig, MoEConfig
from tedlab.models import GPT
from tedlab.nn import fused_parameters
from tedlab.optim import Muon, NarrowAdamW, ShardedOptimizer, matrix_groups

WARM_UP = 2  # untimed steps, which allocate state
MIB = 1 << 20
OPTIMIZERS: dict[str, tuple[partial[Any], int | str]] = {  # and the tile of their steps
    "AdamW": (partial(torch.optim.AdamW), PAPER_TILE),
    "AdamW, fused": (partial(torch.optim.AdamW), "fused"),
    "AdamW, bf16 moments": (partial(NarrowAdamW), PAPER_TILE),
    "Muon": (partial(Muon, dtype="bfloat16"), PAPER_TILE),
    "Muon, fp32 products": (partial(Muon, dtype="float32"), PAPER_TILE),
}


@dataclass
class Row:
    """What was measured of one optimizer."""

    name: str
    milliseconds: float  # median of a step
    of_adamw: float  # times AdamW's
    state_bytes: int
    temporary_bytes: int  # peak of what a step allocates, less what was there before


class Contender:
    """A model of its own, an optimizer of it, and its gradients."""

    def __init__(self, name: str, model: ModelConfig, moe: MoEConfig, device: str, dtype: torch.dtype) -> None:
        self.name = name
        topology = Topology.single(device)
        torch.set_default_dtype(dtype)
        with patch("tedlab.models.gpt.initialize", drawn_there):
            network = GPT(model, moe, topology, 0)
        torch.set_default_dtype(torch.float32)
        self.names = {p: its for its, p in network.named_parameters()}
        groups = matrix_groups(network)
        make, tile = OPTIMIZERS[name]
        if make.func is not Muon:
            for group in groups:
                group.pop("matrix")
        self.optimizer: torch.optim.Optimizer = make(groups, lr=1e-3, weight_decay=0.1)
        self.sharded = ShardedOptimizer(
            self.optimizer, topology.comm, self.names, zero=True, tile=tile, fused=fused_parameters(network)
        )
        self.gradients = {p: torch.randn_like(p) for p in self.names}  # DTensors, as the parameters are

    def prepare(self) -> None:
        for p, gradient in self.gradients.items():
            p.grad = gradient.clone()
        self.sharded.reduce_gradients()

    @property
    def state_bytes(self) -> int:
        values = (x for state in self.optimizer.state.values() for x in state.values())
        return sum(x.nbytes for x in values if isinstance(x, torch.Tensor) and x.dim() > 0)


def measure(contenders: list[Contender], steps: int, device: str) -> list[Row]:
    """Times steps in turn, then one more of each for its temporaries."""
    times: dict[str, list[float]] = {its.name: [] for its in contenders}
    for step in track(range(WARM_UP + steps), "stepping", transient=True):
        for its in contenders:
            its.prepare()
            _wait(device)
            start = time.perf_counter()
            its.optimizer.step()
            _wait(device)
            if step >= WARM_UP:
                times[its.name].append(time.perf_counter() - start)
    rows = []
    first = statistics.median(times[contenders[0].name])
    for its in contenders:
        temporary = temporary_bytes(its.prepare, its.optimizer.step, torch.device(device))
        median = statistics.median(times[its.name])
        rows.append(Row(its.name, median * 1e3, median / first, its.state_bytes, temporary))
    return rows


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measures, shows a table, and writes a file if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bf16", action="store_true", help="weights in bf16 with fp32 master copies")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    given = parser.parse_args()
    model = ModelConfig(
        layers=given.layers,
        hidden=given.hidden,
        heads=given.hidden // 64,
        ffn=4 * given.hidden,
        sequence_length=256,
        vocab_size=4096,
        activation="swiglu",
    )
    moe = MoEConfig(num_experts=given.experts, every=2)
    dtype = torch.bfloat16 if given.bf16 else torch.float32
    # What one tile at a time costs on a GPU is its many kernels, which the fused step does without.
    names = [name for name in OPTIMIZERS if given.device == "cuda" or name != "AdamW, fused"]
    contenders = [Contender(name, model, moe, given.device, dtype) for name in names]
    rows = measure(contenders, given.steps, given.device)
    parameters = sum(gradient.numel() for gradient in contenders[0].gradients.values())
    table = Table(box=SIMPLE_HEAD, title=f"{parameters:,} parameters, {given.device}", title_justify="left")
    for heading in ("optimizer", "ms/step", "× AdamW", "state MiB", "temporaries MiB"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for row in rows:
        cells = f"{row.milliseconds:,.1f}", f"{row.of_adamw:.2f}"
        table.add_row(row.name, *cells, f"{row.state_bytes / MIB:,.1f}", f"{row.temporary_bytes / MIB:,.1f}")
    Console().print(table)
    if given.out is not None:
        found: dict[str, Any] = {"parameters": parameters, "rows": [asdict(row) for row in rows]}
        given.out.write_text(json.dumps({**found, "surroundings": surroundings(torch.device(given.device))}, indent=1))


if __name__ == "__main__":
    main()
