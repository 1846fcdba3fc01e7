"""Lets Hydra put the files of ``conf/`` together once for each choice of presets, however many tests change a value.

Each composition reads some thirty files, and most tests of a configuration choose what others have chosen, too. What
Hydra makes of a choice is kept; it still parses overrides, applies values, and completes its own node every time.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore

from tedlab.cli import CONF

LIST_DEFAULTS, COMPOSE = defaults_list._create_defaults_list, ConfigLoaderImpl._compose_config_from_defaults_list
_ALWAYS_THE_SAME = ("pkg://", "structured://", f"file://{CONF}")
_CHOSEN = ("override_choices", "append_group_defaults", "deletions")  # of Hydra's Overrides, before it uses them
_FOUND = ("override_choices", "override_metadata", "deletions", "known_choices", "known_choices_per_group")  # after


@contextmanager
def remembered() -> Iterator[None]:
    """Within, this process composes from ``conf/`` alone what it has not composed before."""
    lists: dict[Any, bytes] = {}
    composed: dict[Any, bytes] = {}

    def list_once(repo: Any, config_name: Any, overrides: Any, prepend_hydra: bool, skip_missing: bool) -> Any:
        given = repr([getattr(overrides, name) for name in _CHOSEN])
        key = (_state(repo), config_name, given, prepend_hydra, skip_missing)
        if key[0] is None:
            return LIST_DEFAULTS(repo, config_name, overrides, prepend_hydra, skip_missing)
        if key not in lists:
            result = LIST_DEFAULTS(repo, config_name, overrides, prepend_hydra, skip_missing)
            lists[key] = pickle.dumps((result, {name: getattr(overrides, name) for name in _FOUND}))
        result, found = pickle.loads(lists[key])  # which takes a third of the time of a deep copy
        vars(overrides).update(found)
        return result

    def compose_once(loader: ConfigLoaderImpl, defaults: Any, repo: Any) -> Any:
        key = _state(repo), repr(defaults)
        if key[0] is None:
            return COMPOSE(loader, defaults, repo)
        if key not in composed:
            composed[key] = pickle.dumps(COMPOSE(loader, defaults, repo))
        return pickle.loads(composed[key])

    with pytest.MonkeyPatch.context() as patch:
        use(patch, list_once, compose_once)
        yield


def use(patch: pytest.MonkeyPatch, list_defaults: Any, compose: Any) -> None:
    """Makes Hydra use these in place of ``LIST_DEFAULTS`` and ``COMPOSE``."""
    patch.setattr(defaults_list, "_create_defaults_list", list_defaults)
    patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", compose)


def _state(repo: Any) -> Any:
    """What a composition depends on besides its choices; None where files may change: outside of ``conf/``."""
    sources = tuple(source.full_path() for source in repo.get_sources())
    if not all(source.startswith(_ALWAYS_THE_SAME) for source in sources):
        return None
    stored = ConfigStore.instance().repo  # a command that is imported later stores its schema
    return sources, _stored(stored)


def _stored(nodes: Any) -> Any:
    """What packages have registered, by name."""
    if not isinstance(nodes, dict):
        return id(nodes)
    return tuple((name, _stored(node)) for name, node in nodes.items())
