"""Models built from ``tedlab.nn`` and ``tedlab.moe``."""

from tedlab.models.gpt import GPT, ParameterCount, count_parameters

__all__ = ["GPT", "ParameterCount", "count_parameters"]
