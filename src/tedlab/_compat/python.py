"""What tedlab uses of the standard library's private names."""

import atexit
import pickle
from collections.abc import Callable
from typing import Any, ClassVar


def run_exit_functions() -> None:
    """Runs what ``atexit`` has registered, for a process that then leaves by ``os._exit``, which runs none of it."""
    atexit._run_exitfuncs()


class PythonUnpickler(pickle._Unpickler):
    """pickle's reader in Python, whose instructions a subclass can replace; those of the public one are in C.

    Attributes:
        stack: of the objects made so far.
        dispatch: the method of each instruction, by its code.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]]
