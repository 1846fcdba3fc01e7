"""What tedlab uses of Hydra's and OmegaConf's private names. Nothing here needs torch."""

from argparse import ArgumentParser
from typing import Any

from hydra._internal import utils as hydra_utils
from omegaconf import _utils as omegaconf_utils


def arguments_parser() -> ArgumentParser:
    """Hydra's own for ``--cfg``, ``--multirun`` and the others, to look at a command line before Hydra acts on it."""
    return hydra_utils.get_args_parser()


def yaml_loader() -> Any:
    """The class by which ``OmegaConf.load`` reads YAML: to it 9e9 is a number, and a key that comes twice an error.

    ``OmegaConf.load`` has no way to refuse tags and aliases; a subclass has.
    """
    return omegaconf_utils.get_yaml_loader()
