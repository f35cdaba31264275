"""Few long sequences: segments walked at once, joined by what each does to any state.

A segment takes the state S to S·M + B, and the gradient E of the state after it to E·Mᵀ + F. One
walk finds M and B, a walk back F; a chain over the segments then gives each its state, and its
gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv7.wkv7.contract import Call

__all__ = ["Segments"]


@dataclass(frozen=True, slots=True)
class Segments:
    """A call cut into segments of `tokens`: `call` is it as a packed one, a segment a sequence."""

    whole: Call
    call: Call
    tokens: int

    @staticmethod
    def of(whole: Call, tokens: int) -> Segments:
        """`whole` [B, T, …] cut every `tokens` tokens from each sequence's start."""
        B, T, *_ = whole.sizes
        cut = -(-T // tokens) * tokens  # a sequence of whole segments
        offsets = torch.arange(0, B * cut + 1, tokens, device=whole.r.device)
        if cut > T:
            offsets = offsets.sub(offsets // cut, alpha=cut - T)
        r, w, k, v, a, b = (
            x if B == 1 else x.reshape(1, B * T, *x.shape[2:])
            for x in (whole.r, whole.w, whole.k, whole.v, whole.a, whole.b)
        )
        call = Call(r, w, k, v, a, b, None, whole.decay, offsets, whole.invariant)
        return Segments(whole, call, tokens)

    @property
    def each(self) -> int:
        """Segments of a sequence."""
        return -(-self.whole.sizes[1] // self.tokens)

    @property
    def map_words(self) -> int:
        """fp32 words of all maps; a multiple of four, so that what lies behind is aligned."""
        _, _, H, K, _ = self.whole.sizes
        return self.call.sequences * H * K * K

    def maps(self, memory: Tensor) -> Tensor:
        """The beginning of the flat `memory` as a map a segment, fp32 [B · segments, H, K, K]."""
        _, _, H, K, _ = self.whole.sizes
        return memory[: self.map_words].view(self.call.sequences, H, K, K)
