"""Times, memory and errors of the operator's backends side by side: what `rwkv7 bench` shows."""

from .measure import BASELINE, Measurement, Result, Shape, default_shapes, measurements
from .table import results_in, update_tables

__all__ = [
    "BASELINE",
    "Measurement",
    "Result",
    "Shape",
    "default_shapes",
    "measurements",
    "results_in",
    "update_tables",
]
