"""Shows a plan of two pools: the shapes that decode the most, a timeline of the best, and one pool beside them."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tedlab.config import ServeConfig, TrainConfig
from tedlab.console import output
from tedlab.errors import UsageError
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.serve.one_pool import OnePool, one_pool
from tedlab.predict.serve.pingpong import PLACES, Stages, simulate
from tedlab.predict.serve.plan import served
from tedlab.predict.serve.pools import Disaggregation, FoundPools, Served
from tedlab.predict.serve.show import attention_layout, experts_layout
from tedlab.predict.spread import Spread, spread_on
from tedlab.tables import FittingTable

_GIB = 2**30
_ROWS = 4
_LAYERS = 4  # in the picture
_AGAINST = (
    "Against it: arXiv 2602.09721 finds that on ordinary clusters more expert nodes do not help, because the network "
    "between nodes caps their work, and that whole nodes can be balanced less finely than one pool; it expects gains "
    "where links between nodes are fast, experts large and few."
)


def plan_pools(
    config: TrainConfig,
    request: ServeConfig,
    clusters: tuple[tuple[str, ClusterConfig], tuple[str, ClusterConfig]],
    reserve_gib: float,
    shares: Sequence[float] | None = None,
    console: Console | None = None,
    spread: Spread | None = None,
) -> Served:
    """Plans decoding on two pools, prints the plan, draws the timeline, and returns what decodes the most per GPU.

    Args:
        config: The job as composed.
        request: The texts, and what a token may take.
        clusters: Names and clusters of the attention pool and of the expert pool.
        reserve_gib: The GiB of each GPU that are left for what is not modelled.
        shares: (E,) proportions in which experts are chosen; None: all equally often.
        console: Where to print.
        spread: How far times may be off; None: as the attention pool's cluster says.

    Raises:
        UsageError: If the model cannot generate, nothing fits, or nothing is fast enough.
    """
    job, (one, other), reserve = served(config, request), clusters, reserve_gib * _GIB
    plan = Disaggregation(job, request, one[1], other[1], shares)
    found = plan.search(reserve)
    if not found.served:
        raise UsageError(_nothing(found, plan))
    best = max(found.served, key=lambda each: each.per_gpu)
    spread = spread or spread_on(one[1])
    console = console or output()
    console.print(
        f"Planned: decoding after prompts of {request.prompt} tokens, with {request.output} new ones, on at most "
        f"{plan.gpus} GPUs: attention on {one[0]}, experts on {other[0]}. All numbers are predicted, none was measured."
    )
    console.print(_table(found, best, priced=request.price != request.expert_price))
    visits = simulate(best.stages, best.shape.micro_batches, best.layers)
    simulated, formula = visits[-1].end, best.stages.seconds(best.shape.micro_batches, best.layers)
    console.print(
        f"A token of the best takes {spread.said(best.seconds)}, by {spread.source}: "
        f"{formula:.4g} s in {best.layers} layers with experts ({simulated:.4g} s by simulation of {len(visits):,} "
        f"visits) and {best.beside:.4g} s beside these. {_busy(best.stages, best.shape.micro_batches)}",
        markup=False,
    )
    console.print(_beside(one_pool(job, request, one[1], reserve, shares), best, plan, one[0]))
    console.print(_AGAINST)
    path = Path(config.output_dir) / "pingpong.png"
    draw(best.stages, best.shape.micro_batches, best.layers, path)
    console.print(f"{path}: the first layers of the best", soft_wrap=True)
    return best


def _busy(stages: Stages, micro_batches: int) -> str:
    where = {"attention": stages.attention, "experts": stages.experts, "the way between them": stages.transfer}
    slowest = f"What takes longest is {max(where, key=where.__getitem__)}"
    if stages.full(micro_batches):
        return f"{slowest}, which never waits."
    needed = -(-stages.around // stages.slowest)
    return f"{slowest}, which waits at times: {needed:.0f} micro-batches would keep it busy."


def _table(found: FoundPools, best: Served, priced: bool) -> Table:
    table = FittingTable(title="shapes that decode the most")
    for heading in ("", "attention", "experts"):
        table.add_column(heading)
    times = ("T_a,\nµs", "T_e,\nµs", "T_c,\nµs", "token,\nms")
    costs = ("per\ncost",) if priced else ()
    for heading in ("m", "texts", *times, "per\nGPU", *costs, "A,\nGiB", "E,\nGiB"):
        table.add_column(heading, justify="right")

    def add(name: str, each: Served) -> None:
        shape, stages = each.shape, each.stages
        table.add_row(
            *(name, f"{shape.attention_nodes} × T{shape.attention_tensor}"),
            *(f"{shape.expert_nodes} × T{shape.expert_tensor}", f"{shape.micro_batches}", f"{each.batch:,}"),
            *(f"{1e6 * taken:.4g}" for taken in (stages.attention, stages.experts, stages.transfer)),
            *(f"{1e3 * each.seconds:.4g}", f"{each.per_gpu:,.1f}", *([f"{each.per_cost:,.1f}"] if priced else [])),
            *(f"{each.attention_bytes / _GIB:.1f}", f"{each.expert_bytes / _GIB:.1f}"),
            style="bold" if each is best else None,
        )

    for number, each in enumerate(sorted(found.served, key=lambda each: -each.per_gpu)[:_ROWS], 1):
        add(f"{number}", each)
    table.add_section()
    if priced:
        add("cost", max(found.served, key=lambda each: each.per_cost))
    for m in sorted({each.shape.micro_batches for each in found.served}):
        add(f"m = {m}", max((s for s in found.served if s.shape.micro_batches == m), key=lambda each: each.per_gpu))
    rates = "per GPU, per cost" if priced else "per GPU"
    table.caption = (
        "nodes × GPUs that divide each; m: micro-batches of each attention node; texts: over all; T_a, T_e, T_c: a "
        "micro-batch in a layer, in the attention pool, in the busiest expert node, and on the way, in each direction; "
        f"token: until each text has another one; {rates}: new tokens per second; A, E: a GPU of each pool. "
        f"{len(found.served):,} shapes are fast enough, {found.slow:,} too slow, {found.large:,} too large"
    )
    return table


def _beside(pool: OnePool | None, best: Served, plan: Disaggregation, name: str) -> str:
    if pool is None:
        return (
            f"No layout of one pool of {plan.gpus} GPUs of {name} that divides experts by number as far as can be is "
            "fast enough and fits in memory."
        )
    degrees = pool.step.degrees
    return (
        f"One pool of {plan.gpus} GPUs of {name} ({attention_layout(degrees)}, experts {experts_layout(degrees)}) "
        f"decodes {pool.batch:,} texts in {1e3 * pool.step.seconds:.4g} ms a token: {pool.per_gpu:,.1f} tokens/s/GPU. "
        f"Two pools decode {best.per_gpu / pool.per_gpu:.2f} times as much per GPU."
    )


def _nothing(found: FoundPools, plan: Disaggregation) -> str:
    if found.nearest is not None:
        nearest = found.nearest
        return (
            f"no shape of up to {plan.gpus} GPUs makes a token in latency={plan.request.latency:g} s: the nearest "
            f"({_said(nearest)}) takes {nearest.seconds:.4g} s with {_count(nearest.batch, 'text')}"
        )
    if found.smallest is not None:
        over, smallest = found.smallest
        return (
            f"no shape of up to {plan.gpus} GPUs has memory for one text in each micro-batch: the smallest "
            f"({_said(smallest)}) needs {over / _GIB:.2f} GiB more in a GPU; use more GPUs"
        )
    return (
        f"no shape of up to {plan.gpus} GPUs is possible with attention_gpus={plan.request.attention_gpus} and "
        f"expert_gpus={plan.request.expert_gpus}: an expert pool has a divisor of moe.num_experts "
        f"({plan.config.moe.num_experts}) nodes, and nodes of either pool 1, 2, 4, … GPUs, whose number divides "
        "model.heads or the experts' width"
    )


def _said(each: Served) -> str:
    shape = each.shape
    return (
        f"{_count(shape.attention_nodes, 'attention node')} of {_count(shape.attention_tensor, 'GPU')}, "
        f"{_count(shape.expert_nodes, 'expert node')} of {shape.expert_tensor}, "
        f"{_count(shape.micro_batches, 'micro-batch', 'micro-batches')}"
    )


def _count(number: int, one: str, several: str = "") -> str:
    """Returns ``1 node`` or ``3 nodes``."""
    return f"{number} {one if number == 1 else several or f'{one}s'}"


def draw(stages: Stages, micro_batches: int, layers: int, path: Path) -> None:
    """Draws who computes and who travels in the first layers, and saves it as PNG."""
    from matplotlib.figure import Figure

    layers = min(layers, _LAYERS)
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    for visit in simulate(stages, micro_batches, layers):
        place, width = PLACES.index(visit.place), 1e3 * (visit.end - visit.start)
        color = f"C{visit.micro_batch}"
        axes.barh(place, width, left=1e3 * visit.start, height=0.8, color=color, edgecolor="white", linewidth=0.8)
        axes.text(1e3 * visit.start + width / 2, place, f"{visit.layer + 1}", ha="center", va="center", fontsize=7)
    axes.set_yticks(range(len(PLACES)), ["attention pool", "on the way there", "expert pool", "on the way back"])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds, predicted")
    axes.set_title(
        f"{micro_batches} micro-batches (colours) in the first {layers} layers (numbers)", fontsize=10, loc="left"
    )
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
