"""Plans decoding on two pools of GPUs, one for attention and one for experts (MegaScale-Infer, arXiv 2504.02263).

An attention node has all layers but the experts, and remembers the keys and values of its own texts; there are several
alike. An expert node has some of the experts of every layer. Micro-batches go back and forth (``pingpong.py``). Kernels
and collectives are those of specifications and cost model; all numbers are predictions. Nothing here prints.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

from tedlab.comm.rows import Rows
from tedlab.config import ServeConfig, TrainConfig
from tedlab.degrees import ParallelDegrees
from tedlab.errors import UsageError
from tedlab.models import models
from tedlab.moe import MoESpec
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.cost import collective_seconds
from tedlab.predict.serve.load import expected_load
from tedlab.predict.serve.passes import Pass, Tokens, remembered_bytes
from tedlab.predict.serve.pingpong import Stages
from tedlab.predict.serve.plan import lengths
from tedlab.predict.sim.roofline import seconds
from tedlab.spec import Layout, MicroBatch

_MICRO_BATCHES = (1, 2, 3, 4)


class Shape(NamedTuple):
    """How GPUs are divided.

    Attributes:
        attention_nodes: Number of attention nodes, each with texts of its own.
        attention_tensor: GPUs of each.
        expert_nodes: Number of expert nodes, which divide the experts.
        expert_tensor: GPUs of each.
        micro_batches: Number of micro-batches that each attention node's texts are divided into.
    """

    attention_nodes: int
    attention_tensor: int
    expert_nodes: int
    expert_tensor: int
    micro_batches: int

    @property
    def attention_gpus(self) -> int:
        """The GPUs of the attention pool."""
        return self.attention_nodes * self.attention_tensor

    @property
    def expert_gpus(self) -> int:
        """The GPUs of the expert pool."""
        return self.expert_nodes * self.expert_tensor


@dataclass(frozen=True)
class Served:
    """What a shape does with so many texts.

    Attributes:
        shape: The shape.
        texts: Texts of a micro-batch of an attention node.
        stages: What a micro-batch takes in a layer.
        layers: The number of layers with experts.
        beside: Seconds of a token outside of these layers: dense blocks, embedding and logits of all micro-batches, one
            after the other.
        attention_bytes, expert_bytes: Memory of a GPU of each pool.
        cost: What the GPUs cost.
    """

    shape: Shape
    texts: int
    stages: Stages
    layers: int
    beside: float
    attention_bytes: int
    expert_bytes: int
    cost: float

    @property
    def batch(self) -> int:
        """All texts."""
        return self.texts * self.shape.micro_batches * self.shape.attention_nodes

    @property
    def seconds(self) -> float:
        """Seconds of a new token of each text."""
        return self.stages.seconds(self.shape.micro_batches, self.layers) + self.beside

    @property
    def per_gpu(self) -> float:
        """New tokens per second and GPU."""
        return self.batch / self.seconds / (self.shape.attention_gpus + self.shape.expert_gpus)

    @property
    def per_cost(self) -> float:
        """New tokens per second and unit of cost."""
        return self.batch / self.seconds / self.cost


@dataclass
class FoundPools:
    """What a search has found.

    Attributes:
        served: For each shape that is possible, the most texts that it serves in time.
        slow, large: How many shapes serve not even one text per micro-batch in time, or have no memory for it.
        nearest: The fastest of those too slow.
        smallest: Of those too large the one that needs the least more.
    """

    served: list[Served] = field(default_factory=list)
    slow: int = 0
    large: int = 0
    nearest: Served | None = None
    smallest: tuple[float, Served] | None = None


class Disaggregation:
    """A model that is to decode on two pools.

    Args:
        config: The job, see :func:`tedlab.predict.serve.plan.served`; ``parallel.world_size`` is the number of GPUs.
        request: The texts, and what a token may take.
        attention_on, experts_on: The clusters of the pools.
        shares: (E,) proportions in which experts are chosen; None: all equally often.

    Raises:
        UsageError: If the model has no experts, or not of a kind whose rows travel, there are too few GPUs, or more
            than a cluster has, or no network joins the pools.
    """

    def __init__(
        self,
        config: TrainConfig,
        request: ServeConfig,
        attention_on: ClusterConfig,
        experts_on: ClusterConfig,
        shares: Sequence[float] | None = None,
    ) -> None:
        self.config, self.request, self.shares = config, request, shares
        self.attention_on, self.experts_on = attention_on, experts_on
        self.spec = models[config.model.architecture].spec(config.model, config.moe)
        self.layers = sum(isinstance(block.feed_forward, MoESpec) for block in self.spec.blocks)
        if not self.layers or not config.moe.ragged:
            raise UsageError(
                f"phase=disaggregated needs experts that take rows: moe.num_experts is {config.moe.num_experts}, "
                f"moe.dispatch {config.moe.dispatch}"
            )
        self.gpus = config.parallel.world_size
        asked = (request.attention_gpus or 1) + (request.expert_gpus or 1)
        if asked > self.gpus:
            raise UsageError(
                f"the pools need {asked} GPUs at least, but world_size is {self.gpus}: each pool has one or more"
            )
        self._check_network()
        prompt, output = lengths(request)
        self.positions, self.past = prompt + output, prompt + output // 2
        mixtures = (block.feed_forward for block in self.spec.blocks)
        self._experts = next(layer.experts for layer in mixtures if isinstance(layer, MoESpec))
        self._one = Pass(config, ParallelDegrees(1), Tokens(1, 1))
        self.dtype = self._one.compute
        self._weights = cache(self._bytes_of_weights)
        self._remembered = cache(lambda tensor: remembered_bytes(self.spec.blocks, tensor, self.dtype))
        self.attention = cache(self._attention)  # a search asks thousands of times
        self.expert_side = cache(self._expert_side)

    def _check_network(self) -> None:
        if self.attention_on != self.experts_on:
            for pool, cluster in (("attention", self.attention_on), ("experts", self.experts_on)):
                if cluster.between_nodes is None:
                    raise UsageError(
                        f"the cluster for {pool} is one node of {cluster.gpus_per_node} GPUs (between_nodes is null), "
                        "which no network joins with another cluster: use one cluster for both, or give between_nodes"
                    )
        elif self.attention_on.between_nodes is None and self.gpus > self.attention_on.gpus_per_node:
            raise UsageError(
                f"world_size is {self.gpus}, but the cluster is one node of {self.attention_on.gpus_per_node} GPUs "
                "(between_nodes is null): use fewer GPUs, or a cluster of several nodes"
            )

    # ---- a node of each pool -------------------------------------------------------------------------------------

    def _attention(self, tensor: int, texts: int) -> tuple[float, float]:
        """Returns the seconds of a micro-batch in a layer with experts, and outside of all of these."""
        form = Pass(self.config, ParallelDegrees(tensor, tensor), Tokens(texts, 1, self.past))
        even = form.modules(self.attention_on, form)
        beside = even["ends"].seconds + (even["dense"].seconds if "dense" in even else 0.0)
        here = 0.0
        for n, layers in Counter(self.spec.first).items():
            block, b = form.blocks[n], form.at(n)
            if not isinstance(block.feed_forward, MoESpec):
                module = form.exchanging(form.calls_of(block.attention, n), self.attention_on)
                kernels = (*block.norm1.forward(b), *block.attention.forward(b))
                beside += layers * (module + sum(seconds(work, self.attention_on) for work in kernels))
                continue
            local = block.feed_forward.local(b)
            assert local is not None
            works = Counter(block.forward(b))
            works.subtract(local.forward(b))  # what is left are attention, norms, router and shared experts
            # Tensor ranks divide the texts whose rows they send, and add up; then each gets the results of all.
            own = -(-texts // tensor) * self.config.model.hidden
            rows = own * self.config.moe.top_k
            moved = (b.moved(2 * rows), b.moved(rows + own))  # to send, and to add up
            results = texts * self.config.model.hidden * self.dtype.itemsize
            here += layers * collective_seconds("all_gather", results, range(tensor), self.attention_on)
            calls = form.calls_of(block.attention, n)
            if block.feed_forward.shared is not None:
                calls += form.calls_of(block.feed_forward.shared, n)
            kernels = (*works.elements(), *moved)
            here += layers * sum(seconds(work, self.attention_on) for work in kernels)
            here += layers * form.exchanging(calls, self.attention_on)
        return here / self.layers, beside

    def _expert_side(self, nodes: int, tensor: int, tokens: int) -> tuple[float, float, MicroBatch]:
        """Returns the seconds of the busiest node in a layer, its rows, and what it computes with."""
        moe, cluster = self.config.moe, self.experts_on
        load = expected_load(tokens, moe.top_k, moe.num_experts, nodes, self.shares)
        degrees = ParallelDegrees(nodes * tensor, tensor, nodes)
        rows = round(load.most)
        layout, busy = Layout(degrees, self.config.comm), max(1, round(load.busy))
        b = replace(self._one.at(), layout=layout, rows=Rows(computed=rows), busy=busy)
        sorting = b.moved(2 * rows * self.config.model.hidden)
        works = [sorting, *self._experts.forward(b), sorting]
        payload = rows * self.config.model.hidden * b.compute.itemsize
        inside = sum(collective_seconds(op, payload, range(tensor), cluster) for op in ("all_gather", "reduce_scatter"))
        return sum(seconds(work, cluster) for work in works) + inside, load.most, b

    def transfer(self, shape: Shape, texts: int, rows: float) -> float:
        """Returns the seconds of a micro-batch's rows from one pool to the other: of the slower side.

        Pools of one cluster whose GPUs fit into a node are in one; others are in nodes of their own.
        """
        row = self.config.model.hidden * self.dtype.itemsize
        sent = -(-texts // shape.attention_tensor) * self.config.moe.top_k * row
        fits = shape.attention_gpus + shape.expert_gpus <= self.attention_on.gpus_per_node
        inside = self.attention_on == self.experts_on and fits
        received = rows * row / shape.expert_tensor
        return max(_out(self.attention_on, sent, inside), _out(self.experts_on, received, inside))

    # ---- both ----------------------------------------------------------------------------------------------------

    def serve(self, shape: Shape, texts: int) -> Served:
        """Returns what a shape does with so many texts of a micro-batch of an attention node."""
        attention, beside = self.attention(shape.attention_tensor, texts)
        together = texts * shape.attention_nodes
        experts, rows, b = self.expert_side(shape.expert_nodes, shape.expert_tensor, together)
        stages = Stages(attention, experts, self.transfer(shape, texts, rows))
        size, m, moe = b.compute.itemsize, shape.micro_batches, self.config.moe
        dense = self._weights("dense", ParallelDegrees(shape.attention_tensor, shape.attention_tensor))
        each = self.positions * self._remembered(shape.attention_tensor)
        rows_there = texts * moe.top_k * self.config.model.hidden * size
        logits = texts * self.spec.embedding.vocab_size * b.precise.itemsize
        held = self._weights("expert", b.layout.degrees)
        _, _, inner, width = self._experts.here(b)
        working = round(rows) * (2 * self.config.model.hidden + inner + width) * size
        request = self.request
        return Served(
            shape,
            texts,
            stages,
            self.layers,
            m * beside,
            dense + m * texts * each + m * rows_there + logits,
            held + working + (m - 1) * round(rows) * self.config.model.hidden * size,
            request.price * shape.attention_gpus + request.expert_price * shape.expert_gpus,
        )

    def _bytes_of_weights(self, mesh: str, degrees: ParallelDegrees) -> int:
        held = sum(parameter.elements(degrees) for parameter in self.spec.parameters() if parameter.mesh == mesh)
        return held * self.dtype.itemsize

    def shapes(self) -> Iterator[Shape]:
        """Yields all shapes; numbers of attention nodes are powers of two and thrice these, or fill the given GPUs."""
        moe, request = self.config.moe, self.request
        tensors = [t for t in _powers(self.attention_on.gpus_per_node) if self._divides(ParallelDegrees(t, t))]
        expert_nodes = [n for n in range(1, moe.num_experts + 1) if moe.num_experts % n == 0]
        for nodes in expert_nodes:
            for expert_tensor in _powers(self.experts_on.gpus_per_node):
                left = self.gpus - nodes * expert_tensor
                wrong = request.expert_gpus not in (None, nodes * expert_tensor)
                if wrong or self._experts.expert.ffn % expert_tensor:
                    continue
                for tensor in tensors:
                    several = [n for n in range(1, left // tensor + 1) if n & (n - 1) == 0 or _thrice_a_power(n)]
                    if request.attention_gpus is not None:
                        several = [n for n in range(1, left // tensor + 1) if n * tensor == request.attention_gpus]
                    for n in several:
                        for m in _MICRO_BATCHES:
                            yield Shape(n, tensor, nodes, expert_tensor, m)

    def _divides(self, degrees: ParallelDegrees) -> bool:
        try:
            self.spec.check(degrees)
        except ValueError:
            return False
        return self.spec.embedding.vocab_size % degrees.tensor == 0

    def search(self, reserve: float) -> FoundPools:
        """Finds for every shape the most texts that it serves in time and has memory for.

        Args:
            reserve: Bytes of each GPU that are left free.
        """
        found = FoundPools()
        for shape in self.shapes():
            one = self.serve(shape, 1)
            over = self._over(one, reserve)
            if over > 0:
                found.large += 1
                if found.smallest is None or over < found.smallest[0]:
                    found.smallest = over, one
            elif one.seconds > self.request.latency:
                found.slow += 1
                if found.nearest is None or one.seconds < found.nearest.seconds:
                    found.nearest = one
            else:
                found.served.append(self._most(one, reserve))
        return found

    def _over(self, served: Served, reserve: float) -> float:
        """Returns by how many bytes the fuller of the pools exceeds its GPUs; negative if it does not."""
        attention = served.attention_bytes - (self.attention_on.memory_bytes - reserve)
        return max(attention, served.expert_bytes - (self.experts_on.memory_bytes - reserve))

    def _most(self, one: Served, reserve: float) -> Served:
        best, beyond = one, 2
        while (served := self.serve(one.shape, beyond)).seconds <= self.request.latency and self._over(
            served, reserve
        ) <= 0:
            best, beyond = served, 2 * beyond
        while beyond - best.texts > 1:
            middle = (best.texts + beyond) // 2
            served = self.serve(one.shape, middle)
            if served.seconds <= self.request.latency and self._over(served, reserve) <= 0:
                best = served
            else:
                beyond = middle
        return best


def _out(cluster: ClusterConfig, sent: float, inside: bool) -> float:
    """Returns the seconds in which all GPUs of a node send so many bytes each to the other pool, ``inside`` a node."""
    link = cluster.in_node if inside else cluster.between_nodes
    assert link is not None  # GPUs of a cluster are on its links, which are checked
    if inside:
        return link.exchanging(sent, cluster.efficiency.in_node)
    return link.exchanging(sent * cluster.gpus_per_node, cluster.efficiency.all_to_all)


def _powers(most: int) -> list[int]:
    return [1 << n for n in range(most.bit_length()) if 1 << n <= most]


def _thrice_a_power(number: int) -> bool:
    third, rest = divmod(number, 3)
    return not rest and third & (third - 1) == 0
