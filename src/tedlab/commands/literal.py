"""Values that are text as it was typed: a prompt, a path. Hydra's grammar would find lists and numbers in them."""

import re
from collections.abc import Collection

from hydra.core.override_parser.types import Quote, QuotedString


def quoted(arguments: list[str], keys: Collection[str]) -> list[str]:
    """The arguments, with the values of some keys in quotes, so that they arrive as they are."""
    split = [(argument, *argument.partition("=")) for argument in arguments]
    return [f"{key}={quote(text)}" if equals and key in keys else whole for whole, key, equals, text in split]


def quote(text: str) -> str:
    """A text that Hydra and OmegaConf read as it is."""
    plain = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # no interpolation
    return QuotedString(text=plain, quote=Quote.single).with_quotes()
