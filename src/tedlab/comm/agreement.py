"""Whether the processes of an expert group send each other equally many slots, as their all-to-all takes for granted.

Slots follow from the tokens of a micro-batch. Where data ranks have unequal numbers of them, a library of collectives
would abort, wait for ever or mix values up; here that is found before, and said. It costs nothing while a process's
number of tokens stays what it was: the processes compare it in their first forward pass, and afterwards each for itself
notices a layer's change and waits for the others to announce theirs. One whose number alone has changed waits in vain.
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

_ADVICE = (
    "Give each the same number of tokens, by padding (see padding_mask of MoELayer), or use moe.dispatch=dropless, "
    "which takes as many as there are"
)

_numbers = itertools.count()  # of the agreements that this process has begun


class SlotAgreement:
    """See the module. One for all MoE layers of a process.

    Args:
        comm: the collectives of this process.

    Attributes:
        uneven: whether numbers may differ, as at the end of predictions: each forward pass then agrees on the largest.
            To be set by all processes alike.
        patience: how long to wait for the others' announcements.
    """

    def __init__(self, comm: Collectives) -> None:
        self.comm = comm
        self.uneven = False
        self.patience = timedelta(minutes=5)
        self._tokens: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # of each layer's last forward pass
        self._last: int | None = None  # what the last layer had whose number was new
        self._changes = 0
        self._number = 0  # among the agreements that the group has made with its store

    def __deepcopy__(self, memo: dict[int, Any]) -> "SlotAgreement":
        """Itself: a copy of a layer speaks with the same processes."""
        return self

    def expect(self, layer: nn.Module, tokens: int, slots: int) -> None:
        """Says what the forward pass to come of a layer sends for one expert; before every one, in every process.

        Raises:
            ValueError: if the processes of the group do not send equally many; names them, and what they have.
        """
        before = self._tokens.get(layer, self._last)  # a new layer is first taken to have as many as another
        if self.uneven or recomputing() or self.comm.size("expert") == 1:
            return
        self._tokens[layer] = tokens
        if tokens == before:
            return
        self._last = tokens
        have = self._together(tokens, slots) if before is None else self._announced(before, tokens, slots)
        if len({theirs for _, theirs in have}) > 1:
            told = ", ".join(
                f"process {rank} {own} tokens, {theirs} slots for each expert"
                for rank, (own, theirs) in zip(self._ranks, have, strict=True)
            )
            raise ValueError(
                f"Experts with a capacity take equally many slots from every process of an expert group, but the "
                f"micro-batches of this one are unequal: {told}. {_ADVICE}."
            )

    def largest(self, slots: int) -> int:
        """How many slots to send for each expert: these, or where they may differ the most that any process has."""
        if not self.uneven or self.comm.size("expert") == 1:
            return slots
        own = torch.tensor([slots], device=self._device)
        return int(self.comm.all_reduce(own, "expert", tag="dispatch.slots", phase="check", op="max"))

    @property
    def _ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.comm.group("expert"))

    @property
    def _device(self) -> str:
        return "cuda" if dist.get_backend(self.comm.group("expert")) == "nccl" else "cpu"

    def _together(self, tokens: int, slots: int) -> Sequence[tuple[int, int]]:
        own = torch.tensor([[tokens, slots, next(_numbers)]], device=self._device)
        table = self.comm.all_gather(own, "expert", tag="dispatch.slots", phase="check").tolist()
        # An earlier agreement of the group may have left announcements under its number, which was lower.
        self._number = max(number for *_, number in table)
        return [(theirs, of_them) for theirs, of_them, _ in table]

    def _announced(self, before: int, tokens: int, slots: int) -> Sequence[tuple[int, int]]:
        """Through the store of the process group: a collective would meet those of processes that know of no change."""
        self._changes += 1
        store, group = default_store(), self.comm.group("expert")
        place = f"tedlab/slots/{group.group_name}/{self._number}"
        store.set(f"{place}/{self._changes}/{group.rank()}", f"{tokens} {slots}")
        keys = [f"{place}/{self._changes}/{rank}" for rank in range(group.size())]
        try:
            store.wait(keys, self.patience)
        except RuntimeError as error:  # by which stores of some kinds say that they have waited long enough
            if isinstance(error, DistNetworkError):
                raise
            raise ValueError(
                f"Experts with a capacity take equally many tokens from every process of an expert group, but with a "
                f"micro-batch of {tokens} tokens after {before} process {self._ranks[group.rank()]} has waited "
                f"{self.patience.total_seconds():g} s for others of processes {', '.join(map(str, self._ranks))} to "
                f"have another number, too. {_ADVICE}."
            ) from None
        # Whoever announced this change has read all announcements of the last but one.
        store.delete_key(f"{place}/{self._changes - 2}/{group.rank()}")
        announced = [store.get(key).decode().split() for key in keys]
        return [(int(theirs), int(of_them)) for theirs, of_them in announced]
