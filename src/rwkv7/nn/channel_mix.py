"""Channel mix: RWKV-7's feed-forward, a squared ReLU over a token-shifted input.

Unlike RWKV-5 and 6 it has no receptance gate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkv7.config import ModelConfig

from .again import again
from .before import Before
from .fused import ChannelMixWeights, mixed_in_pool_, shifted_mixes, squared_relu
from .linear import Linear, plain_weights
from .token_shift import Packing, Slots


class ChannelMix(nn.Module):
    """W_v relu(W_k x')², x' = x + (previous - x) x_k. Parameters are named as in checkpoints."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        C, F = config.width, config.ffn_size
        self.x_k = nn.Parameter(torch.empty(C, dtype=dtype, device=device))
        self.key = Linear(C, F, dtype, device)
        self.value = Linear(F, C, dtype, device)

    def forward(
        self,
        x: Tensor,
        shift: Tensor | None,
        packed: Packing | None = None,
        before: Before | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(output [B, T, C], shift to carry on [S, C]) from x [B, T, C] and the carried shift."""
        if before is not None:
            shift = before.shift(x, shift)

        def mixes(x: Tensor) -> tuple[Tensor, Tensor]:
            (mixed,), last = shifted_mixes(x, shift, packed, (self.x_k,))
            return mixed, last

        mixed, last = again(mixes, x)
        return self._fed(mixed), last

    def step_(self, x: Tensor, shift: Tensor, slots: Slots) -> Tensor:
        """The output [B, 1, C] for one token each; rows of the pool `shift` [P, C] change."""
        (mixed,) = mixed_in_pool_(x, shift, slots, (self.x_k,))
        return self._fed(mixed)

    def weights_of_step(self) -> ChannelMixWeights | None:
        """All of it for `channel_mix_of_one_`; None where a module is more than its weights."""
        if (found := plain_weights(self.key, self.value)) is None:
            return None
        return ChannelMixWeights(self.x_k, *found)

    def _fed(self, mixed: Tensor) -> Tensor:
        (squares,) = again(_squares, self.key(mixed))
        return self.value(squares)


def _squares(x: Tensor) -> tuple[Tensor]:
    return (squared_relu(x),)
