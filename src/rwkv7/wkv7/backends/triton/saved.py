"""What the forward pass by chunks keeps for the backward pass: the state before every chunk."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv7.wkv7.contract import Call

from .launch import Part
from .plan import CHUNK, products


def part_count(call: Call, tokens: int) -> int:
    """How many numbers parts of so many tokens use (packed: at most; some may have no tokens)."""
    B, T, *_ = call.sizes
    if call.cu_seqlens is None:
        return B * -(-T // tokens)
    return T // tokens + call.sequences


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
        rows, address = _rows(call), memory.data_ptr()
        states = operand_dtype(call), 4 * _aligned(rows), rows * call.sizes[3]
        return cls(Part(memory, address, torch.float32, 0, rows), Part(memory, address, *states))


def carve(x: Tensor, *parts: tuple[torch.dtype, int]) -> list[Part]:
    """So many elements of each dtype on the device of x, in one allocation: the host takes longer
    over each than over a launch. They begin on 64 bytes, where kernels expect 16."""
    size, places = _places(parts)
    memory = x.new_empty(size, dtype=torch.uint8)
    address = memory.data_ptr()
    return [Part(memory, address, *place) for place in places]


@functools.lru_cache(64)
def _places(
    parts: tuple[tuple[torch.dtype, int], ...],
) -> tuple[int, list[tuple[torch.dtype, int, int]]]:
    """Bytes of all parts, and of each its dtype, the byte at which it begins, and its elements."""
    size, places = 0, []
    for dtype, count in parts:
        places.append((dtype, size, count))
        size += -(-count * dtype.itemsize // 64) * 64
    return size, places


def operand_dtype(call: Call) -> torch.dtype:
    """The dtype of products' operands: fp16 for 16-bit inputs, else fp32."""
    return torch.float32 if products(call.v) == "ieee" else torch.float16


def _rows(call: Call) -> int:
    _, _, H, _, V = call.sizes
    return part_count(call, CHUNK) * H * V


def _aligned(words: int) -> int:
    return -(-words // 4) * 4
