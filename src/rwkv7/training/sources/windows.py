"""Windows of one row of tokens, whatever documents they cut through: the source of plain text."""

from __future__ import annotations

import numpy as np
import torch

from rwkv7.training.batch import Batch
from rwkv7.training.data import Tokens

from .order import make_order

__all__ = ["Windows"]


class Windows:
    """Batches of windows [B, T] over a row of tokens, without replacement within an epoch."""

    def __init__(
        self, tokens: Tokens, *, window: int, batch: int, seed: int, order: str = "shuffled"
    ) -> None:
        """`batch` windows of `window` tokens a step, in the order "shuffled" or "official".

        Raises ValueError when the tokens do not make a window, or not enough for the order.
        """
        self.order = make_order(order, len(tokens), window, seed)
        self._tokens, self._window, self._batch = tokens, window, batch
        self.tokens_per_step = window * batch

    def batch(self, step: int) -> Batch:
        """The batch of the step (from 0); each target is the token after its input."""
        rows = torch.from_numpy(np.stack([self._row(n) for n in self._samples(step)]))
        return Batch(inputs=rows[:, :-1], targets=rows[:, 1:])

    def _samples(self, step: int) -> range:
        return range(step * self._batch, (step + 1) * self._batch)

    def _row(self, sample: int) -> np.ndarray:
        start = self.order.start(sample)
        return self._tokens[start : start + self._window + 1].astype(np.int64)
