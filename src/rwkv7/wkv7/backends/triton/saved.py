"""What the forward pass by chunks keeps for the backward pass: the state before every chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv7.wkv7.contract import Call

from .launch import Part
from .plan import CHUNK, products


def chunk_count(call: Call) -> int:
    """How many chunk numbers the call uses (packed: at most; some may have no tokens)."""
    B, T, *_ = call.sizes
    if call.cu_seqlens is None:
        return B * -(-T // CHUNK)
    return T // CHUNK + call.sequences


@dataclass(frozen=True, slots=True)
class Saved:
    """Parts of one flat fp32 tensor: states [n, H, V, K], fp16 for 16-bit inputs, else fp32, and
    the powers of two taken out of their rows, states_scale [n, H, V] (not written beside fp32)."""

    states_scale: Part
    states: Part

    @staticmethod
    def words(call: Call) -> int:
        """fp32 words that all of it takes."""
        rows, states = _rows(call), _rows(call) * call.sizes[3]
        return _aligned(rows) + _aligned(-(-states * operand_dtype(call).itemsize // 4))

    @classmethod
    def view(cls, call: Call, memory: Tensor) -> Saved:
        """The fields inside a flat fp32 tensor of `words`."""
        rows = _rows(call)
        return cls(
            Part(memory, torch.float32, 0, rows),
            Part(memory, operand_dtype(call), 4 * _aligned(rows), rows * call.sizes[3]),
        )


def carve(x: Tensor, *parts: tuple[torch.dtype, int]) -> list[Part]:
    """So many elements of each dtype on the device of x, in one allocation: the host takes longer
    over each than over a launch. They begin where kernels expect it, on 16 bytes."""
    begins, total = [], 0
    for dtype, count in parts:
        begins.append(total)
        total += -(-count * dtype.itemsize // 64) * 64
    memory = x.new_empty(total, dtype=torch.uint8)
    return [
        Part(memory, dtype, begin, count)
        for (dtype, count), begin in zip(parts, begins, strict=True)
    ]


def operand_dtype(call: Call) -> torch.dtype:
    """The dtype of products' operands: fp16 for 16-bit inputs, else fp32."""
    return torch.float32 if products(call.v) == "ieee" else torch.float16


def _rows(call: Call) -> int:
    _, _, H, _, V = call.sizes
    return chunk_count(call) * H * V


def _aligned(words: int) -> int:
    return -(-words // 4) * 4
