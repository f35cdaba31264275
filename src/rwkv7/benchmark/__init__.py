"""Times, memory and errors of the operator, side by side: what `rwkv7 bench` shows."""

from .document import update_tables
from .measure import WORKS, Measurement, Result, default_shapes, measurements
from .sample import Shape
from .subjects import (
    BASELINE,
    FLA_CHUNKS,
    Subject,
    backend,
    einsum_loop,
    fla,
    step,
    token_loop,
)
from .table import results_in

__all__ = [
    "BASELINE",
    "FLA_CHUNKS",
    "WORKS",
    "Measurement",
    "Result",
    "Shape",
    "Subject",
    "backend",
    "default_shapes",
    "einsum_loop",
    "fla",
    "measurements",
    "results_in",
    "step",
    "token_loop",
    "update_tables",
]
