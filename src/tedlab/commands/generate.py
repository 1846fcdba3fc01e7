"""``tedlab generate run=<dir> prompt="def "``: continues a text with the model of a finished run."""

import os
from typing import Any

from tedlab.commands.application import hydra_entry
from tedlab.commands.literal import quoted
from tedlab.config import GenerateConfig
from tedlab.errors import UsageError


def prepare(arguments: list[str]) -> list[str]:
    """Quotes the values that are text."""
    return quoted(arguments, ("run", "prompt", "prompts"))


def task(config: GenerateConfig) -> None:
    """Prints the continued texts, a single one while it grows."""
    from tedlab.generate import given
    from tedlab.launch.launcher import launch
    from tedlab.launch.outside import started_outside

    try:
        given(config)
        if config.processes == 1 and not started_outside():
            written(config)
        else:
            launch(written, config, config.processes)
    except (OSError, ValueError) as error:
        raise UsageError(f"{error}") from None


def written(config: GenerateConfig) -> dict[str, Any]:
    """Writes texts to the standard output of the first process."""
    from tedlab.generate import generate

    first = os.environ.get("RANK", "0") == "0"
    if config.prompts is not None:
        texts = generate(config)
        if first:
            print("\n\n".join(texts))
    else:
        generate(config, show=(lambda piece: print(piece, end="", flush=True)) if first else None)
        if first:
            print()
    return {}


main = hydra_entry(task, "generate", GenerateConfig, prepare)
