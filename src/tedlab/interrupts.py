"""What Ctrl-C does to a command: it ends with a line, and so do the processes that it has started.

Ctrl-C reaches all processes of a terminal. Imported last by a server that forks processes, this module makes those end
at once and silently, until they say otherwise; the server itself ignores it. A command that is started with Ctrl-C
ignored, as in the background of a script, keeps ignoring it, and so do the processes that it forks.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tedlab._compat.python import shorten_paths_of_sockets

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

_SERVER = "TEDLAB_FORK_SERVER"  # the environment variable that tells a server what it is

if os.environ.pop(_SERVER, None) is not None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Within it, Ctrl-C ends the process with a line and the exit code of SIGINT instead of a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nSIGINT: ended.", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)


def fork_server(preload: Sequence[str]) -> "BaseContext":
    """Starts the server from which processes are forked, if there is none, and returns the context that makes them.

    The server begins with Ctrl-C ignored, since it would end in the middle of its imports, with a traceback. It keeps
    ignoring it, but gives processes what this module has set, unless this process ignores it, too.

    Args:
        preload: Modules that the server imports, so that processes need not.
    """
    import multiprocessing  # not above: a command that needs no processes is at work sooner
    from multiprocessing import forkserver

    shorten_paths_of_sockets()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*preload, __name__])
    if threading.current_thread() is threading.main_thread():  # only it can set handlers
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is ignored stays so in a new program
        if before != signal.SIG_IGN:
            os.environ[_SERVER] = "1"
        try:
            forkserver.ensure_running()
        finally:
            os.environ.pop(_SERVER, None)
            signal.signal(signal.SIGINT, before)
    # Once this one has ended, the imports are done: of a process that is asked for while they go on, and forked when
    # the one that asked is gone, Python prints a traceback.
    first = context.Process(target=_nothing)
    first.start()
    first.join()
    return context


def _nothing() -> None:
    pass
