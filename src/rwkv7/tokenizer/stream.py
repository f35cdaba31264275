"""Characters out of ids that arrive one by one."""

from __future__ import annotations

import codecs

from .builtin import Tokenizer

__all__ = ["StreamDecoder"]


class StreamDecoder:
    """Ids in, one at a time; whole characters out. Stray bytes come out as U+FFFD.

    `pending` holds the bytes of a character that is not yet whole; give it to a new decoder to go
    on where this one stopped.
    """

    def __init__(self, tokenizer: Tokenizer, pending: bytes = b"") -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.setstate((pending, 0))

    @property
    def pending(self) -> bytes:
        """The bytes received that do not make a whole character yet (at most three)."""
        return self._decoder.getstate()[0]

    def feed(self, token: int) -> str:
        """The characters that `token` completes, often one, sometimes none."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """What is left at the end of a text: U+FFFD for a character that stayed incomplete."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
