"""``tedlab generate run=<dir> prompt="def "``: continues a text with the model of a finished run."""

from tedlab.commands.application import hydra_entry
from tedlab.commands.literal import quoted
from tedlab.config import GenerateConfig
from tedlab.errors import UsageError


def prepare(arguments: list[str]) -> list[str]:
    """Quotes the values that are text."""
    return quoted(arguments, ("run", "prompt", "prompts"))


def task(config: GenerateConfig) -> None:
    """Prints the continued texts, a single one while it grows."""
    from tedlab.generate import generate

    try:
        if config.prompts is None:
            generate(config, show=lambda piece: print(piece, end="", flush=True))
            print()
        else:
            print("\n\n".join(generate(config)))
    except (OSError, ValueError) as error:
        raise UsageError(f"{error}") from None


main = hydra_entry(task, "generate", GenerateConfig, prepare)
