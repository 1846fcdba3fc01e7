"""``tedlab completion bash``: prints what makes bash complete commands, presets and values after TAB.

eval "$(tedlab completion bash)"                                        in ~/.bashrc
autoload -U bashcompinit && bashcompinit; eval "$(tedlab completion bash)"     in ~/.zshrc
"""

import argparse
import shlex
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import hydra
from omegaconf import OmegaConf

from tedlab.cli import CONF, presets

# Words of the line are divided at blanks alone: bash divides them at "=" as well, and replaces only what is after it.
_SCRIPT = """\
_tedlab() {
  local line=${COMP_LINE:0:COMP_POINT} words= cur
  cur=${line##* }
  case "$line" in
%(cases)s
    *) words=%(commands)s ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
  if [[ -z ${COMPREPLY[*]} || ( $cur == *= && ${COMPREPLY[*]} == "$cur" ) ]]; then
    COMPREPLY=($(compgen -f -- "${cur##*=}"))
  fi
  if [[ ${COMPREPLY[0]} == *= ]]; then compopt -o nospace 2> /dev/null; fi
  if [[ $cur == *=* ]]; then COMPREPLY=("${COMPREPLY[@]#"${cur%%=*}="}"); fi
}
complete -o default -F _tedlab tedlab
"""


def main(arguments: list[str] | None = None) -> None:
    """Prints the script."""
    parser = argparse.ArgumentParser(
        prog="tedlab completion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shell", choices=["bash"])
    parser.parse_args(arguments)
    print(script(), end="")


def script() -> str:
    """Returns the script for bash. What it knows is that of this version: evaluate it again after an update."""
    from tedlab.__main__ import COMMANDS

    cases = []
    for name in COMMANDS:
        if (CONF / f"{name}.yaml").exists():
            import_module(f"tedlab.commands.{name}")  # which registers the types of its configuration
            cases.append(f"    'tedlab {name} '*) words={shlex.quote(' '.join(words(name)))} ;;")
    return _SCRIPT % {"cases": "\n".join(cases), "commands": shlex.quote(" ".join(COMMANDS))}


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
