"""What operations move, counted in torch's dispatcher."""

from collections import Counter
from typing import Any

from tedlab._compat.torch import TorchDispatchMode
from tedlab.predict.sim.roofline import work_of
from tedlab.spec import Work


class Moved(TorchDispatchMode):
    """Adds up the bytes that operations read and write, and lists their work."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0
        self.works: Counter[Work] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        work = work_of(func, args, kwargs or {}, out)
        if work is not None:
            self.bytes += work.bytes
            self.works[work] += 1
        return out
