"""What operations move, counted in torch's dispatcher."""

from typing import Any

from tedlab._compat.torch import TorchDispatchMode
from tedlab.predict.sim.roofline import work_of


class Moved(TorchDispatchMode):
    """Adds up the bytes that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        work = work_of(func, args, kwargs or {}, out)
        self.bytes += 0.0 if work is None else work.bytes
        return out
