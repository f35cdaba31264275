from .contract import DECAY_SCALE, checks_wanted
from .op import batch_invariant, checks, explain, needs_operator, unchecked, wkv7, wkv7_step_

__all__ = [
    "DECAY_SCALE",
    "batch_invariant",
    "checks",
    "checks_wanted",
    "explain",
    "needs_operator",
    "unchecked",
    "wkv7",
    "wkv7_step_",
]
