"""Ctrl-C ends a command with a line, and the processes that it forks without one."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tedlab import interrupts
from tedlab._compat import python
from tedlab.interrupts import ended_by_ctrl_c
from tests.signals import answered

# Forks a process, waits, and tells how each ends. The server imports a module that takes its time.
SCRIPT = """
import os, signal, sys, time
from interrupts import ended_by_ctrl_c, fork_server

def work(pipe):
    pipe.send((os.getppid(), signal.getsignal(signal.SIGINT)))
    time.sleep(100)

if __name__ == "__main__":
    with ended_by_ctrl_c():
        before = signal.getsignal(signal.SIGINT)
        context = fork_server(["slow"])
        assert signal.getsignal(signal.SIGINT) == before
        print("importing", flush=True)
        if sys.argv[1] == "early":
            time.sleep(100)
        here, there = context.Pipe()
        worker = context.Process(target=work, args=(there,))
        worker.start()
        server, of_worker = here.recv()
        os.kill(server, signal.SIGINT)  # ignored
        assert of_worker == (signal.SIG_IGN if before == signal.SIG_IGN else signal.SIG_DFL)
        print("at work", flush=True)
        try:
            worker.join()
        except KeyboardInterrupt:
            worker.join()
            print("worker", worker.exitcode, flush=True)
            raise
"""


def test_a_command_ends_with_a_line_and_the_code_of_the_signal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, ended_by_ctrl_c():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == "\nSIGINT: ended.\n"


def copy_alone(folder: Path) -> None:
    """Copies the module and what it imports, without all that importing tedlab takes."""
    shutil.copy(interrupts.__file__, folder)
    package = folder / "tedlab" / "_compat"
    package.mkdir(parents=True)
    for file in (package.parent / "__init__.py", package / "__init__.py"):
        file.touch()
    shutil.copy(python.__file__, package)


def interrupted(tmp_path: Path, handler: Any, moment: str, until: str) -> "tuple[subprocess.Popen[str], str]":
    """The script, where SIGINT has the handler and Ctrl-C follows the line ``until``; and its lines so far.

    The path of its temporary files is too long for the server's sockets, which are elsewhere then.
    """
    temporary = tmp_path / ("x" * 100)
    temporary.mkdir()
    copy_alone(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "slow.py").write_text("import time; time.sleep(0.5)\n")
    with answered(handler, signal.SIGINT):
        process = subprocess.Popen(
            [sys.executable, "script.py", moment],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"TMPDIR": str(temporary)},
        )
    assert process.stdout is not None
    shown = ""
    for line in process.stdout:
        shown += line
        if line.startswith(until):
            break
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    return process, shown


@pytest.mark.parametrize(("moment", "until"), [("early", "importing"), ("late", "at work")])
def test_forked_processes_and_their_server_say_nothing(tmp_path: Path, moment: str, until: str) -> None:
    """Ctrl-C goes to all processes of a terminal, while the server imports or the process works."""
    process, shown = interrupted(tmp_path, signal.default_int_handler, moment, until)
    rest, _ = process.communicate(timeout=60)
    assert "Traceback" not in shown + rest, shown + rest
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "SIGINT: ended."
    assert moment == "early" or f"worker {-signal.SIGINT}" in rest


def test_where_ctrl_c_is_ignored_neither_a_command_nor_what_it_forks_ends(tmp_path: Path) -> None:
    process, shown = interrupted(tmp_path, signal.SIG_IGN, "late", "at work")
    try:
        assert "at work" in shown, shown
        with pytest.raises(subprocess.TimeoutExpired):  # the command would end with its process
            process.wait(0.5)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("handler", ["SIG_IGN", "default_int_handler"])
def test_importing_it_elsewhere_changes_nothing(tmp_path: Path, handler: str) -> None:
    """A shell starts what runs in the background of a script with Ctrl-C ignored, and it stays so."""
    code = f"import signal; signal.signal(signal.SIGINT, signal.{handler}); import interrupts; "
    code += f"print(signal.getsignal(signal.SIGINT) is signal.{handler})"
    copy_alone(tmp_path)
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout == "True\n"
