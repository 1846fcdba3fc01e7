"""A command as a user types it, but in this process: starting another takes longer than most of them."""

import sys
from collections.abc import Callable

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig


def run_command(main: Callable[[], None], *arguments: str) -> int | str | None:
    """What the command exits with: a message, a code, or None. Nothing of Hydra is left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tedlab", *arguments])
        try:
            main()
        except SystemExit as end:
            return end.code
        finally:
            HydraConfig.instance().cfg = None
            GlobalHydra.instance().clear()
    return None
