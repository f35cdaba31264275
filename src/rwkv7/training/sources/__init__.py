"""What a step reads: windows of a row of tokens, packed documents, or documents in turn."""

from .choice import make_source
from .documents import DocumentWindows
from .packed import PackedWindows
from .windows import Windows

__all__ = ["DocumentWindows", "PackedWindows", "Windows", "make_source"]
