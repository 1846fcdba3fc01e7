"""``python -m docs.folding``: draws folding.png, who of eight processes holds what, from the degrees themselves."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tedlab.compare.charts import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION
from tedlab.degrees import GroupKind, ParallelDegrees

FILE = Path(__file__).with_name("folding.png")
EXPERTS = 8
TED = ParallelDegrees(8, tensor=4, expert=2)
FOLDED = ParallelDegrees(8, tensor=4, expert=4, expert_tensor=1)
_DATA_RANKS, _REPLICAS = (BLUE, ORANGE, SKY, VERMILION), (GREEN, PURPLE)
_EMPTY, _INK = "#e9ecef", "#1f2328"
_WIDTH, _GAP = 1.0, 0.28  # of a process, and between two


def held(degrees: ParallelDegrees, rank: int) -> dict[int, tuple[int, int]]:
    """Returns the experts that a process holds, each with the number of its part and how many parts there are."""
    here, places = EXPERTS // degrees.expert, degrees.coordinates(rank)
    first = places["expert"] * here
    return dict.fromkeys(range(first, first + here), (places["expert_tensor"], degrees.expert_tensor))


def groups(degrees: ParallelDegrees, kind: GroupKind) -> list[range]:
    """Returns all groups of a kind."""
    found = {members[0]: members for rank in range(degrees.world_size) for members in [degrees.groups(rank)[kind]]}
    return [found[first] for first in sorted(found)]


def draw(file: Path = FILE) -> None:
    """Draws the same processes three times: dense layers, experts as in TED, and folded experts."""
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    dense, ted, folded = figure.subplots(3)
    draw_dense(dense, TED, "a quarter of each")
    bracket(dense, TED, "tensor", "tensor group: results of each layer are summed")
    draw_experts(ted, TED, "Experts as in the paper: a quarter of each of four")
    bracket(ted, TED, "expert_tensor", "expert_tensor group: rows are gathered, results summed")
    listed(ted, TED, "expert", "expert groups, one exchange there and one back")
    draw_experts(folded, FOLDED, "Experts folded: two whole ones")
    bracket(folded, FOLDED, "expert", "expert group: one exchange there and one back")
    listed(folded, FOLDED, "expert_data", "expert_data groups, gradients of experts")
    figure.savefig(file, dpi=150)


def draw_dense(axes: Axes, degrees: ParallelDegrees, share: str) -> None:
    """Draws which part of the dense layers each process holds; ``share`` says so in words."""
    _frame(axes, degrees, f"Dense layers, data {degrees.data} × tensor {degrees.tensor}: {share}")
    for rank in range(degrees.world_size):
        places = degrees.coordinates(rank)
        for part in range(degrees.tensor):
            colour = _DATA_RANKS[places["data"]] if part == places["tensor"] else _EMPTY
            _box(axes, _left(rank) + part * _WIDTH / degrees.tensor, 0.45, _WIDTH / degrees.tensor, 0.95, colour)
    listed(axes, degrees, "data", "data groups, gradients of dense layers")


def draw_experts(axes: Axes, degrees: ParallelDegrees, title: str) -> None:
    """Draws which parts of which of eight experts each process holds."""
    sizes = f"expert_data {degrees.expert_data} × expert {degrees.expert} × expert_tensor {degrees.expert_tensor}"
    what, _, rest = title.partition(":")
    _frame(axes, degrees, f"{what}, {sizes}:{rest}")
    side = _WIDTH / 4
    for rank in range(degrees.world_size):
        parts, replica = held(degrees, rank), degrees.coordinates(rank)["expert_data"]
        for number in range(EXPERTS):
            left, bottom = _left(rank) + number % 4 * side, 0.95 - number // 4 * 0.5
            _box(axes, left, bottom, side, 0.45, _EMPTY)
            part, of = parts.get(number, (0, 0))
            if of:
                _box(axes, left + part * side / of, bottom, side / of, 0.45, _REPLICAS[replica])
            ink = "white" if of == 1 else _INK
            axes.text(left + side / 2, bottom + 0.21, f"{number}", ha="center", va="center", fontsize=7, color=ink)


def _frame(axes: Axes, degrees: ParallelDegrees, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=_INK)
    axes.set_xlim(-0.1, _left(degrees.world_size) - _GAP + 0.1)
    axes.set_ylim(-0.55, 1.75)
    axes.axis("off")
    for rank in range(degrees.world_size):
        axes.text(_left(rank) + _WIDTH / 2, 1.47, f"rank {rank}", ha="center", va="bottom", fontsize=8.5, color=_INK)


def bracket(axes: Axes, degrees: ParallelDegrees, kind: GroupKind, text: str) -> None:
    """Draws a bracket under each group of a kind whose members are neighbours."""
    for members in groups(degrees, kind):
        left, right = _left(members[0]), _left(members[-1]) + _WIDTH
        axes.plot([left, left, right, right], [0.36, 0.24, 0.24, 0.36], color=_INK, linewidth=0.9)
        axes.text((left + right) / 2, 0.18, text, ha="center", va="top", fontsize=8.5, color=_INK)


def listed(axes: Axes, degrees: ParallelDegrees, kind: GroupKind, text: str, bottom: float = -0.22) -> None:
    """Lists the groups of a kind whose members are not neighbours."""
    text_of_groups = "  ".join("{" + ", ".join(map(str, members)) + "}" for members in groups(degrees, kind))
    middle = (_left(degrees.world_size) - _GAP) / 2
    axes.text(middle, bottom, f"{text}: {text_of_groups}", ha="center", va="top", fontsize=8.5, color=_INK)


def _box(axes: Axes, left: float, bottom: float, width: float, height: float, colour: str) -> None:
    axes.add_patch(Rectangle((left, bottom), width, height, facecolor=colour, edgecolor="white", linewidth=0.7))


def _left(rank: int) -> float:
    return rank * (_WIDTH + _GAP)


if __name__ == "__main__":
    draw()
