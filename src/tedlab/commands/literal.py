"""Quotes values that are plain text, such as prompts and paths, in which Hydra would find lists and numbers."""

import re
from collections.abc import Collection

from hydra.core.override_parser.types import Quote, QuotedString


def quoted(arguments: list[str], keys: Collection[str]) -> list[str]:
    """Returns the arguments with the values of some keys in quotes, so that they arrive as typed."""
    split = [(argument, *argument.partition("=")) for argument in arguments]
    return [f"{key}={quote(text)}" if equals and key in keys else whole for whole, key, equals, text in split]


def quote(text: str) -> str:
    """Quotes a text so that Hydra and OmegaConf read it as typed."""
    plain = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # no interpolation
    return QuotedString(text=plain, quote=Quote.single).with_quotes()
