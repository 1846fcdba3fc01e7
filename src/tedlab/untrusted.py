"""Reading files that may come from others: nothing in them is executed, instantiated or looked up.

What a user writes (their YAML files in ``conf/``, overrides, their own package) is trusted and goes through Hydra. What
may have been sent to them is read here, or like here: docs/reliability.md has the rule.
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
    """OmegaConf's, which knows 9e9 for a number and no key twice. Aliases could stand for more than memory holds."""

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        if self.check_event(AliasEvent):
            raise ValueError("it has an alias (*), which plain values do not need")
        node: Node | None = super().compose_node(parent, index)
        return node


_Loader.yaml_constructors = {  # OmegaConf makes paths of tags that name Python's class of them
    tag: construct for tag, construct in _Loader.yaml_constructors.items() if tag is None or "python" not in tag
}


def read_yaml(path: Path) -> dict[str, Any]:
    """The mappings, lists, numbers and strings of a YAML file. Tags are refused, ``${…}`` stays a string.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no YAML, or no mapping; says what is wrong with "it".
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
    """A dataclass from plain values, checked against its types.

    Raises:
        OmegaConfBaseException: for a key that it has not, or a value of another type.
        ValueError: for a value that would be looked up elsewhere (``${…}``), or that the class refuses.
    """
    found = interpolation(values)
    if found is not None:
        raise ValueError(f"{found} has ${{…}} in it, which is not looked up in a file that may come from others")
    result = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
    assert isinstance(result, kind)
    return result


def interpolation(values: Any, name: str = "") -> str | None:
    """The dotted key of the first value that OmegaConf would look up."""
    if isinstance(values, str):
        return name if "${" in values else None
    sequence = values if isinstance(values, (list, tuple, set, frozenset)) else ()
    for key, value in values.items() if isinstance(values, Mapping) else enumerate(sequence):
        found = interpolation(value, f"{name}.{key}" if name else f"{key}")
        if found is not None:
            return found
    return None


def one_line(error: Exception) -> str:
    """The first line of a message, and where a parser was."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        what = ": ".join(filter(None, (error.context, error.problem)))
        return f"{what} (line {error.problem_mark.line + 1})"
    return (str(error).splitlines() or [type(error).__name__])[0]
