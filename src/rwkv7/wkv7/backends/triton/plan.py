"""Static configurations: which route a call takes and how each kernel is cut and launched.

Nothing here is tuned at run time. Decisions look at sizes, dtype and decay form alone, never at
values, and inside `batch_invariant()` never at T, B or the packing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from rwkv7.wkv7.contract import Call

CHUNK = 64
SPAN = 16  # tokens between two states that the token route saves, and rebuilds backward
LARGEST = 256
# K and V up to which calls go by chunks. The wide kernels are for Hopper, whose products read both
# factors from shared memory: compiled for 8.0 they keep nearly everything in local memory.
CHUNK_LARGEST, CHUNK_LARGEST_ELSEWHERE = 128, 64
# Sequences up to this length are walked token by token: a chunk would be mostly padding.
SHORT = 16


@dataclass(frozen=True, slots=True)
class Launch:
    """Warps of a program and stages of its software pipeline, Triton's num_warps, num_stages."""

    warps: int
    stages: int = 1


@dataclass(frozen=True, slots=True)
class Walk(Launch):
    """A walk over chunks; rows: how many rows of V one program carries; outputs: whether it also
    makes y or dv, which are else left to a kernel over all chunks at once."""

    rows: int = 64
    outputs: bool = True


# The chunked route. Measured on Hopper (bf16): 8 warps are slower (a tile of 64 rows has work for
# four), and so are fewer registers a thread with three or four programs a multiprocessor; a
# pipeline gains nothing but in a walk with few programs.
MAPS = Launch(warps=4)
GRADIENTS = Launch(warps=4)
# Channels of K at a time: 64 spill five times the registers that 32 do. For fp16 inputs all chunks'
# tiles of two numbers must be in shared memory then, more than cards other than Hopper's have.
GRADIENTS_PART, GRADIENTS_PART_PAIRS = 32, 64
WALK = Walk(warps=4, rows=64)
# Few walks are as slow as their chain of steps: it is kept short, and V is cut over more programs.
WALK_FEW = Walk(warps=4, stages=3, rows=16, outputs=False)
OUTPUTS = Launch(warps=4)
# With fewer (sequence, head) pairs than this a card is not full, and V is cut further.
FEW_PAIRS = 256


def block(size: int) -> int:
    """The power of two, at least 16, that holds `size` channels."""
    return max(16, 1 << (size - 1).bit_length())


def chunk_block(size: int) -> int:
    """`block` for the chunked route, at least 64: smaller tiles save nothing there."""
    return max(64, block(size))


def takes_chunks(call: Call) -> bool:
    """Whether the call runs by chunks; else it is walked token by token."""
    _, T, _, K, V = call.sizes
    if call.decay == "log" or max(K, V) > _largest(call.v) or _exact_on_gpu(call):
        return False
    return call.invariant or T > SHORT


def why_tokens(call: Call) -> str:
    """Why `takes_chunks` says no."""
    _, _, _, K, V = call.sizes
    if call.decay == "log":
        return 'decay="log" has no floor; "log_bounded" is faster'
    if max(K, V) > _largest(call.v):
        return f"chunks take K and V up to {_largest(call.v)}"
    if _exact_on_gpu(call):
        return "float32 inputs: true float32 products"
    return "a short sequence"


def _largest(v: torch.Tensor) -> int:
    return CHUNK_LARGEST_ELSEWHERE if v.is_cuda and not _hopper(v) else CHUNK_LARGEST


def _hopper(v: torch.Tensor) -> bool:
    return v.is_cuda and torch.version.hip is None and _generation(v.device) == 9


@functools.cache
def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _exact_on_gpu(call: Call) -> bool:
    # The chunked kernels with three-product tf32 spill most of their registers and compile for
    # a minute; under the interpreter they run in fp32.
    return call.v.is_cuda and call.v.dtype == torch.float32


def walk_for(call: Call) -> Walk:
    """The walk over states, and that over their gradients: V is cut where pairs are few."""
    return WALK_FEW if _few(call) else WALK


def _few(call: Call) -> bool:
    # Sequences count unless the call must not depend on its batch.
    return call.sizes[2] * (1 if call.invariant else call.sequences) < FEW_PAIRS


def gradients_part(v: torch.Tensor) -> int:
    """How many channels of K the gradients are made of at a time."""
    return GRADIENTS_PART_PAIRS if products(v) == "halves" else GRADIENTS_PART


def token_rows(K: int, V: int) -> int:
    """Rows of the state per program of the token route: about 32 floats a thread at most."""
    return max(1, min(block(V), 4096 // block(K)))


def products(v: torch.Tensor) -> str:
    """The operands of the chunked kernels' products.

    "half": fp16 where digits are to spare, two bf16 numbers elsewhere; "halves", for fp16 inputs,
    which are held to finer bounds: two fp16 numbers in the place of one. "ieee": true fp32, off
    NVIDIA's cards (Triton's interpreter has no bf16 products).
    """
    if not v.is_cuda or torch.version.hip is not None:
        return "ieee"
    return "halves" if v.dtype == torch.float16 else "half"
