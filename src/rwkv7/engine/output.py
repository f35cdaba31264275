"""From drawn ids to what may be given out: text in whole characters, and no part of a stop string.

One `Output` for each sample. It knows nothing of models and states.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from .request import Logprob

Decode = Callable[[Sequence[int]], bytes]


class Piece(NamedTuple):
    """What has become certain."""

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[Logprob, ...]


class Output:
    """Holds back what may yet turn out to be a stop string, and finds the one that is.

    Args:
        decode: the bytes of ids, or None where there is to be no text.
        stop_tokens: ids that end the text.
        stop_strings: bytes that end it.
        pending: bytes of an earlier part of the text that were not given out yet.

    Attributes:
        tokens, text, logprobs: all that was given out so far (`text` in parts).
        stopped: whether a stop token or string was met.
    """

    def __init__(
        self,
        decode: Decode | None,
        stop_tokens: Collection[int],
        stop_strings: Sequence[bytes],
        pending: bytes = b"",
    ) -> None:
        self._decode = decode
        self._stop_tokens = frozenset(stop_tokens)
        self._stop_strings = tuple(stop_strings)
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._buffer = bytearray(pending)
        self._held: deque[tuple[int, Logprob | None, int]] = deque()  # with its end in the buffer
        self.tokens: list[int] = []
        self.text: list[str] = []
        self.logprobs: list[Logprob] = []
        self.stopped = False

    @property
    def pending(self) -> bytes:
        """The bytes not given out: of an unfinished character, or the start of a stop string."""
        return self._characters.getstate()[0] + bytes(self._buffer)

    def take(self, token: int, logprob: Logprob | None = None) -> Piece:
        """One more id was drawn."""
        if token in self._stop_tokens:
            self.stopped = True
        elif self._decode is not None:
            self._buffer += self._decode([token])
        if not self._stop_strings:  # nothing is ever held back; a step of many rows ends sooner
            text = self._given(len(self._buffer)) if self._buffer else ""
            self.tokens.append(token)
            if logprob is None:
                return Piece((token,), text, ())
            self.logprobs.append(logprob)
            return Piece((token,), text, (logprob,))
        self._held.append((token, logprob, len(self._buffer)))
        if not self.stopped:
            self._look_for_stop()
        held_back = 0 if self.stopped else self._possible_start()
        return self._release(len(self._buffer) - held_back)

    def finish(self) -> Piece:
        """Nothing more will come: what was held back, and U+FFFD for half a character."""
        return self._release(len(self._buffer), final=True)

    def _look_for_stop(self) -> None:
        places = [p for stop in self._stop_strings if (p := self._buffer.find(stop)) >= 0]
        if places:
            self.stopped = True
            del self._buffer[min(places) :]
            while self._held and self._held[-1][2] > len(self._buffer):
                self._held.pop()

    def _possible_start(self) -> int:
        """How many of the last bytes may be the start of a stop string."""
        longest = 0
        for stop in self._stop_strings:
            for size in range(min(len(stop) - 1, len(self._buffer)), longest, -1):
                if self._buffer.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _release(self, size: int, final: bool = False) -> Piece:
        tokens, logprobs = [], []
        while self._held and self._held[0][2] <= size:
            token, logprob, _ = self._held.popleft()
            tokens.append(token)
            if logprob is not None:
                logprobs.append(logprob)
        self._held = deque((token, logprob, end - size) for token, logprob, end in self._held)
        self.tokens += tokens
        self.logprobs += logprobs
        return Piece(tuple(tokens), self._given(size, final), tuple(logprobs))

    def _given(self, size: int, final: bool = False) -> str:
        """The next `size` bytes as whole characters."""
        text = self._characters.decode(bytes(self._buffer[:size]), final)
        del self._buffer[:size]
        if text:
            self.text.append(text)
        return text
