"""Training on several cards, one process each: many rows at once, or one sequence in pieces."""

from .context import ContextParallel
from .exchange import sum_gradients
from .operator import wkv7_in_pieces
from .piece import Piece, cut

__all__ = ["ContextParallel", "Piece", "cut", "sum_gradients", "wkv7_in_pieces"]
