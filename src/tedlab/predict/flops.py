"""Computes how many floating-point operations a configuration's model needs, and how many a device can do.

These are model FLOPs: what the mathematics of a training step needs, without what a layout or implementation adds.

Layers state the FLOPs of their forward pass (``Spec.flops``), which are those of their matrix products; a multiply-add
counts as two operations. Attention's scores and weighted sums count half because attention is causal. Experts count
for every choice of a token, including those that a full expert drops. The backward pass counts twice the forward pass
because a product has two gradients. Recomputation does not count, nor does anything but matrix products: table lookups,
biases, norms, activations, rotations, softmax, the loss and the optimizer.
"""

import re
from collections import Counter
from collections.abc import Sequence
from math import prod

from tedlab.config import GroupConfig, ModelConfig, MoEConfig
from tedlab.models import GPTSpec, models
from tedlab.optim.groups import Grouping
from tedlab.spec import ParameterSpec

_BEFORE_BLOCKS = ("embedding", "positions")  # layers before the first block

# The dense peak (without sparsity) in TFLOP/s of one device, by a pattern of torch's name for it; the first match wins.
# Half precision uses tensor cores. fp32 is IEEE fp32, not TF32, which torch uses for matrix products only when told to.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    # NVIDIA V100 data sheet (January 2020): SXM2, and PCIe. No bf16.
    (r"\bV100-SXM2\b", {"fp32": 15.7, "fp16": 125.0}),
    (r"\bV100-PCIE\b", {"fp32": 14.0, "fp16": 112.0}),
    # NVIDIA A100 data sheet (June 2021): the same for SXM and PCIe.
    (r"\bA100\b", {"fp32": 19.5, "fp16": 312.0, "bf16": 312.0}),
    # NVIDIA H100 data sheet (whose half-precision figures include sparsity and are twice these): NVL, PCIe, SXM.
    (r"\bH100 NVL\b", {"fp32": 60.0, "fp16": 835.5, "bf16": 835.5}),
    (r"\bH100 PCIe\b", {"fp32": 51.0, "fp16": 756.5, "bf16": 756.5}),
    (r"\bH100\b", {"fp32": 67.0, "fp16": 989.5, "bf16": 989.5}),
    # NVIDIA H200 data sheet (whose figures include sparsity, too): NVL, SXM.
    (r"\bH200 NVL\b", {"fp32": 60.0, "fp16": 835.5, "bf16": 835.5}),
    (r"\bH200\b", {"fp32": 67.0, "fp16": 989.5, "bf16": 989.5}),
    # NVIDIA HGX B200 specifications (600 and 36000 for eight GPUs, half precision with sparsity).
    (r"\bB200\b", {"fp32": 75.0, "fp16": 2250.0, "bf16": 2250.0}),
    # AMD Instinct MI250X data sheet, matrix cores; torch sees each of its two dies (GCDs) as one device.
    (r"\bMI250X\b", {"fp32": 95.7 / 2, "fp16": 383.0 / 2, "bf16": 383.0 / 2}),
)


def forward_flops(model: ModelConfig, moe: MoEConfig) -> Counter[str]:
    """Returns the FLOPs of the forward pass per token, by part of the model.

    Args:
        model: The model, with its ``vocab_size`` set.
        moe: The model's experts.
    """
    return models[model.architecture].spec(model, moe).flops(model.sequence_length)


def training_flops(model: ModelConfig, moe: MoEConfig, groups: Sequence[GroupConfig] = ()) -> int:
    """Returns the FLOPs of the forward and backward pass per token.

    The backward pass leaves out the weight gradients of frozen parameters, and all blocks before the first layer that
    trains.

    Args:
        model: The model, with its ``vocab_size`` set.
        moe: The model's experts.
        groups: ``optim.groups``, which may freeze parameters.
    """
    forward = sum(forward_flops(model, moe).values())
    if not any(group.frozen for group in groups):
        return 3 * forward
    spec, grouping = models[model.architecture].spec(model, moe), Grouping(groups)
    first = first_with_backward(spec, grouping)
    backward = 2 * forward
    for index, block in enumerate(spec.blocks):
        flops = sum(block.flops(model.sequence_length).values())
        frozen = (p for p in block.parameters() if not grouping.trains(f"blocks.{index}.{p.name}"))
        backward -= 2 * flops if index < first else sum(weight_flops(p, moe) for p in frozen)
    output = "embedding" if model.tie_embeddings else "output"
    if not grouping.trains(f"{output}.weight"):
        assert model.vocab_size is not None
        backward -= 2 * model.vocab_size * model.hidden
    return forward + backward


def first_with_backward(spec: GPTSpec, grouping: Grouping) -> int:
    """Returns the first block that the backward pass reaches, which ends at the first layer that trains.

    It is the number of blocks if only layers after them train.
    """
    layers = [p.name.split(".") for p in spec.parameters() if grouping.trains(p.name)]
    if any(name[0] in _BEFORE_BLOCKS for name in layers):
        return 0
    return min((int(name[1]) for name in layers if name[0] == "blocks"), default=len(spec.blocks))


def weight_flops(parameter: ParameterSpec, moe: MoEConfig) -> int:
    """Returns the FLOPs per token of the products with a block's parameter in one pass: none if it is no matrix.

    A token uses a matrix once, or ``top_k`` of the matrices of all experts, for each tensor that a router reads.
    """
    if not parameter.decayed:
        return 0
    once = 2 * prod(parameter.shape)
    if parameter.mesh == "expert":
        return once * moe.inputs * moe.top_k // moe.num_experts
    return once * moe.inputs if ".router." in parameter.name else once


def peak_flops(device: str, precision: str) -> float | None:
    """Returns the dense peak of a device in FLOP/s, or None if it is not known.

    Args:
        device: The device's name, as torch gives it.
        precision: Lightning's ``trainer.precision``.
    """
    dtype = {"32": "fp32", "16": "fp16", "bf16": "bf16"}.get(precision.split("-")[0], precision)
    if "MIG" in device:  # a part of a GPU
        return None
    for pattern, peaks in _PEAKS:
        if re.search(pattern, device):
            return peaks[dtype] * 1e12 if dtype in peaks else None
    return None
