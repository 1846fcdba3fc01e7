"""Models built from ``tedlab.nn`` and ``tedlab.moe``."""

from tedlab.models.block import Block, BlockSpec
from tedlab.models.gpt import GPT, GPTSpec, ParameterCount, count_parameters, models

__all__ = [
    "GPT",
    "Block",
    "BlockSpec",
    "GPTSpec",
    "ParameterCount",
    "count_parameters",
    "models",
]
