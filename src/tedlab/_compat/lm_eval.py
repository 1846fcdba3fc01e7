"""What tedlab changes of the lm-eval harness, so that files of tasks run no code. Its extra is ``eval``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn
from unittest.mock import patch

import yaml
from jinja2.sandbox import SandboxedEnvironment
from lm_eval import utils
from lm_eval.api import metrics as metrics  # registers them
from lm_eval.api import registry, task
from lm_eval.tasks import _yaml_loader


def sandbox_templates() -> None:
    """Makes the templates of tasks reach documents, but not what Python objects have inside.

    The harness renders all of them in one environment of its own, which has no such limit, and takes no other.
    """
    open_air = utils.env
    utils.env = SandboxedEnvironment(undefined=open_air.undefined, keep_trailing_newline=open_air.keep_trailing_newline)
    utils.env.filters.update(open_air.filters)


@contextmanager
def without_functions(refuse: Callable[[str], NoReturn]) -> Iterator[None]:
    """Within it, what would import a function that a task's file names (``!function``) calls ``refuse`` with the name.

    Otherwise the harness imports any, from files beside the task's and from whatever is installed. Where PyYAML has no
    libyaml, it also takes a loader whose ``!!python/name`` does the same; this one knows no such tags.
    """
    with (
        patch.object(_yaml_loader, "_import_func_in_yml", lambda name, folder: refuse(name)),
        patch.object(_yaml_loader, "_Base", getattr(yaml, "CSafeLoader", yaml.SafeLoader)),
    ):
        yield


@contextmanager
def without_unknown_metrics(refuse: Callable[[str], NoReturn]) -> Iterator[None]:
    """Within it, a metric that is not the harness's own calls ``refuse`` with its name.

    Otherwise the harness looks for a script of that name, in the working directory and then at a hub, and runs it.
    """

    def own(name: Any, scripted: bool = False) -> Any:
        return refuse(f"{name}") if scripted or name not in registry.metric_registry else registry.get_metric(name)

    with patch.object(task, "get_metric", own):
        yield
