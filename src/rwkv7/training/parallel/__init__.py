"""Training on several cards, one process each: many rows at once, or one sequence in pieces."""

from rwkv7.training.together.processes import joined, launched

from .cards import Cards, parallelise
from .context import ContextParallel
from .exchange import sum_gradients
from .joining import join_newest, share_moments
from .operator import wkv7_in_pieces
from .piece import Piece, cut
from .rows import share
from .shards import Shards, join_shards, load_shards, newest_shards, save_shards

__all__ = [
    "Cards",
    "ContextParallel",
    "Piece",
    "Shards",
    "cut",
    "join_newest",
    "join_shards",
    "joined",
    "launched",
    "load_shards",
    "newest_shards",
    "parallelise",
    "save_shards",
    "share",
    "share_moments",
    "sum_gradients",
    "wkv7_in_pieces",
]
