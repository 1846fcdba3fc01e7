"""Token paths without a capacity: every choice is a row, and each process gets as many as were chosen for its experts.

The modes and collectives are those of ``dispatch.py``, with rows in place of slots; before them the processes exchange
their numbers of rows. A :class:`RaggedRows` passes between path and experts.

If shapes on the host depend on these numbers, the host reads them once per layer: if expert groups have several
processes, or products need the sizes (see ``grouped.py``). They set out as soon as the router has chosen, and the
device spreads rows while the host waits for them. A recomputed forward pass reuses the numbers of the first one.

=================  =======================  ==================================================================
mode               path and region          rows
=================  =======================  ==================================================================
plain TED          sorted, replicated       every tensor rank exchanges all R rows of the data rank, and gets back
                                            partial results, of which it adds up those of each token; these sums,
                                            fewer than rows, are all-reduced
DTD                dealt, gathered          tensor rank r mod T sends row r; what each received is gathered
DTD, fused         dealt, scattered         the same with a reduce-scatter for all-reduce and drop
sequence parallel  sorted, scattered        each tensor rank has its own tokens
folded (T_e ≠ T)   as DTD or sequence       the same; the expert_tensor group gathers and reduces, if T_e > 1
=================  =======================  ==================================================================

Legend as in ``router.py``, and R: rows of a data rank (of a tensor rank, if sequence-sharded), sorted by expert; e:
experts of this process; i: processes that divide its experts and receive rows of their own (1 if all receive the same);
s: senders (E_p); M: rows that one of them receives (the most, if there are several); N: rows that this process's
experts see.

With ``comm.chunks`` the rows of each expert are divided into chunks (see ``chunks.py``), each of which is exchanged and
computed by itself; the numbers of rows are exchanged once.

With ``moe.lend``, every process gets the numbers of all of its group, and plans alike who computes which rows (see
``moe/lending``). Rows are then sorted by *slot* instead of by expert: one for each expert of a process, and one for
each that it borrows. Otherwise rows travel as without.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from tedlab.comm import (
    Collectives,
    Issued,
    Numbers,
    Relay,
    Splits,
    copy_to,
    evaluating,
    gather_from,
    gather_to,
    once,
    reduce_from,
    route,
    scatter_from,
    slice_to,
    to_compute_dtype,
)
from tedlab.comm.reading import deliver
from tedlab.comm.rows import Rows, dealt, hands, in_chunks, listed, relayed, rows_of
from tedlab.moe.chunks import by_chunk
from tedlab.moe.gather import gather_rows, grown, merge_choices, spread_choices
from tedlab.moe.grouped import Groups, one_kernel
from tedlab.moe.lending import Loans, Policy, by_slot, loans_of, runs_of, slots_of
from tedlab.moe.products import index_functions
from tedlab.moe.router import Routing
from tedlab.spec import Layout
from tedlab.topology import Topology


@dataclass(frozen=True)
class Exchange:
    """Who sends how many rows, in one layer and micro-batch, or in one chunk of it.

    Attributes:
        splits: Splits of the exchange with the experts.
        counts_ise: (i, s, e) int64 on the device: rows by receiver, sender and expert.
        width: M, as in the legend.
        total: N, as in the legend.
        sizes: Number of rows of each expert of this process; None: the host has not asked.
        kernel: What sorts the rows, see ``moe.kernel``.
        loans: What this process lends and borrows; e then counts borrowed experts, too. None: nobody lends.
        lent: Indices on the device of the experts that it lends, as ``loans`` has them.
        runs_2V: What lists rows in the order of slots, see :func:`tedlab.moe.lending.by_slot`; None: by expert.
    """

    splits: Splits | Relay
    counts_ise: Tensor
    width: int
    total: int
    sizes: tuple[int, ...] | None
    kernel: str
    loans: Loans | None = None
    lent: Tensor | None = None
    runs_2V: Tensor | None = None


Exchanges = Callable[[], tuple[Exchange, ...]]  # waits for the numbers of rows; one exchange for each chunk
Finish = Callable[[], tuple[tuple[Exchange, ...], Rows]]  # the same, and what is moved in all


class RaggedRows(NamedTuple):
    """Rows at the process of their experts, sorted by sender and then by expert.

    Attributes:
        values: (rows that this process received, H).
        exchange: How they came.
        listing: The routing with this process's choices in the order in which their results come back; None: as they
            were.
    """

    values: Tensor
    exchange: Exchange
    listing: Routing | None = None


class RowPath(Protocol):
    """Moves rows to their experts, and results back.

    Attributes:
        moved: Rows of all forward passes so far that a backward pass may follow.
    """

    moved: Rows

    def dispatch(self, x_TH: Tensor, routing: Routing) -> RaggedRows:
        """Sends this rank's tokens (T, H) and returns the rows of this process's experts."""
        ...

    def combine(self, y: RaggedRows, routing: Routing) -> Tensor:
        """Sends experts' results back and returns each token's gate-weighted sum of its choices (T, H)."""
        ...


@runtime_checkable
class OverlappingRowPath(RowPath, Protocol):
    """A row path in parts, see :class:`tedlab.moe.dispatch.OverlappingPath`."""

    def send(self, x_TH: Tensor, routing: Routing) -> list[Issued[RaggedRows]]:
        """Begins a :meth:`dispatch`. The rows arrive in one or several chunks, to compute each."""
        ...

    def answer(self, y: RaggedRows) -> Issued[RaggedRows]:
        """Begins to send a chunk's results back."""
        ...

    def receive(self, back: list[RaggedRows], routing: Routing) -> Tensor:
        """Returns what :meth:`combine` does, of the chunks that came back, in their order."""
        ...


def of_all(comm: Collectives, arriving_sx: Tensor, gathers: int) -> Tensor:
    """Returns the numbers of rows that arrive at each process which receives rows of its own: (i, s, x)."""
    if gathers == 1:
        return arriving_sx.unsqueeze(0)
    return comm.all_gather(arriving_sx.unsqueeze(0), "expert_tensor", tag="dispatch.gather_counts", phase="forward")


class RaggedPath:
    """Exchanges all rows of this process within its expert group.

    If all tensor ranks receive the same rows, each computes a part of the results of its data rank's tokens, and the
    region between there and back must not sum the parts: :meth:`receive` does.

    Args:
        num_experts: Number of experts E, a multiple of the expert degree.
        topology: The process's place in the meshes.
        widths: Widths of the experts' matrices.
        kernel: What copies and sums rows, see ``moe.kernel``.
        policy: Plans who computes which rows, see ``moe/lending``; None: the home of their expert.
        packed: Whether the device decides how many rows there are, see ``packed.py``; otherwise one for each choice.
        chunks: The number of chunks in which rows travel; :meth:`dispatch` and :meth:`combine` need 1.
        layout: The layout as the path obeys its toggles; None: the topology's.

    Raises:
        ValueError: If there is a policy, and several chunks or a folded layout.
    """

    def __init__(
        self,
        num_experts: int,
        topology: Topology,
        widths: tuple[int, int],
        kernel: str = "auto",
        policy: Policy | None = None,
        packed: bool = False,
        chunks: int = 1,
        layout: Layout | None = None,
    ) -> None:
        if policy is not None and chunks > 1:
            raise ValueError(f"comm.chunks={chunks} divides rows before a plan that lends experts could: use 1")
        layout = layout or topology.layout
        if layout.degrees.folded and policy is not None:
            raise ValueError("a folded layout (expert_tensor ≠ tensor) lends no experts: tensor ranks list other rows")
        self.comm, self.num_experts, self.widths = topology.comm, num_experts, widths
        self.deals, self.gathers = layout.deals, layout.gathers
        self.of_one_rank = not layout.degrees.folded  # all that are gathered are a data rank's, and as many of each
        self.kernel, self.policy, self.packed, self.chunks = kernel, policy, packed, chunks
        self.route = route(topology.comm)
        self.moved = Rows()

    def dispatch(self, x_TH: Tensor, routing: Routing) -> RaggedRows:
        (rows,) = self.send(x_TH, routing)
        return rows.wait()

    def combine(self, y: RaggedRows, routing: Routing) -> Tensor:
        return self.receive([self.answer(y).wait()], routing)

    def send(self, x_TH: Tensor, routing: Routing) -> list[Issued[RaggedRows]]:
        x = to_compute_dtype(x_TH)
        if self.gathers == 1:
            x = copy_to(x, self.comm, "expert_tensor", "experts.copy")
        exchanges = self._ask(routing.counts_E, len(routing.choice_EC), x)
        listing = self._listing(routing, routing.counts_E.unsqueeze(0), exchanges)
        return self._to_experts(spread_choices(x, listing, self.kernel), exchanges, listing)

    def answer(self, y: RaggedRows) -> Issued[RaggedRows]:
        return self.route.back(y.values, y.exchange.splits).then(lambda values: y._replace(values=values))

    def receive(self, back: list[RaggedRows], routing: Routing) -> Tensor:
        y_RH, listing = _joined(back), back[0].listing or routing
        if self.gathers > 1:
            return merge_choices(y_RH, listing, self.kernel)
        gate_TK = copy_to(listing.gate_TK, self.comm, "expert_tensor", "experts.copy_gates")
        partial_TH = merge_choices(y_RH, listing._replace(gate_TK=gate_TK), self.kernel)
        return reduce_from(partial_TH, self.comm, "expert_tensor", "experts.reduce")

    def _listing(self, routing: Routing, counts_iE: Tensor, exchanges: Exchanges) -> Routing:
        """Returns the routing with choices in the order of rows, which chunks decide or, with a policy, the plan.

        Of packed choices, which come before empty places, it keeps as many as this list has rows.

        Args:
            routing: The routing.
            counts_iE: Rows by expert of each of the tensor ranks that deal the list; one if nobody deals.
            exchanges: How the rows travel.
        """
        if self.packed:
            rows = sum(sum(exchange.splits.sent) for exchange in exchanges()) * self._dealers
            routing = routing._replace(choice_EC=routing.choice_EC[:rows])
        if self.chunks > 1:
            return by_chunk(routing, counts_iE, self.chunks)
        runs_2V = None if self.policy is None else exchanges()[0].runs_2V
        return routing if runs_2V is None else by_slot(routing, runs_2V)

    def _to_experts(self, x_RH: Tensor, exchanges: Exchanges, listing: Routing) -> list[Issued[RaggedRows]]:
        def issue(x: Tensor, exchange: Exchange) -> Issued[RaggedRows]:
            return self.route.there(x, exchange.splits).then(lambda values: RaggedRows(values, exchange, listing))

        known = exchanges()
        parts = [x_RH] if len(known) == 1 else x_RH.split([sum(exchange.splits.sent) for exchange in known])
        return [issue(x, exchange) for x, exchange in zip(parts, known, strict=True)]

    def _ask(self, counts_E: Tensor, rows: int, x: Tensor) -> Exchanges:
        """Exchanges numbers of rows, and returns a function that waits for them, once, if the host needs them.

        Args:
            counts_E: Rows that this process sends, by expert; with a policy, those that it lists.
            rows: The number of rows that this process sends.
            x: A tensor with the dtype of the rows.
        """
        return once("dispatch.counts", lambda: functools.cache(self._start(counts_E, rows, x)))

    def _start(self, counts_E: Tensor, rows: int, x: Tensor) -> Exchanges:
        if self.policy is not None:
            return self._counted(self._planning(counts_E, self.policy))
        numbers = self.route.numbers(counts_E.view(self.comm.size("expert"), -1))
        counts_ise = of_all(self.comm, numbers.arriving_sx, self.gathers)
        return self._counted(self._without_waiting(counts_ise, rows, x) or self._waiting(numbers, counts_ise))

    def _hands(self, counts_isV: np.ndarray) -> np.ndarray:
        """Returns how many rows of each slot tensor ranks send of their lists: (i, s, V)."""
        return counts_isV

    def _counted(self, finish: Finish) -> Exchanges:
        """Adds what is moved to the total, if a backward pass may follow."""
        counted = not evaluating()

        def exchanges() -> tuple[Exchange, ...]:
            found, moved = finish()
            if counted:
                self.moved += moved
            return found

        return exchanges

    def _without_waiting(self, counts_ise: Tensor, rows: int, x: Tensor) -> Finish | None:
        """Works without counts on the host if only this process's experts can be chosen and a product is one kernel."""
        alone = self.comm.size("expert") == 1 and (self.of_one_rank or self.gathers == 1)
        if self.packed or not alone or not one_kernel(x, *self.widths):
            return None
        exchange = Exchange(Splits((rows,), (rows,)), counts_ise, rows, self.gathers * rows, None, self.kernel)
        return lambda: ((exchange,), Rows(rows, rows, exchange.total, exchange.total))

    def _waiting(self, numbers: Numbers, counts_ise: Tensor) -> Finish:
        read = self.comm.reader(torch.cat((*numbers.passing, counts_ise)))
        own, passing = self.comm.rank("expert_tensor") if self.gathers > 1 else 0, len(numbers.passing)

        def exchange(counts_ise: Tensor, passing_jse: np.ndarray, arriving_ise: np.ndarray) -> Exchange:
            sent, *through = passing_jse.sum(2).tolist()
            rows = rows_of(arriving_ise, sum(sent), own)
            splits = self.route.splits(sent, arriving_ise[own].sum(1).tolist(), *through)
            sizes = tuple(arriving_ise.sum((0, 1)).tolist())
            return Exchange(splits, counts_ise, rows.gathered // self.gathers, rows.computed, sizes, self.kernel)

        def finish() -> tuple[tuple[Exchange, ...], Rows]:
            values = np.array(read())
            chunks = (in_chunks(counts, self.chunks) for counts in (counts_ise, values[:passing], values[passing:]))
            exchanges = tuple(exchange(*chunk) for chunk in zip(*chunks, strict=True))
            rows = rows_of(values[passing:], int(values[0].sum()), own, self.chunks)
            return exchanges, replace(rows, relayed=int(values[1:passing].sum()))

        return finish

    def _planning(self, counts_E: Tensor, policy: Policy) -> Finish:
        """Exchanges the numbers of rows of all lists, of which every process makes the same plan."""
        processes, device = self.comm.size("expert"), counts_E.device
        counts_isE = self.comm.all_gather(counts_E, "expert", tag="dispatch.counts", phase="forward")
        counts_isE = counts_isE.view(1, processes, -1)
        if self._own_lists:
            counts_isE = self.comm.all_gather(
                counts_isE, "expert_tensor", tag="dispatch.gather_counts", phase="forward"
            )
        read = self.comm.reader(counts_isE)
        process, own = self.comm.rank("expert"), self.comm.rank("expert_tensor") if self.gathers > 1 else 0

        def finish() -> tuple[tuple[Exchange, ...], Rows]:
            counts = np.array(read())
            plan = policy(counts.sum((0, 1)))
            slots, loans = slots_of(plan, counts), loans_of(plan, process)
            hands_isV = self._hands(slots.counts_isV)
            arriving = hands_isV[:, :, slots.of(process)]
            sent_ss = np.stack([hands_isV[own][:, slots.of(to)].sum(1) for to in range(processes)], 1)
            sent, passing = sent_ss[process].tolist(), relayed(sent_ss, process, self.route.nodes).tolist()
            rows = rows_of(arriving, sum(sent), own)
            if self.route.nodes > 1:
                rows = replace(rows, relayed=sum(passing))
            device_needs = [arriving]
            if loans is not None:
                rows = replace(rows, lent=len(loans.lent), borrowed=loans.borrowed, exchanges=1)
                lister = own if self._own_lists else 0
                device_needs += [np.array(loans.lent, dtype=np.int64), runs_of(slots, lister, process)]
            counts_ise, *of_loans = deliver(device_needs, device)
            exchange = Exchange(
                self.route.splits(sent, arriving[own].sum(1).tolist(), passing),
                counts_ise,
                rows.gathered // self.gathers,
                rows.computed,
                tuple(arriving.sum((0, 1)).tolist()),
                self.kernel,
                loans,
                *of_loans,
            )
            return (exchange,), rows

        return finish

    @property
    def _own_lists(self) -> bool:
        """Whether tensor ranks list rows of their own, rather than all the same."""
        return self.gathers > 1

    @property
    def _dealers(self) -> int:
        """Among how many processes the rows of a list are dealt."""
        return 1


class DealtPath(RaggedPath):
    """Duplicate token dropping (paper §5.1): all tensor ranks list the same rows, and each exchanges every T-th."""

    def send(self, x_TH: Tensor, routing: Routing) -> list[Issued[RaggedRows]]:
        x, rows = to_compute_dtype(x_TH), listed(len(routing.choice_EC), self.deals)
        counts_E = routing.counts_E
        own_E, hands_iE = counts_E, counts_E.unsqueeze(0)
        if self.policy is None:  # otherwise whole lists are planned for, and dealt afterwards
            if self.packed or rows > len(routing.choice_EC):  # the last expert gets what is missing
                counts_E = torch.cat((counts_E[:-1], counts_E[-1:] - counts_E.sum() % -self.deals))
            own_E = dealt(counts_E, self.deals, self.comm.rank("tensor"))
            if self.chunks > 1:
                hands_iE = torch.stack([dealt(counts_E, self.deals, rank) for rank in range(self.deals)])
        exchanges = self._ask(own_E, rows // self.deals, x)
        listing = self._listing(routing, hands_iE, exchanges)
        if self.packed:
            rows = listed(len(listing.choice_EC), self.deals)
        x_RH = grown(spread_choices(x, listing, self.kernel), rows)
        hand = slice_to(x_RH.unflatten(0, (-1, self.deals)), self.comm, "tensor", "dispatch.drop", dim=1)
        return self._to_experts(hand.flatten(0, 1), exchanges, listing)

    def receive(self, back: list[RaggedRows], routing: Routing) -> Tensor:
        y_RH = gather_from(_joined(back).unsqueeze(1), self.comm, "tensor", "combine.gather", dim=1).flatten(0, 1)
        listing = back[0].listing or routing
        return merge_choices(y_RH[: len(listing.choice_EC)], listing, self.kernel)

    def _hands(self, counts_isV: np.ndarray) -> np.ndarray:
        return hands(counts_isV[0], self.deals)

    @property
    def _own_lists(self) -> bool:
        return False

    @property
    def _dealers(self) -> int:
        return self.deals


def _joined(back: list[RaggedRows]) -> Tensor:
    """Returns the results of all chunks."""
    return back[0].values if len(back) == 1 else torch.cat([y.values for y in back])


class Arrangement(NamedTuple):
    """How received rows are sorted by expert.

    Attributes:
        row_N: The place of each expert row among received ones, (i, M) flattened; None: the same place.
        place_iM: The inverse, -1 where a process received fewer than M.
        groups: Which expert each row belongs to.
        kernel: What sorts them, see ``moe.kernel``.
    """

    row_N: Tensor | None
    place_iM: Tensor | None
    groups: Groups
    kernel: str

    def sort(self, x_iMH: Tensor) -> Tensor:
        """Sorts received rows (i·M, H) by expert: (N, H)."""
        if self.row_N is None or self.place_iM is None:
            return x_iMH
        return gather_rows(x_iMH, self.row_N, self.place_iM.unsqueeze(1), self.kernel)

    def restore(self, y_NH: Tensor) -> Tensor:
        """Inverts :meth:`sort`, with zeros where nothing was received."""
        if self.row_N is None or self.place_iM is None:
            return y_NH
        return gather_rows(y_NH, self.place_iM, self.row_N.unsqueeze(1), self.kernel)


def arrange(exchange: Exchange) -> Arrangement:
    """Sorts by expert, then by sender, then by receiver, without waiting for the device."""
    counts_ise = exchange.counts_ise
    ranks, senders, experts = counts_ise.shape
    alike = ranks == 1 and 1 in (senders, experts)
    index = index_functions(exchange.kernel, counts_ise.device)
    runs = index.runs(counts_ise, exchange.width, exchange.total, whole=not alike)
    groups = Groups(runs.expert_N, runs.ends_e, exchange.sizes)
    return Arrangement(runs.row_N, runs.place_iM, groups, exchange.kernel)


class RowRegion(Protocol):
    """The entry and exit of the computation that an expert_tensor group divides.

    Attributes:
        feeds: Tag of the collective that results go into; a second pass that does not repeat it does not need them.
    """

    feeds: str

    def enter(self, x: RaggedRows, arrangement: Arrangement) -> Tensor:
        """Maps the rows that this process received to rows (N, H) of which every process computes its part."""
        ...

    def leave(self, partial_NH: Tensor, exchange: Exchange, arrangement: Arrangement) -> Tensor:
        """Returns the rows that this process sends back: sums of the group's parts, or its own parts.

        Backward, every process of the group must get the gradient of the whole sums.
        """
        ...


class ReplicatedRows:
    """Every process that divides an expert receives the same rows and sends back its parts of the results.

    If there is one, its parts are whole.
    """

    def __init__(self, comm: Collectives) -> None:
        self.comm, self.feeds = comm, route(comm).returning

    def enter(self, x: RaggedRows, arrangement: Arrangement) -> Tensor:
        return arrangement.sort(x.values)

    def leave(self, partial_NH: Tensor, exchange: Exchange, arrangement: Arrangement) -> Tensor:
        return arrangement.restore(partial_NH)


class GatheredRows:
    """Each process receives its own rows, which are gathered; results are reduced in the paper's order."""

    feeds = "experts.reduce"

    def __init__(self, comm: Collectives) -> None:
        self.comm = comm

    def enter(self, x: RaggedRows, arrangement: Arrangement) -> Tensor:
        x_iMH = gather_from(_widened(x), self.comm, "expert_tensor", "dispatch.gather", dim=0)
        return copy_to(arrangement.sort(x_iMH), self.comm, "expert_tensor", "experts.copy")

    def leave(self, partial_NH: Tensor, exchange: Exchange, arrangement: Arrangement) -> Tensor:
        y_iMH = arrangement.restore(reduce_from(partial_NH, self.comm, "expert_tensor", "experts.reduce"))
        y_MH = slice_to(y_iMH, self.comm, "expert_tensor", "combine.drop", dim=0)
        return y_MH[: sum(exchange.splits.received)]


class ScatteredRows(GatheredRows):
    """Each process receives its own rows and gets only their sums: a reduce-scatter is all-reduce and drop."""

    def enter(self, x: RaggedRows, arrangement: Arrangement) -> Tensor:
        return arrangement.sort(gather_to(_widened(x), self.comm, "expert_tensor", "dispatch.gather", dim=0))

    def leave(self, partial_NH: Tensor, exchange: Exchange, arrangement: Arrangement) -> Tensor:
        y_MH = scatter_from(arrangement.restore(partial_NH), self.comm, "expert_tensor", "experts.reduce", dim=0)
        return y_MH[: sum(exchange.splits.received)]


def _widened(x: RaggedRows) -> Tensor:
    """Pads this process's rows to (M, H), since the gather takes equal parts."""
    return grown(x.values, x.exchange.width)


def ragged_path(
    num_experts: int,
    widths: tuple[int, int],
    topology: Topology,
    kernel: str = "auto",
    policy: Policy | None = None,
    packed: bool = False,
) -> tuple[RaggedPath, RowRegion]:
    """Returns the path and the region that the topology's toggles select.

    Args:
        num_experts: Number of experts E.
        widths: Widths of this process's part of an expert's matrices.
        topology: The process's place in the meshes.
        kernel: What copies and sums rows, see ``moe.kernel``.
        policy: Plans who computes which rows, see ``moe/lending``; None: the home of their expert.
        packed: Whether the device decides how many rows there are, see ``packed.py``.
    """
    layout = topology.layout
    path = DealtPath if layout.dealt else RaggedPath
    return path(num_experts, topology, widths, kernel, policy, packed, layout.chunks), _region(topology)


def _region(topology: Topology) -> RowRegion:
    layout, comm = topology.layout, topology.comm
    if layout.gathers == 1:
        return ReplicatedRows(comm)
    return (ScatteredRows if layout.scattered else GatheredRows)(comm)
