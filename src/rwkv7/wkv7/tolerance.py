"""What counts as the right numbers: how an error is measured, and the bound for each dtype.

The tests, `rwkv7 verify` and `rwkv7 bench` all judge by this one table. A bound is never loosened
to make a backend pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import state_dtype

GRADIENTS = ("dr", "dw", "dk", "dv", "da", "db", "dstate")
RESULTS = ("y", "state", *GRADIENTS)


@dataclass(frozen=True, slots=True)
class Bound:
    """The largest relative error allowed in y, in each gradient and in the final state."""

    y: float
    gradient: float
    state: float

    def of(self, name: str) -> float:
        """The bound on one of RESULTS; "dstate" is the gradient of the initial state."""
        return {"y": self.y, "state": self.state}.get(name, self.gradient)


# By the dtype of the inputs; the reference sees the same, already rounded, inputs in fp64.
# Rounding y to bf16 alone costs 1.66e-3.
BOUNDS: dict[torch.dtype, Bound] = {
    torch.float64: Bound(y=1e-12, gradient=1e-12, state=1e-12),
    torch.float32: Bound(y=1e-5, gradient=1e-5, state=1e-5),
    torch.bfloat16: Bound(y=2.0e-3, gradient=3.0e-3, state=6e-4),
    torch.float16: Bound(y=6e-4, gradient=9e-4, state=4e-4),
}


@dataclass(frozen=True, slots=True)
class Measure:
    """A relative error beside the bound it is held to."""

    error: float
    bound: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the bound; NaN never is."""
        return self.error <= self.bound


def relative_error(found: Tensor, reference: Tensor, floor: float = 0.0) -> float:
    """‖found - reference‖ / max(‖reference‖, floor), over all elements, computed in float64.

    0.0 when both are zero or empty, inf when a nonzero result meets a zero reference and no
    floor, NaN when either holds one. ValueError when the shapes differ: broadcasting would hide
    a mistake.
    """
    if found.shape != reference.shape:
        raise ValueError(
            f"found: expected the reference's shape {list(reference.shape)}, "
            f"found {list(found.shape)}"
        )
    # Through the CPU because some devices (MPS) have no float64.
    x = found.detach().cpu().to(torch.float64)
    ref = reference.detach().cpu().to(torch.float64)
    difference = float(torch.linalg.vector_norm(x - ref))
    if difference == 0.0:
        return 0.0
    size = max(float(torch.linalg.vector_norm(ref)), floor)
    return difference / size if size else float("inf") if difference > 0 else difference


def compare(
    found: Mapping[str, Tensor], reference: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Measure]:
    """Each of `found` against its namesake in `reference`, held to the bounds for `dtype` inputs.

    The names are those of RESULTS, as many as there are; `reference` is the fp64 recurrence. A
    gradient that vanishes beside the others (dw for a saturated logit, everything that feeds an
    empty state) cannot be held to its own size: there the error may reach eps, that of the
    arithmetic's dtype, times the largest gradient. It is then given relative to the size at which
    that allowance and the bound are the same, so that one comparison serves everywhere.
    """
    eps = torch.finfo(state_dtype(dtype)).eps
    gradients = [reference[name] for name in GRADIENTS if name in reference]
    norms = [float(torch.linalg.vector_norm(x.detach().double().cpu())) for x in gradients]
    largest = max(norms, default=0.0)
    measures = {}
    for name, x in found.items():
        bound = BOUNDS[dtype].of(name)
        floor = largest * eps / bound if name in GRADIENTS else 0.0
        measures[name] = Measure(relative_error(x, reference[name], floor), bound)
    return measures
