"""Which parameters train, and with which settings, by patterns over their names (``optim.groups``).

The optimizer and the closed form of its communication both ask a :class:`Grouping`, so that they agree on the order of
the optimizer's parameter groups.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

import hydra

from tedlab.config import GroupConfig, OptimConfig
from tedlab.optim.kinds import is_matrixwise
from tedlab.optim.muon import ADAMW, is_matrix, matches
from tedlab.parametrization import Scale

_SHOWN = 4  # names in a message


class Grouping:
    """Assigns parameters to the optimizer's groups by name.

    The optimizer has two groups, one with weight decay and one without, for the parameters that match no pattern, and
    two for each pattern that is not frozen, in the order of the configuration. An optimizer of matrices has three each:
    the first is of matrices. Where learning rates follow the width, there are as many for each factor, 1 first.

    Args:
        groups: The configured groups, of which the first that matches a name counts.
        is_matrix: Tells of a name, a number of dimensions, and whether weight decay applies, whether the optimizer
            steps such a parameter as a matrix; None: it steps none so.
        scales: How the learning rates of parameters follow the width of the model, by name; 1 where there is none.
    """

    def __init__(
        self,
        groups: Sequence[GroupConfig],
        is_matrix: Callable[[str, int, bool], bool] | None = None,
        scales: Mapping[str, Scale] = MappingProxyType({}),
    ) -> None:
        self._groups, self._is_matrix, self._scales = groups, is_matrix, scales
        of_matrices = {scale.matrix_rate for scale in scales.values() if is_matrix is not None}
        factors = sorted({scale.rate for scale in scales.values()} | of_matrices)
        self._factors = [*dict.fromkeys((1.0, *factors))]
        trained = [None, *(group for group in groups if not group.frozen)]
        self._trained = [*itertools.product(trained, self._factors)]

    @classmethod
    def under(cls, optim: OptimConfig, scales: Mapping[str, Scale] = MappingProxyType({})) -> "Grouping":
        """Returns the groups of the configured optimizer, for a model of these scales."""
        return cls(optim.groups, _matrix_rule(optim.optimizer), scales)

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

    def factor(self, name: str, dimensions: int, decayed: bool) -> float:
        """Returns the factor on a parameter's configured learning rate that the width of the model makes."""
        scale = self._scales.get(name, Scale())
        return scale.matrix_rate if self.matrix(name, dimensions, decayed) else scale.rate

    def index(self, name: str, dimensions: int, decayed: bool) -> int:
        """Returns the index of the optimizer's group that a trained parameter is in."""
        group, matrix = self.of(name), self.matrix(name, dimensions, decayed)
        factor = self.factor(name, dimensions, decayed)
        position = next(n for n, (its, by) in enumerate(self._trained) if its is group and by == factor)
        if self._is_matrix is None:
            return 2 * position + (not decayed)
        return 3 * position + (0 if matrix else 1 if decayed else 2)

    def options(self, optim: OptimConfig) -> list[dict[str, Any]]:
        """Returns the options of each of the optimizer's groups, where they differ from the optimizer's own.

        A factor on the learning rate divides weight decay, of which an optimizer takes the product of both: how fast a
        weight decays does not depend on the width.
        """
        found: list[dict[str, Any]] = []
        for group, factor in self._trained:
            options: dict[str, Any] = {}
            if group is not None and group.lr is not None:
                options["lr"] = group.lr
            if group is not None and group.lr_factor is not None:
                options["lr"] = optim.lr * group.lr_factor
            decay = {} if group is None or group.weight_decay is None else {"weight_decay": group.weight_decay}
            if factor != 1.0:
                options["lr"] = options.get("lr", optim.lr) * factor
                decay["weight_decay"] = decay.get("weight_decay", weight_decay(optim.optimizer)) / factor
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


def weight_decay(options: Mapping[str, Any]) -> float:
    """Returns the weight decay of the optimizer of these options, which may be its own default."""
    default = inspect.signature(hydra.utils.get_class(str(options["_target_"]))).parameters["weight_decay"].default
    return float(options.get("weight_decay", default))


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
