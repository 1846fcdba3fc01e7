"""``python -m docs.notebooks``: runs the notebooks of docs/notebooks and keeps in them what their cells print and draw.

A cell runs as in Jupyter: what it prints and the value of its last line is its output, and a figure that is its last
value is a picture. The cells are plain Python, so neither Jupyter nor a kernel is needed, here or in CI.
"""

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from docs.commands import words

FOLDER = Path(__file__).with_name("notebooks")
Notebook = dict[str, Any]  # in Jupyter's format 4


def notebooks() -> list[Path]:
    """Returns the files, in the order of their names."""
    return sorted(FOLDER.glob("*.ipynb"))


def run(notebook: Notebook, folder: Path) -> Notebook:
    """Returns a copy of a notebook with the outputs that its cells have when they run in a folder, in turn."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells, count = [], 0
    before = Path.cwd()
    os.chdir(folder)
    try:
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                count += 1
                cell = cell | {"execution_count": count, "outputs": _outputs("".join(cell["source"]), names, count)}
            cells.append(cell)
    finally:
        os.chdir(before)
    return notebook | {"cells": cells}


def differences(one: Notebook, other: Notebook) -> list[str]:
    """Returns the cells whose outputs differ, by their source.

    Pictures must be there, but may differ: fonts and versions of matplotlib draw them otherwise. Numbers of cells that
    are tagged ``measured`` may differ, too: they depend on the machine.
    """
    pairs = zip(one["cells"], other["cells"], strict=True)
    return ["".join(a["source"]) for a, b in pairs if a["cell_type"] == "code" and _said(a) != _said(b)]


def markdown(notebook: Notebook) -> str:
    """Returns a notebook as a page: text, code, and outputs below it."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![{''.join(data['text/plain'])}](data:image/png;base64,{data['image/png'].strip()})")
            else:
                parts.append(f"```text\n{''.join(output.get('text') or data['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _outputs(source: str, names: dict[str, Any], count: int) -> list[dict[str, Any]]:
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {count}", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {count}", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": _lines(printed.getvalue())})
    if value is not None:
        text = str(value.get_label() or "a figure") if isinstance(value, Figure) else repr(value)
        data: dict[str, Any] = {"text/plain": _lines(text)}
        if isinstance(value, Figure):
            picture = io.BytesIO()
            value.savefig(picture, format="png", dpi=100)
            data["image/png"] = base64.b64encode(picture.getvalue()).decode()
        outputs.append({"data": data, "execution_count": count, "metadata": {}, "output_type": "execute_result"})
    return outputs


def _said(cell: dict[str, Any]) -> list[Any]:
    measured = "measured" in cell["metadata"].get("tags", [])
    said: list[Any] = []
    for output in cell["outputs"]:
        text = "".join(output.get("text") or output["data"]["text/plain"])
        said += [words(text) if measured else text, "image/png" in output.get("data", {})]
    return said


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main(paths: Sequence[Path]) -> None:
    """Runs notebooks, each in a folder of its own, and writes them back."""
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            done = run(json.loads(path.read_text()), Path(folder))
        path.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]] or notebooks())
