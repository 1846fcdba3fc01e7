"""``python -m experiments.paper_shares``: see README.md."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from benchmarks import published
from experiments.breakdown import RANK
from experiments.paper import MODEL_40B, MODES, configured, write_json
from experiments.uncertainty import BASELINE, BOTH, einsum_flops
from tedlab.predict.cluster import ClusterConfig, load_cluster
from tedlab.predict.estimate import Estimate, estimate
from tedlab.predict.estimate.step import COMPUTE
from tedlab.predict.volumes import ClosedForm

HERE = Path(__file__).parent
# Remembered from the paper's body, of the 40 B model on 128 V100: changes by both optimisations together.
EXCHANGES, STEP = -0.64, -0.207
PEAK = 0.20  # of the baseline, by an earlier abstract
NETWORK = 0.92  # the share of Summit's network that a large message reaches (OLCF)


@dataclass(frozen=True)
class Mode:
    """A step with a choice of the two optimisations.

    Attributes:
        seconds: by cause, as the closed form has them.
        exchanges: how many all-to-alls a rank takes part in.
        peak: share of the peak's FLOPs, if what is computed again counts as useful.
    """

    seconds: Mapping[str, float]
    exchanges: int
    peak: float

    def of(self, operation: str) -> float:
        """Seconds of the passes' collectives of a kind."""
        return sum(taken for cause, taken in self.seconds.items() if cause.startswith(f"{operation},"))

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds.values())


Modes = Mapping[str, Mode]


def modes(cluster: ClusterConfig) -> Modes:
    """All four, with micro-batches of one sequence, on a cluster."""
    found = {}
    for name, preset in MODES.items():
        config = configured([*MODEL_40B, "data.micro_batch_size=1", f"comm={preset}"])
        form, guess = ClosedForm(config), estimate(config, cluster, RANK)
        exchanges = sum(call.op == "all_to_all" for block in form.kinds for call in form.block(block))
        times = config.trainer["accumulate_grad_batches"] * len(config.moe.routed(config.model.layers))
        found[name] = Mode(guess.seconds, exchanges * times, _peak(guess))
    return found


def _peak(guess: Estimate) -> float:
    return 4 / 3 * guess.mfu


def changed(of: Modes, *, kernels: float = 1.0, added: float = 0.0, fixed: float = 0.0, rate: float = 1.0) -> Modes:
    """The same steps under other assumptions.

    Args:
        of: The steps.
        kernels: How many times longer kernels take.
        added: Seconds of kernels that are added to every step.
        fixed: Seconds of each all-to-all that do not depend on what it sends.
        rate: How many times faster all-to-alls send bytes.
    """
    result = {}
    for name, mode in of.items():
        seconds = dict(mode.seconds)
        seconds[COMPUTE] = kernels * (seconds[COMPUTE] + added)
        for cause in [cause for cause in seconds if cause.startswith("all_to_all,")]:
            seconds[cause] = seconds[cause] / rate + fixed * mode.exchanges
        total = sum(seconds.values())
        result[name] = replace(mode, seconds=seconds, peak=mode.peak * mode.total / total)
    return result


def change(of: Modes, operation: str | None = None) -> float:
    """By what share both optimisations together change a step, or its collectives of a kind."""
    before, after = (mode.total if operation is None else mode.of(operation) for mode in (of[BASELINE], of[BOTH]))
    return after / before - 1


def solved(of: Modes, change_by: float, operation: str, name: str) -> float:
    """The value of an argument of :func:`changed` for which :func:`change` is as given, by bisection."""
    low, high = 0.0, 1e3
    for _ in range(80):
        middle = (low + high) / 2
        found = change(changed(of, **{name: middle}), operation or None)
        low, high = (middle, high) if found < change_by else (low, middle)  # more of either saves less
    return (low + high) / 2


def measured_fixed() -> float:
    """Seconds of an all-to-all that did not depend on its bytes, by the smallest two measured between two H100."""
    link = load_cluster("dgx_h100").in_node
    assert link is not None
    first, second = link.all_to_all[:2]
    slope = (second.seconds - first.seconds) / (second.bytes - first.bytes)
    return first.seconds - slope * first.bytes


def study() -> dict[str, tuple[Modes, str]]:
    """The assumptions, each with the steps under it and what it says, in the order of the table."""
    summit = replace(load_cluster("summit"), gpus_per_node=4)
    assumed = modes(summit)
    config = configured([*MODEL_40B, "data.micro_batch_size=1"])
    einsum = einsum_flops(config) / (summit.peak_flops.fp16 * summit.efficiency.gemm)
    slower = deepspeed()
    on_nvlink = measured_fixed()
    products = changed(assumed, added=einsum)
    fixed = solved(products, EXCHANGES, "all_to_all", "fixed")
    small = changed(products, fixed=fixed)
    needed = solved(small, STEP, "", "kernels")
    fastest = NETWORK / summit.efficiency.all_to_all
    best = changed(products, rate=fastest)
    fixed_best = solved(best, EXCHANGES, "all_to_all", "fixed")
    small_best = changed(best, fixed=fixed_best)
    needed_best = solved(small_best, STEP, "", "kernels")
    return {
        "as assumed": (assumed, "`summit.yaml`, index dispatch"),
        "one-hot dispatch": (products, f"{einsum:.1f} s of products are added"),
        "… and DeepSpeed's kernels": (changed(products, kernels=slower), f"kernels take ×{slower:.2f}: a row of 2021"),
        "one-hot, fixed time as on NVLink": (
            changed(products, fixed=on_nvlink),
            f"{1e3 * on_nvlink:.2f} ms of each exchange are fixed",
        ),
        "one-hot, fixed time for −64 %": (small, f"{1e3 * fixed:.1f} ms of each exchange are fixed"),
        "… and kernels for −20.7 %": (changed(small, kernels=needed), f"kernels take ×{needed:.2f}"),
        "−64 % at the network's best rate": (
            small_best,
            f"bytes at {100 * NETWORK:.0f} %, {1e3 * fixed_best:.1f} ms are fixed",
        ),
        "… and −20.7 %": (changed(small_best, kernels=needed_best), f"kernels take ×{needed_best:.2f}"),
    }


def deepspeed() -> float:
    """How many times longer kernels took with DeepSpeed in 2021 than with today's, by a dense row of its blog."""
    (run,) = (run for run in published.read() if run.profile == "deepspeed" and run.calibrates)
    return published.factor(*published.estimated(run))


def line(name: str, of: Modes, said: str) -> str:
    """A row of the table."""
    base = of[BASELINE]
    shares = (change(of, "all_reduce"), change(of, "all_to_all"), change(of))
    gains = (base.total / mode.total for key, mode in of.items() if key != BASELINE)
    cells = [name, said, *(f"{100 * share:+.0f} %".replace("-", "−") for share in shares)]
    cells += [*(f"×{gain:.2f}" for gain in gains), f"{base.total:.1f}", f"{100 * base.peak:.0f} %"]
    return f"| {' | '.join(cells)} |"


HEAD = "| assumption | that is | all-reduce | all-to-all | step | DTD | CAC | both | baseline, s | of peak |"


def table(found: Mapping[str, tuple[Modes, str]]) -> list[str]:
    """Lines of the table."""
    return [HEAD, "|---|---|" + "---:|" * 8, *(line(name, of, said) for name, (of, said) in found.items())]


def main() -> None:
    """The command."""
    found = study()
    write_json(HERE / "results.json", {name: _numbers(of) for name, (of, _) in found.items()})
    Console(width=200, highlight=False).print("\n".join(table(found)), markup=False)


def _numbers(of: Modes) -> dict[str, Mapping[str, float]]:
    return {name: mode.seconds for name, mode in of.items()}


if __name__ == "__main__":
    main()
