"""How many operations a token of training takes, by which a speed becomes a share of the device's.

Counted are the model's own: work that is done again to save memory does not raise the figure.
"""

from __future__ import annotations

import torch

from rwkv7.machine import peak_flops
from rwkv7.nn import RWKV7

__all__ = ["Utilisation", "flops_per_token"]

# Of a state element and token: decay 1, S a 2, (S a) bᵀ 2, v kᵀ 2, S r 2.
RECURRENCE = 9


def flops_per_token(model: RWKV7) -> int:
    """Operations, forwards and back, for one token of training.

    6 for each element of a matrix that is trained and 4 for each of a frozen one (products only;
    the embedding is a look-up), and three times the recurrence's forward pass.
    """
    config = model.config
    matrices = 0
    for name, x in model.named_parameters():
        if x.dim() == 2 and name != "emb.weight" and not name.endswith(".r_k"):
            matrices += x.numel() * (6 if x.requires_grad else 4)
    state = config.layers * config.width * config.head_size
    return matrices + 3 * RECURRENCE * state


class Utilisation:
    """The share of the device's peak that training reaches (MFU), where the peak is known."""

    def __init__(self, model: RWKV7, dtype: torch.dtype) -> None:
        """`dtype` is that of the products."""
        self._flops, self._peak = flops_per_token(model), peak_flops(model.device, dtype)

    def at(self, tokens_per_second: float) -> float | None:
        """The share at this speed, 0 to 1; None on a device whose peak is not known."""
        return None if self._peak is None else tokens_per_second * self._flops / self._peak
