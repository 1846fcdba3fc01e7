"""Checks that the processes of an expert group send each other equally many slots, as their all-to-all assumes.

In a folded layout, groups that exchange, gather and divide layers overlap, so that all processes must.

The number of slots follows from the tokens of a micro-batch. If data ranks have unequal numbers of tokens, a
communication library aborts, hangs or mixes values up; this check raises an error first. It costs nothing while the
numbers stay the same: the processes compare them in their first forward pass. Afterwards a process whose number changes
announces it and waits for the others to announce theirs; if no other number has changed, it times out.
"""

import itertools
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import DistNetworkError

from tedlab._compat.torch import default_store
from tedlab.comm.collectives import Collectives
from tedlab.comm.recompute import recomputing
from tedlab.degrees import GroupKind

_RULE = "Experts with a capacity take equally many slots from every process of an expert group"
_GATHERED_RULE = "comm.dedup=group gathers equally many tokens from every process of an expert group"
_ADVICE = (
    "Give each the same number of tokens, by padding (see padding_mask of MoELayer), or use {}, which takes as many as "
    "there are"
)

_numbers = itertools.count()  # numbers the agreements that this process has begun


class SlotAgreement:
    """The check that the module docstring describes. All MoE layers of a process share one.

    Args:
        comm: The collectives of this process.
        kind: The kind of group that must agree.

    Attributes:
        uneven: Whether the numbers may differ, as at the end of predictions; each forward pass then agrees on the
            largest. All processes must set the same value.
        patience: How long to wait for the others' announcements.
    """

    def __init__(self, comm: Collectives, kind: GroupKind = "expert") -> None:
        self.comm, self.kind = comm, kind
        self.uneven = False
        self.patience = timedelta(minutes=5)
        self._tokens: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # in each layer's last forward pass
        self._last: int | None = None  # the tokens of the last layer whose number changed
        self._changes = 0
        self._number = 0  # tells the keys of this agreement from those of the group's earlier ones in the store

    def __deepcopy__(self, memo: dict[int, Any]) -> "SlotAgreement":
        """Returns itself, since a copy of a layer communicates with the same processes."""
        return self

    def expect(self, layer: nn.Module, tokens: int, slots: int, gathered: bool = False) -> None:
        """Checks what a layer is about to send. Every process calls it before every forward pass of the layer.

        Args:
            layer: The MoE layer.
            tokens: The number of tokens in this process's micro-batch.
            slots: The number of slots that it sends for each expert.
            gathered: Whether tokens are gathered rather than put into slots; ``slots`` is then how many it sends.

        Raises:
            ValueError: If the processes of the group do not send equally many slots; the message lists their numbers,
                or says that the others announced none.
        """
        before = self._tokens.get(layer, self._last)  # a new layer is assumed to have as many tokens as the last one
        if self.uneven or recomputing() or self.comm.size(self.kind) == 1:
            return
        self._tokens[layer] = tokens
        if tokens == before:
            return
        self._last = tokens
        rule = _GATHERED_RULE if gathered else _RULE
        advice = _ADVICE.format("comm.dedup=rank" if gathered else "moe.dispatch=dropless")
        if before is None:
            have = self._together(tokens, slots)
        else:
            have = self._announced(before, tokens, slots, f"{rule}, but", advice)
        if len({theirs for _, theirs in have}) > 1:
            what = "" if gathered else ", {} slots for each expert"
            told = ", ".join(
                f"process {rank} {own} tokens{what.format(theirs)}"
                for rank, (own, theirs) in zip(self._ranks, have, strict=True)
            )
            raise ValueError(f"{rule}, but the micro-batches of this one are unequal: {told}. {advice}.")

    def largest(self, slots: int) -> int:
        """Returns the slots to send for each expert: ``slots``, or the group's maximum where numbers may differ."""
        if not self.uneven or self.comm.size(self.kind) == 1:
            return slots
        own = torch.tensor([slots], device=self._device)
        return int(self.comm.all_reduce(own, self.kind, tag="dispatch.slots", phase="check", op="max"))

    @property
    def _ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.comm.group(self.kind))

    @property
    def _device(self) -> str:
        return "cuda" if dist.get_backend(self.comm.group(self.kind)) == "nccl" else "cpu"

    def _together(self, tokens: int, slots: int) -> Sequence[tuple[int, int]]:
        own = torch.tensor([[tokens, slots, next(_numbers)]], device=self._device)
        table = self.comm.all_gather(own, self.kind, tag="dispatch.slots", phase="check").tolist()
        # The group's earlier agreements may have left announcements in the store, under lower numbers.
        self._number = max(number for *_, number in table)
        return [(theirs, of_them) for theirs, of_them, _ in table]

    def _announced(self, before: int, tokens: int, slots: int, rule: str, advice: str) -> Sequence[tuple[int, int]]:
        """Exchanges numbers through the store: processes that see no change would not join a collective."""
        self._changes += 1
        store, group = default_store(), self.comm.group(self.kind)
        place = f"tedlab/slots/{group.group_name}/{self._number}"
        store.set(f"{place}/{self._changes}/{group.rank()}", f"{tokens} {slots}")
        keys = [f"{place}/{self._changes}/{rank}" for rank in range(group.size())]
        try:
            store.wait(keys, self.patience)
        except RuntimeError as error:  # some kinds of store raise it when their wait times out
            if isinstance(error, DistNetworkError):
                raise
            raise ValueError(
                f"{rule} with a micro-batch of {tokens} tokens after {before} process {self._ranks[group.rank()]} has "
                f"waited {self.patience.total_seconds():g} s for others of processes "
                f"{', '.join(map(str, self._ranks))} to have another number, too. {advice}."
            ) from None
        # A process that announces this change has read all announcements of the one before the previous.
        store.delete_key(f"{place}/{self._changes - 2}/{group.rank()}")
        announced = [store.get(key).decode().split() for key in keys]
        return [(int(theirs), int(of_them)) for theirs, of_them in announced]
