"""The source that the settings of a run ask for."""

from __future__ import annotations

from rwkv7.training.batch import Source
from rwkv7.training.data import Corpus
from rwkv7.training.settings import TrainSettings

from .packed import PackedWindows
from .windows import Windows

__all__ = ["make_source"]


def make_source(corpus: Corpus, settings: TrainSettings) -> Source:
    """What the steps of a run read of its tokens: packed documents (`pack`) or plain windows.

    Raises ValueError when the tokens are too few for a window, or for the order.
    """
    row = settings.sequence or settings.window
    sizes = {"window": row, "batch": settings.batch, "seed": settings.seed}
    if settings.pack:
        return PackedWindows(corpus, **sizes, order=settings.order)
    return Windows(corpus.tokens, **sizes, order=settings.order)
