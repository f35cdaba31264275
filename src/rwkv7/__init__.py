"""RWKV-7 for PyTorch with state you can trust."""

from .wkv7 import batch_invariant, checks, explain, wkv7, wkv7_step_

__all__ = ["batch_invariant", "checks", "explain", "wkv7", "wkv7_step_"]
