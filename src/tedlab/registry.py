"""Names in a configuration that stand for parts: tedlab's own, and those of packages that plug in.

A package plugs in by an entry point of the group ``tedlab``, a module that is imported when a name is not known here;
in every process that asks, so that nothing has to be handed on.
"""

import functools
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Generic, TypeVar

Part = TypeVar("Part")


class Registry(Generic[Part]):
    """Parts of one kind by name.

    Args:
        key: of the configuration value that names them.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._parts: dict[str, Part] = {}

    def register(self, name: str) -> Callable[[Part], Part]:
        """A decorator that lets the value be this name.

        Raises:
            ValueError: if another part has the name.
        """

        def add(part: Part) -> Part:
            if self._parts.setdefault(name, part) is not part:
                raise ValueError(f"{self.key}={name} is taken by {self._parts[name]}; choose another name for {part}")
            return part

        return add

    def __getitem__(self, name: str) -> Part:
        """The part of this name.

        Raises:
            ValueError: if there is none; names those that there are.
        """
        if name not in self._parts:
            import_plugins()
        if name not in self._parts:
            raise ValueError(f"{self.key}={name} is unknown; valid: {', '.join(self._parts)}")
        return self._parts[name]

    @property
    def names(self) -> Sequence[str]:
        """All names, in the order of registration."""
        import_plugins()
        return tuple(self._parts)


@functools.cache
def import_plugins() -> None:
    """Imports, once, the modules that installed packages name in the entry-point group ``tedlab``."""
    for entry in entry_points(group="tedlab"):
        entry.load()
