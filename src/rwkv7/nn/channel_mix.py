"""Channel mix: RWKV-7's feed-forward, a squared ReLU over a token-shifted input.

Unlike RWKV-5 and 6 it has no receptance gate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkv7.config import ModelConfig

from .again import again
from .fused import ChannelMixWeights, mixed_in_pool_, squared_relu
from .linear import Linear, plain_weights
from .token_shift import Slots


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

    def forward(self, mixed: Tensor) -> Tensor:
        """The output [..., C] from x' [..., C], the shifted and mixed input."""
        (squares,) = again(_squares, self.key(mixed))
        return self.value(squares)

    def mixes(self) -> tuple[Tensor]:
        """What the input takes of the token before, [C]."""
        return (self.x_k,)

    def step_(self, x: Tensor, shift: Tensor, slots: Slots) -> Tensor:
        """The output [B, C] for one token each; rows of the pool `shift` [P, C] change."""
        return self(*mixed_in_pool_(x, shift, slots, self.mixes()))

    def weights_of_step(self) -> ChannelMixWeights | None:
        """All of it for `channel_mix_of_one_`; None where a module is more than its weights."""
        if (found := plain_weights(self.key, self.value)) is None:
            return None
        return ChannelMixWeights(self.x_k, *found)


def _squares(x: Tensor) -> tuple[Tensor]:
    return (squared_relu(x),)
