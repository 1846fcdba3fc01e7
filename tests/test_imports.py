"""Modules form layers: none imports, at once or in a function, what imports it."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src"
FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCE.glob("tedlab/**/*.py")
}


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of this package that a module imports; what is for type checkers alone does not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in FILES else node.module for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        yield from imported(node)


def test_no_module_imports_what_imports_it() -> None:
    arrows = {name: {*imported(ast.parse(path.read_text()))} & FILES.keys() - {name} for name, path in FILES.items()}
    assert sum(map(len, arrows.values())) > 500
    TopologicalSorter(arrows).prepare()  # raises a CycleError that has the cycle


def test_what_is_imported_in_a_function_counts() -> None:
    source = "if TYPE_CHECKING:\n    import tedlab.run\ndef f():\n    from tedlab.moe import router\n"
    assert [*imported(ast.parse(source))] == ["tedlab.moe.router"]
