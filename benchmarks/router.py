"""What routing costs on one GPU, forward and backward, and what the kernel that chooses experts saves.

python -m benchmarks.router --out router.json
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.surroundings import surroundings
from tedlab import Topology
from tedlab.config import MoEConfig, RouterConfig
from tedlab.moe import Router, RouterSpec, choice
from tedlab.nn import Init, initialize


@dataclass(frozen=True)
class Case:
    """The routing of a published model: T tokens, H hidden."""

    tokens: int
    hidden: int
    experts: int
    top_k: int
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "OLMoE": Case(32768, 2048, 64, 8, {"gates": "raw"}),
    "Qwen3-30B-A3B": Case(32768, 2048, 128, 8),
    "DeepSeek-V2": Case(
        32768, 5120, 160, 6, {"gates": "raw", "gate_scale": 16.0, "expert_groups": 8, "chosen_groups": 3}
    ),
    "DeepSeek-V3": Case(
        32768,
        7168,
        256,
        8,
        {
            **{"scoring": "sigmoid", "gate_scale": 2.5, "bias_update": "sign"},
            **{"expert_groups": 8, "chosen_groups": 4, "group_score": "top2"},
        },
    ),
}


@contextmanager
def plain() -> Iterator[None]:
    """Chooses in plain torch."""
    fit = choice.unfit
    choice.unfit = lambda dtype, device: "switched off"
    try:
        yield
    finally:
        choice.unfit = fit


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """Returns the median time of a call on the GPU."""
    times = []
    for repeat in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end))
    return median(times)


def measure(case: Case, repeats: int) -> dict[str, float]:
    """Measures one case: the choice alone, and all of the router, each with and without the kernel."""
    config = MoEConfig(
        num_experts=case.experts, top_k=case.top_k, dispatch="dropless", router=RouterConfig(**case.options)
    )
    router = Router(RouterSpec(case.hidden, config, Init(std=0.02)), Topology.single("cuda")).bfloat16()
    initialize(router, 0)
    x_TH = torch.randn(case.tokens, case.hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    logits_TE = router.logits(x_TH, case.tokens).detach()
    scores_TE = router.scores(logits_TE)

    def whole() -> None:
        routing = router(x_TH)
        (routing.gate_TK.sum() + routing.report.balance_loss + routing.report.z_loss).backward()

    def choosing() -> torch.Tensor:
        return router.choose(logits_TE, scores_TE, case.tokens)

    found = {"choice": milliseconds(choosing, repeats), "router": milliseconds(whole, repeats)}
    ours = choosing()
    with plain():
        found |= {"choice, torch": milliseconds(choosing, repeats), "router, torch": milliseconds(whole, repeats)}
        differing_T = (ours.sort(-1).values != choosing().sort(-1).values).any(-1)
        found["tokens that choose otherwise"] = float(differing_T.sum())
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark measures a GPU, and there is none here")
    results = {name: measure(case, given.repeats) for name, case in CASES.items()}
    table = Table("", *next(iter(results.values())), title="ms, medians")
    for name, row in results.items():
        table.add_row(name, *(f"{value:.3f}" for value in row.values()))
    Console().print(table)
    if given.out is not None:
        given.out.write_text(json.dumps({**surroundings(torch.device("cuda")), "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
