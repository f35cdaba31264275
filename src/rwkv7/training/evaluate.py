"""Bits per byte of held-out text, with the state carried from window to window, and dropped.

Both numbers are over the very same bytes, each counted once, so that they can be set beside each
other and beside those of a compressor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rwkv7.evaluation import LOGITS_AT_ONCE, carried_bits, summed_bits
from rwkv7.nn import RWKV7
from rwkv7.tokenizer import Tokenizer

from .data import Tokens

__all__ = ["Evaluation", "dropped_bits", "evaluate"]

DROPPED_TOKENS = 8192  # of windows whose state is dropped, read side by side, or LOGITS_AT_ONCE


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Bits per byte with the state carried and with it dropped at every window; bytes read."""

    carried: float
    dropped: float
    bytes: int


def evaluate(
    model: RWKV7, tokens: Tokens, tokenizer: Tokenizer, *, window: int, size: int | None = None
) -> Evaluation:
    """Reads held-out `tokens` in both ways.

    The first token of the text has nothing before it that could foretell it: in both ways it is
    charged log2(vocabulary) bits, what a model without any knowledge would pay. Every other token
    is predicted from at least one before it.

    Args:
        model: set to evaluation for the time being.
        tokens: the held-out text, at least 1 token.
        tokenizer: what the text was tokenized with.
        window: tokens after which the second way drops the state, those of a training window.
        size: bytes of the text, where known; else the tokens are decoded to count them.
    """
    if len(tokens) == 0:
        raise ValueError("tokens: expected at least one held-out token, found none")
    if size is None:
        size = _count_bytes(tokens, tokenizer)
    first = math.log2(model.config.vocab_size)
    was_training = model.training
    model.eval()
    try:
        carried = first + carried_bits(model, tokens)
        dropped = first + dropped_bits(model, tokens, window)
    finally:
        model.train(was_training)
    return Evaluation(carried=carried / size, dropped=dropped / size, bytes=size)


@torch.no_grad()
def dropped_bits(model: RWKV7, tokens: Tokens, window: int) -> float:
    """The bits of all tokens but the first when every `window` tokens the state is dropped."""
    last = len(tokens) - 1
    whole = last // window
    at_once = min(DROPPED_TOKENS, LOGITS_AT_ONCE // model.config.vocab_size)
    rows = max(1, at_once // window)
    bits = 0.0
    for first in range(0, whole, rows):
        some = range(first, min(first + rows, whole))
        windows = np.stack([tokens[i * window : (i + 1) * window + 1] for i in some])
        bits += _window_bits(model, windows)
    if whole * window < last:
        bits += _window_bits(model, tokens[None, whole * window :])
    return bits


def _window_bits(model: RWKV7, windows: np.ndarray) -> float:
    tokens = _to_device(windows, model)
    return summed_bits(model(tokens[:, :-1])[0], tokens[:, 1:])


def _to_device(tokens: np.ndarray, model: RWKV7) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64)).to(model.emb.weight.device)


def _count_bytes(tokens: Tokens, tokenizer: Tokenizer) -> int:
    piece = 1 << 16
    return sum(
        len(tokenizer.decode_bytes(tokens[start : start + piece].tolist()))
        for start in range(0, len(tokens), piece)
    )
