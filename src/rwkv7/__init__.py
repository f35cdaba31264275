"""RWKV-7 for PyTorch with state you can trust."""

from .config import ModelConfig
from .nn import RWKV7
from .state import (
    ModelState,
    state_from_fla,
    state_from_official,
    state_to_fla,
    state_to_official,
)
from .weights import load_model, save_model
from .wkv7 import batch_invariant, checks, explain, wkv7, wkv7_step_

__all__ = [
    "RWKV7",
    "ModelConfig",
    "ModelState",
    "batch_invariant",
    "checks",
    "explain",
    "load_model",
    "save_model",
    "state_from_fla",
    "state_from_official",
    "state_to_fla",
    "state_to_official",
    "wkv7",
    "wkv7_step_",
]
