"""``tedlab completion bash``: prints what makes bash complete commands, presets, values and folders after TAB.

eval "$(tedlab completion bash)"     in ~/.bashrc
"""

import shlex
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import hydra
from omegaconf import OmegaConf

from tedlab.cli import CONF, presets
from tedlab.commands.arguments import ArgumentParser

# Words of the line are divided at blanks alone: bash divides them at "=" as well, and replaces only what is after it.
_SCRIPT = """\
_tedlab() {
  local line=${COMP_LINE:0:COMP_POINT} words= folders= cur IFS=$'\\n'
  while [[ $line == *'  '* ]]; do line=${line//  / }; done
  line="tedlab ${line#* }"  # it may have been called by its path
  cur=${line##* }
  case "$line" in
%(cases)s
    *) words=%(commands)s ;;
  esac
  COMPREPLY=($(IFS=' '; compgen -W "$words" -- "$cur"))
  if [[ $folders && $cur != *=* ]]; then COMPREPLY+=($(compgen -d -S / -- "$cur")); fi
  if [[ -z ${COMPREPLY[*]} || ( $cur == *= && ${COMPREPLY[*]} == "$cur" ) ]]; then
    COMPREPLY=($(compgen -f -- "${cur##*=}"))
  fi
  if [[ ${COMPREPLY[0]} == *[=/] ]]; then compopt -o nospace 2> /dev/null; fi
  if [[ $cur == *=* ]]; then COMPREPLY=("${COMPREPLY[@]#"${cur%%%%=*}="}"); fi
}
complete -o default -F _tedlab tedlab
"""
# What may follow the commands that Hydra does not compose, by the beginning of the line; the first that matches holds.
_OTHERS = {
    "checkpoint inspect ": "",
    "checkpoint consolidate ": "",
    "checkpoint import ": "hf= out=",
    "checkpoint export ": "run= out= family= dtype= checkpoint=",
    "checkpoint upcycle ": "run= out= moe= scale= noise= reinit= router_std=",
    "checkpoint verify ": "",
    "checkpoint ": "inspect consolidate import verify export upcycle --help",
    "runs ": "--all --help",
    "models ": "--help",
    "completion ": "bash --help",
}
_BELOW = {"data": ("prepare", "inspect")}  # commands of commands that Hydra composes
_TAKE_FOLDERS = ("checkpoint inspect ", "checkpoint consolidate ", "runs ", "compare ")


def main(arguments: list[str] | None = None) -> None:
    """Prints the script."""
    parser = ArgumentParser(prog="tedlab completion", description=__doc__)
    parser.add_argument("shell", choices=["bash"])
    parser.parse_args(arguments)
    print(script(), end="")


def script() -> str:
    """Returns the script for bash. What it knows is that of this version: evaluate it again after an update."""
    from tedlab.__main__ import COMMANDS

    cases = [_case(start, following) for start, following in _OTHERS.items()]
    for name in COMMANDS:
        if (CONF / f"{name}.yaml").exists():
            import_module(f"tedlab.commands.{name}")  # which registers the types of its configuration
            below = _BELOW.get(name, ())
            cases += [_case(f"{name} {command} ", " ".join(words(name))) for command in below]
            cases.append(_case(f"{name} ", " ".join([*below, "--help"] if below else words(name))))
    return _SCRIPT % {"cases": "\n".join(cases), "commands": shlex.quote(" ".join(COMMANDS))}


def _case(start: str, following: str) -> str:
    folders = " folders=yes" if start in _TAKE_FOLDERS else ""
    return f"    'tedlab {start}'*) words={shlex.quote(following)}{folders} ;;"


def words(name: str) -> list[str]:
    """Returns what may follow a command: every preset as GROUP=OPTION, and every value as KEY=."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        chosen = [f"{group}={option}" for group, options in presets(name).items() for option in options]
        config = OmegaConf.to_container(hydra.compose(name))
    return [*chosen, *(f"{key}=" for key in _keys(config)), "--help"]


def _keys(values: Any, prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
