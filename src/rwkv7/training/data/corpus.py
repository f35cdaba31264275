"""Tokens in one long row and where the documents in them begin, wherever they lie.

How they come to be on disk is told in binidx.py, what a step reads of them in sources/.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

__all__ = ["Corpus", "Starts", "Tokens"]

PIECE = 1 << 22  # tokens looked at together

Tokens = npt.NDArray[np.integer]


class Starts(Sequence[int]):
    """Offsets of documents, read when asked for, so that a mapped index stays on disk.

    `pointers` [sequences] are byte offsets of sequences; `firsts` names the sequence with which
    each document begins. Documents that begin at or after `end` (in tokens) are left out, and the
    last offset is `end`.
    """

    def __init__(
        self,
        pointers: npt.NDArray[np.int64],
        firsts: npt.NDArray[np.int64],
        itemsize: int,
        end: int,
    ) -> None:
        self._pointers, self._firsts, self._itemsize, self._end = pointers, firsts, itemsize, end
        self._count = bisect_left(range(len(firsts)), end, key=self._offset)

    def __len__(self) -> int:
        return self._count + 1

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        places = range(len(self))[index]  # IndexError where there is none
        if isinstance(places, range):
            return [self[place] for place in places]
        return self._end if places == self._count else self._offset(places)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        firsts = self._firsts[: self._count]
        # Documents kept begin before the end, so each has a sequence of its own.
        return np.append(self._pointers[firsts] // self._itemsize, self._end).astype(
            dtype or np.int64
        )

    def until(self, end: int) -> Starts:
        """The offsets of the same documents up to the token `end`."""
        return Starts(self._pointers, self._firsts, self._itemsize, min(end, self._end))

    def _offset(self, document: int) -> int:
        first = int(self._firsts[document])
        if first == len(self._pointers):
            return self._end
        return int(self._pointers[first]) // self._itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Tokens [tokens] of any integer type, and the D + 1 offsets of their documents.

    Document d is tokens[starts[d] : starts[d + 1]]. The first offset is 0, the last the number of
    tokens, and none is smaller than the one before.
    """

    tokens: Tokens
    starts: Starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def document(self, number: int) -> Tokens:
        """The tokens of one document."""
        return self.tokens[self.starts[number] : self.starts[number + 1]]

    @staticmethod
    def of(tokens: Tokens, starts: Sequence[int]) -> Corpus:
        """The corpus of tokens in memory whose documents begin at `starts`, the first at 0."""
        pointers = np.asarray(starts, np.int64)
        return Corpus(tokens, Starts(pointers, np.arange(len(pointers)), 1, len(tokens)))

    def first(self, tokens: int) -> Corpus:
        """The corpus up to a token, which may lie inside a document."""
        return Corpus(self.tokens[:tokens], self.starts.until(tokens))

    def starts_between(self, first: int, last: int) -> list[int]:
        """Where documents begin in first..last, both included, each place once, in order."""
        low, high = bisect_left(self.starts, first), bisect_right(self.starts, last)
        return sorted({self.starts[place] for place in range(low, high)})

    def lengths(self) -> npt.NDArray[np.int64]:
        """The tokens of each document [D]."""
        starts = np.asarray(self.starts, np.int64)
        return starts[1:] - starts[:-1]

    def check_ids(self, vocab_size: int, name: str) -> None:
        """ValueError unless all ids are in [0, vocab_size); reads the tokens unless their type says
        so already. `name` is what the message calls them."""
        limits = np.iinfo(self.tokens.dtype)
        if limits.min >= 0 and limits.max < vocab_size:
            return
        for start in range(0, len(self.tokens), PIECE):
            piece = self.tokens[start : start + PIECE]
            wrong = np.flatnonzero((piece < 0) | (piece >= vocab_size))
            if len(wrong):
                raise ValueError(
                    f"{name}: expected ids from 0 to {vocab_size - 1}, found {piece[wrong[0]]} at "
                    f"token {start + wrong[0]}: was it made with another tokenizer?"
                )
