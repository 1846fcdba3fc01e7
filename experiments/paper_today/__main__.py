"""``python -m experiments.paper_today``: see README.md."""

from pathlib import Path

from experiments.breakdown import RANK, breakdown_picture, parts, print_summary, study
from experiments.paper import MODEL_40B, Job, peak_gib, simulate_all, write_json
from experiments.uncertainty import BASELINE, BOTH, Unknown
from tedlab.predict.cluster import load_cluster

HERE = Path(__file__).parent
UNKNOWNS = {
    "gemm": Unknown("share of peak in matrix products", (0.5, 0.8), "0.8 at the best shape, see dgx_h100.yaml"),
    "memory": Unknown("share of memory bandwidth", (0.6, 0.9), "unfused kernels at worst; a plain copy at best"),
    "in_node": Unknown("share of NVLink in a tensor ring", (0.6, 0.85), "0.82 in large messages, see dgx_h100.yaml"),
    "between_nodes": Unknown("share of network, rings", (0.7, 0.97), "0.97 in large messages, see dgx_h100.yaml"),
    "all_to_all": Unknown(
        "share of network, all-to-all", (0.3, 0.9), "as on Summit; rail-optimised networks are better"
    ),
    "latency": Unknown("times NCCL's latencies", (1.0, 5.0), "NCCL's own figures are those of its hardware model"),
    "gpus_per_node": Unknown("GPUs used per node", (8,), "all", choice=True),
    "micro_batch": Unknown("sequences per micro-batch", (1, 2, 4), "all fit", choice=True),
    "einsum": Unknown("tokens dispatched by products", (0,), "not done any more", choice=True),
}
ALTERNATIVES = {  # what 80 GB allow, recomputing only what the backward pass needs
    "tensor 2, both": ("parallel.tensor=2", "comm=ted"),
    "tensor 1": ("parallel.tensor=1",),
    "tensor 1, nothing recomputed": ("parallel.tensor=1", "model.recompute.granularity=none"),
}
MODERN = ("model.recompute.early_stop=true", "comm.skip_dead_gemm=true", "data.micro_batch_size=1")


def main() -> None:
    """The command."""
    cluster = load_cluster("dgx_h100")
    results, _ = study(HERE, "40 B model on 128 H100", cluster, UNKNOWNS)
    others = simulate_all({name: Job((*MODEL_40B, *MODERN, *own), cluster, RANK) for name, own in ALTERNATIVES.items()})
    layouts = {f"tensor 4, {mode.strip('+ ')}": results["breakdown_seconds"][mode] for mode in (BASELINE, BOTH)}
    layouts |= {name: parts(simulation.seconds) for name, simulation in others.items()}
    results["layouts_seconds"] = layouts
    results["layouts_peak_gib"] = {name: peak_gib(simulation) for name, simulation in others.items()}
    write_json(HERE / "results.json", results)
    breakdown_picture(layouts, "Predicted step in other layouts, 40 B model on 128 H100", HERE / "layouts.png")
    print_summary(results)


if __name__ == "__main__":
    main()
