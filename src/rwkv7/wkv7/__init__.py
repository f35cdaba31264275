from .op import batch_invariant, checks, explain, unchecked, wkv7, wkv7_step_

__all__ = ["batch_invariant", "checks", "explain", "unchecked", "wkv7", "wkv7_step_"]
