"""``python -m experiments.megascale``: see README.md."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.paper import composed, write_json
from tedlab.config import ServeConfig
from tedlab.predict.cluster import load_cluster
from tedlab.predict.serve.one_pool import one_pool
from tedlab.predict.serve.plan import served
from tedlab.predict.serve.pools import Disaggregation

HERE = Path(__file__).parent
GPUS = 64
REQUEST = ServeConfig(prompt=571, output=159, latency=0.15)
_COMMON = ("trainer=gpu", "trainer.precision=bf16-true", "model.sequence_length=2048")
MODELS: dict[str, Sequence[str]] = {
    "Mixtral-8x22B": (*_COMMON, "model=mixtral_8x22b", "moe=mixtral"),
    "DBRX": (  # databricks/dbrx-base, config.json
        *(*_COMMON, "model=mixtral_8x22b", "moe=mixtral", "model.layers=40", "model.hidden=6144", "model.heads=48"),
        *("model.kv_heads=8", "model.ffn=10752", "model.vocab_size=100352", "moe.num_experts=16", "moe.top_k=4"),
    ),
}
_RESERVE = 1.2 * 2**30  # as `tedlab plan` leaves free


def main() -> None:
    """The command."""
    results = {name: row(overrides) for name, overrides in MODELS.items()}
    write_json(HERE / "results.json", results)
    Console().print(results)


def row(overrides: Sequence[str], gpus: int = GPUS, request: ServeConfig = REQUEST) -> dict[str, Any]:
    """Tokens per second and GPU by the number of micro-batches, and those of one pool."""
    cluster = load_cluster("dgx_a100")
    job = served(composed([*overrides, f"parallel.world_size={gpus}", "parallel.tensor=1"]), request)
    found = Disaggregation(job, request, cluster, cluster).search(_RESERVE).served
    by_number = {
        m: max((each for each in found if each.shape.micro_batches == m), key=lambda each: each.per_gpu)
        for m in sorted({each.shape.micro_batches for each in found})
    }
    one = one_pool(job, request, cluster, _RESERVE)
    return {
        "per_gpu": {f"{m}": each.per_gpu for m, each in by_number.items()},
        "shapes": {f"{m}": list(each.shape) for m, each in by_number.items()},
        "texts": {f"{m}": each.batch for m, each in by_number.items()},
        "token_seconds": {f"{m}": each.seconds for m, each in by_number.items()},
        "one_pool_per_gpu": None if one is None else one.per_gpu,
    }


if __name__ == "__main__":
    main()
