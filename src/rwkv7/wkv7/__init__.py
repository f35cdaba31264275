from .contract import DECAY_SCALE, checks_wanted
from .op import batch_invariant, checks, explain, unchecked, wkv7, wkv7_step_
from .operation import Operation, is_traced
from .step import first_of_run

__all__ = [
    "DECAY_SCALE",
    "Operation",
    "batch_invariant",
    "checks",
    "checks_wanted",
    "explain",
    "first_of_run",
    "is_traced",
    "unchecked",
    "wkv7",
    "wkv7_step_",
]
