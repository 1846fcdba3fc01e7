"""``python -m experiments.paper_breakdown``: see README.md."""

from dataclasses import replace
from pathlib import Path

from experiments.breakdown import print_summary, study
from experiments.uncertainty import Unknown
from tedlab.predict.cluster import load_cluster

HERE = Path(__file__).parent
UNKNOWNS = {
    "gemm": Unknown(
        "share of peak in matrix products",
        (0.35, 0.65),
        "Megatron-LM's whole step on one V100 reached 30 % of peak (arXiv 1909.08053, abstract), so its products more; "
        "the upper end is judgement",
    ),
    "memory": Unknown("share of memory bandwidth", (0.6, 0.9), "unfused kernels at worst; a plain copy at best"),
    "in_node": Unknown(
        "share of 50 GB/s in a tensor ring",
        (0.2, 0.8),
        "10 to 40 GB/s; no measured ring on Summit is public. A ring over four GPUs crosses the link between the two "
        "processors",
    ),
    "between_nodes": Unknown("share of network, rings", (0.6, 0.92), "at best OLCF's 23 of 25 GB/s of injection"),
    "all_to_all": Unknown(
        "share of network, all-to-all",
        (0.3, 0.85),
        "many small messages that meet in the fabric at worst; nearly as good as a ring at best",
    ),
    "latency": Unknown("times NCCL's latencies", (1.0, 5.0), "NCCL's own figures are those of its hardware model"),
    "gpus_per_node": Unknown(
        "GPUs used per node",
        (4, 6),
        "not known to us; 4 suits tensor groups of 4, 6 is a full node",
        choice=True,
    ),
    "micro_batch": Unknown(
        "sequences per micro-batch", (1, 2), "not known to us; with 4 and CAC it does not fit 16 GB", choice=True
    ),
    "einsum": Unknown(
        "tokens dispatched by products (1: yes)",
        (0, 1),
        "DeepSpeed's MoE layer multiplies by one-hot masks; an index does without",
        choice=True,
    ),
}


def main() -> None:
    """The command."""
    summit = replace(load_cluster("summit"), gpus_per_node=4)
    results, _ = study(HERE, "40 B model on 128 V100 of Summit", summit, UNKNOWNS)
    print_summary(results)


if __name__ == "__main__":
    main()
