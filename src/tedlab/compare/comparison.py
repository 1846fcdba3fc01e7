"""Compares runs: which settings differ, whether losses agree to the last digit, and what effect each change had."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from tedlab.compare.quantities import SENT, STEP_TIME, Quantity
from tedlab.compare.runs import CURVES, EVALUATIONS, Run
from tedlab.config import ChartAxis
from tedlab.errors import UsageError
from tedlab.hints import did_you_mean
from tedlab.record import DIRECTORY, Recording, flip_rates
from tedlab.renamed import RENAMED, note, renamed
from tedlab.untrusted import flat

# Settings that are not compared: where a run writes, what it is called, what follows from other settings, and what is
# evaluated beside, of which how_evaluated tells.
PLUMBING = (
    "output_dir",
    "choices",
    "logger",
    "hydra",
    "experiment_name",
    "objective",
    "certificate",
    "data.cache_dir",
    "trainer.devices",
    "trainer.accumulate_grad_batches",
    "eval",
)
# Runs that differ in one of these have losses that mean different things …
MUST_AGREE = (
    "model",
    "moe.num_experts",
    "moe.every",
    "moe.first_dense",
    "moe.blocks",
    "moe.ffn",
    "moe.shared",
    "data.path",
    "data.sources",
    "data.stream",
    "data.field",
    "data.tokenizer",
    "data.bpe_vocab_size",
    "data.validation_fraction",
    "data.validation_samples",
    "data.training_batches",
    "trainer.max_steps",
)
MAY_DIFFER = ("model.recompute",)  # … except in these, which change no maths

_SETS, _SAMPLES = "eval.sets.", "eval.samples"
ABSENT = "–"  # stands for a setting that a run's version did not have


@dataclass(frozen=True)
class Effect:
    """The effect of one change of settings, over all pairs of runs that differ only in it.

    Attributes:
        change: The new settings, as ``key=value``.
        pairs: Pairs of runs, (before, after).
    """

    change: str
    pairs: tuple[tuple[Run, Run], ...]

    def changes(self, quantity: Quantity) -> list[float]:
        """Returns the relative change of a quantity in each pair that has it: −0.25 is a quarter less."""
        values = [(quantity.value(before), quantity.value(after)) for before, after in self.pairs]
        return [after / before - 1 for before, after in values if before and after is not None]

    @property
    def emulated(self) -> bool:
        """Whether times belong to an emulated or simulated network."""
        return any(run.emulated for pair in self.pairs for run in pair)

    @property
    def loss_distance(self) -> float:
        """The largest difference of any loss in any pair; 0 if all agree to the last digit, inf if none has one."""
        apart = [_distance(before, after, name) for before, after in self.pairs for name in CURVES]
        return max((distance for distance in apart if distance is not None), default=math.inf)


@dataclass(frozen=True)
class View:
    """How loss curves are drawn.

    Attributes:
        x: What they are drawn over.
        smoothing: Weight of the earlier values in an exponential moving average of training losses; 0 draws them as
            they are.
    """

    x: str = ChartAxis.STEP
    smoothing: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        runs: The runs; the others are compared with the first.
        settings: Keys of the configuration to show.
        differing: Keys of the configuration that differ, shown or not.
        notes: Sentences that a reader must know before drawing conclusions.
        view: How the chart of losses is drawn.
    """

    runs: Sequence[Run]
    settings: Sequence[str]
    differing: Sequence[str]
    notes: Sequence[str]
    view: View = View()

    def value(self, run: Run, key: str) -> str:
        """Returns a setting as YAML would show it."""
        return written(run.config[key]) if key in run.config else ABSENT

    def label(self, run: Run) -> str:
        """Returns a run's name and its settings in brief, for charts."""
        last = [key.rsplit(".", 1)[-1] for key in self.settings]
        brief = [word if last.count(word) == 1 else key for word, key in zip(last, self.settings, strict=True)]
        text = ", ".join(f"{word}={self.value(run, key)}" for word, key in zip(brief, self.settings, strict=True))
        text = f"{run.name}: {text}" if text else run.name
        return text if len(text) <= 60 else f"{text[:59]}…"

    def ratio(self, run: Run, quantity: Quantity) -> float | None:
        """Returns the ratio to the first run; None for that run itself, or if either has no value."""
        first, own = quantity.value(self.runs[0]), quantity.value(run)
        return None if run is self.runs[0] or not first or own is None else own / first

    def effects(self) -> list[Effect]:
        """Returns the effect of each setting that alone departs from the first run's value, or else of whole runs."""
        found: dict[str, list[tuple[Run, Run]]] = {}
        for before in self.runs:
            for after in self.runs:
                changed = self._changed(before, after)
                if len(changed) == 1 and self.value(before, changed[0]) == self.value(self.runs[0], changed[0]):
                    found.setdefault(self._change(after, changed), []).append((before, after))
        return [Effect(change, tuple(pairs)) for change, pairs in found.items()] or self.against_first()

    def against_first(self) -> list[Effect]:
        """Returns the effect of all settings of each run together, compared with the first run."""
        first, *others = self.runs
        effects = []
        for run in others:
            changed = self._changed(first, run)
            effects.append(Effect(self._change(run, changed) or f"run {run.name}", ((first, run),)))
        return effects

    def headline(self) -> Effect | None:
        """Returns the change that saved the most bytes or, if none did, the most time; None if nothing was saved."""
        candidates = [*self.effects(), *self.against_first()]
        for quantity in (SENT, STEP_TIME):
            measured = [effect for effect in candidates if effect.changes(quantity)]
            best = min(measured, key=lambda effect: max(effect.changes(quantity)), default=None)
            if best is not None and max(best.changes(quantity)) < 0:
                return best
        return None

    @cached_property
    def flips(self) -> dict[str, dict[int, np.ndarray]]:
        """The shares of choices that flipped against the first run, by run, step and MoE layer (L,).

        It has the runs that recorded their routing (``routing.record=true``) as the first one did.
        """
        found = {}
        try:
            first, *others = (_record(run) for run in self.runs)
            for run, record in zip(self.runs[1:], others, strict=True):
                if first is not None and record is not None and record.shape == first.shape:
                    found[run.name] = flip_rates(first, record)
        except ValueError as error:
            raise UsageError(flat(f"{error}. Without its folder {DIRECTORY}, the run can be compared.")) from None
        return {name: rates for name, rates in found.items() if rates}

    def flip_statements(self) -> list[str]:
        """Says how many choices of experts differ from the first run's."""
        texts = []
        for name, rates in self.flips.items():
            means = {step: float(rates[step].mean()) for step in rates}
            first, last = min(means), max(means)
            texts.append(
                f"routing: {np.mean(list(means.values())):.2%} of the choices of run {name} are not run "
                f"{self.runs[0].name}'s: {means[first]:.2%} in step {first}, {means[last]:.2%} in step {last}."
            )
        return texts

    def loss_statements(self) -> list[str]:
        """Says which runs have the same losses to the last digit, and by how much the others differ."""
        return [text for name in CURVES if (text := self._loss_statement(name)) is not None]

    def _loss_statement(self, name: str) -> str | None:
        runs = [run for run in self.runs if run.number(name) is not None]
        if len(runs) < 2:
            return None
        alike: dict[str | None, list[Run]] = {}
        for run in runs:
            alike.setdefault(_digits(run, name), []).append(run)
        logged = len(runs[0].curves[name])
        if len(alike) == 1:
            where = f", at each of the {logged} steps where it was logged" if logged > 1 else ""
            who = "all runs" if len(runs) == len(self.runs) else f"runs {', '.join(run.name for run in runs)}"
            return f"{name}: identical to the last digit in {who} ({runs[0].number(name)!r}){where}."
        apart = max(_distance(a, b, name) or 0.0 for a in runs for b in runs)
        if apart == 0.0:
            return f"{name}: identical to the last digit where two runs logged it, but not all runs came equally far."
        groups = [f"runs {', '.join(run.name for run in group)}" for group in alike.values() if len(group) > 1]
        same = f"identical to the last digit in {' and in '.join(groups)}; the others" if groups else "the runs"
        return f"{name}: {same} differ by up to {apart:.1e}."

    def _changed(self, before: Run, after: Run) -> list[str]:
        return [key for key in self.differing if self.value(before, key) != self.value(after, key)]

    def _change(self, run: Run, keys: Sequence[str]) -> str:
        return ", ".join(f"{key}={self.value(run, key)}" for key in keys)


def compare(
    runs: Sequence[Run],
    by: Sequence[str] = (),
    notes: Sequence[str] = (),
    force: bool = False,
    view: View = View(),
) -> Comparison:
    """Checks that runs can be compared, and determines how they differ.

    Args:
        runs: At least one run; the first is the reference.
        by: Keys of the settings to show; by default all that differ.
        notes: Notes from reading the runs, to keep.
        force: Whether to compare unlike runs nevertheless, with a note.
        view: How to draw losses.

    Raises:
        UsageError: If no configuration has a key of ``by``, or if losses of the runs do not mean the same.
    """
    known = list(dict.fromkeys(key for run in runs for key in run.config))
    notes = [*notes, *(note(key) for key in by if key in RENAMED)]
    by = [renamed(key) for key in by]
    differing = _differing(runs, known)
    for key in by:
        if key not in known:
            listed = ", ".join(differing) or "none"
            raise UsageError(
                f"by={key}: no configuration has that key.{did_you_mean(key, known)}\nThose that differ: {listed}"
            )
    unlike = _unlike(runs, known)
    if unlike and not force:
        raise UsageError(
            "These runs cannot be compared, their losses do not mean the same:\n"
            + "\n".join(f"  {difference}" for difference in unlike)
            + "\nforce=true compares them nevertheless, and says so in the report."
        )
    forced = [f"These runs are not alike, and their losses do not mean the same: {'; '.join(unlike)}."] * bool(unlike)
    notes = [*forced, *notes, *_warnings(runs)]
    notes += [
        f"Run {run.name} is not in the chart of losses: it did not log {view.x}." for run in missing(runs, view.x)
    ]
    return Comparison(runs, by or differing, differing, notes, view)


def missing(runs: Sequence[Run], x: str) -> list[Run]:
    """Returns the runs that have losses, but cannot be drawn over ``x``."""
    clocks = {ChartAxis.TOKENS: attrgetter("tokens"), ChartAxis.TIME: attrgetter("seconds")}
    return [run for run in runs if x in clocks and any(run.curves.values()) and not clocks[ChartAxis(x)](run)]


def _record(run: Run) -> Recording | None:
    """Returns the record of a run's routing; None if it has none, or is not on this machine."""
    directory = Path(run.source) / DIRECTORY
    return Recording(directory) if directory.is_dir() else None


def written(value: Any) -> str:
    """Returns a value of a configuration as YAML would write it on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _differing(runs: Sequence[Run], known: Sequence[str]) -> list[str]:
    shown = [key for key in known if not is_one_of(key, PLUMBING)]
    return [key for key in shown if len({written(run.config.get(key, ABSENT)) for run in runs}) > 1]


def _unlike(runs: Sequence[Run], known: Sequence[str]) -> list[str]:
    """Lists what must agree but does not, with the values. Runs whose version did not have a key are ignored for it."""
    values: dict[str, Callable[[Run], Any]] = {
        key: lambda run, key=key: run.config.get(key, ABSENT)  # type: ignore[misc]
        for key in known
        if is_one_of(key, MUST_AGREE) and not is_one_of(key, MAY_DIFFER)
    }
    values["steps"] = lambda run: run.summary["steps"]
    unlike = []
    for key, value in values.items():
        names: dict[str, list[str]] = {}
        for run in runs:
            names.setdefault(written(value(run)), []).append(run.name)
        names.pop(ABSENT, None)
        if len(names) > 1:
            unlike.append(f"{key} is " + ", ".join(f"{text} in {', '.join(who)}" for text, who in names.items()))
    return unlike


def _warnings(runs: Sequence[Run]) -> list[str]:
    texts = []
    for run in runs:
        difference = run.number("comm/predicted_difference_bytes")
        if difference:
            texts.append(f"Run {run.name} communicated {difference:+,.0f} bytes against the prediction; 0 is right.")
        if run.config.get("ckpt_path") is not None and "comm/steps" not in run.summary:
            texts.append(
                f"Run {run.name} was continued from a checkpoint: its communication, of the steps since, is divided by "
                "all steps."
            )
    texts += _unlike_evaluations(runs)
    for cluster in dict.fromkeys(run.emulated for run in runs if run.emulated):
        names = ", ".join(run.name for run in runs if run.emulated == cluster)
        simulated = any(run.simulated for run in runs if run.emulated == cluster)
        what = "were simulated" if simulated else "include the delays of an emulated network"
        texts.append(f"† Times of {names} {what} ({cluster}); none was measured.")
    return texts


def _unlike_evaluations(runs: Sequence[Run]) -> list[str]:
    """Says which sets and tasks were evaluated otherwise in some runs, so that their values do not mean the same."""
    by_name: dict[str, dict[str, Mapping[str, Any]]] = {}
    for run in runs:
        for name, settings in how_evaluated(run).items():
            by_name.setdefault(name, {})[run.name] = settings
    texts = []
    for name, by_run in by_name.items():
        known = dict.fromkeys(key for settings in by_run.values() for key in settings)
        differing = [key for key in known if len({written(by.get(key, ABSENT)) for by in by_run.values()}) > 1]
        ways: dict[str, list[str]] = {}
        for who, settings in by_run.items():
            ways.setdefault(written({key: settings.get(key, ABSENT) for key in differing}), []).append(who)
        if differing:
            said = ", but with ".join(f"{how} in {', '.join(who)}" for how, who in ways.items())
            texts.append(f"{name} was evaluated with {said}: its values do not mean the same.")
    return texts


def how_evaluated(run: Run) -> dict[str, Mapping[str, Any]]:
    """Returns what values of named sets and tasks depend on: by ``eval/NAME``, and ``val/NAME`` for validations'."""
    sets = {key.removeprefix(_SETS): path for key, path in run.config.items() if key.startswith(_SETS)}
    while_training = {f"val/{name}": {"path": path, "samples": run.config.get(_SAMPLES)} for name, path in sets.items()}
    after = {f"eval/{name}": settings for name, settings in run.summary.get(EVALUATIONS, {}).items()}
    return {**while_training, **after}


def is_one_of(key: str, prefixes: Sequence[str]) -> bool:
    """Tells whether a key of the configuration is one of these, or lies below one."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _digits(run: Run, name: str) -> str | None:
    """Returns the final loss and all logged ones with all their digits; None if there is none."""
    final = run.number(name)
    return None if final is None else repr((final, run.curves[name]))


def _distance(a: Run, b: Run, name: str) -> float | None:
    """Returns the largest difference of a loss between two runs, at steps where both logged it and at a common end.

    It is infinite where one is no number, and None for runs of other lengths that logged it at no common step.
    """
    theirs = dict(b.curves[name])
    pairs = [(loss, theirs[step]) for step, loss in a.curves[name] if step in theirs]
    if a.summary["steps"] == b.summary["steps"]:  # a run that broke ends elsewhere
        pairs.append((_final(a, name), _final(b, name)))
    if not pairs:
        return None
    return max(0.0 if repr(x) == repr(y) else math.inf if math.isnan(x - y) else abs(x - y) for x, y in pairs)


def _final(run: Run, name: str) -> float:
    """Returns a run's final loss; NaN if the summary has none."""
    final = run.number(name)
    return math.nan if final is None else final
