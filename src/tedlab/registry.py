"""Registries of the parts that a configuration selects by name, both tedlab's own and those of plug-in packages.

A package plugs in with an entry point in the group ``tedlab``. It names a module, which every process imports by itself
when it meets a name that is not registered yet.
"""

import functools
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from tedlab.moe import Experts

Registered = TypeVar("Registered")


class Registry(Generic[Registered]):
    """Parts of one kind by name.

    Args:
        key: The name of the configuration value that selects one of them.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._parts: dict[str, Registered] = {}

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """Returns a decorator that registers a part under a name.

        Raises:
            ValueError: If another part has the name.
        """

        def add(part: Registered) -> Registered:
            if self._parts.setdefault(name, part) is not part:
                raise ValueError(f"{self.key}={name} is taken by {self._parts[name]}; choose another name for {part}")
            return part

        return add

    def __getitem__(self, name: str) -> Registered:
        """Returns the part of this name.

        Raises:
            ValueError: If there is none; the message lists the valid names.
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


# Of ``tedlab.moe``, which fills it; here for what knows no torch.
mixtures: "Registry[type[Experts]]" = Registry("moe.dispatch")
