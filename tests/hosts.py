"""Hosts that are namespaces of this machine: each with a name, interfaces and an /etc/hosts of its own, on one wire."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

WIRES = {"eth0": ("10.77.0.{}", "fd77::{}"), "eth1": ("10.88.0.{}", "fd88::{}")}


@dataclass(frozen=True)
class Host:
    """A host, by the process that keeps its namespaces, and the folder in which its commands run."""

    name: str
    keeper: int
    folder: Path

    def enter(self, *command: str) -> list[str]:
        """Returns the command line that runs a command on this host; entering its namespaces leaves the folder."""
        return ["nsenter", "-t", str(self.keeper), "-n", "-m", "-u", "--", "env", "-C", str(self.folder), *command]


def why_not() -> str | None:
    """Returns why there can be no such hosts here; None if there can."""
    for program in ("ip", "unshare", "nsenter", "mount"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    tried = subprocess.run(["unshare", "-n", "-m", "-u", "true"], capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"no namespaces may be made: {tried.stderr.strip()}"


@contextlib.contextmanager
def two_hosts(folder: Path, names: dict[str, Sequence[str]]) -> Iterator[tuple[Host, Host]]:
    """Makes two hosts, joined by two wires (:data:`WIRES`).

    Args:
        folder: Where commands run, on both hosts.
        names: The addresses of a name on each host, where ``{}`` stands for the host's number: 1 or 2.
    """
    lines = [
        f"{form.format(number)} {name}{number}" for name, forms in names.items() for form in forms for number in (1, 2)
    ]
    (folder / "etc_hosts").write_text("\n".join(["127.0.0.1 localhost", "::1 localhost", *lines, ""]))
    with contextlib.ExitStack() as stack:
        hosts = []
        for number in (1, 2):
            name = f"{next(iter(names))}{number}"
            setup = f"mount --bind '{folder}/etc_hosts' /etc/hosts && hostname {name} && exec sleep 1000"
            keeper = subprocess.Popen(["unshare", "-n", "-m", "-u", "sh", "-c", setup])
            stack.callback(keeper.wait)
            stack.callback(keeper.kill)
            hosts.append(Host(name, keeper.pid, folder))
        first, second = hosts
        _wait_for_names(hosts)
        for wire in WIRES:
            _run(
                first.enter(
                    "ip", "link", "add", wire, "type", "veth", "peer", "name", wire, "netns", str(second.keeper)
                )
            )
        for number, host in enumerate(hosts, 1):
            _run(host.enter("ip", "link", "set", "lo", "up"))
            for wire, (v4, v6) in WIRES.items():
                _run(host.enter("ip", "addr", "add", f"{v4.format(number)}/24", "dev", wire))
                _run(host.enter("ip", "addr", "add", f"{v6.format(number)}/64", "dev", wire, "nodad"))
                _run(host.enter("ip", "link", "set", wire, "up"))
        yield first, second


def _wait_for_names(hosts: Sequence[Host]) -> None:
    deadline = time.monotonic() + 20
    for host in hosts:
        asked = host.enter("hostname")
        while subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() != host.name:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
