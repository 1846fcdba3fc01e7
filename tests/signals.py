"""How a process, and whatever it starts, answers to signals: shells ignore some for a script's background."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def answered(by: Any, *numbers: signal.Signals) -> Iterator[None]:
    """Within it, the handler ``by`` answers; programs that are started take SIG_IGN over, and else begin as usual."""
    before = {number: signal.signal(number, by) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
