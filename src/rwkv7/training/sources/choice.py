"""The source that the settings of a run ask for."""

from __future__ import annotations

from rwkv7.training.batch import Source
from rwkv7.training.data import ChatData, TokenData
from rwkv7.training.settings import TrainSettings

from .conversations import PackedConversations
from .packed import PackedWindows
from .windows import Windows

__all__ = ["make_source"]


def make_source(data: TokenData | ChatData, settings: TrainSettings) -> Source:
    """What the steps of a run read: packed conversations or documents (`pack`), or plain windows.

    Raises ValueError when the tokens are too few for a window, or for the order.
    """
    row = settings.sequence or settings.window
    sizes = {"window": row, "batch": settings.batch, "seed": settings.seed}
    if isinstance(data, ChatData):
        return PackedConversations(data.documents, **sizes)
    if settings.pack:
        return PackedWindows(data.documents, **sizes, order=settings.order)
    return Windows(data.train, **sizes, order=settings.order)
