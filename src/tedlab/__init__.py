"""tedlab: train Mixture-of-Experts transformers under tensor × expert × data parallelism.

``import tedlab`` registers the Lightning strategy, so that ``Trainer(strategy="ted")`` works. This imports torch and
Lightning, which takes seconds. A command (``tedlab train …``) must print its help sooner, so it imports the names below
when they are first used.
"""

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

_MODULES = {"ParallelDegrees": "degrees", "TEDStrategy": "strategy", "Topology": "topology"}


def _runs_a_command() -> bool:
    """Returns whether this process was started as a tedlab command rather than a program that imports tedlab."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # Python sets this until it has found the module to run
        return re.search(r" -m ?tedlab(\.| |$)", " ".join(sys.orig_argv)) is not None
    return Path(program).stem == "tedlab"  # the console script


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'tedlab' has no attribute '{name}'")
    return getattr(import_module(f"tedlab.{_MODULES[name]}"), name)


if TYPE_CHECKING or not _runs_a_command():
    from tedlab.degrees import ParallelDegrees
    from tedlab.strategy import TEDStrategy
    from tedlab.topology import Topology

__all__ = ["ParallelDegrees", "TEDStrategy", "Topology"]
