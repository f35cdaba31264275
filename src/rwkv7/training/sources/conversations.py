"""Conversations packed into steps, of which only what the assistant says is predicted."""

from __future__ import annotations

import numpy as np
import torch

from rwkv7.training.batch import IGNORED, Batch
from rwkv7.training.data import Conversations

from .order import seeded_hash

__all__ = ["PackedConversations"]


class PackedConversations:
    """Batches [1, T] of whole conversations one behind the other, T ≤ batch · window.

    Each begins with an empty (or the tuned) state. One that is longer than `window` tokens is cut
    there; one of which nothing would be predicted before the cut is left out. An epoch visits all
    of them in an order of its own, and a step takes as many as fit. Needs 8 bytes a conversation.

    Attributes:
        cut, left_out: how many conversations are.
    """

    def __init__(self, data: Conversations, *, window: int, batch: int, seed: int) -> None:
        """Raises ValueError where nothing is left to predict."""
        self._data, self._window, self._seed = data, window, seed
        self.tokens_per_step = window * batch
        lengths = data.tokens.lengths() - 1  # the last token is a target only
        useful = [n for n in range(len(data)) if data.learnt.document(n)[1 : window + 1].any()]
        self._useful = np.asarray(useful, np.int64)
        self.cut, self.left_out = int((lengths > window).sum()), len(data) - len(useful)
        if not useful:
            raise ValueError(
                f"window: expected a conversation in which the assistant speaks within {window} "
                "tokens, found none: use a larger window"
            )
        self._lengths = np.minimum(lengths, window)
        self._epochs: list[int] = [0]  # the step with which each begins
        self._epoch, self._bins = -1, [np.empty(0, np.int64)]

    def batch(self, step: int) -> Batch:
        """The batch of the step (from 0), with `cu_seqlens`."""
        inputs, targets, offsets = [], [], [0]
        for number in self.conversations(step):
            stop = self._lengths[number] + 1
            ids = self._data.tokens.document(number)[:stop].astype(np.int64)
            learnt = self._data.learnt.document(number)[1:stop]
            inputs.append(ids[:-1])
            targets.append(np.where(learnt, ids[1:], IGNORED))
            offsets.append(offsets[-1] + len(ids) - 1)
        return Batch(
            inputs=torch.from_numpy(np.concatenate(inputs))[None],
            targets=torch.from_numpy(np.concatenate(targets))[None],
            cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
        )

    def where(self, step: int) -> str:
        """The numbers of the step's conversations."""
        return f"conversations {', '.join(map(str, self.conversations(step)))} (from 0)"

    def conversations(self, step: int) -> list[int]:
        """The numbers, from 0, of the conversations that the step reads."""
        while self._epochs[-1] <= step:
            self._pack(len(self._epochs) - 1)
            self._epochs.append(self._epochs[-1] + len(self._bins))
        epoch = int(np.searchsorted(self._epochs, step, side="right")) - 1
        if epoch != self._epoch:
            self._pack(epoch)
        return [int(number) for number in self._bins[step - self._epochs[epoch]]]

    def _pack(self, epoch: int) -> None:
        # Of numpy's generators the one whose numbers never change from version to version.
        shuffle = np.random.RandomState(seeded_hash(self._seed, epoch) % 2**32)
        order = self._useful[shuffle.permutation(len(self._useful))]
        borders, held = [], 0
        for place, length in enumerate(self._lengths[order].tolist()):
            if held + length > self.tokens_per_step:
                borders.append(place)
                held = 0
            held += length
        self._epoch, self._bins = epoch, np.split(order, borders)
