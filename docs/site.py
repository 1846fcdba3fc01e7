"""What the documentation site consists of: a hook of MkDocs, see mkdocs.yml.

Pages have the places that they have in the repository, so that the same links work in both. Beside Markdown files there
are the pictures and other files to which these link, and pages that are generated: what commands take, what a
configuration has, and the notebooks.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # which the program mkdocs has not
from docs.notebooks import markdown, notebooks  # noqa: E402

_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
_PICTURE = re.compile(r"!\[[^\]]*\]\(([^)#\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Takes the repository's documents in the place of the folder ``docs``."""
    chosen = [file for file in files if file.src_dir != config.docs_dir]
    for path in sorted({*pages(), *linked(), ROOT / "docs" / "site.css"}):
        chosen.append(File(str(path.relative_to(ROOT)), str(ROOT), config.site_dir, config.use_directory_urls))
    for name, text in (("commands", commands_page), ("config", config_page)):
        chosen.append(File.generated(config, f"docs/reference/{name}.md", content=text()))
    for path in notebooks():
        place, page = path.relative_to(ROOT).with_suffix(".md"), markdown(json.loads(path.read_text()))
        chosen.append(File.generated(config, str(place), content=page))
    return Files(chosen)


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leaves the text of links to folders, which a site cannot show."""
    if page.file.abs_src_path is None:
        return markdown
    here = Path(page.file.abs_src_path).parent
    return _LINK.sub(lambda m: m[1] if "://" not in m[2] and (here / m[2]).is_dir() else m[0], markdown)


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leaves out the roles of names in docstrings (:class: and so on), which Markdown does not know."""
    return re.sub(r":(?:class|func|meth|mod|attr|data):(?=<code>)", "", html)


def pages() -> list[Path]:
    """Returns the Markdown files of the repository that the site shows."""
    at_the_top = (ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY"))
    return [
        *at_the_top,
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("experiments/**/README.md"),
        *ROOT.glob("benchmarks/*.md"),
    ]


def linked() -> Iterator[Path]:
    """Finds the other files to which these link."""
    for page in pages():
        text = page.read_text()
        for link in (*(match[2] for match in _LINK.finditer(text)), *_PICTURE.findall(text)):
            path = (page.parent / link).resolve()
            if "://" not in link and path.suffix != ".md" and path.is_file():
                yield path


def commands_page() -> str:
    """Returns a page with the ``--help`` of every command; that of ``train`` is the page of the configuration."""
    from tedlab.__main__ import COMMANDS
    from tedlab.cli import CONF
    from tedlab.commands.arguments import plain
    from tedlab.commands.help import help_text

    parts = ["# Commands\n\n`tedlab COMMAND --help` prints this.\n"]
    for name, what in COMMANDS.items():
        command = import_module(f"tedlab.commands.{name}")  # which registers the types of its configuration
        text = help_text(name, []) if (CONF / f"{name}.yaml").exists() else plain(command.__doc__ or "")
        text, values, _ = text.partition("Presets (GROUP=OPTION)")
        more = "\nIt takes presets and values of the [configuration](config.md) as well.\n" if values else ""
        parts.append(f"## tedlab {name}\n\n{what.capitalize()}.\n\n```text\n{text.strip()}\n```\n{more}")
    return "\n".join(parts)


def config_page() -> str:
    """Returns a page with each field of the configuration, its type, default and comment in ``config.py``."""
    from tedlab import config

    parts = [
        "# Configuration\n\nEvery value of `tedlab train`, which `simulate`, `plan` and `certify` take as well; one is "
        "set by `section.name=value`. Defaults here are those of `config.py`; presets in `conf/` set others, and "
        "`tedlab train --help` shows what is in force.\n"
    ]
    parts += _sections(config.TrainConfig, "")
    for command, kind in {
        "simulate": config.SimulationConfig,
        "plan": config.PlanConfig,
        "plan phase=generate": config.ServeConfig,
        "calibrate": config.CalibrateConfig,
        "generate": config.GenerateConfig,
        "eval": config.EvalConfig,
        "compare": config.CompareConfig,
    }.items():
        parts += [f"## Only of tedlab {command}\n", _table(kind)]
    return "\n".join(parts)


def _sections(kind: type, path: str) -> list[str]:
    hints = get_type_hints(kind)
    below = [(f"{path}{f.name}.", hints[f.name]) for f in fields(kind) if is_dataclass(hints[f.name])]
    own = [f"## {path.rstrip('.') or 'Top level'}\n", _table(kind)]
    return own + [part for name, section in below for part in _sections(section, name)]


def _table(kind: Any) -> str:
    from tedlab.commands.help import Comment, field_comments

    hints, comments = get_type_hints(kind), field_comments(kind)
    rows = ["| value | type | default | |", "|---|---|---|---|"]
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            continue
        comment = comments.get(field.name, Comment())
        text = " ".join((*comment.above, comment.beside)).strip()
        annotation = getattr(hints[field.name], "__name__", None) if isinstance(hints[field.name], type) else None
        written = str(annotation or hints[field.name]).replace("typing.", "")
        cells = (f"`{field.name}`", f"`{written}`", _default(field))
        rows.append("| " + " | ".join((*cells, text.replace("|", "\\|"))) + " |")
    return "\n".join(rows) + "\n"


def _default(field: Any) -> str:
    if isinstance(field.default, str | int | float | bool):
        text = str(getattr(field.default, "value", field.default))
        text = text.lower() if isinstance(field.default, bool) else text
        return {"???": "must be set", "": "empty"}.get(text, f"`{text}`")
    return "`null`" if field.default is None else ""
