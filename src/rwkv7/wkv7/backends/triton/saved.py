"""What the forward pass by chunks keeps for the backward pass: the state before every chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv7.wkv7.contract import Call

from .plan import CHUNK, products


def chunk_count(call: Call) -> int:
    """How many chunk numbers the call uses (packed: at most; some may have no tokens)."""
    B, T, *_ = call.sizes
    if call.cu_seqlens is None:
        return B * -(-T // CHUNK)
    return T // CHUNK + call.sequences


@dataclass(frozen=True, slots=True)
class Saved:
    """Flat parts of one fp32 tensor: states [n, H, V, K], fp16 for 16-bit inputs, else fp32, and
    the powers of two taken out of their rows, states_scale [n, H, V] (not written beside fp32)."""

    states_scale: Tensor
    states: Tensor

    @staticmethod
    def words(call: Call) -> int:
        """fp32 words that all of it takes."""
        rows, states = _rows(call), _rows(call) * call.sizes[3]
        return _aligned(rows) + _aligned(-(-states * operand_dtype(call).itemsize // 4))

    @classmethod
    def view(cls, call: Call, memory: Tensor) -> Saved:
        """The fields inside a flat fp32 tensor of `words`."""
        rows = _aligned(_rows(call))
        scale, states = memory.split((rows, memory.numel() - rows))
        return cls(scale, states.view(operand_dtype(call)))


def carve(x: Tensor, dtype: torch.dtype, *counts: int) -> tuple[Tensor, ...]:
    """Flat tensors of so many elements on the device of x, in one allocation: the host takes
    longer over each than over a split. They begin where kernels expect it, on 16 bytes."""
    padded = [-(-count // 16) * 16 for count in counts]
    return x.new_empty(sum(padded), dtype=dtype).split(padded)


def operand_dtype(call: Call) -> torch.dtype:
    """The dtype of products' operands: fp16 for 16-bit inputs, else fp32."""
    return torch.float32 if products(call.v) == "ieee" else torch.float16


def _rows(call: Call) -> int:
    _, _, H, _, V = call.sizes
    return chunk_count(call) * H * V


def _aligned(words: int) -> int:
    return -(-words // 4) * 4
