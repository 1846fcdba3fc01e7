"""``tedlab checkpoint inspect|consolidate <dir>``: what is in a checkpoint, and the model as one file."""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    """Runs the command with its command line."""
    parser = argparse.ArgumentParser(prog="tedlab checkpoint", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in (("inspect", "print what is in it"), ("consolidate", "write one safetensors file")):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("directory", type=Path, help="e.g. runs/main/<date>/checkpoints/last.ckpt")
        if name == "consolidate":
            command.add_argument("out", type=Path, nargs="?", help="default: <directory>.safetensors")
    options = parser.parse_args(arguments)
    from rich.console import Console
    from safetensors import SafetensorError

    from tedlab.checkpoint.contents import consolidate, inspect

    try:
        if options.command == "inspect":
            Console().print(inspect(options.directory))
        else:
            out = options.out or options.directory.with_suffix(".safetensors")
            consolidate(options.directory, out)
            print(out)
    except (OSError, ValueError, SafetensorError) as error:
        sys.exit(f"{error}")
