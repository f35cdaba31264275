"""Which windows of the training text a step reads: a pure function of (seed, step).

Nothing to save and nothing to replay on resume: the position is the number of the step. An epoch
visits every window once, in an order of its own, without a list of the windows in memory.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from .data import Tokens

__all__ = ["Windows"]

ROUNDS = 4  # of the Feistel network; four make a permutation that looks random


class Windows:
    """Batches of windows over a token stream, without replacement within an epoch.

    An epoch cuts the stream into windows from an offset of its own, so that the borders move from
    epoch to epoch, and visits them in a seeded pseudo-random order.
    """

    def __init__(self, tokens: Tokens, *, window: int, batch: int, seed: int) -> None:
        if len(tokens) < window + 1:
            raise ValueError(
                f"text: expected at least {window + 1} tokens to train on (a window of {window} "
                f"and the token after it), found {len(tokens)}: give more text, hold out less, or "
                "use a smaller window"
            )
        self._tokens, self._window, self._batch, self._seed = tokens, window, batch, seed
        self.per_epoch = max(1, (len(tokens) - window) // window)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the step (from 0), int64 [B, T] each; targets are one token on."""
        first = step * self._batch
        rows = np.stack([self._row(sample) for sample in range(first, first + self._batch)])
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1], tokens[:, 1:]

    def start(self, sample: int) -> int:
        """Where in the stream the window of the given sample (from 0, over all steps) begins."""
        epoch, number = divmod(sample, self.per_epoch)
        spare = len(self._tokens) - 1 - self.per_epoch * self._window
        offset = self._hash(epoch) % (min(spare, self._window - 1) + 1)
        return offset + self._permuted(number, epoch) * self._window

    def _row(self, sample: int) -> np.ndarray:
        start = self.start(sample)
        return self._tokens[start : start + self._window + 1].astype(np.int64)

    def _permuted(self, number: int, epoch: int) -> int:
        """A permutation of range(per_epoch): a Feistel network on the next even power of two.

        It is a bijection there, so walking on from a value outside the range ends inside it, and
        the whole stays a bijection.
        """
        half = max(1, ((self.per_epoch - 1).bit_length() + 1) // 2)
        mask = (1 << half) - 1
        while True:
            left, right = number >> half, number & mask
            for turn in range(ROUNDS):
                left, right = right, left ^ (self._hash(epoch, turn, right) & mask)
            number = left << half | right
            if number < self.per_epoch:
                return number

    def _hash(self, *values: int) -> int:
        key = ":".join(map(str, (self._seed, *values))).encode()
        return int.from_bytes(blake2b(key, digest_size=8).digest(), "little")
