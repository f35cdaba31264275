"""One document after another, in consecutive windows: for a state that is carried between steps."""

from __future__ import annotations

import numpy as np
import torch

from rwkv7.training.batch import Batch
from rwkv7.training.data import Corpus

from .order import seeded_hash

__all__ = ["DocumentWindows"]


class DocumentWindows:
    """Batches [1, T] that go through each document window by window, T ≤ window.

    `fresh` is true for the first window of a document; the last one may be shorter. Every token of
    a document but its first is a target once an epoch, and documents of fewer than two tokens are
    left out. Each epoch has an order of documents of its own. Needs 24 bytes a document.
    """

    def __init__(self, corpus: Corpus, *, window: int, seed: int) -> None:
        """Raises ValueError when no document has two tokens."""
        # The last token of a document is a target only, hence one less to read.
        self._windows = -(-np.maximum(corpus.lengths() - 1, 0) // window)
        self.per_epoch = int(self._windows.sum())
        if self.per_epoch == 0:
            raise ValueError(
                "text: expected a document of at least two tokens to train on, found none"
            )
        self._corpus, self._window, self._seed = corpus, window, seed
        none = np.empty(0, np.int64)
        self._epoch, self._order, self._ends = -1, none, none
        self.tokens_per_step = window

    def batch(self, step: int) -> Batch:
        """The batch of the step (from 0): the window that follows the one of the step before."""
        document, number = self.place(step)
        start = self._corpus.starts[document] + number * self._window
        stop = min(start + self._window + 1, self._corpus.starts[document + 1])
        row = torch.from_numpy(self._corpus.tokens[start:stop].astype(np.int64))
        return Batch(inputs=row[None, :-1], targets=row[None, 1:], fresh=number == 0)

    def place(self, step: int) -> tuple[int, int]:
        """The document of the step and the number of its window, both from 0."""
        epoch, sample = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            # Of numpy's generators the one whose numbers never change from version to version.
            shuffle = np.random.RandomState(seeded_hash(self._seed, epoch) % 2**32)
            self._order = shuffle.permutation(len(self._windows))
            self._ends = np.cumsum(self._windows[self._order])
            self._epoch = epoch
        turn = int(np.searchsorted(self._ends, sample, side="right"))
        document = int(self._order[turn])
        return document, sample - int(self._ends[turn] - self._windows[document])
