"""What tedlab uses of Hydra's and OmegaConf's private names. Nothing here needs torch."""

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from hydra._internal import utils as hydra_utils
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from omegaconf import OmegaConf
from omegaconf import _utils as omegaconf_utils


def arguments_parser(refuse: Callable[[str], NoReturn]) -> ArgumentParser:
    """Hydra's own for ``--cfg``, ``--multirun`` and the others, to look at a command line before Hydra acts on it.

    Args:
        refuse: Takes what is wrong with a command line; argparse's own prints all options and exits with 2.
    """
    parser = hydra_utils.get_args_parser()
    parser.error = refuse  # type: ignore[method-assign, assignment]
    return parser


def group_options(loader: ConfigLoader, name: str, overrides: Sequence[str]) -> Callable[[str, ObjectType], list[str]]:
    """``loader.get_group_options`` for a configuration and overrides, of which it reads the search path only once.

    The public method reads the configuration again for each group, which takes most of a second for all of them.
    """
    assert isinstance(loader, ConfigLoaderImpl)
    _, repository = loader._parse_overrides_and_create_caching_repo(name, [*overrides])
    return repository.get_group_options


def translate_files(translate: Callable[[str, Any], Any]) -> None:
    """Makes Hydra compose what ``translate`` returns for each file's path and content, as nested in the whole.

    Hydra tells its plugins of jobs, and of places to look for files, but not of what it reads there.
    """
    load = ConfigLoaderImpl._load_single_config

    def load_translated(*arguments: Any, **options: Any) -> Any:
        result = load(*arguments, **options)
        if not result.path.startswith("structured:"):  # that is a schema
            content = OmegaConf.to_container(result.config)
            new = translate(result.path, content)
            result.config = result.config if new == content else OmegaConf.create(new)
        return result

    ConfigLoaderImpl._load_single_config = load_translated  # type: ignore[method-assign]


def yaml_loader() -> Any:
    """The class by which ``OmegaConf.load`` reads YAML: to it 9e9 is a number, and a key that comes twice an error.

    ``OmegaConf.load`` has no way to refuse tags and aliases; a subclass has.
    """
    return omegaconf_utils.get_yaml_loader()
