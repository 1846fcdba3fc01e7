"""Models built from ``tedlab.nn`` and ``tedlab.moe``."""

from tedlab.models.gpt import GPT, GPTSpec, ParameterCount, count_parameters

__all__ = ["GPT", "GPTSpec", "ParameterCount", "count_parameters"]
