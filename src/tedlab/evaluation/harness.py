"""Lends a model to EleutherAI's lm-eval harness, which asks how likely continuations of texts are.

Every process of a layout runs the harness alike: each is asked the same questions, and :mod:`tedlab.evaluation.scoring`
divides them among data ranks. This needs the extra ``eval``.
"""

import io
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from unittest.mock import patch

import numpy as np
from typing_extensions import override

from tedlab.data.tokenizers import Tokenizer
from tedlab.decode import continuations
from tedlab.errors import UsageError
from tedlab.evaluation.scoring import Score, scores
from tedlab.evaluation.windows import Window, windows
from tedlab.generate import Continued
from tedlab.hints import did_you_mean
from tedlab.launch.outside import first_outside
from tedlab.models import GPT
from tedlab.sampling import Sampling

if not first_outside():  # one process shows how far it is
    os.environ.setdefault("TQDM_DISABLE", "1")
try:
    from lm_eval import simple_evaluate
    from lm_eval.api.group import Group
    from lm_eval.api.model import TemplateLM
    from lm_eval.defaults import default_gen_kwargs
    from lm_eval.tasks import TaskManager

    from tedlab._compat.lm_eval import sandbox_templates, without_functions, without_unknown_metrics
except ImportError as error:
    raise ValueError(
        f"tasks need the lm-eval harness, which is not installed ({error}): pip install 'tedlab[eval]'"
    ) from None
logging.getLogger("lm_eval").setLevel(logging.ERROR)
sandbox_templates()

_ALLOWED = "tasks_execute_code=true"
_GENERATION = {
    key: value for key, value in default_gen_kwargs(None).items() if key != "until"
}  # if a task says nothing


class LentModel(TemplateLM):
    """A model as the harness sees it.

    Args:
        model: In any layout, with no capacity of experts.
        tokenizer: Its tokenizer.
        batch: How many texts each data rank computes at a time.
        context: How many tokens the model reads at a time. Longer contexts lose their beginnings.

    Attributes:
        shortened: How many contexts lost their beginnings.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, batch: int, context: int) -> None:
        super().__init__()
        self.model, self.letters, self.batch, self.context = model, tokenizer, batch, context
        self.shortened = 0
        self._requests: list[Any] = []  # those whose likelihoods are being asked for

    @property
    @override
    def eot_token_id(self) -> int:
        return self.letters.separator

    @override
    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return [int(token) for token in self.letters.encode(string)]

    @override
    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation, and whether it is what greedy decoding would give.

        Raises:
            ValueError: If a continuation has no tokens, or more than the model reads at a time.
        """
        self._requests = requests
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    @override
    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        asked = []
        for whose, ((_, continuation), before, tokens) in zip(self._requests, requests, strict=True):
            # These have the blanks at the end of what stands before them.
            if not 0 < len(tokens) <= self.context:
                raise ValueError(
                    f"document {whose.doc_id} of task {whose.task_name}: {continuation[:60]!r}, whose probability is "
                    f"asked for, has {len(tokens)} tokens; it must have 1 to {self.context}"
                )
            whole = np.array([*(before or [self.eot_token_id]), *tokens])
            self.shortened += len(whole) > self.context + 1
            asked.append(Window(whole[-(self.context + 1) :], len(tokens)))
        return [(score.log_likelihood, score.greedy) for score in self._scores(asked)]

    @override
    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each whole text after a separator, in windows if it is long."""
        cut = []
        for request in requests:
            tokens = np.array([self.eot_token_id, *self.tok_encode(request.args[0])])
            cut.append([*windows(tokens, self.context, self.context)])
        found = iter(self._scores([window for text in cut for window in text]))
        return [sum(next(found).log_likelihood for _ in text) for text in cut]

    @override
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns continuations, greedy ones unless a task says ``do_sample``; these depend on no batch and no layout.

        Raises:
            ValueError: If a task asks for more tokens than the model reads at a time, or for none.
        """
        for request in requests:
            self._new_tokens(request)
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(number)
        together = self.batch * self.model.comm.size("data")
        first = 0  # the stream of random numbers of the next request
        for numbers in alike.values():
            for start in range(0, len(numbers), together):
                now = numbers[start : start + together]
                for number, text in zip(now, self._continued([requests[n] for n in now], first), strict=True):
                    texts[number] = text
                first += len(now)
        return texts

    def _new_tokens(self, request: Any) -> int:
        """Returns how many tokens a text may have at most that a task wants generated."""
        given = {option: value for option, value in request.args[1].items() if option != "until"}
        if "max_gen_toks" not in given or given == _GENERATION:
            return max(1, min(_GENERATION["max_gen_toks"], self.context // 2))
        tokens = int(given["max_gen_toks"])
        if not 0 < tokens < self.context:
            raise ValueError(
                f"task {request.task_name} has max_gen_toks={tokens}, and the model reads {self.context} tokens at a "
                f"time, of which a prompt needs some: give 1 to {self.context - 1}"
            )
        return tokens

    def _continued(self, requests: Sequence[Any], stream: int) -> list[str]:
        """Returns what is added to the prompts of requests with the same options, of which the first has a stream."""
        options, tokens = requests[0].args[1], self._new_tokens(requests[0])
        until = options.get("until") or []
        stop = [text for text in ([until] if isinstance(until, str) else until) if text]
        room = max(1, self.context - tokens)
        given = []
        for prompt in (request.args[0] for request in requests):
            encoded = self.tok_encode(prompt) or [self.eot_token_id]
            self.shortened += len(encoded) > room
            given.append(encoded[-room:])
        sampling = Sampling(0.0)
        if options.get("do_sample"):
            kind = options.get("temperature", 1.0), options.get("top_k"), options.get("top_p", 1.0)
            sampling = Sampling(*kind, seed=stream)
        texts = [Continued(self.letters, prompt, stop) for prompt in given]
        steps = continuations(
            *(self.model, given, tokens, sampling),
            ended=lambda number, added: added[-1] == self.eot_token_id or texts[number].ends(added),
            vocabulary=self.letters.vocab_size,
        )
        for _ in steps:
            pass
        return [text.text[text.begins :] for text in texts]

    def _scores(self, asked: Sequence[Window]) -> list[Score]:
        return scores(self.model, asked, self.batch, known=self.letters.vocab_size)


class TaskResult(NamedTuple):
    """What the harness found of a task.

    Attributes:
        values: By the name of what was measured, such as ``acc``; that of its standard error ends in ``_stderr``.
        documents: How many documents it has, or were taken of it.
        fewshot: How many examples stood before each; None: they differ between the tasks of a group.
        version: Of the task.
    """

    values: dict[str, float]
    documents: int
    fewshot: int | None
    version: str

    def metrics(self, name: str) -> dict[str, float]:
        """Returns what is logged of the task of this name, by the names of metrics."""
        return {f"eval/{name}/{metric}": value for metric, value in self.values.items()}


class Loaded(NamedTuple):
    """Tasks with their data.

    Attributes:
        manager: The harness's own manager of tasks.
        tasks: Its tasks, and groups of these.
        names: Of all of them.
    """

    manager: Any
    tasks: list[Any]
    names: list[str]


def load_tasks(tasks: Sequence[str], include: str | None, execute_code: bool = False) -> Loaded:
    """Returns tasks of the harness, with their data.

    Args:
        tasks: Names, or paths of YAML files.
        include: A folder with further tasks; None: there is none.
        execute_code: Whether files of tasks may name functions and scripts, and tasks may run what the model writes.
            Functions that the harness's own tasks name are part of the harness, and always allowed.

    Raises:
        FileNotFoundError: If a file or the folder does not exist.
        ValueError: If a task is unknown, comes twice, would run code that is not allowed, or cannot be loaded; the
            message says why, and whether it needs the network.
    """
    if include is not None and not Path(include).is_dir():
        raise FileNotFoundError(f"include={include} is no folder")
    files = [task for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"tasks has {file}, and there is no such file")
    own = TaskManager(include_path=include, include_defaults=False)
    shipped = {*tasks} - {*files} - {*own.all_tasks}
    harness = TaskManager() if shipped else own  # reads thousands of files
    for task in sorted(shipped):
        if task not in harness.all_tasks:
            known = [*harness.all_tasks, *own.all_tasks]
            raise ValueError(
                f"tasks has {task!r}, which the lm-eval harness does not know.{did_you_mean(task, known)} "
                f"It knows {len(harness.all_tasks):,}; give one of your own as the path of its YAML file, or a folder "
                "of them with include=DIR"
            )
    loaded = Loaded(harness, [], [])
    for task in tasks:
        try:
            with ExitStack() as guards:
                if not execute_code:
                    guards.enter_context(without_unknown_metrics(_refuse_metric))
                    if task not in shipped:
                        guards.enter_context(without_functions(_refuse_function))
                found = (harness if task in shipped else own).load([task])
        except Exception as error:  # those of data sets, of hubs and of a task's own code
            raise ValueError(f"task {task!r} cannot be loaded: {_why(error)}") from None
        if not execute_code:
            for name in (name for name, each in found["tasks"].items() if getattr(each, "UNSAFE_CODE", False)):
                raise ValueError(f"task {name!r} runs what the model writes: allow it with {_ALLOWED}")
        groups = [*found.get("groups", {}).values()]
        loaded.tasks.extend(groups[:1] or found["tasks"].values())  # a group holds those in it
        for name in (*found.get("groups", {}), *found["tasks"]):
            if name in loaded.names:
                raise ValueError(f"tasks has {name!r} twice, the second time in {task}")
            loaded.names.append(name)
    return loaded


def _refuse_function(name: str) -> NoReturn:
    raise ValueError(f"it would run Python code (!function {name}): if you trust all of it, allow it with {_ALLOWED}")


def _refuse_metric(name: str) -> NoReturn:
    raise ValueError(
        f"the harness has no metric {name!r} of its own, and would run a script of this name: if you trust that, "
        f"allow it with {_ALLOWED}"
    )


def _why(error: BaseException) -> str:
    said = " ".join(f"{error}".split())[:300] or type(error).__name__
    names = {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}
    if names & {"ConnectionError", "OfflineModeIsEnabled", "ConnectTimeout", "ConnectError", "LocalEntryNotFoundError"}:
        return (
            f"its data is not on this machine, and no hub can be reached ({said}). Load the task once where there is a "
            "network, and take its cache (HF_HOME) along, or use a task whose dataset_path is json, with files of yours"
        )
    return said


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


class _Rehearsal(LentModel):
    """Takes the place of a model: finds all continuations as likely, and writes what a task would have written.

    Args:
        tokenizer, context: See :class:`LentModel`.
        task: The only one of the harness that asks it.
    """

    def __init__(self, tokenizer: Tokenizer, context: int, task: Any) -> None:
        super().__init__(None, tokenizer, 1, context)  # type: ignore[arg-type]
        self.task = task

    @override
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            self._new_tokens(request)
        return [f"{self.task.doc_to_target(request.doc)}" for request in requests]

    @override
    def _scores(self, asked: Sequence[Window]) -> list[Score]:
        return [Score(0.0, window.predicted, False) for window in asked]


def rehearse(tokenizer: Tokenizer, context: int, loaded: Loaded, fewshot: int | None, limit: int | None) -> None:
    """Runs each task without a model, so that one that cannot be run is told before any process starts.

    Args:
        tokenizer: The model's.
        context: How many tokens the model reads at a time.
        loaded: The result of :func:`load_tasks`.
        fewshot, limit: See :func:`run_tasks`.

    Raises:
        ValueError: If a task cannot be run; the message names it and says why.
    """
    parts = [part for task in loaded.tasks for part in (task.get_all_tasks() if isinstance(task, Group) else [task])]
    for task in parts:
        told, alone = _Rehearsal(tokenizer, context, task), loaded._replace(tasks=[task])
        try:
            with redirect_stderr(io.StringIO()):  # the run will say it again
                _evaluated(told, alone, fewshot, limit, bootstrap_iters=0)
        except Exception as error:  # those of a task's data, and of its own code
            why = _why(error)
            if not isinstance(error, ValueError):  # what Python says of it
                said = f"{type(error).__name__}: {why}"
                why = f"a document lacks what its file asks for, or has it in another form ({said})"
            if fewshot:
                examples = len([*(task.fewshot_docs() or [])])
                if fewshot + (task.config.fewshot_split == task.config.test_split) > examples:
                    why = f"fewshot={fewshot}, and it has {examples} examples, a document that it asks about included"
            raise ValueError(f"task {task.task_name!r} cannot be run: {why}") from None


def run_tasks(lent: LentModel, loaded: Loaded, fewshot: int | None, limit: int | None) -> dict[str, TaskResult]:
    """Returns the result of each task, in the first process; nothing in the others, which must call it, too.

    Args:
        lent: The model.
        loaded: The result of :func:`load_tasks`.
        fewshot: How many examples stand before each document; None: as each task says.
        limit: How many documents of each task to take, its first; None: all.

    Raises:
        UsageError: If a task fails on what the model writes, or its own code does; the message says why.
    """
    try:
        found = _evaluated(lent, loaded, fewshot, limit, bootstrap_iters=1000)
    except Exception as error:
        of = ", ".join(loaded.names)
        raise UsageError(f"the lm-eval harness failed in {of}: {type(error).__name__}: {_why(error)}") from error
    if found is None:
        return {}
    # A group that aggregates nothing has no documents.
    return {name: _result(name, values, found) for name, values in found["results"].items() if "sample_len" in values}


def _evaluated(lent: LentModel, loaded: Loaded, fewshot: int | None, limit: int | None, bootstrap_iters: int) -> Any:
    # Each process of a layout would start as many as there are cores to bootstrap, and print that it does.
    with patch.dict(os.environ, {"DISABLE_MULTIPROC": "1"}), redirect_stdout(io.StringIO()):
        return simple_evaluate(
            model=lent,
            tasks=loaded.tasks,
            task_manager=loaded.manager,
            num_fewshot=fewshot,
            limit=limit,
            log_samples=False,
            bootstrap_iters=bootstrap_iters,
            confirm_run_unsafe_code=True,  # load_tasks has refused it unless it is allowed
        )


def _result(name: str, values: Mapping[str, Any], found: Mapping[str, Any]) -> TaskResult:
    """Takes the result of a task apart; the harness calls metrics ``acc,none``, after what filters their answers."""
    measured = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if comma and isinstance(value, int | float):
            measured[metric if filtered == "none" else f"{metric}_{filtered}"] = float(value)
    return TaskResult(
        measured, values.get("sample_len", 0), found["n-shot"].get(name), f"{found['versions'].get(name, '')}"
    )
