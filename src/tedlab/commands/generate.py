"""``tedlab generate run=<dir> prompt="def "``: continues a text with the model of a finished run."""

import sys

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tedlab.generate import GenerateConfig, generate


def main() -> None:
    """Reads ``key=value`` arguments and prints the text."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print('usage: tedlab generate run=<dir> prompt="def " [key=value …]\n')
        print(OmegaConf.to_yaml(OmegaConf.structured(GenerateConfig)).replace(": ", "="))
        return
    try:
        wrong = [a for a in arguments if "=" not in a]
        if wrong:
            raise ValueError(f"'{wrong[0]}' is not of the form key=value; --help shows the keys")
        settings = OmegaConf.merge(OmegaConf.structured(GenerateConfig), dict(a.split("=", 1) for a in arguments))
        config = OmegaConf.to_object(settings)
        assert isinstance(config, GenerateConfig)
        print(generate(config))
    except (OmegaConfBaseException, OSError, ValueError) as error:
        sys.exit(f"{error}")
