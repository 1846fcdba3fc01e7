"""How many floating-point operations the model needs, from the configuration alone, and how many a device can do.

Counted are model FLOPs: what the mathematics of a training step needs, whatever a layout or an implementation adds.

Legend: H hidden, F ffn, S sequence_length, V vocab_size, E experts, K choices per token. A multiply-add is two
operations. Forward, per token:

- attention's projections, each block: 2·(3H² + H²);
- attention's scores and weighted sums, each block: 2·S·H, half of 4·S·H: a token looks at the tokens before it only;
- a dense feed-forward layer: 2·2·H·F, and with SwiGLU, which has three matrices, 2·3·H·F;
- experts: K times that, whatever a full expert drops, and without the empty slots of the dispatch buffer;
- a router: 2·H·E;
- the output over the vocabulary: 2·H·V.

Backward is twice forward: a product has two gradients. What activation checkpointing recomputes is not counted.
Neither are lookups in tables, biases, norms, activations, rotations, softmax, the loss and the optimizer, which
multiply no matrices.
"""

import re

from tedlab.config import ModelConfig, MoEConfig

# Dense peak (without sparsity) in TFLOP/s of one device as torch names it. Tensor cores for half precision; fp32 is
# IEEE fp32, not TF32, which torch uses for matrix products only when told to. Of several that match the first counts.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    # NVIDIA V100 data sheet (January 2020): SXM2, and PCIe. No bf16.
    (r"\bV100-SXM2\b", {"fp32": 15.7, "fp16": 125.0}),
    (r"\bV100-PCIE\b", {"fp32": 14.0, "fp16": 112.0}),
    # NVIDIA A100 data sheet (June 2021): the same for SXM and PCIe.
    (r"\bA100\b", {"fp32": 19.5, "fp16": 312.0, "bf16": 312.0}),
    # NVIDIA H100 data sheet (its half-precision figures are with sparsity: twice these): NVL, PCIe, SXM.
    (r"\bH100 NVL\b", {"fp32": 60.0, "fp16": 835.5, "bf16": 835.5}),
    (r"\bH100 PCIe\b", {"fp32": 51.0, "fp16": 756.5, "bf16": 756.5}),
    (r"\bH100\b", {"fp32": 67.0, "fp16": 989.5, "bf16": 989.5}),
    # NVIDIA H200 data sheet (likewise): NVL, SXM.
    (r"\bH200 NVL\b", {"fp32": 60.0, "fp16": 835.5, "bf16": 835.5}),
    (r"\bH200\b", {"fp32": 67.0, "fp16": 989.5, "bf16": 989.5}),
    # NVIDIA HGX B200 specifications (of eight, half precision with sparsity: 600 and 36000).
    (r"\bB200\b", {"fp32": 75.0, "fp16": 2250.0, "bf16": 2250.0}),
    # AMD Instinct MI250X data sheet, matrix cores; torch sees each of its two dies (GCDs) as a device of its own.
    (r"\bMI250X\b", {"fp32": 95.7 / 2, "fp16": 383.0 / 2, "bf16": 383.0 / 2}),
)


def forward_flops(model: ModelConfig, moe: MoEConfig) -> dict[str, int]:
    """FLOPs of the forward pass per token, by part of the model; see the module for the formula.

    Args:
        model: with its ``vocab_size`` set.
        moe: experts.
    """
    assert model.vocab_size is not None
    routed = len(moe.blocks(model.layers))
    feed_forward = 2 * (3 if model.activation == "swiglu" else 2) * model.hidden * model.ffn
    return {
        "attention_projections": model.layers * 2 * 4 * model.hidden**2,
        "attention_scores": model.layers * 2 * model.sequence_length * model.hidden,
        "feed_forward": (model.layers - routed) * feed_forward,
        "experts": routed * moe.top_k * feed_forward,
        "routers": routed * 2 * model.hidden * moe.num_experts,
        "output": 2 * model.hidden * model.vocab_size,
    }


def training_flops(model: ModelConfig, moe: MoEConfig) -> int:
    """FLOPs of forward and backward pass per token."""
    return 3 * sum(forward_flops(model, moe).values())


def peak_flops(device: str, precision: str) -> float | None:
    """Dense peak of a device in FLOP/s; None if it is not known.

    Args:
        device: its name, as torch gives it.
        precision: Lightning's ``trainer.precision``.
    """
    dtype = {"32": "fp32", "16": "fp16", "bf16": "bf16"}.get(precision.split("-")[0], precision)
    if "MIG" in device:  # a part of a GPU
        return None
    for pattern, peaks in _PEAKS:
        if re.search(pattern, device):
            return peaks[dtype] * 1e12 if dtype in peaks else None
    return None
