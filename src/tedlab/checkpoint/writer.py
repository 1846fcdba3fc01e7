"""Saves and removes checkpoints in order, either immediately or in the background."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tedlab._compat.torch import set_local_tensor, tree_map_only
from tedlab.checkpoint.directory import link, prepare, remove, write


class Writer:
    """Writes one checkpoint after another.

    In the background, :meth:`save` copies values to the CPU before it returns, and at most one checkpoint is being
    written. The next :meth:`save` or :meth:`wait` raises a failure. Nothing is removed after one, because the previous
    checkpoint may be the only one left.

    Args:
        background: Whether to write while training goes on. This creates a process group, so construction is
            collective.
        timeout: Timeout of that group's collectives; None is torch's default.
    """

    def __init__(self, background: bool, timeout: timedelta | None = None) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        # A second thread needs its own group for collectives, and tensors on the CPU need gloo.
        self._group = dist.new_group(backend="gloo", timeout=timeout) if background else None
        self._pending: list[Future[None]] = []

    def save(self, tensors: dict[str, Any], meta: Mapping[str, Any], path: Path) -> None:
        """Saves a checkpoint as :func:`tedlab.checkpoint.save` does. Collective."""
        self.wait()
        prepared = prepare(tensors, meta)
        if self._thread is not None:
            tensors = tree_map_only(Tensor, _copied_to_cpu, tensors)
        self._run(lambda: write(tensors, prepared, path, self._group))

    def remove(self, path: Path) -> None:
        """Deletes a checkpoint once all earlier tasks have succeeded. Only one process may call it."""
        self._run(lambda: remove(path))

    def link(self, target: Path, path: Path) -> None:
        """Makes ``path`` a link to a checkpoint once all earlier tasks have succeeded. Collective."""
        self._run(lambda: link(target, path, self._group))

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
            OSError: If something could not be written.
        """
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def _run(self, task: Callable[[], None]) -> None:
        if self._thread is None:
            task()
            return
        before = list(self._pending)

        def in_turn() -> None:
            for future in before:
                future.result()  # raises an earlier task's failure, so that this task does not run
            task()

        self._pending.append(self._thread.submit(in_turn))


def _copied_to_cpu(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", copy=True)
    copied = tensor.detach()
    assert isinstance(copied, DTensor)
    # torch's own stagers fail on our shards.
    set_local_tensor(copied, tensor.to_local().detach().to("cpu", copy=True))
    return copied
