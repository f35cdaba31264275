"""What a step reads: windows of a row of tokens, packed documents or conversations, or documents in
turn."""

from .choice import make_source
from .conversations import PackedConversations
from .documents import DocumentWindows
from .order import make_order
from .packed import PackedWindows
from .windows import Windows

__all__ = [
    "DocumentWindows",
    "PackedConversations",
    "PackedWindows",
    "Windows",
    "make_order",
    "make_source",
]
