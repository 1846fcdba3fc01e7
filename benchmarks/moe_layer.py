"""What one MoE layer costs, forward and backward, on one GPU: tedlab beside transformers and plain torch code.

See ``python -m benchmarks.moe_layer --help``, and README.md for what is compared with what.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from benchmarks.surroundings import require, surroundings
from tedlab import Topology
from tedlab.config import MoEConfig
from tedlab.moe import MoELayer, MoESpec
from tedlab.nn import FeedForwardSpec, Init

GIB = 1 << 30
STD = 0.02  # of weights


@dataclass(frozen=True)
class Shape:
    """Of a layer: T tokens, H hidden, F inner width of one of E experts, K of which each token chooses."""

    tokens: int
    hidden: int
    inner: int
    experts: int
    top_k: int
    gated: bool = True  # SwiGLU without biases; otherwise GELU with

    @property
    def flops(self) -> int:
        """Of the experts' matrix products, both passes: backward has twice those of forward."""
        return 3 * (6 if self.gated else 4) * self.tokens * self.hidden * self.inner * self.top_k


SHAPES = {
    "TED 6.7B": Shape(32768, 4096, 16384, 16, 1, gated=False),
    "Mixtral 8x7B": Shape(32768, 4096, 14336, 8, 2),
    "OLMoE 1B-7B": Shape(32768, 2048, 1024, 64, 8),
    "Qwen3-30B-A3B": Shape(32768, 2048, 768, 128, 8),
    "DeepSeek-V2-Lite": Shape(32768, 2048, 1408, 64, 6),
}


@dataclass
class Row:
    """What was measured of one layer."""

    shape: str
    routing: str
    name: str
    milliseconds: float  # median
    quickest: float
    tflops: float
    kept_gib: float  # what forward keeps for backward, beyond input, output and weights
    busiest: float  # load of the busiest expert over the mean


class PlainLayer(nn.Module):
    """What one writes with torch alone: sort, gather, ``grouped_mm``, activation, ``grouped_mm``, scatter."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__()
        self.shape = shape

        def weight(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(sizes, device=device, dtype=torch.bfloat16) * STD)

        self.router = weight(shape.experts, shape.hidden)
        self.up = weight(shape.experts, shape.hidden, 2 * shape.inner if shape.gated else shape.inner)
        self.down = weight(shape.experts, shape.inner, shape.hidden)

    def forward(self, x_1TH: Tensor) -> Tensor:
        x = x_1TH.squeeze(0)
        probs = F.linear(x, self.router).float().softmax(-1)
        gate, expert = probs.topk(self.shape.top_k, -1)
        gate = (gate / gate.sum(-1, keepdim=True)).to(x.dtype)
        order = expert.flatten().argsort()
        token = order // self.shape.top_k
        ends = torch.bincount(expert.flatten(), minlength=self.shape.experts).cumsum(0).int()
        z = F.grouped_mm(x[token], self.up, offs=ends)
        if self.shape.gated:
            left, right = z.chunk(2, -1)
            h = F.silu(left) * right
        else:
            h = F.gelu(z)
        y = F.grouped_mm(h, self.down, offs=ends) * gate.flatten()[order].unsqueeze(1)
        return torch.zeros_like(x).index_add(0, token, y).unsqueeze(0)


def transformers_layer(shape: Shape, device: torch.device, experts: str) -> nn.Module:
    """Mixtral's block with this shape; ``experts`` is transformers' name of an implementation."""
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        router_jitter_noise=0.0,
    )
    config._experts_implementation = experts
    with device:
        block = MixtralSparseMoeBlock(config).to(torch.bfloat16)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=STD)
    return block


def tedlab_layer(shape: Shape, device: torch.device, kernel: str) -> nn.Module:
    """tedlab's, dropless, in one process."""
    config = MoEConfig(num_experts=shape.experts, top_k=shape.top_k, dispatch="dropless", kernel=kernel)
    init, activation = Init(std=STD), "swiglu" if shape.gated else "gelu"
    expert = FeedForwardSpec(shape.hidden, shape.inner, init, init, activation, bias=not shape.gated)
    layer = MoELayer(MoESpec(expert, config), Topology.single(device))
    with torch.no_grad():  # where the weights are: billions of numbers
        for parameter in layer.parameters():
            values_of(parameter).normal_(std=STD)
    return layer.to(torch.bfloat16)


def contenders(shape: Shape, device: torch.device) -> dict[str, Callable[[], nn.Module]]:
    """Layers by name. transformers has no GELU experts without a gate."""
    layers: dict[str, Callable[[], nn.Module]] = {"plain torch": lambda: PlainLayer(shape, device)}
    if shape.gated:
        layers["transformers, grouped_mm"] = lambda: transformers_layer(shape, device, "grouped_mm")
        layers["transformers, eager"] = lambda: transformers_layer(shape, device, "eager")
    for kernel in ("torch", "triton"):
        layers[f"tedlab, kernel={kernel}"] = lambda kernel=kernel: tedlab_layer(shape, device, kernel)  # type: ignore[misc]
    return layers


def values_of(parameter: Tensor) -> Tensor:
    """This process's part of a parameter, which here is all of it."""
    return getattr(parameter, "_local_tensor", parameter)


def router_weight(layer: nn.Module) -> Tensor:
    """(E, H)."""
    names = ("router", "gate.weight", "router.weight")
    return values_of(next(p for name, p in layer.named_parameters() if name in names))


def plant_routing(layer: nn.Module, exponent: float) -> None:
    """Makes the router prefer experts as Zipf's law has it: their logits are log(rank^-exponent) plus noise."""
    local = router_weight(layer)
    experts, hidden = local.shape
    with torch.no_grad():
        local.copy_(torch.randn(local.shape, generator=torch.Generator().manual_seed(0)) / hidden**0.5)
        local[:, 0] = -exponent * torch.arange(1, experts + 1).log()


def tokens(shape: Shape, device: torch.device) -> Tensor:
    """(T, H) of noise, and a feature that is always 1, with which :func:`plant_routing` biases the router."""
    x = torch.randn(shape.tokens, shape.hidden, device=device, dtype=torch.bfloat16)
    x[:, 0] = 1.0
    return x


def busiest(layer: nn.Module, x: Tensor, top_k: int) -> float:
    """Load of the busiest expert over the mean."""
    weight = router_weight(layer)
    chosen = F.linear(x.float(), weight.float()).topk(top_k, -1).indices
    load = torch.bincount(chosen.flatten(), minlength=len(weight))
    return (load.max() / load.float().mean()).item()


def milliseconds(call: Callable[[], object], repeats: int) -> list[float]:
    """By the device's clock, one by one."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def dense_tflops(device: torch.device, repeats: int) -> list[float]:
    """Of one large matrix product: what products can reach at most."""
    a = torch.randn(32768, 4096, device=device, dtype=torch.bfloat16)
    b = torch.randn(4096, 16384, device=device, dtype=torch.bfloat16)
    flops = 2 * 32768 * 4096 * 16384
    return [flops / t / 1e9 for t in milliseconds(lambda: a @ b, repeats)]


class Step:
    """One forward and backward pass of a layer, gradients cleared before."""

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        self.layer, self.x = layer, x.unsqueeze(0).requires_grad_()
        self.grad = torch.randn_like(self.x)

    def forward(self) -> Tensor:
        result = self.layer(self.x)
        return result[0] if isinstance(result, tuple) else result

    def clear(self) -> None:
        self.x.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None

    def __call__(self) -> None:
        self.clear()
        self.forward().backward(self.grad)

    def kept_bytes(self) -> int:
        """What forward keeps for backward, beyond input, output and weights."""
        self.clear()
        before = torch.cuda.memory_allocated()
        output = self.forward()
        return torch.cuda.memory_allocated() - before - output.nbytes


def measure(name: str, shape: Shape, routing: str, exponent: float, device: torch.device, repeats: int) -> list[Row]:
    """All contenders at one shape, one after the other, each warm."""
    rows = []
    for contender, build in contenders(shape, device).items():
        layer, x = build(), tokens(shape, device)
        plant_routing(layer, exponent)
        step = Step(layer, x)
        for _ in range(3):
            step()
        times = milliseconds(step, repeats)
        rows.append(
            Row(
                shape=name,
                routing=routing,
                name=contender,
                milliseconds=median(times),
                quickest=min(times),
                tflops=shape.flops / median(times) / 1e9,
                kept_gib=step.kept_bytes() / GIB,
                busiest=busiest(layer, x, shape.top_k),
            )
        )
        del layer, step
    return rows


def table(rows: list[Row], dense: float, title: str) -> Table:
    """For people."""
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    left = ("shape", "routing", "layer")
    for column in (*left, "busiest", "kept GiB", "ms", "over transformers", "TFLOP/s", "of dense"):
        result.add_column(column, justify="left" if column in left else "right", no_wrap=column in left)
    for row in rows:
        alike = [r for r in rows if (r.shape, r.routing) == (row.shape, row.routing)]
        best = min((r.milliseconds for r in alike if r.name.startswith("transformers")), default=None)
        result.add_row(
            row.shape,
            row.routing,
            row.name,
            f"{row.busiest:.1f}",
            f"{row.kept_gib:.2f}",
            f"{row.milliseconds:.2f}",
            "" if best is None else f"{best / row.milliseconds:.2f}",
            f"{row.tflops:.0f}",
            f"{row.tflops / dense:.0%}",
        )
    return result


def draw(rows: list[Row], dense: float, title: str, file: Path) -> None:
    """Bars of TFLOP/s, a group for each shape and routing, and a line at the dense product."""
    names = list(dict.fromkeys(row.name for row in rows))
    groups = list(dict.fromkeys((row.shape, row.routing) for row in rows))
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        of_name = {(r.shape, r.routing): r.tflops for r in rows if r.name == name}
        bars = [(g, of_name[key]) for g, key in enumerate(groups) if key in of_name]
        axes.bar([g + (i - len(names) / 2 + 0.5) * width for g, _ in bars], [t for _, t in bars], width, label=name)
    axes.axhline(dense, color="black", linestyle="--", linewidth=1, label="dense matrix product")
    axes.set_xticks(range(len(groups)), [f"{shape}\n{routing}" for shape, routing in groups], fontsize=8)
    axes.set(ylabel="TFLOP/s, forward and backward", title=title)
    axes.legend(fontsize=8, ncols=3)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--out", type=Path, help="JSON file for the results, and beside it a PNG")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU")
    require("transformers")
    device = torch.device("cuda")
    torch.manual_seed(0)
    dense = dense_tflops(device, 10)[3:]
    rows: list[Row] = []
    jobs = [(name, routing) for name in arguments.shapes for routing in ("uniform", "Zipf 1.2")]
    for name, routing in track(jobs, "Layers", transient=True):
        exponent = 1.2 if routing == "Zipf 1.2" else 0.0
        rows.extend(measure(name, SHAPES[name], routing, exponent, device, arguments.repeats))
        torch.cuda.empty_cache()
        dense += dense_tflops(device, 5)
    limit = median(dense)
    facts = surroundings(device, "transformers")
    title = f"One MoE layer, forward and backward, bf16, {facts['device']}; a dense product runs at {limit:.0f} TFLOP/s"
    Console(width=130).print(table(rows, limit, title))
    if arguments.out:
        everything = facts | {"dense_tflops": dense, "rows": [asdict(row) for row in rows]}
        arguments.out.write_text(json.dumps(everything, indent=1) + "\n")
        draw(rows, limit, title, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
