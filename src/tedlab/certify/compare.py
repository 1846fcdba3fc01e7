"""Compares two records: the largest difference in every quantity, and a hint at its cause."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tedlab.certify.record import QUANTITIES, Record
from tedlab.degrees import ParallelDegrees

TOLERANCES = {
    "64-true": 1e-10,  # for each tensor separately
    # For all tensors of a step together: rounding sends a few tokens to another expert, whose gradient then differs by
    # tenths. The largest error of 20 certificates was 0.12; a wrong factor in all tensors makes an error of 0.5 or
    # more. An error in one small tensor may not show here; float64 finds it.
    "bf16-true": 0.3,
}
_NO_MULTIPLE = 1e-6  # the residual allowed in a multiple, relative to the tensor's norm


@dataclass(frozen=True)
class Row:
    """The verdict on one quantity.

    Attributes:
        quantity: The quantity that was compared.
        error: The largest absolute difference divided by the reference tensor's largest magnitude, over all steps and
            tensors; in bf16, the Euclidean norm of the difference divided by the reference's, for the worst step.
        compared: The number of tensors compared.
        step: The first step in which something differs, or 0.
        first: The first tensor of that step that differs, in the order of recording.
        hint: A description of the difference.
        tolerance: The largest ``error`` that counts as equal.
    """

    quantity: str
    error: float
    compared: int
    step: int
    first: str
    hint: str
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether nothing differs and something was compared."""
        return self.compared > 0 and self.error <= self.tolerance

    def __str__(self) -> str:
        if self.ok:
            return f"{self.quantity}: equal"
        return f"{self.quantity}, first in step {self.step}: {self.first} is {self.hint}"


def first_difference(rows: Sequence[Row]) -> Row | None:
    """Returns the first difference, by step and then by order of the rows; None if all are equal."""
    return min((row for row in rows if not row.ok), key=lambda row: row.step, default=None)


def compare(
    record: Record,
    reference: Record,
    degrees: ParallelDegrees,
    tolerance: float = TOLERANCES["64-true"],
    together: bool = False,
    steps: Collection[int] | None = None,
    quantities: Sequence[str] = QUANTITIES,
) -> list[Row]:
    """Compares two records and returns one row for each quantity.

    A step, quantity or tensor that only one of the two has counts as an infinite error.

    Args:
        record: The record to be judged.
        reference: The record that it should equal.
        degrees: The degrees of the layout, for hints.
        tolerance: The largest relative error that counts as equal; 0 demands exact equality.
        together: Whether to compare all tensors of a quantity and step as one vector.
        steps: The exact set of steps that ``record`` must have; None means those of ``reference``.
        quantities: The quantities to compare.
    """
    needed = sorted({*(reference if steps is None else steps), *record})
    allowed = set(reference if steps is None else steps)
    return [
        _row(
            quantity,
            {step: record.get(step, {}).get(quantity) for step in needed},
            {step: reference.get(step, {}).get(quantity) if step in allowed else None for step in needed},
            degrees,
            tolerance,
            together,
        )
        for quantity in quantities
    ]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Returns the largest absolute difference over ``theirs``'s largest magnitude; inf for NaN or another shape."""
    if ours.shape != theirs.shape:
        return float("inf")
    ours, theirs = ours.double(), theirs.double()
    return _ratio((ours - theirs).abs().max(), theirs.abs().max())


def _error_together(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    if {name: t.shape for name, t in ours.items()} != {name: t.shape for name, t in theirs.items()}:
        return float("inf")
    a, b = (torch.cat([tensors[name].double().flatten() for name in theirs]) for tensors in (ours, theirs))
    return _ratio(torch.linalg.vector_norm(a - b), torch.linalg.vector_norm(b))


def _ratio(difference: Tensor, size: Tensor) -> float:
    """Divides a difference by a size; returns 0 if nothing differs, and infinity if anything is NaN."""
    if difference == 0.0:
        return 0.0
    error = (difference / size).item()
    return error if error == error else float("inf")


Tensors = Mapping[str, Tensor]  # by name
_EVERYTHING: Tensors = {"everything": torch.tensor(0.0)}


def _row(
    quantity: str,
    record: Mapping[int, Tensors | None],
    reference: Mapping[int, Tensors | None],
    degrees: ParallelDegrees,
    tolerance: float,
    together: bool,
) -> Row:
    """Compares one quantity, given by step; None stands for a step without it."""
    worst, compared, first_step, first, hint = 0.0, 0, 0, "", ""
    for step, ours in record.items():
        theirs = reference[step]
        if ours is None or theirs is None:  # one of the two lacks this step or quantity
            ours, theirs = ({} if tensors is None else _EVERYTHING for tensors in (ours, theirs))
        names = [*theirs, *(name for name in ours if name not in theirs)]
        errors = {
            name: relative_error(ours[name], theirs[name]) if name in ours and name in theirs else float("inf")
            for name in names
        }
        compared += len(errors)
        if together and errors:
            errors = {max(errors, key=lambda name: errors[name]): _error_together(ours, theirs)}
        for name, error in errors.items():
            worst = max(worst, error)
            if error > tolerance and not first:
                first_step, first = step, name
                hint = _hint(ours, theirs, name, degrees)
    return Row(quantity, worst, compared, first_step, first, hint, tolerance)


def _hint(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], name: str, degrees: ParallelDegrees) -> str:
    if name not in ours or name not in theirs:
        return "absent" if name in theirs else "absent in one process"
    a, b = ours[name].double(), theirs[name].double()
    if a.shape != b.shape:
        return f"of shape {tuple(a.shape)} instead of {tuple(b.shape)}"
    undefined = int(a.isnan().sum())
    if undefined > int(b.isnan().sum()):
        return f"NaN, or different on processes that should agree, in {undefined:,} of {a.numel():,} elements"
    factor = ((a * b).sum() / b.square().sum()).item()
    if not torch.linalg.vector_norm(a - factor * b) <= _NO_MULTIPLE * torch.linalg.vector_norm(b):
        return "no multiple of what one process has"
    named = {
        "tensor": degrees.tensor,
        "expert": degrees.expert,
        "data": degrees.data,
        "expert_data": degrees.expert_data,
        "√tensor": degrees.tensor**0.5,
        "√data": degrees.data**0.5,
        **({"expert_tensor": degrees.expert_tensor} if degrees.folded else {}),
    }
    meanings = [name for name, size in named.items() if size > 1 and abs(factor / size - 1) < _NO_MULTIPLE]
    meanings += [f"1/{name}" for name, size in named.items() if size > 1 and abs(factor * size - 1) < _NO_MULTIPLE]
    return f"{factor:.6g} × what one process has{' = ' + ' or '.join(meanings) if meanings else ''}"
