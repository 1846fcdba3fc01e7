"""Shows the plan of a generation: the layouts of the fastest choice, others beside it, and what the switch costs."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from tedlab.config import ServeConfig, TrainConfig
from tedlab.console import output
from tedlab.degrees import ParallelDegrees
from tedlab.errors import UsageError
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.serve.plan import Choice, Found, Generation, served
from tedlab.predict.spread import Spread, spread_on
from tedlab.tables import FittingTable

_GIB = 2**30
_ROWS = 5
_REASONS = 4
_CHANGES = (
    "Warning: int4=true changes weights: decoding computes with weights of four bits, and says something else than "
    "the model. HAP's authors report 58.0 instead of 58.3 on GSM8K."
)


def plan_generation(
    config: TrainConfig,
    request: ServeConfig,
    name: str,
    cluster: ClusterConfig,
    reserve_gib: float,
    shares: Sequence[float] | None = None,
    console: Console | None = None,
    spread: Spread | None = None,
) -> Choice:
    """Plans a generation, prints the plan and returns the fastest choice.

    Args:
        config: The job as composed.
        request: The texts.
        name, cluster: The cluster.
        reserve_gib: The GiB of each GPU that are left for what is not modelled.
        shares: (E,) proportions in which experts are chosen; None: all equally often.
        console: Where to print.
        spread: How far times may be off; None: as the cluster says.

    Raises:
        UsageError: If the model cannot generate, the cluster is too small, or nothing fits in its memory.
    """
    job = served(config, request)
    generation, capacity = Generation(job, request, cluster, shares), cluster.memory_bytes - reserve_gib * _GIB
    try:
        found = generation.search(capacity)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not found.choices:
        raise UsageError(_nothing_fits(generation, found, capacity))
    console = console or output()
    best = found.choices[0]
    console.print(
        f"Planned: {request.batch} texts of {request.prompt} tokens and {request.output} new ones on "
        f"{generation.world} GPUs of {name}. All numbers are predicted, none was measured."
    )
    if request.int4:
        console.print(_CHANGES)
    console.print(_modules_table(best))
    console.print(_choices_table(found))
    for line in _verdict(best, found, generation, spread or spread_on(cluster)):
        console.print(line)
    console.print(_left_table(found, capacity))
    return best


def attention_layout(degrees: ParallelDegrees) -> str:
    """Returns how attention is divided: ``T2 × D4``."""
    return f"T{degrees.tensor} × D{degrees.data}"


def experts_layout(degrees: ParallelDegrees) -> str:
    """Returns how experts are divided: ``T1 × E8``, or ``T1 × E4 × R2`` if there are replicas."""
    replicas = f" × R{degrees.expert_data}" if degrees.expert_data > 1 else ""
    return f"T{degrees.expert_tensor} × E{degrees.expert}{replicas}"


def _layouts(choice: Choice) -> tuple[str, str]:
    prefill, decode = choice.prefill.degrees, choice.decode.degrees
    experts = experts_layout(prefill) + ("" if choice.same else f" → {experts_layout(decode)}")
    return attention_layout(prefill), experts


def _modules_table(choice: Choice) -> Table:
    table = FittingTable(title="the fastest choice that fits")
    for heading in ("phase", "module", "layout"):
        table.add_column(heading)
    for heading in ("layers", "ms", "exchanges", "MB sent", "most rows", "mean", "busy experts"):
        table.add_column(heading, justify="right")
    for phase, of in (("prefill", choice.prefill), ("decode", choice.decode)):
        for name, module in of.modules.items():
            experts = name == "experts"
            layout = experts_layout(of.degrees) if experts else attention_layout(of.degrees)
            table.add_row(
                *(phase, name, layout, f"{module.layers}", f"{module.seconds * 1e3:.4g}"),
                *(f"{module.exchanges * 1e3:.4g}", f"{module.sent / 1e6:.4g}"),
                *((f"{of.load.most:.0f}", f"{of.load.mean:.0f}", f"{of.load.busy:.1f}") if experts else ("", "", "")),
            )
        table.add_section()
    table.caption = (
        "T: processes that divide a layer by width; D: data ranks, with texts of their own; E: processes that divide "
        "experts; R: their replicas; ends: embedding, last norm, logits; decode: a step at the middle of the output; "
        "exchanges: of the ms before; MB sent: by a process in a pass, if all experts are chosen equally often; most "
        "rows: of the busiest process in a layer; busy experts: those of a process that any token chooses"
    )
    return table


def _choices_table(found: Found) -> Table:
    table = FittingTable(title="choices that fit")
    for heading in ("", "attention", "experts"):
        table.add_column(heading)
    for heading in ("first, s", "token, ms", "switch, s", "all, s", "×", "GiB"):
        table.add_column(heading, justify="right")
    best = found.choices[0]

    def add(name: str, choice: Choice) -> None:
        table.add_row(
            *(name, *_layouts(choice), f"{choice.first_seconds:.4g}", f"{choice.decode.seconds * 1e3:.4g}"),
            *(f"{choice.switch.seconds:.4g}" if choice.switch.seconds else "", f"{choice.seconds:.4g}"),
            *(f"{choice.seconds / best.seconds:.3f}", f"{choice.bytes / _GIB:.2f}"),
            style="bold" if choice is best else None,
        )

    for number, choice in enumerate(found.choices[:_ROWS], 1):
        add(f"{number}", choice)
    table.add_section()
    for name, choice in _named(found):
        add(name, choice)
    table.caption = (
        "first: to the first new token; token: a step of decoding; all: until all texts are finished; GiB: of the "
        "fullest process"
    )
    return table


def _named(found: Found) -> Iterator[tuple[str, Choice]]:
    """Yields the fastest choices of some kinds, which are the first of each in the order of their times."""
    world = found.choices[0].prefill.degrees.world_size
    kinds = {
        "one layout": lambda choice: choice.same,
        "tensor alone": lambda choice: choice.same and choice.prefill.degrees == ParallelDegrees(world, world),
        "another tensor": lambda choice: choice.prefill.degrees.tensor != found.choices[0].prefill.degrees.tensor,
    }
    for name, belongs in kinds.items():
        choice = next(filter(belongs, found.choices), None)
        if choice is not None:
            yield name, choice


def _verdict(best: Choice, found: Found, generation: Generation, spread: Spread) -> Iterator[str]:
    texts, output = generation.tokens["prefill"].texts, generation.steps + 1
    yield (
        f"All texts are finished after {spread.said(best.seconds)}, by {spread.source}: "
        f"{texts * output / best.seconds:,.0f} new tokens/s."
    )
    alike = [choice for choice in found.choices[1:] if not spread.apart(best.seconds, choice.seconds)]
    if alike:
        yield (
            f"{len(alike)} of the {len(found.choices) - 1} other choices cannot be told apart from it: they are "
            f"predicted to be slower by less than that ({spread.factor:.2f} ×)."
        )
    unlike = next((choice for choice in found.choices if not choice.same), None)
    if best.same and unlike is not None:
        yield (
            "No switch: with another layout of experts in decoding the fastest is "
            f"{' with '.join(reversed(_layouts(unlike)))}. {_switch(unlike)} It takes {unlike.seconds:.4g} s in all."
        )
    elif not best.same:
        yield _switch(best)
    weights, cache = best.decode.weights / _GIB, best.remembered / _GIB
    yield (
        f"Of the fullest process's {best.bytes / _GIB:.2f} GiB, weights are {weights:.2f} (in decoding), keys and "
        f"values of {generation.positions} positions {cache:.2f}, activations of the prefill "
        f"{best.prefill.activations / _GIB:.2f}."
    )


def _switch(choice: Choice) -> str:
    change = choice.switch
    if change.way == "none":
        return "Each process has its part of experts in the new layout already, so that nothing moves."
    how = "an exchange of experts" if change.way == "exchange" else "experts from the host in INT4"
    most = f"{change.moved / _GIB:.2f} GiB to the process that gets the most"
    return f"The switch adds {change.seconds:.4g} s for {how}: {most}."


def _left_table(found: Found, capacity: float) -> Table:
    table = FittingTable(title="all choices", show_header=False)
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"{len(found.choices):,}", "fit")
    if found.nearest is not None:
        over = (found.nearest.bytes - capacity) / _GIB
        table.add_row(
            f"{found.too_large:,}",
            f"do not fit in memory; the nearest miss, by {over:.2f} GiB: {' with '.join(_layouts(found.nearest))}",
        )
    for reason, count in found.refused.most_common(_REASONS):
        table.add_row(f"{count:,}", f"layouts are not possible: {reason}")
    return table


def _nothing_fits(generation: Generation, found: Found, capacity: float) -> str:
    if found.nearest is None:
        reasons = "; ".join(reason for reason, _ in found.refused.most_common(_REASONS))
        return f"no layout of {generation.world} GPUs is possible: {reasons}"
    nearest, request = found.nearest, generation.request
    most, where = generation.largest_batch(capacity)
    would = "not even one text fits in any layout that both phases can have: use more GPUs"
    if where is not None:
        would = f"batch={most} would fit, with {attention_layout(where)} and {experts_layout(where)}"
    return (
        f"{request.batch} texts of {generation.positions} tokens fit in no layout: the smallest "
        f"({' with '.join(_layouts(nearest))}) needs {(nearest.bytes - capacity) / _GIB:.2f} GiB more than the "
        f"{capacity / _GIB:.2f} GiB of a GPU without the reserve; weights are "
        f"{max(nearest.prefill.weights, nearest.decode.weights) / _GIB:.2f} of it, keys and values "
        f"{nearest.remembered / _GIB:.2f}; {would}"
    )
