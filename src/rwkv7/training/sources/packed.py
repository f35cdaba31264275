"""Documents packed into steps of a fixed number of tokens, none of which feels its neighbour."""

from __future__ import annotations

import numpy as np
import torch

from rwkv7.training.batch import IGNORED, Batch
from rwkv7.training.data import Corpus

from .order import make_order

__all__ = ["PackedWindows"]


class PackedWindows:
    """Batches [1, T] of documents one behind the other, with offsets between them.

    A step reads `batch` windows of the corpus, T = batch · window tokens, in the same orders as
    `Windows`; a document ends where it ends in the corpus or where its window does, so that it is
    at most `window` tokens long, and begins with an empty state. A target is the next token of the
    same document; the last token of a document has none.
    """

    def __init__(
        self, corpus: Corpus, *, window: int, batch: int, seed: int, order: str = "shuffled"
    ) -> None:
        """Raises ValueError when the tokens do not make a window, or not enough for the order."""
        self.order = make_order(order, len(corpus.tokens), window, seed)
        self._corpus, self._window, self._batch = corpus, window, batch
        self.tokens_per_step = window * batch

    def batch(self, step: int) -> Batch:
        """The batch of the step (from 0), with `cu_seqlens`."""
        inputs, targets, offsets = [], [], [0]
        for sample in range(step * self._batch, (step + 1) * self._batch):
            start = self.order.start(sample)
            row = self._corpus.tokens[start : start + self._window + 1].astype(np.int64)
            # Each place is in start + 1 .. start + window; the last is the border of the window.
            places = self._corpus.starts_between(start + 1, start + self._window)
            ends = np.asarray(places, np.int64) - start
            inputs.append(row[:-1])
            targets.append(row[1:].copy())
            targets[-1][ends - 1] = IGNORED
            first = offsets[-1]
            offsets.extend(first + int(end) for end in ends if end < self._window)
            offsets.append(first + self._window)
        return Batch(
            inputs=torch.from_numpy(np.concatenate(inputs))[None],
            targets=torch.from_numpy(np.concatenate(targets))[None],
            cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
        )
