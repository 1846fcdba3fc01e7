"""``python -m docs.refresh [--check] [NAME …]``: writes into README and docs what commands print and simulations give.

What stands between ``<!-- refresh NAME -->`` and ``<!-- end NAME -->`` in a document comes from here, and from nowhere
else. Where commands train, numbers depend on the machine and on the text of Python's library, and only words are
compared. All others must agree: their times are predicted ones. ``--check`` writes nothing and exits with 1 if a
document says something else than the code; tests do that, too.
"""

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import published
from benchmarks.plan_order import place
from docs.commands import Run, Shown, commands, in_a_new_process, run_commands
from experiments.breakdown import NAMES, parts, total
from experiments.paper import MODEL_40B, WORKERS, configured, peak_gib
from tedlab.predict.cluster import load_cluster
from tedlab.predict.cost import wire_bytes_by_link
from tedlab.predict.sim import Simulation, simulate
from tedlab.predict.sim.memory import Category
from tedlab.predict.sim.meter import KERNELS, MATRICES
from tedlab.predict.sim.routing import routing_of
from tedlab.predict.volumes import ClosedForm

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("certify", "folding", "inference-plans", "plan", "simulate", "truth")),
)
_BLOCK = re.compile(r"(<!-- refresh (\S+) -->\n)(.*?)(<!-- end \2 -->)", re.DOTALL)
_GIB = 2**30

# The paper's 40 B model, in micro-batches of one sequence; recomputation stops as soon as it can.
_40B = (*(o for o in MODEL_40B if "early_stop" not in o and "skip_dead" not in o), "data.micro_batch_size=1")


@dataclass(frozen=True)
class Job:
    """A simulation that a block needs; ``routing``: ``sim.routing`` and ``sim.zipf`` of dropless routers."""

    overrides: tuple[str, ...]
    rank: int = 0
    gpus_per_node: int = 6
    routing: tuple[str, float | None] | None = None


@dataclass(frozen=True)
class Block:
    """What stands in one place of a document: text made from simulations."""

    jobs: Mapping[str, Job]
    text: Callable[[Mapping[str, Simulation]], str]


# ---- what commands print ---------------------------------------------------------------------------------------------

PRINTED = {
    "train": Shown(r"main: \d+ steps", "parameters"),
    "compare": Shown("Results", "Communication by phase"),
    "certificate": Shown("4 processes", "float64, on cpu"),
    "simulate": Shown("predicted seconds of a step", "saved in", exact=True),
    "predicted": Shown("predicted$", "saved in", exact=True),
    "plan": Shown("Planned", "tedlab train", exact=True),
    "plan_generate": Shown("Planned", exact=True),
    "plan_disaggregated": Shown("Planned", "pingpong", exact=True),
}


def _above(name: str) -> list[str]:
    """Returns the commands of the last bash block above a place in a document."""
    (text,) = (text for path in DOCUMENTS if f"<!-- refresh {name} -->" in (text := path.read_text()))
    above = text[: text.index(f"<!-- refresh {name} -->")]
    return commands(above[above.rindex("```bash") :])


def printed(names: Sequence[str], run: Run, added: Mapping[str, Sequence[str]] | None = None) -> dict[str, str]:
    """Returns what documents should show of what the commands above it print, by name; the last command counts."""
    outputs: dict[tuple[str, ...], str] = {}
    for lines in dict.fromkeys(tuple(_above(name)) for name in names):
        with tempfile.TemporaryDirectory() as folder:
            outputs[lines] = run_commands(lines, Path(folder), run, added)[-1]
    return {name: PRINTED[name].of(outputs[tuple(_above(name))]) for name in names}


# ---- docs/simulate.md ----------------------------------------------------------------------------------------------

_LAYOUTS = {
    "`comm=none`": ("comm=none",),
    "`comm=dtd`": ("comm=dtd",),
    "`comm=ted` (DTD, CAC)": ("comm=ted",),
    "`parallel.sequence=true`": ("parallel.sequence=true",),
    "`parallel.sequence=true comm.cac=shard`": ("parallel.sequence=true", "comm.cac=shard"),
}


def _memory(simulations: Mapping[str, Simulation]) -> str:
    rows = []
    for name in _LAYOUTS:
        one, many = simulations[f"{name} 1"], simulations[f"{name} 32"]
        rows.append((name, *_kept(many), f"{peak_gib(one):.2f}", f"{peak_gib(many):.2f}"))
    return _table(
        ("", "stash, most", "activations, most", "peak, 1 micro-batch a step", "peak, 32 micro-batches"), rows
    )


_TOGGLES = ("none", "dtd", "cac", "ted")


def _seconds(simulations: Mapping[str, Simulation]) -> str:
    """On four of a node's GPUs; the last two rows, which need no simulation of their own, on all six."""
    rows = []
    for title, toggles, gpus in (("", _TOGGLES, 4), (", 6 GPUs a node", ("none", "ted"), 6)):
        cluster = replace(load_cluster("summit"), gpus_per_node=gpus)
        first = None
        for toggle in toggles:
            of = parts(simulations[toggle].seconds_on(cluster))
            first = first or total(of)
            kernels = of[MATRICES] + of[KERNELS]
            others = [of[name] for name in (*NAMES, "gradient sync", "optimizer")]
            change = f"−{100 * (1 - total(of) / first):.1f} %" if toggle != "none" else ""
            rows.append((f"`comm={toggle}`{title}", *(f"{x:.1f}" for x in (kernels, *others, total(of))), change))
    return _table(("", "kernels", *NAMES.values(), "gradients, parameters", "optimizer", "step", ""), rows)


_ROUTINGS = {
    "balanced": (("balanced", None), 0),
    "`zipf`, 0.5": (("zipf", 0.5), 0),
    "`zipf`, 1.2": (("zipf", 1.2), 0),
    "`zipf`, 1.2 ": (("zipf", 1.2), 60),
}


def _dropless(simulations: Mapping[str, Simulation]) -> str:
    config = configured([*_40B, "comm=ted", "moe.dispatch=dropless"])
    rows = []
    for name, (chosen, rank) in _ROUTINGS.items():
        simulation = simulations[name]
        routing = routing_of(config, *chosen, None)
        assert routing is not None
        computed = routing.rows_by_expert_rank().sum(0)
        share = computed[rank // 4 % len(computed)] / computed.mean()
        peak, step = f"{peak_gib(simulation):.2f}", f"{simulation.step_seconds:.1f}"
        rows.append((name.strip(), f"{rank}", f"{share:.2f}", peak, *_kept(simulation), step))
    return _table(
        ("", "rank", "rows of a micro-batch, mean = 1", "peak, GiB", "stash, most", "activations, most", "step, s"),
        rows,
    )


# ---- docs/truth.md -------------------------------------------------------------------------------------------------


def _published(_: Mapping[str, Simulation]) -> str:
    return published.markdown(published.compared(published.read()))


_RESULTS = ROOT / "benchmarks" / "results"


def _steps(file: str) -> list[dict[str, Any]]:
    """Returns the steps that a file of ``benchmarks.truth`` has with their predictions."""
    return [row for row in json.loads((_RESULTS / file).read_text())["rows"] if row["kind"] == "step time"]


def _measured(file: str, _: Mapping[str, Simulation]) -> str:
    """What is in the file: the table, and how many rows meet the aims."""
    steps = _steps(file)
    rows, close, full, equal, routed = [], 0, 0, 0, []
    for row in steps:
        times = [f"{1e3 * row[key]:.1f}" for key in ("predicted_s", "measured_s")]
        parts = [
            f"{1e3 * row['predicted_s_by_part'][part]:.1f} / {1e3 * row['measured_s_by_part'][part]:.1f}"
            for part in ("forward", "backward", "optimizer")
        ]
        memory = row["predicted_bytes"] / row["measured_bytes"]
        same = "equal" if row["equal_bytes"] else "DIFFERENT"
        rows.append((row["name"], f"{row['processes']}", *times, f"{row['ratio']:.2f}", *parts, f"{memory:.3f}", same))
        close += abs(row["ratio"] - 1) <= 0.1
        full += abs(memory - 1) <= 0.03
        equal += row["equal_bytes"]
        if row["sent_bytes"] != row["predicted_sent_bytes"]:  # where routers decide who sends what
            routed.append(abs(row["predicted_sent_bytes"] / row["sent_bytes"] - 1))
    errors = sorted(abs(row["ratio"] - 1) for row in steps)
    head = ("configuration", "GPUs", "predicted, ms", "measured, ms", "ratio", *("forward", "backward", "optimizer"))
    given = (
        f", those of {len(routed)} only given how many rows the run routed: they were predicted within "
        f"{100 * max(routed):.2f} %"
        if routed
        else ""
    )
    said = (
        f"\nOf {len(steps)} configurations {close} are within 10 % in time and {full} within 3 % in memory; the bytes "
        f"of {equal} are equal{given}. Half of the times are within {100 * errors[len(errors) // 2]:.0f} %, and the "
        f"worst is off by {100 * errors[-1]:.0f} %.\n"
    )
    return _table((*head, "memory", "bytes"), rows) + said


def _sessions(_: Mapping[str, Simulation]) -> str:
    """The same configurations in several sessions: how far measurements are from each other."""
    names = "x2_first", "x2_olmoe", "x2_third", "x2", "one"
    files = [f"truth_h200_{name}.json" for name in names]
    sessions = [{row["name"]: row for row in _steps(file)} for file in files]
    rows, spreads = [], []
    for name, last in sessions[-2].items():
        found = [session.get(name) for session in sessions]
        every = [f"{1e3 * row['measured_s']:.1f}" if row else "" for row in found]
        optimizer = [f"{1e3 * row['measured_s_by_part']['optimizer']:.1f}" if row else "" for row in found]
        taken = [row["measured_s"] for row in found if row]
        spreads.append(max(taken) / min(taken))
        rows.append((name, f"{last['processes']}", *every, f"{spreads[-1]:.2f}", *optimizer))
    spreads.sort()
    each = "first", "second", "third", "fourth", "fifth"
    said = (
        f"\nHalf of the configurations took up to {100 * (spreads[len(spreads) // 2] - 1):.0f} % longer in one session "
        f"than in another, and the worst {100 * (spreads[-1] - 1):.0f} %.\n"
    )
    return (
        _table(("configuration", "GPUs", *each, "slowest / quickest", *(f"optimizer, {n}" for n in each)), rows) + said
    )


def _planned(_: Mapping[str, Simulation]) -> str:
    """A plan's first choices and a contrast, predicted and measured."""
    found = json.loads((_RESULTS / "plan_order_h200_x2.json").read_text())
    rows = []
    for row in found["rows"]:
        settings = dict(setting.split("=") for setting in row["settings"])
        kept = ("parallel.tensor", "data.micro_batch_size", "parallel.sequence")
        (low, high), error = row["predicted_range_s"], row["predicted_s"] / row["measured_s"] - 1
        rows.append(
            (
                *(settings[name] for name in kept),
                f"{1e3 * row['predicted_s']:.0f} ({1e3 * low:.0f} to {1e3 * high:.0f})",
                f"{1e3 * row['measured_s']:.0f}",
                f"{100 * error:+.0f} %".replace("-", "−"),
                *(f"{place(row, found['rows'], key)}" for key in ("predicted_s", "measured_s")),
                f"{row['predicted_gib'] / row['measured_gib']:.3f}",
            )
        )
    head = ("tensor", "micro-batch", "sequence", "predicted, ms", "measured, ms", "off by")
    return _table((*head, "place predicted", "measured", "memory"), rows)


def _ablation(_: Mapping[str, Simulation]) -> str:
    """The paper's toggles on four GPUs, as ratios to the row without them."""
    steps = {row["name"]: row for row in _steps("truth_h200_x4.json")}
    rows = []
    for base, others in {
        "1.3B's width, 4 layers, 8 experts with capacity, tensor 2 × expert 2": ("… DTD",),
        "… recomputing": ("… recomputing, CAC", "… recomputing, DTD, CAC", "… recomputing, fused reduce-scatter, CAC"),
    }.items():
        for name in others:
            ratios = [
                f"{of(steps[name]) / of(steps[base]):.3f}"
                for of in (
                    lambda row: row["predicted_s"],
                    lambda row: row["measured_s"],
                    lambda row: row["measured_s_by_part"]["forward"],
                    lambda row: row["measured_s_by_part"]["backward"],
                    lambda row: row["sent_bytes"],
                )
            ]
            rows.append((name.removeprefix("… "), base.split(", ")[-1].removeprefix("… "), *ratios))
    return _table(("with", "without", "predicted", "measured", "forward", "backward", "bytes sent"), rows)


# ---- docs/folding.md -------------------------------------------------------------------------------------------------

# A layer of X-MoE's Medium model in micro-batches of one sample, on 64 processes in nodes of 8.
_MEDIUM = (
    *("model.layers=1", "model.hidden=5120", "model.ffn=1536", "model.heads=128", "model.sequence_length=4096"),
    *("model.vocab_size=50304", "moe.num_experts=128", "moe.top_k=6", "moe.every=1", "moe.capacity_factor=1.25"),
    *("trainer=gpu", "trainer.precision=bf16-true", "data.batch_size=16", "data.micro_batch_size=1"),
    *("parallel.world_size=64", "parallel.tensor=4"),
)
_FOLDINGS = {
    "plain TED": ("parallel.expert=16",),
    "`comm.dtd=true`": ("parallel.expert=16", "comm=dtd"),
    "`… comm.fuse_reduce_scatter=true`": ("parallel.expert=16", "comm.dtd=true", "comm.fuse_reduce_scatter=true"),
    "`parallel.expert_tensor=2`, fused": (
        *("parallel.expert=32", "parallel.expert_tensor=2"),
        *("comm.dtd=true", "comm.fuse_reduce_scatter=true"),
    ),
    "`parallel.expert_tensor=1`": ("parallel.expert=64", "parallel.expert_tensor=1", "comm=dtd"),
    "`… parallel.expert=8`": ("parallel.expert=8", "parallel.expert_tensor=1", "comm=dtd"),
    "`parallel.expert_tensor=1 moe.slice=tokens` (SSMB)": (
        *("parallel.expert=64", "parallel.expert_tensor=1", "moe.slice=tokens"),
    ),
    "`… parallel.expert=8 moe.slice=tokens`": ("parallel.expert=8", "parallel.expert_tensor=1", "moe.slice=tokens"),
}


def _folding(_: Mapping[str, Simulation]) -> str:
    """What the routed experts of one layer send in a forward pass, by the closed form, and hold."""
    rows, per_node = [], 8
    for name, overrides in _FOLDINGS.items():
        form = ClosedForm(configured([*_MEDIUM, *overrides]))
        layer, members = form.spec.blocks[0].feed_forward, form.degrees.groups(0)
        calls = form.calls(layer.sites(form.layout).present(form.layout).forward, "forward", form.at(0).rows)
        sent: defaultdict[str, float] = defaultdict(float)
        for call in calls:
            sent[call.kind] += call.wire_bytes
            for link, size in wire_bytes_by_link(call.op, call.payload_bytes, members[call.kind], per_node).items():
                sent[link] += size
        weights = sum(p.elements(form.degrees) for p in layer.parameters() if p.mesh == "expert")
        degrees = f"{form.degrees.expert_tensor} × {form.degrees.expert} × {form.degrees.expert_data}"
        columns = ("expert", "expert_tensor", "tensor", "in_node", "between_nodes")
        rows.append((name, degrees, *(f"{sent[kind] / 1e6:.0f}" for kind in columns), f"{weights / 1e6:.0f}"))
    head = ("", "T_e × E_p × D_e", "expert", "expert_tensor", "tensor", "in node", "between nodes", "weights, M")
    return _table(head, rows)


BLOCKS = {
    "folding": Block({}, _folding),
    "memory": Block(
        {
            f"{name} {count}": Job((*_40B, f"data.batch_size={32 * count}", *overrides))
            for name, overrides in _LAYOUTS.items()
            for count in (1, 32)
        },
        _memory,
    ),
    "seconds": Block(
        {name: Job((*MODEL_40B, "data.micro_batch_size=1", f"comm={name}"), gpus_per_node=4) for name in _TOGGLES},
        _seconds,
    ),
    "dropless": Block(
        {
            name: Job((*_40B, "comm=ted", "moe.dispatch=dropless"), rank, routing=routing)
            for name, (routing, rank) in _ROUTINGS.items()
        },
        _dropless,
    ),
    "published": Block({}, _published),
    "measured": Block({}, partial(_measured, "truth_h200_x2.json")),
    "measured_on_one": Block({}, partial(_measured, "truth_h200_one.json")),
    "sessions": Block({}, _sessions),
    "measured_on_four": Block({}, partial(_measured, "truth_h200_x4.json")),
    "ablation": Block({}, _ablation),
    "planned": Block({}, _planned),
}


def _kept(simulation: Simulation) -> tuple[str, str]:
    return _most(simulation, "stash"), _most(simulation, "activations")


def _most(simulation: Simulation, category: Category) -> str:
    most = simulation.memory.held[category].max() / _GIB
    return f"{most:.2f}" if most else "0"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, rule, *rows)).replace("|  |", "| |")


def simulated(job: Job) -> Simulation:
    """What a block needs, made by this process."""
    torch.set_num_threads(1)
    config = configured(job.overrides)
    routing = routing_of(config, *job.routing, None) if job.routing else None
    cluster = replace(load_cluster("summit"), gpus_per_node=job.gpus_per_node)
    return simulate(config, cluster, job.rank, routing=routing)


def _in_processes(jobs: Sequence[Job]) -> list[Simulation]:
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(simulated, jobs))


def texts(names: Sequence[str], run: Callable[[Sequence[Job]], Sequence[Simulation]] = _in_processes) -> dict[str, str]:
    """What the documents should say, by block; ``run`` makes the simulations, by default several at a time."""
    blocks = {name: BLOCKS[name] for name in names if name in BLOCKS}
    jobs = {(name, key): job for name, block in blocks.items() for key, job in block.jobs.items()}
    done = dict(zip(jobs, run([*jobs.values()]), strict=True))
    made = {name: block.text({key: done[name, key] for key in block.jobs}) for name, block in blocks.items()}
    return made | printed([name for name in names if name in PRINTED], in_a_new_process)


def agrees(name: str, one: str, other: str) -> bool:
    """Returns whether two texts of a block say the same."""
    return PRINTED[name].same(one, other) if name in PRINTED else one == other


def said() -> dict[str, str]:
    """What the documents say, by block."""
    return {match[2]: match[3] for path in DOCUMENTS for match in _BLOCK.finditer(path.read_text())}


def refresh(right: Mapping[str, str]) -> None:
    """Writes blocks into their documents."""
    for path in DOCUMENTS:
        path.write_text(_BLOCK.sub(lambda m: m[1] + right.get(m[2], m[3]) + m[4], path.read_text()))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m docs.refresh", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a document is stale")
    parser.add_argument("names", nargs="*", help="blocks; all if none is named")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - {*BLOCKS, *PRINTED})
    if unknown:
        parser.error(f"there is no block {unknown[0]}; valid: {', '.join((*BLOCKS, *PRINTED))}")
    right, before = texts(options.names or [*BLOCKS, *PRINTED]), said()
    stale = [name for name, text in right.items() if not agrees(name, before[name], text)]
    if options.check and stale:
        sys.exit(f"Stale: {', '.join(stale)}. `python -m docs.refresh` writes what the code gives today.")
    if not options.check:
        refresh(right)
    print(f"{len(stale)} of {len(right)} blocks {'are' if options.check else 'were'} stale")


if __name__ == "__main__":
    main()
