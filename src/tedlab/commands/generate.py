"""``tedlab generate run=<dir> prompt="def "``: continues a text with the model of a finished run."""

import json
import re
from dataclasses import replace
from typing import Any

from tedlab.commands.application import hydra_entry
from tedlab.commands.literal import quoted
from tedlab.config import GenerateConfig
from tedlab.errors import UsageError


def prepare(arguments: list[str]) -> list[str]:
    """Quotes the values that are text."""
    return quoted(arguments, ("run", "prompt") if "prompts=null" in arguments else ("run", "prompt", "prompts"))


def task(config: GenerateConfig) -> None:
    """Prints the continued texts: a single one while it grows, those of a file as lines of JSON."""
    from tedlab.generate import given
    from tedlab.launch import outside
    from tedlab.launch.launcher import launch

    config = replace(config, stop=[unescaped(text) for text in config.stop])
    try:
        given(config)
        if config.processes == 1 and not outside.started_outside():
            written(config)
        else:
            outside.check(config.processes)
            launch(written, config, config.processes)
    except (OSError, ValueError) as error:
        raise UsageError(f"{error}") from None


def unescaped(text: str) -> str:
    r"""Returns a text with line feeds and tabs for ``\n`` and ``\t``, which a shell does not write as such."""
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t", "\\": "\\"}[found[1]], text)


def written(config: GenerateConfig) -> dict[str, Any]:
    """Writes texts to the standard output of the first process."""
    from tedlab.generate import generate
    from tedlab.launch.outside import first_outside
    from tedlab.progress import advancing

    if config.prompts is not None:
        with advancing("generating", config.tokens, disable=not first_outside()) as advance:
            texts = generate(config, advance=advance)
        for text in texts if first_outside() else ():
            print(json.dumps({"text": text}, ensure_ascii=False))
        return {}
    generate(config, show=(lambda piece: print(piece, end="", flush=True)) if first_outside() else None)
    if first_outside():
        print()
    return {}


main = hydra_entry(task, "generate", GenerateConfig, prepare)
