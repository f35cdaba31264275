"""What stands before a piece of a sequence whose earlier tokens another process holds.

The seam between the model and whoever spreads one sequence over several cards: the two places at
which a layer looks back, and nothing else. `rwkv7.training.parallel` has an implementation.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Before(Protocol):
    """Stands in for the two things that a layer asks of the tokens before its own.

    `shift` gives the vectors [S, C] to go before each sequence's first token here, from the mix's
    input at the last token of each row, [B, C], and what was carried, [S, C] or None for zeros.
    `wkv7` is the operator, with the state that the tokens before leave; its final states count
    where a sequence ends here.
    """

    def shift(self, last: Tensor, carried: Tensor | None) -> Tensor:
        """The vectors [S, C] before each sequence's first token."""

    def wkv7(
        self,
        r: Tensor,  # [B, T, H, K]
        w: Tensor,  # [B, T, H, K]
        k: Tensor,  # [B, T, H, K]
        v: Tensor,  # [B, T, H, V]
        a: Tensor,  # [B, T, H, K]
        b: Tensor,  # [B, T, H, K]
        state: Tensor | None = None,  # [S, H, V, K]
        *,
        cu_seqlens: Tensor | None = None,  # [S + 1]
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """y [B, T, H, V] and the states after each sequence's last token here."""
