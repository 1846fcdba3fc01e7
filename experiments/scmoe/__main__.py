"""``python -m experiments.scmoe``: see README.md."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from experiments.paper import composed, write_json
from tedlab import ParallelDegrees, Topology
from tedlab.config import TrainConfig
from tedlab.models import GPT
from tedlab.predict.flops import training_flops
from tedlab.validate import complete_simulated

HERE = Path(__file__).parent
SEEDS, STEPS, EVERY, VALIDATED = (0, 1, 2), 300, 10, 64  # the last in samples
BYTES = 4_000_000  # of the standard library's source text
COMMON = (
    *("model=gpt_tiny", "model.layers=4", "model.hidden=64", "model.ffn=128", "model.sequence_length=64"),
    *("model.vocab_size=256", "parallel=single", "moe.num_experts=8", "moe.every=2", "moe.capacity_multiple=1"),
    *("data.batch_size=8", "data.micro_batch_size=8"),
)
SHARED = ("moe=top1", "moe.shared.experts=1", "moe.shared.combine=cg1")
VARIANTS = {  # of equal FLOPs, but for the coefficient's product of a token and DGMoE's second one of the router
    "top-2": ("moe=top2",),
    "shared expert": SHARED,
    "DGMoE": ("moe=top1", "moe.shortcut=dgmoe"),
    **{position: (*SHARED, f"moe.shortcut={position}") for position in ("pos1", "pos2", "pos3")},
}


def main() -> None:
    """The command."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    topology, text = Topology(ParallelDegrees(1)), corpus()
    results: dict[str, Any] = {}
    for variant, overrides in VARIANTS.items():
        config = complete_simulated(composed((*COMMON, *overrides)))
        runs = [trained(config, topology, text, seed) for seed in SEEDS]
        results[variant] = {
            "val_loss": [loss for _, loss in runs],
            "flops_per_token": training_flops(config.model, config.moe),
            "curve": np.mean([curve for curve, _ in runs], 0).round(4).tolist(),
        }
        print(variant, spread(results[variant]["val_loss"]), flush=True)
    dist.destroy_process_group()
    write_json(HERE / "quality.json", results)
    draw(results)
    shown = Table("variant", "validation loss, nats", "FLOPs per token", title=f"{len(SEEDS)} seeds, {STEPS} steps")
    for variant, found in results.items():
        shown.add_row(variant, spread(found["val_loss"]), f"{found['flops_per_token']:,}")
    Console().print(shown)


def corpus() -> Tensor:
    """Returns the first bytes of the source text of Python's standard library, file by file."""
    whole = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
    return torch.tensor(list(whole[:BYTES]))


def trained(config: TrainConfig, topology: Topology, text: Tensor, seed: int) -> tuple[list[float], float]:
    """Trains a model, and returns means of so many training losses and the final validation loss."""
    length, batch = config.model.sequence_length, config.data.batch_size
    model = GPT(config.model, config.moe, topology, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, foreach=True)
    draw, own = torch.Generator().manual_seed(seed), len(text) * 9 // 10  # the last tenth validates
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - step / STEPS)
        given, targets = windows(text[:own], torch.randint(0, own - length - 1, (batch,), generator=draw), length)
        loss, reports = model.loss(given, targets)
        (loss + config.moe.aux_loss * torch.stack([report.balance_loss for report in reports]).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        starts = torch.linspace(own, len(text) - length - 2, VALIDATED).long()
        parts = [model.loss(*windows(text, part, length))[0].item() for part in starts.split(batch)]
    return np.reshape(losses, (-1, EVERY)).mean(1).tolist(), float(np.mean(parts))


def windows(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Returns tokens (B, S) and the tokens after them."""
    whole = torch.stack([text[start : start + length + 1] for start in starts])
    return whole[:, :-1], whole[:, 1:]


def spread(values: Sequence[float]) -> str:
    """Writes a mean with its range."""
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def draw(results: dict[str, Any]) -> None:
    """Draws the training losses."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for variant, found in results.items():
        axes.plot(np.arange(EVERY, STEPS + 1, EVERY), found["curve"], label=variant, linewidth=1)
    axes.set(xlabel="step", ylabel="training loss, nats (mean of three seeds)")
    axes.legend(frameon=False)
    figure.savefig(HERE / "loss.png", dpi=150)


if __name__ == "__main__":
    main()
