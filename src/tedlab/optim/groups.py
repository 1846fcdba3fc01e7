"""Which parameters train, and with which settings, by patterns over their names (``optim.groups``).

The optimizer and the closed form of its communication both ask a :class:`Grouping`, so that they agree on the order of
the optimizer's parameter groups.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import hydra

from tedlab.config import GroupConfig, OptimConfig
from tedlab.optim.kinds import is_matrixwise
from tedlab.optim.muon import ADAMW, is_matrix, matches

_SHOWN = 4  # names in a message


class Grouping:
    """Assigns parameters to the optimizer's groups by name.

    The optimizer has two groups, one with weight decay and one without, for the parameters that match no pattern, and
    two for each pattern that is not frozen, in the order of the configuration. An optimizer of matrices has three each:
    the first is of matrices.

    Args:
        groups: The configured groups, of which the first that matches a name counts.
        is_matrix: Tells of a name, a number of dimensions, and whether weight decay applies, whether the optimizer
            steps such a parameter as a matrix; None: it steps none so.
    """

    def __init__(
        self, groups: Sequence[GroupConfig], is_matrix: Callable[[str, int, bool], bool] | None = None
    ) -> None:
        self._groups, self._is_matrix = groups, is_matrix
        self._trained = [None, *(group for group in groups if not group.frozen)]

    @classmethod
    def under(cls, optim: OptimConfig) -> "Grouping":
        """Returns the groups of the configured optimizer."""
        return cls(optim.groups, _matrix_rule(optim.optimizer))

    def of(self, name: str) -> GroupConfig | None:
        """Returns the group of a parameter; None: it matches no pattern, so ``optim``'s own values apply."""
        return next((group for group in self._groups if fnmatchcase(name, group.pattern)), None)

    def trains(self, name: str) -> bool:
        """Tells whether a parameter is trained."""
        group = self.of(name)
        return group is None or not group.frozen

    @property
    def of_matrices(self) -> bool:
        """Whether the optimizer has groups of matrices."""
        return self._is_matrix is not None

    def matrix(self, name: str, dimensions: int, decayed: bool) -> bool:
        """Tells whether the optimizer steps a parameter as a matrix."""
        return self._is_matrix is not None and self._is_matrix(name, dimensions, decayed)

    def index(self, name: str, dimensions: int, decayed: bool) -> int:
        """Returns the index of the optimizer's group that a trained parameter is in."""
        group = self.of(name)
        position = next(n for n, other in enumerate(self._trained) if other is group)
        if self._is_matrix is None:
            return 2 * position + (not decayed)
        return 3 * position + (0 if self.matrix(name, dimensions, decayed) else 1 if decayed else 2)

    def options(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """Returns the options of each of the optimizer's groups, where they differ from the optimizer's own."""
        found: list[dict[str, Any]] = []
        for group in self._trained:
            options: dict[str, Any] = {}
            if group is not None and group.lr is not None:
                options["lr"] = group.lr
            if group is not None and group.lr_factor is not None:
                options["lr"] = optim.lr * group.lr_factor
            decay = {} if group is None or group.weight_decay is None else {"weight_decay": group.weight_decay}
            both = [{**options, **decay}, {**options, "weight_decay": 0.0}]
            if self._is_matrix is not None:
                both = [{**both[0], "matrix": True}, *({**its, "matrix": False} for its in both)]
            found += both
        return found

    def check_adamw(self, names: Iterable[str], adamw: Iterable[str]) -> None:
        """Refuses a pattern of names that AdamW steps which matches no parameter, unless it is one of the default.

        Args:
            names: The names of all parameters of the model.
            adamw: The patterns.

        Raises:
            ValueError: If there is such a pattern; the message names parameters near it.
        """
        known = [*names]
        for pattern in adamw:
            if pattern not in ADAMW and not any(matches(name, pattern) for name in known):
                raise ValueError(f"optim.optimizer.adamw: {pattern} matches no parameter.{_near(pattern, known)}")

    def check(self, names: Iterable[str]) -> None:
        """Refuses groups that contradict themselves, or that these parameters give no meaning.

        Args:
            names: The names of all parameters of the model.

        Raises:
            ValueError: If a group has no parameter or two learning rates, or if no parameter is left to train.
        """
        taken: Mapping[str, GroupConfig | None] = {name: self.of(name) for name in names}
        for number, group in enumerate(self._groups):
            where = f"optim.groups[{number}] (pattern {group.pattern})"
            if group.lr is not None and group.lr_factor is not None:
                raise ValueError(f"{where} has both lr={group.lr} and lr_factor={group.lr_factor}; give one of them")
            given = [n for n in ("lr", "lr_factor", "weight_decay") if getattr(group, n) is not None]
            if group.frozen and given:
                raise ValueError(f"{where} is frozen, so its {given[0]} means nothing; leave it out, or frozen")
            matched = [name for name in taken if fnmatchcase(name, group.pattern)]
            if not matched:
                raise ValueError(f"{where} matches no parameter.{_near(group.pattern, taken)}")
            if all(taken[name] is not group for name in matched):
                first = taken[matched[0]]
                assert first is not None
                raise ValueError(
                    f"{where} has no parameter: all that it matches belong to patterns before it, such as "
                    f"{matched[0]} to {first.pattern}; the first match counts, so put the narrower pattern first"
                )
        if self._groups and all(group is not None and group.frozen for group in taken.values()):
            raise ValueError(
                "optim.groups freezes every parameter, so there is nothing to train; put a pattern for those that are "
                "to train before the frozen one, such as {pattern: '*.experts.*'} before {pattern: '*', frozen: true}"
            )


def _matrix_rule(options: Mapping[str, Any]) -> Callable[[str, int, bool], bool] | None:
    """Returns which parameters the optimizer of these options steps as matrices; None: it steps none so."""
    if not isinstance(options, Mapping) or not is_matrixwise(hydra.utils.get_class(str(options["_target_"]))):
        return None  # without a configured optimizer, for a module that never makes one
    return functools.partial(is_matrix, adamw=options.get("adamw", ADAMW))


def _near(pattern: str, names: Iterable[str]) -> str:
    """Suggests names for a pattern that matches none, with * for the number of a block."""
    kinds = [*dict.fromkeys(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names)]
    words = {part for kind in kinds for part in kind.split(".")} - {"*"}
    given = pattern.split(".")
    meant = {word: get_close_matches(word, words, n=1) for word in given if word.isidentifier() and word not in words}
    wanted = (words & {*given}) | {word for found in meant.values() for word in found}
    # The more of the words a name has, the nearer it is.
    near = sorted(kinds, key=lambda kind: -len(wanted & {*kind.split(".")}))[:_SHOWN]
    hint = " ".join(f"Did you mean '{found[0]}' by '{word}'?" for word, found in meant.items() if found)
    return f"{' ' if hint else ''}{hint} Names near it: {', '.join(near)}"
