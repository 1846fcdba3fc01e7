"""Reads files that may come from others, and executes, instantiates and resolves nothing in them.

Hydra handles what users write themselves (their YAML files in ``conf/``, overrides, their own package), which is
trusted. Files that they may have received are read here or in the same way; docs/reliability.md states the rule.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from yaml.events import AliasEvent
from yaml.nodes import Node

from tedlab._compat.hydra import yaml_loader

T = TypeVar("T")


class _Loader(yaml_loader()):  # type: ignore[misc]
    """OmegaConf's loader, which reads 9e9 as a number and refuses duplicate keys, without aliases.

    Aliases are refused because they can expand to more than memory holds.
    """

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        if self.check_event(AliasEvent):
            raise ValueError("it has an alias (*), which plain values do not need")
        node: Node | None = super().compose_node(parent, index)
        return node


_Loader.yaml_constructors = {  # OmegaConf constructs paths from tags that name Python's path classes
    tag: construct for tag, construct in _Loader.yaml_constructors.items() if tag is None or "python" not in tag
}


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads the mappings, lists, numbers and strings of a YAML file; refuses tags, and keeps ``${…}`` as a string.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not YAML or not a mapping; the message calls the file "it".
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeError) as error:
        raise ValueError(f"it is no plain YAML: {one_line(error)}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it holds no keys with values")
    return {str(key): value for key, value in content.items()}


def typed(kind: type[T], values: Mapping[str, Any]) -> T:
    """Makes a dataclass from plain values and checks them against its types.

    Raises:
        OmegaConfBaseException: If a key is unknown, or a value has the wrong type.
        ValueError: If a value has an interpolation (``${…}``), or the class refuses it.
    """
    found = interpolation(values)
    if found is not None:
        raise ValueError(f"{found} has ${{…}} in it, which is not looked up in a file that may come from others")
    result = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
    assert isinstance(result, kind)
    return result


def interpolation(values: Any, name: str = "") -> str | None:
    """Returns the dotted key of the first value with an interpolation, which OmegaConf would resolve, or None."""
    if isinstance(values, str):
        return name if "${" in values else None
    sequence = values if isinstance(values, (list, tuple, set, frozenset)) else ()
    for key, value in values.items() if isinstance(values, Mapping) else enumerate(sequence):
        found = interpolation(value, f"{name}.{key}" if name else f"{key}")
        if found is not None:
            return found
    return None


def printable(value: Any) -> Any:
    """Returns plain values whose texts, also those of keys, steer no terminal: ESC is four characters, ``\\x1b``.

    Line breaks are spaces. What is no mapping, list, number or None, such as YAML's dates, becomes a text.
    """
    if isinstance(value, Mapping):
        return {printable(str(key)): printable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [printable(inner) for inner in value]
    if value is None or isinstance(value, int | float):
        return value
    letters = (" " if letter.isspace() else letter for letter in str(value))
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in letters)


def flat(text: object) -> str:
    """Returns a text that stays within the line that it is put into: line breaks are spaces, and nothing steers it."""
    return str(printable(" ".join(str(text).split())))


def one_line(error: Exception) -> str:
    """Returns the first line of an error's message, with the line number if it is a parser's, or the value's name."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        what = ": ".join(filter(None, (error.context, error.problem)))
        return f"{what} (line {error.problem_mark.line + 1})"
    line = (str(error).splitlines() or [type(error).__name__])[0]
    key = getattr(error, "full_key", None)  # of OmegaConf's
    return f"{key}: {line}" if key else line
