"""Padded batches to packed ones and back, so that padding never touches a state.

Packed sequences stand one behind the other in a batch of one, with offsets between them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .nn import RWKV7
from .state import ModelState


def run_padded(
    model: RWKV7,
    tokens: Tensor,
    mask: Tensor,
    state: ModelState | None = None,
    last_only: bool = False,
) -> tuple[Tensor, ModelState]:
    """What `model` makes of each row of a padded batch alone: no padding is read.

    For batches in the form of transformers' tokenizers, `input_ids` and `attention_mask`. It
    costs what the tokens that count cost, packed; gradients flow.

    Args:
        model: on the device of `tokens`.
        tokens: [B, T], int32 or int64. What stands in padded places does not matter, not even
            that it is an id.
        mask: [B, T], as for `pack`: each row padded left, right or on both sides.
        state: of the B rows, what came out before them; None at the start. Never changed.
        last_only: only the logits after each row's last token, wherever it stands.

    Returns:
        logits [B, T, V], zero where the mask is false, or [B, 1, V]; and the state of each row
        after its last token. A row of padding alone is an empty sequence: it keeps its state, and
        with `last_only` its logits are NaN.

    Raises:
        ValueError, TypeError: a row with a hole, another mask, and what `model` raises.
    """
    mask = mask.to(tokens.device)
    packed, offsets = pack(tokens, mask)
    logits, state = model(packed, state, cu_seqlens=offsets, last_only=last_only)
    return (logits.transpose(0, 1) if last_only else unpack(logits, mask)), state


def pack(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A padded batch without its padding.

    Args:
        tokens: [B, T, ...], any dtype.
        mask: [B, T], bool or 0 and 1, true where a token counts. Each row's true places are one
            run: padding is left, right or on both sides, never between tokens.

    Returns:
        The packed tokens [1, total, ...] and the offsets [B + 1], int64, to go with them as
        `cu_seqlens`. A row without tokens is an empty sequence.

    Raises:
        ValueError, TypeError: shapes that differ, another mask, or a row with a hole.
    """
    mask = _checked(mask)
    if tokens.shape[:2] != mask.shape:
        raise ValueError(
            f"tokens: expected [B, T, ...] to go with the mask {list(mask.shape)}, "
            f"found {list(tokens.shape)}"
        )
    lengths = mask.sum(1)
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=mask.device)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return tokens[mask][None], offsets


def unpack(packed: Tensor, mask: Tensor, fill: float = 0) -> Tensor:
    """The inverse of `pack`: [1, total, ...] -> [B, T, ...], with `fill` where the mask is false.

    Args:
        packed: tokens, or what a model made of them, for instance logits.
        mask: the mask that `pack` was given.

    Raises:
        ValueError, TypeError: another mask, or a total that is not its number of tokens.
    """
    mask = _checked(mask)
    count = int(mask.sum())
    if packed.shape[:2] != (1, count):
        raise ValueError(
            f"packed: expected [1, {count}, ...] to go with the mask, found {list(packed.shape)}"
        )
    result = packed.new_full((*mask.shape, *packed.shape[2:]), fill)
    return result.masked_scatter(
        mask.reshape(*mask.shape, *(1,) * (packed.dim() - 2)).expand_as(result), packed
    )


def _checked(mask: Tensor) -> Tensor:
    if mask.dim() != 2:
        raise ValueError(f"mask: expected [B, T], found the shape {list(mask.shape)}")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask: expected bool or 0 and 1, found {mask.dtype}")
    if mask.dtype != torch.bool:
        if bool(((mask != 0) & (mask != 1)).any()):
            raise ValueError("mask: expected 0 and 1 alone, found other numbers")
        mask = mask.bool()
    # A run begins where a true place has no true place before it.
    runs = mask[:, :1].sum(1) + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    if bool((runs > 1).any()):
        row = int((runs > 1).nonzero()[0])
        raise ValueError(f"mask: expected padding at the ends alone, found a hole in row {row}")
    return mask
