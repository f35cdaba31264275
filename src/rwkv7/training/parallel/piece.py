"""Which part of a sequence, or of packed sequences, a rank holds: plain numbers, no tensors.

The ranks hold contiguous pieces in their order. A sequence may begin on one rank, fill others and
end on a later one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

__all__ = ["Piece", "cut"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One rank's tokens. Counts are in tokens.

    rank, size: this rank, and how many there are.
    packed: whether the rows below are packed sequences; else they are the B of the batch.
    offsets: where each sequence begins here, [R + 1] from 0; of packed sequences alone.
    numbers: which of all sequences they are, [R].
    owned: for each, whether it ends here.
    head: tokens here of the sequence that began on an earlier rank, 0 when none did.
    tail: tokens here of the sequence that a later rank goes on with, 0 when none does.
    """

    rank: int
    size: int
    packed: bool = False
    offsets: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()
    owned: tuple[bool, ...] = ()
    head: int
    tail: int
    tokens: int

    @property
    def spans(self) -> bool:
        """Whether one sequence comes from before, fills the piece and goes on after it."""
        return self.head == self.tail == self.tokens

    @property
    def arriving(self) -> slice:
        """The rows that an earlier rank hands over, if it does."""
        return slice(0, 1) if self.packed else slice(None)

    @property
    def leaving(self) -> slice:
        """The rows that are handed to the next rank, if any is."""
        return slice(len(self.numbers) - 1, None) if self.packed else slice(None)


def cut(lengths: list[int], rank: int, offsets: list[int] | None = None) -> Piece:
    """The piece of `rank`.

    Args:
        lengths: how many tokens each rank holds, all above 0.
        offsets: of all packed sequences, from 0 to the sum of `lengths`; None: they are not packed.
    """
    size, tokens = len(lengths), lengths[rank]
    if offsets is None:
        return Piece(
            rank=rank,
            size=size,
            head=tokens if rank > 0 else 0,
            tail=tokens if rank < size - 1 else 0,
            tokens=tokens,
        )
    start = sum(lengths[:rank])
    stop = start + tokens
    spans = list(itertools.pairwise(offsets))
    here = [i for i, (first, end) in enumerate(spans) if max(first, start) < min(end, stop)]
    begins = [max(spans[i][0], start) - start for i in here]
    first, last = spans[here[0]], spans[here[-1]]
    return Piece(
        rank=rank,
        size=size,
        packed=True,
        offsets=(*begins, tokens),
        numbers=tuple(here),
        owned=tuple(spans[i][1] <= stop for i in here),
        head=min(first[1], stop) - start if first[0] < start else 0,
        tail=stop - max(last[0], start) if last[1] > stop else 0,
        tokens=tokens,
    )
