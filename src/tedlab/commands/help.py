"""Writes the ``--help`` of a command: its presets, and every value with its comment in the source."""

import ast
import inspect
import io
import math
import re
import tokenize
from dataclasses import is_dataclass
from functools import cache
from textwrap import dedent
from typing import Any, NamedTuple

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tedlab.cli import CONF, from_folder, presets
from tedlab.config import TrainConfig
from tedlab.errors import UsageError

_BESIDE = 34  # column of comments beside values, unless these are longer


class Comment(NamedTuple):
    """The comment on a field: the lines above it, and the text beside it."""

    above: tuple[str, ...] = ()
    beside: str = ""


def help_text(name: str, overrides: list[str], folder: str | None = None) -> str:
    """Returns what a command does, the options of its groups, and its configuration with the overrides.

    Args:
        name: The name of the command's file in ``conf/``.
        overrides: The overrides of the command line.
        folder: ``--config-dir``, a folder with the user's own presets.

    Raises:
        UsageError: If the configuration does not compose.
    """
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        options = presets(name, folder)
        try:
            config = hydra.compose(name, [*overrides, *from_folder(folder)], return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise UsageError(f"{error}") from None
    chosen = OmegaConf.to_container(config.hydra.runtime.choices)
    assert isinstance(chosen, dict)
    lines = [config.hydra.help.header]
    if options:
        lines += ["Presets (GROUP=OPTION)", *(f"{group}: {', '.join(known)}" for group, known in options.items()), ""]
    lines.append("Values (KEY=VALUE), with their present setting")
    values = OmegaConf.to_container(config)  # missing values and interpolations stay as written
    assert isinstance(values, dict)
    keys = [str(key) for key in values if key != "hydra"]
    own = [key for key in keys if key not in TrainConfig.__dataclass_fields__]
    for key in own + [key for key in keys if key not in own]:
        lines += _shown(config, key, values[key], _file_comments(f"{key}/{chosen.get(key)}"))
    lines += ["", "Flags: -m sweep over comma-separated values; --cfg job print the configuration; --hydra-help more."]
    return "\n".join(lines)


def _shown(parent: DictConfig, key: str, value: Any, in_file: dict[str, str], path: tuple[str, ...] = ()) -> list[str]:
    """Returns the YAML lines of a value, or of a section with everything in it.

    Args:
        parent: The section that holds the value.
        key: The value's name in its parent.
        value: The value itself.
        in_file: The comments of the file that its group came from, by dotted name inside the group.
        path: The path of ``parent``, from the group on.
    """
    indent = "  " * len(path)
    kind = OmegaConf.get_type(parent)
    comments = field_comments(kind) if kind is not None and is_dataclass(kind) else {}
    comment = comments.get(key) or Comment(beside=in_file.get(".".join((*path[1:], key)), ""))
    if isinstance(value, dict) and value:
        text = f"{indent}{key}:"
        below = [line for k, v in value.items() for line in _shown(parent[key], str(k), v, in_file, (*path, key))]
    else:
        one_line = yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()
        text, below = f"{indent}{key}: {one_line}", []
    beside = f"{text:<{_BESIDE}}  # {comment.beside}" if comment.beside else text
    said = [f"{indent}# {line}" for line in comment.above] + [beside]
    return [re.sub(r"\bNone\b", "null", line) for line in said] + below  # as on a command line


@cache
def field_comments(kind: type) -> dict[str, Comment]:
    """Returns the comments of a dataclass's fields: ``beside`` has those on the field's lines, ``above`` the others."""
    found: dict[str, Comment] = {}
    for base in reversed(kind.__mro__):
        if not is_dataclass(base):
            continue
        source = dedent(inspect.getsource(base))
        (definition,) = ast.parse(source).body
        assert isinstance(definition, ast.ClassDef)
        named = [s for s in definition.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            field = next((s for s in named if token.start[0] <= (s.end_lineno or 0)), None)
            if token.type == tokenize.COMMENT and field is not None and definition.body[0].lineno < token.start[0]:
                assert isinstance(field.target, ast.Name)
                above, beside = found.get(field.target.id, Comment())
                text = token.string.lstrip("# ")
                if token.start[0] < field.lineno:
                    found[field.target.id] = Comment((*above, text), beside)
                else:
                    found[field.target.id] = Comment(above, f"{beside} {text}".strip())
    return found


def _file_comments(name: str) -> dict[str, str]:
    """Returns the comments beside values of a file in ``conf/``, by dotted name; none if there is no such file."""
    path = CONF / f"{name}.yaml"
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        match = re.match(r"( *)([\w-]+):(?:.*?\s#\s*(.*))?", line)
        if match is not None:
            indent, key, comment = match.groups()
            above = [*(entry for entry in above if entry[0] < len(indent)), (len(indent), key)]
            if comment:
                found[".".join(part for _, part in above)] = comment
    return found
