"""``python -m experiments.hap``: see README.md."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.paper import composed, write_json
from tedlab.config import ServeConfig
from tedlab.predict.cluster import ClusterConfig, Efficiency, Link, PeakFlops, load_cluster
from tedlab.predict.serve.plan import Choice, Generation, served
from tedlab.predict.serve.show import attention_layout, experts_layout

HERE = Path(__file__).parent
GPUS, BATCH, PROMPT = 8, 8, 4096
OUTPUTS = (64, 2048)
# fp16, and positions for the longest texts.
MODEL = ("model=mixtral_8x7b", "moe=mixtral", "model.sequence_length=8192", "trainer=gpu", "trainer.precision=16-true")
REPORTED = {"A100": (1.68, 1.13), "A6000": (1.77, 1.01), "V100": (1.57, None)}  # by machine, for each of the outputs
_RESERVE = 1.2 * 2**30  # as `tedlab plan` leaves free

_A100 = load_cluster("dgx_a100")
_EFFICIENCY = Efficiency(gemm=0.6, memory=0.8, in_node=0.6, between_nodes=0.9, all_to_all=0.6)  # assumed
_PCIE_4 = Link(bandwidth=32e9, latency=5.7e-6)  # 16 lanes; latency: NCCL's own model, hwLat: PCI, ring, Simple
_PCIE_3 = Link(bandwidth=16e9, latency=5.7e-6)
_V100 = replace(
    load_cluster("summit"),
    gpus_per_node=GPUS,
    memory_bytes=34.1e9,  # of 32 GB
    between_nodes=None,
    efficiency=_EFFICIENCY,
)
MACHINES: dict[tuple[str, str], ClusterConfig] = {
    ("A100", "NVLink"): _A100,
    ("A100", "PCIe 4"): replace(_A100, in_node=_PCIE_4, efficiency=_EFFICIENCY),
    ("A6000", "PCIe 4"): ClusterConfig(
        gpus_per_node=GPUS,
        memory_bytes=51.0e9,  # 48 GB; assumed
        memory_bandwidth=768e9,  # NVIDIA RTX A6000 data sheet
        peak_flops=PeakFlops(fp64=0.6e12, fp32=38.7e12, fp16=154.8e12, bf16=154.8e12),  # dense; the same
        in_node=_PCIE_4,
        between_nodes=None,
        efficiency=_EFFICIENCY,
    ),
    ("V100", "NVLink"): _V100,
    ("V100", "PCIe 3"): replace(_V100, in_node=_PCIE_3),
}


def main() -> None:
    """The command."""
    rows = [row(machine, link, output) for machine, link in MACHINES for output in OUTPUTS]
    write_json(HERE / "results.json", rows)
    console = Console(width=160)
    table = Table()
    for heading in rows[0]:
        table.add_column(heading)
    for each in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else f"{value}" for value in each.values()))
    console.print(table)


def row(machine: str, link: str, output: int, model: Sequence[str] = MODEL, prompt: int = PROMPT) -> dict[str, Any]:
    """The best choice on a machine, beside tensor parallelism."""
    request, cluster = ServeConfig(prompt=prompt, output=output, batch=BATCH), MACHINES[machine, link]
    config = served(composed([*model, f"parallel.world_size={GPUS}", "parallel.tensor=1"]), request)
    found = Generation(config, request, cluster).search(cluster.memory_bytes - _RESERVE)
    tensor = next(choice for choice in found.choices if _tensor_alone(choice))
    best, one = found.choices[0], next(choice for choice in found.choices if choice.same)
    moved = next((choice for choice in found.choices if choice.switch.seconds > 0), None)
    reported = REPORTED[machine][OUTPUTS.index(output)] if output in OUTPUTS else None
    return {
        "machine": machine,
        "link": link,
        "output": output,
        "attention": attention_layout(best.prefill.degrees),
        "prefill": experts_layout(best.prefill.degrees),
        "decode": experts_layout(best.decode.degrees),
        "switch_seconds": best.switch.seconds,
        "seconds": best.seconds,
        "one_layout_seconds": one.seconds,
        "moved": moved and [experts_layout(phase.degrees) for phase in (moved.prefill, moved.decode)],
        "moved_seconds": moved and moved.seconds,
        "moved_switch_seconds": moved and moved.switch.seconds,
        "tensor_seconds": tensor.seconds,
        "tensor_exchanges": _exchanges(tensor) / tensor.seconds,
        "factor": tensor.seconds / best.seconds,
        "reported": reported,
    }


def _tensor_alone(choice: Choice) -> bool:
    degrees = choice.prefill.degrees
    return choice.same and degrees.tensor == degrees.expert_tensor == degrees.world_size


def _exchanges(choice: Choice) -> float:
    phases = ((choice.prefill, 1), (choice.decode, choice.steps))
    return sum(times * sum(module.exchanges for module in phase.modules.values()) for phase, times in phases)


if __name__ == "__main__":
    main()
