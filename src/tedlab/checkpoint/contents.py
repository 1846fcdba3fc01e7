"""Shows the contents of a checkpoint as a table, and exports its model as one file."""

import math
from pathlib import Path

from rich.table import Table
from safetensors.torch import save_file

from tedlab.checkpoint import read_meta, stored_tensors, verify
from tedlab.checkpoint.pieces import PieceReader
from tedlab.progress import advancing
from tedlab.tables import FittingTable

_MODEL = "model."


def inspect(path: Path) -> Table:
    """Verifies every file of a checkpoint and lists its parameters with global shape, dtype and number of pieces.

    Raises:
        FileNotFoundError: If ``path`` is not a complete checkpoint.
        ValueError: If a file is damaged or belongs to another save.
    """
    verify(path)
    meta, tensors = read_meta(path), stored_tensors(path)
    parameters = {n.removeprefix(_MODEL): t for n, t in tensors.items() if n.startswith(_MODEL)}
    table = FittingTable(title=f"{path}: step {meta.get('global_step', 'unknown')}")
    for heading in ("parameter", "shape", "dtype", "pieces"):
        table.add_column(heading, justify="right" if heading == "pieces" else "left")
    for name, tensor in sorted(parameters.items()):
        shape = "×".join(map(str, tensor.size)) or "scalar"
        dtype = str(tensor.properties.dtype).removeprefix("torch.")
        table.add_row(name, shape, dtype, str(len(tensor.chunks)))
    elements = sum(math.prod(t.size) for t in parameters.values())
    size = sum(file.stat().st_size for file in path.iterdir())
    state = sorted({n.rsplit(".", 1)[1] for n in tensors if ".state." in n})
    optimizer = f"with the optimizer's {', '.join(state)}" if state else "without optimizer state"
    table.caption = f"{elements:,} parameters in {len(parameters)} tensors; {size / 2**20:,.1f} MiB {optimizer}"
    return table


def consolidate(path: Path, out: Path) -> None:
    """Writes the whole model, unsharded, as one safetensors file. One process does it, and holds the model in memory.

    Raises:
        FileNotFoundError: If ``path`` is not a complete checkpoint.
        ValueError: If a file is damaged or belongs to another save.
    """
    reader, tensors = PieceReader(path), {}
    stored = {name: entry for name, entry in reader.tensors.items() if name.startswith(_MODEL)}
    with advancing("consolidating", sum(entry.size.numel() for entry in stored.values())) as advance:
        for name in stored:
            tensors[name.removeprefix(_MODEL)] = tensor = reader.read(name)
            advance(tensor.numel())
    partial = out.with_name(out.name + ".partial")
    save_file(tensors, partial)
    partial.replace(out)
