"""What attention remembers of the tokens before, so that a text grows by a token without being computed again.

A layer remembers each token's keys and values, or, if it is :class:`~tedlab.nn.LatentAttention`, the latent that they
are made of. Each token has a slot with the number of its position. Samples may differ in length: a query sees slots up
to its own position, and what stands in later ones is written before a query sees it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tedlab.nn.attend import attend_visible


class Past:
    """The slots of all layers, and the positions of the tokens that are being computed.

    Args:
        room: Number of slots for each sample, the most positions that it may have.

    Attributes:
        position_BS: (B, S) int64, the positions of the tokens that are being computed.
        end: One more than the last of these positions.
        begins: Whether they are the first ones of all samples, so that nothing is remembered of tokens before.
        last: Whether they are the last one of each sample, which sees all slots up to its own.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.end, self.begins, self.last = 0, True, False
        self.position_BS = torch.empty(0, 0, dtype=torch.int64)
        self._slots: dict[int, tuple[Tensor, ...]] = {}
        self._turns: Tensor | None = None
        self._sample_B1: Tensor | None = None
        self._visible: dict[int | None, Tensor] = {}  # by window, of the tokens that are being computed

    def enter(self, position_BS: Tensor, end: int, last: bool = False) -> None:
        """Says which tokens are computed next.

        Args:
            position_BS: (B, S) int64, their positions, which are consecutive in each sample, and at first 0, 1, ….
            end: One more than the last of these positions, in all samples, or any larger number.
            last: Whether all positions are ``end - 1``, which the host need not ask the device then.

        Raises:
            ValueError: If there is no room for them.
        """
        if end > self.room:
            raise ValueError(f"{end} positions are more than the {self.room} for which there is room")
        self.begins = not self._slots
        self.position_BS, self.end, self.last = position_BS, end, last
        self._visible.clear()

    def turns(self, of_all: Callable[[int], Tensor]) -> Tensor:
        """Returns the rotation of the tokens' positions (2, B, S, d/2).

        Args:
            of_all: Returns that of so many positions (2, room, d/2), see :func:`tedlab.nn.rotation`; called once.
        """
        if self._turns is None:
            self._turns = of_all(self.room)
        return self._turns[:, self.position_BS]

    def extend(self, layer: int, *values: Tensor) -> tuple[Tensor, ...]:
        """Remembers what a layer has computed of the tokens, and returns what it knows of all up to them.

        Args:
            layer: Any number that tells layers apart.
            values: (B, S, …), in the order of the first call.

        Returns:
            (B, end, …) for each.
        """
        if layer not in self._slots:
            self._slots[layer] = tuple(value.new_zeros(len(value), self.room, *value.shape[2:]) for value in values)
        length = self.position_BS.shape[1]
        for slots, value in zip(self._slots[layer], values, strict=True):
            if self.begins or self.last:
                start = 0 if self.begins else self.end - length
                slots[:, start : start + length] = value
            else:
                slots[self._samples(), self.position_BS] = value
        return tuple(slots[:, : self.end] for slots in self._slots[layer])

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None = None,
        sinks: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Does what :func:`tedlab.nn.attend` does for queries of the tokens and keys of all slots up to them.

        Args:
            q: Queries (B, H, S, d).
            k: Keys (B, K, end, d).
            v: Values (B, K, end, e).
            window, sinks, scale: See there.
        """
        if self.last and (window is None or window >= self.end):
            return attend_visible(q, k, v, None, sinks, scale)  # kernels are faster without a mask
        if window not in self._visible:
            before = self.position_BS.unsqueeze(-1) - torch.arange(self.end, device=q.device)  # (B, S, end)
            seen = before >= 0 if window is None else (before >= 0) & (before < window)
            self._visible[window] = seen.unsqueeze(1)
        return attend_visible(q, k, v, self._visible[window], sinks, scale)

    def _samples(self) -> Tensor:
        if self._sample_B1 is None:
            self._sample_B1 = torch.arange(len(self.position_BS), device=self.position_BS.device).unsqueeze(1)
        return self._sample_B1


@runtime_checkable
class Remembers(Protocol):
    """A module whose tokens depend on those before, or on their positions."""

    past: Past | None


def rememberers(root: nn.Module) -> list[Remembers]:
    """Returns the modules below ``root``, itself included, that can remember tokens."""
    return [module for module in root.modules() if isinstance(module, Remembers)]


@contextmanager
def remembering(modules: Sequence[Remembers], past: Past) -> Iterator[Past]:
    """Lets modules remember tokens inside the context, and compute only those that are new."""
    for module in modules:
        module.past = past
    try:
        yield past
    finally:
        for module in modules:
            module.past = None
