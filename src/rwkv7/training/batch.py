"""What a training step reads: `Batch`, and `Source`, whoever makes one batch for each step.

Which tokens they hold is the sources' affair, what is computed from them the loop's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from rwkv7.nn.fused import IGNORED

__all__ = ["IGNORED", "Batch", "Source"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Tokens of one step and what is to be predicted from each of them.

    inputs: ids, int64 [B, T].
    targets: ids, int64 [B, T]; IGNORED where nothing is predicted.
    cu_seqlens: offsets int32 [S + 1] of packed documents (then B = 1), or None.
    fresh: False when this window goes on where the batch before it ended, with its state.
    """

    inputs: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None = None
    fresh: bool = True

    @property
    def sequences(self) -> int:
        """B, or S when packed."""
        return len(self.inputs if self.cu_seqlens is None else self.cu_seqlens[1:])

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        offsets = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        return replace(
            self,
            inputs=self.inputs.to(device),
            targets=self.targets.to(device),
            cu_seqlens=offsets,
        )


class Source(Protocol):
    """Makes batches: a pure function of its settings and the step, so a resumed run needs only
    the number of the step."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a batch holds."""

    def batch(self, step: int) -> Batch:
        """The batch of the step (from 0), on the CPU."""

    def where(self, step: int) -> str:
        """Which part of the data the batch of the step is, in words for a person."""
