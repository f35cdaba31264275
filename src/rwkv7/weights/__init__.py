"""Checkpoints: reading them under official or FLA's names, refusing what is not one, writing them.

Optimizer and progress live elsewhere (`training.checkpoint`); states are in `state`.
"""

from .load import load_model
from .official import config_from_tensors
from .save import convert, save_model

__all__ = ["config_from_tensors", "convert", "load_model", "save_model"]
