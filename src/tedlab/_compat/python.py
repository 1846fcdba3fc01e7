"""What tedlab uses of the standard library's private and undocumented names."""

import atexit
import os
import pickle
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

_LONGEST = 103  # bytes of a socket's path on macOS; on Linux 107
_BELOW = len("/pymp-01234567/listener-01234567")  # of a socket below the folder for temporary files


def run_exit_functions() -> None:
    """Runs what ``atexit`` has registered, for a process that then leaves by ``os._exit``, which runs none of it."""
    atexit._run_exitfuncs()


def shorten_paths_of_sockets() -> None:
    """Puts the sockets of this process, and of those that it starts, below ``/tmp`` if ``TMPDIR`` is too long for them.

    Else no server starts that forks processes, and a training process waits for ever for the samples that its data
    workers cannot hand over. Later releases of Python do this themselves (python/cpython#132124); in others nothing
    public says where sockets are. If neither ``TMPDIR`` nor ``/tmp`` can be used, the error comes where a socket is
    needed.
    """
    with suppress(OSError):
        if len(os.fsencode(tempfile.gettempdir())) + _BELOW <= _LONGEST:
            return
        from multiprocessing import util

        usual = tempfile.tempdir
        tempfile.tempdir = "/tmp"
        try:
            util.get_temp_dir()  # which is remembered, and handed on
        finally:
            tempfile.tempdir = usual


class PythonUnpickler(pickle._Unpickler):
    """pickle's reader in Python, whose instructions a subclass can replace; those of the public one are in C.

    Attributes:
        stack: of the objects made so far.
        dispatch: the method of each instruction, by its code.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]]
