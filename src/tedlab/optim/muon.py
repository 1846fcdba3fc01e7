"""Muon, which makes the momentum of each matrix nearly orthogonal, with AdamW for parameters that are no matrices.

Sources: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), and Liu et al. 2025, "Muon is Scalable for LLM
Training" (arXiv 2502.16982, Moonlight), for weight decay and the factor that lets both share a learning rate.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adam import adam

# Names that AdamW steps. A pattern also matches a name after a dot, so that these hold inside other modules.
ADAMW = ("*embed*", "*position*", "*head.weight", "*.output.weight", "*.router.*", "*.gate.*")
DTYPES = ("bfloat16", "float32")
NS_STEPS = 5
_COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of Jordan et al.: the steepest at 0 that keep singular values near 1
_SMALLEST = 1e-7  # norm that a matrix is divided by


def newton_schulz(matrix: Tensor, steps: int) -> Tensor:
    """Returns U S' Vᵀ of a matrix U S Vᵀ (rows, columns), with singular values S' near 1, between 0.68 and 1.14.

    Each step is a polynomial of degree five in the matrix. Singular values below about 0.002 of the matrix's Frobenius
    norm come less far in five steps. It computes in the matrix's dtype.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=_SMALLEST)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def is_matrix(name: str, dimensions: int, decayed: bool, adamw: Sequence[str] = ADAMW) -> bool:
    """Tells whether Muon steps a parameter: one of two or three dimensions, no bias or norm, that no pattern names.

    Args:
        name: Name of the parameter.
        dimensions: Number of its dimensions; three are a stack of matrices.
        decayed: Whether weight decay applies to it, which spares biases and norms.
        adamw: Patterns of names that AdamW steps.
    """
    return dimensions in (2, 3) and decayed and not any(matches(name, pattern) for pattern in adamw)


def matches(name: str, pattern: str) -> bool:
    """Tells whether a pattern of names that AdamW steps matches a name, as it is or with a dot before it."""
    return fnmatchcase(name, pattern) or fnmatchcase(f".{name}", pattern)


class Muon(Optimizer):
    """Steps matrices by Muon and all other parameters by AdamW.

    The momentum M of a matrix (A, B) follows its gradient, M ← M + (1 − momentum) (G − M); the matrix then steps by
    W ← (1 − lr · weight_decay) W − lr · rms · √max(A, B) · NS(…), where NS is :func:`newton_schulz` of G + momentum
    (M − G), or of M without ``nesterov``. The factor gives an update the root mean square ``rms``, if all its singular
    values are 1, whatever its shape: about that of AdamW's, so that both have one learning rate.

    Under :class:`tedlab.TEDStrategy` each matrix becomes whole in one process, see ``matrices.py``.

    Args:
        params: Parameters, or groups of them. A group with ``matrix=False`` is stepped by AdamW.
        lr: The learning rate of both.
        momentum, nesterov: See above.
        ns_steps: Steps of :func:`newton_schulz`.
        rms: See above; Moonlight's is 0.2.
        dtype: ``bfloat16`` or ``float32``, in which :func:`newton_schulz` computes and what it needs travels; weights
            in fp64 keep fp64.
        weight_decay: Decoupled weight decay, of both.
        betas, eps: AdamW's.
        adamw: Patterns of the names of parameters that AdamW steps, although they have two or three dimensions; for
            who makes the groups, such as :func:`matrix_groups`.

    Raises:
        ValueError: If an argument is out of range, or a group of matrices has a parameter of other dimensions.
    """

    matrixwise = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = NS_STEPS,
        rms: float = 0.2,
        dtype: str = DTYPES[0],
        weight_decay: float = 0.1,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        adamw: Sequence[str] = ADAMW,
    ) -> None:
        if isinstance(betas, str) or not isinstance(betas, Sequence) or len(betas) != 2:
            raise ValueError(f"Muon: betas is {betas}; it must be two numbers, such as [0.9, 0.95]")
        beta1, beta2 = betas
        for what, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
            if not value >= 0:
                raise ValueError(f"Muon: {what} is {value}; it must be at least 0")
        if not rms > 0:
            raise ValueError(f"Muon: rms is {rms}; it must be greater than 0, or no matrix would train")
        for what, value in (("momentum", momentum), ("betas[0]", beta1), ("betas[1]", beta2)):
            if not 0 <= value < 1:
                raise ValueError(f"Muon: {what} is {value}; it must be at least 0 and smaller than 1")
        if type(ns_steps) is not int or not 1 <= ns_steps < 100:
            raise ValueError(f"Muon: ns_steps is {ns_steps}; it must be a whole number from 1 to 99")
        if dtype not in DTYPES:
            raise ValueError(f"Muon: dtype is {dtype}; valid: {', '.join(DTYPES)}")
        listed = isinstance(adamw, Sequence) and not isinstance(adamw, str)
        if not listed or not all(isinstance(pattern, str) for pattern in adamw):
            raise ValueError(f"Muon: adamw is {adamw}; it must be a list of patterns, such as ['*embed*']")
        defaults: dict[str, Any] = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        defaults |= {"rms": rms, "dtype": dtype, "weight_decay": weight_decay, "betas": (beta1, beta2), "eps": eps}
        defaults["matrix"] = True
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, of matrices unless it says ``matrix=False``."""
        given = param_group["params"]
        group = {**param_group, "params": [given] if isinstance(given, Tensor) else [*given]}
        of_matrices = group.get("matrix", self.defaults["matrix"])
        for number, p in enumerate(group["params"]):
            shape = tuple((p[1] if isinstance(p, tuple) else p).shape)  # a name may come with it
            if of_matrices and len(shape) not in (2, 3):
                raise ValueError(
                    f"Muon: parameter {number} of group {len(self.param_groups)} has the shape {shape}, "
                    "and only those of two dimensions, or of three (a stack of matrices), are matrices; put others in "
                    "a group with matrix=False, for AdamW"
                )
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Makes a step in one process; a parameter of two dimensions is one matrix."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            having = [p for p in group["params"] if p.grad is not None]
            if not group["matrix"]:
                self._adamw(having, group)
                continue
            for p in having:
                direction = self.direct(p, p.grad, group).to(self.precision(p.dtype, group))
                matrices = direction if p.dim() == 3 else direction.unsqueeze(0)
                update = torch.stack([self.orthogonalise(matrix, group) for matrix in matrices])
                self.apply(p, update.view(p.shape), group)
        return loss

    # ---- the parts of a matrix's step, see tedlab.optim.MatrixOptimizer ------------------------------------------

    def direct(self, piece: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        state = self.state[piece]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(piece)
        momentum: Tensor = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum

    def orthogonalise(self, matrix: Tensor, group: Mapping[str, Any]) -> Tensor:
        return newton_schulz(matrix, group["ns_steps"]).mul(group["rms"] * max(matrix.shape) ** 0.5)

    def apply(self, piece: Tensor, update: Tensor, group: Mapping[str, Any]) -> None:
        piece.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def precision(self, dtype: torch.dtype, group: Mapping[str, Any]) -> torch.dtype:
        return dtype if dtype == torch.float64 else getattr(torch, group["dtype"])

    # --------------------------------------------------------------------------------------------------------------

    def _adamw(self, parameters: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {"step": torch.tensor(0.0)}
                self.state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        beta1, beta2 = group["betas"]
        averages, squares, steps = (
            [self.state[p][key] for p in parameters] for key in ("exp_avg", "exp_avg_sq", "step")
        )
        options = {"lr": group["lr"], "weight_decay": group["weight_decay"], "eps": group["eps"]}
        options |= {"beta1": beta1, "beta2": beta2, "amsgrad": False, "maximize": False}
        gradients = [p.grad for p in parameters if p.grad is not None]
        adam(list(parameters), gradients, averages, squares, [], steps, decoupled_weight_decay=True, **options)


def matrix_groups(module: nn.Module, patterns: Sequence[str] = ADAMW) -> list[dict[str, Any]]:
    """Returns groups of a module's parameters for :class:`Muon`: its matrices, what else decays, biases and norms.

    What ``nn.Embedding`` holds is no matrix, whatever its name.

    Args:
        module: Any module, whose names decide, such as a LightningModule in ``configure_optimizers``.
        patterns: Names that AdamW steps, although they have two or three dimensions.
    """
    from tedlab.nn import decay_groups  # which imports what knows of processes

    decayed = {*decay_groups(module)[0]}
    tables = {p for layer in module.modules() if isinstance(layer, nn.Embedding) for p in layer.parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [], "matrix": True},
        {"params": [], "matrix": False},
        {"params": [], "matrix": False, "weight_decay": 0.0},
    ]
    for name, p in module.named_parameters():
        if p not in tables and is_matrix(name, p.dim(), p in decayed, patterns):
            groups[0]["params"].append(p)
        else:
            groups[1 if p in decayed else 2]["params"].append(p)
    return groups
