"""What it costs to give experts another layout between the prefill and decoding.

Two ways (HAP, arXiv 2508.19373): processes exchange the parts of experts that they lack, or each loads its new ones
from the host's memory, where they wait in INT4, while the prefill still runs. The latter changes weights.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from tedlab.degrees import ParallelDegrees
from tedlab.predict.cluster import ClusterConfig
from tedlab.predict.cost import exchange_seconds
from tedlab.predict.sim.roofline import seconds
from tedlab.relayout import moved_elements
from tedlab.spec import ParameterSpec, Work

_GROUP = 128  # weights that share a scale and a zero point, two bytes each, as in GPTQ and AWQ
_INT4 = 0.5 + 4 / _GROUP  # bytes of a weight


class Switch(NamedTuple):
    """A change of the experts' layout.

    Attributes:
        way: ``none`` if nothing moves.
        seconds: What it adds.
        moved: Bytes that the process gets which gets the most.
        beside: Bytes of a layer's experts that a process holds beside its weights while they come.
    """

    way: Literal["none", "exchange", "int4"]
    seconds: float
    moved: float
    beside: float


def switches(
    parameters: Sequence[ParameterSpec],
    layers: int,
    old: ParallelDegrees,
    new: ParallelDegrees,
    dtype: torch.dtype,
    cluster: ClusterConfig,
    upload: float | None = None,
    prefill_layer: float = 0.0,
) -> list[Switch]:
    """Returns the ways.

    Args:
        parameters: Those of the experts of a layer.
        layers: The number of layers with such experts, which are exchanged one after the other.
        old, new: The layouts.
        dtype: Dtype of the weights.
        cluster: The cluster that this is on.
        upload: Bytes/s from the host's memory to each GPU at the same time; None: INT4 is not allowed.
        prefill_layer: Seconds of a layer of the prefill, under which a layer's upload can hide.
    """
    counts_sr = moved_elements(parameters, old, new)
    received = counts_sr.sum(0) - counts_sr.diagonal()
    if not received.any():
        return [Switch("none", 0.0, 0.0, 0.0)]
    held = sum(parameter.elements(new) for parameter in parameters)
    exchanged = layers * exchange_seconds(counts_sr * float(dtype.itemsize), cluster)
    ways = [Switch("exchange", exchanged, layers * float(received.max()) * dtype.itemsize, held * dtype.itemsize)]
    if upload is not None:
        dequantised = Work(0, held * (_INT4 + dtype.itemsize), dtype, "movement")
        beyond = max(0.0, held * _INT4 / upload + seconds(dequantised, cluster) - prefill_layer)
        ways.append(Switch("int4", layers * beyond, layers * held * _INT4, held * (dtype.itemsize + _INT4)))
    return ways
