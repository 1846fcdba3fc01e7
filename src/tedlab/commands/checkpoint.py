"""``tedlab checkpoint COMMAND``: what is in a checkpoint, the model as one file, and models of transformers in and out.

tedlab checkpoint inspect DIR
tedlab checkpoint consolidate DIR [FILE]
tedlab checkpoint import hf=FOLDER out=DIR [model.sequence_length=… parallel.tensor=… …]
tedlab checkpoint export run=DIR out=FOLDER [family=…] [dtype=…] [checkpoint=last.ckpt]
tedlab checkpoint upcycle run=DIR out=DIR moe=PRESET [moe.ffn=… …] [scale=gates] [noise=…] [reinit=…] [router_std=…]
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tedlab.commands.arguments import ArgumentParser

_MIB = 1 << 20


def main(arguments: list[str] | None = None) -> None:
    """Runs the command with its command line."""
    parser = ArgumentParser(prog="tedlab checkpoint", description=__doc__)
    names = "{inspect,consolidate,import,verify,export,upcycle}"  # in what is said if none is given
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    for name, help_text in (("inspect", "print what is in it"), ("consolidate", "write one safetensors file")):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("directory", type=Path, help="e.g. runs/main/<date>/checkpoints/last.ckpt")
        if name == "consolidate":
            command.add_argument("out", type=Path, nargs="?", help="default: <directory>.safetensors")
    for name, help_text in (
        ("import", "make a run directory of a folder with a model of transformers"),
        ("verify", "compare an import with transformers, number by number"),
        ("export", "make a folder that transformers loads of a run"),
        ("upcycle", "make a run directory with experts of a dense run"),
    ):
        commands.add_parser(name, help=help_text).add_argument("values", nargs="+", metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    from safetensors import SafetensorError

    from tedlab.checkpoint.contents import consolidate, inspect
    from tedlab.console import output

    try:
        if options.command == "inspect":
            output().print(inspect(options.directory))
        elif options.command == "consolidate":
            out = options.out or options.directory.with_suffix(".safetensors")
            consolidate(options.directory, out)
            print(out)
        else:
            {"import": _import, "verify": _verify, "export": _export, "upcycle": _upcycle}[options.command](
                options.values
            )
    except (OSError, ValueError, SafetensorError) as error:
        sys.exit(f"{error}")


def _import(arguments: Sequence[str]) -> None:
    from tedlab.exchange.imports import import_folder

    given, overrides = _values("import", arguments, ("hf", "out"), (), others=True)
    done = import_folder(Path(given["hf"]).expanduser(), Path(given["out"]).expanduser(), overrides)
    print(
        f"{given['out']}: {done.parameters:,} parameters of the family {done.family}, read in pieces of at most "
        f"{_mib(done.largest_bytes)}",
        f"its tokenizer is in {given['out']}/tokenizer.json" if done.tokenizer else "the folder has no tokenizer.json",
        f"tedlab train weights={given['out']} …  starts from it",
        sep="\n",
    )


def _export(arguments: Sequence[str]) -> None:
    from tedlab.exchange.exports import export

    given, _ = _values("export", arguments, ("run", "out"), ("family", "dtype", "checkpoint"))
    done = export(_checkpoint(given), Path(given["out"]).expanduser(), given.get("family"), given.get("dtype"))
    print(
        f"{done.folder}: {done.parameters:,} parameters in the form of {done.family}, read in pieces of at most "
        f"{_mib(done.largest_bytes)}"
    )


def _upcycle(arguments: Sequence[str]) -> None:
    from tedlab.commands import upcycle

    given, overrides = _values("upcycle", arguments, ("run", "out"), (*upcycle.OPTIONS, "checkpoint"), others=True)
    options = {name: value for name, value in given.items() if name in upcycle.OPTIONS}
    print(upcycle.run(_checkpoint(given), Path(given["out"]).expanduser(), options, overrides))


def _verify(arguments: Sequence[str]) -> None:

    from tedlab.console import output
    from tedlab.exchange.verify import verify
    from tedlab.tables import FittingTable

    given, _ = _values("verify", arguments, ("run", "hf"), ("layers", "dtype", "checkpoint"))
    layers = given.get("layers")
    if layers is not None and not (layers.isdecimal() and int(layers)):
        raise ValueError(f"layers={layers} is no number of blocks")
    verdict = verify(
        _checkpoint(given),
        Path(given["hf"]).expanduser(),
        given.get("dtype", "float64"),
        None if layers is None else int(layers),
    )
    table = FittingTable(title="the same as transformers" if verdict.ok else "not what transformers computes")
    for heading in ("quantity", "largest error", "in", "verdict"):
        table.add_column(heading)
    for row in verdict.rows:
        table.add_row(row.quantity, f"{row.error:.1e}", row.worst, "equal" if row.ok else "different")
    output().print(table)
    if not verdict.ok:
        sys.exit("\n".join(verdict.found))


def _mib(size: int) -> str:
    """Writes a number of bytes in MiB, with at least three digits that say something."""
    return f"{size / _MIB:,.1f} MiB" if size >= 10 * _MIB else f"{size / _MIB:.3g} MiB"


def _checkpoint(given: Mapping[str, str]) -> Path:
    """Returns the checkpoint that ``run=`` and ``checkpoint=`` name."""
    from tedlab.resume import find_checkpoint

    place = Path(given["run"]).expanduser()
    return find_checkpoint(place / "checkpoints" / given["checkpoint"] if "checkpoint" in given else place, "run")


def _values(
    command: str, arguments: Sequence[str], required: Sequence[str], optional: Sequence[str], others: bool = False
) -> tuple[dict[str, str], list[str]]:
    """Divides ``KEY=VALUE`` arguments into the command's own and, if there may be some, others."""
    own: dict[str, str] = {}
    further: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key in own:
            raise ValueError(f"{key} is given twice: {own[key]} and {value}")
        if equals and key in (*required, *optional):
            own[key] = value
        elif others:
            further.append(argument)
        else:
            known = ", ".join((*required, *optional))
            raise ValueError(f"{argument!r}: tedlab checkpoint {command} takes {known}, each as KEY=VALUE")
    for key in required:
        if not own.get(key):
            raise ValueError(f"tedlab checkpoint {command} needs {key}=…")
    return own, further
