"""Counts the ranks that a signal ended, over all processes of a pytest run, and fails the run when it was not one.

One may be chance, and the pool runs its world again; two are a fault that second chances would hide.
"""

import os
import tempfile
from pathlib import Path

import pytest

MOST = 1  # in one pytest run
FILE = "TEDLAB_TEST_DEATHS"  # the environment variable that names the file to all processes of xdist
_OURS = pytest.StashKey[Path]()


def record(what: str) -> None:
    """Notes one death. Under no pytest run of ours nobody counts."""
    if FILE in os.environ:
        with open(os.environ[FILE], "a") as file:
            file.write(what.splitlines()[0] + "\n")


def recorded() -> list[str]:
    """Of this pytest run so far."""
    return Path(os.environ[FILE]).read_text().splitlines()


def pytest_configure(config: pytest.Config) -> None:
    """Starts counting, in the process that starts the others."""
    if not hasattr(config, "workerinput"):
        number, name = tempfile.mkstemp(prefix="tedlab-deaths-")
        os.close(number)
        config.stash[_OURS] = Path(name)
        os.environ[FILE] = name


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run that would otherwise pass."""
    if _OURS in session.config.stash and len(recorded()) > MOST and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says so."""
    deaths = recorded()
    if deaths:
        verdict = f"more than {MOST}: the run fails" if len(deaths) > MOST else "its world was run again"
        terminalreporter.section(f"ranks that a signal ended: {len(deaths)} ({verdict})", red=len(deaths) > MOST)
        for line in deaths:
            terminalreporter.line(line)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the file."""
    if _OURS in config.stash:
        config.stash[_OURS].unlink(missing_ok=True)
        os.environ.pop(FILE, None)
