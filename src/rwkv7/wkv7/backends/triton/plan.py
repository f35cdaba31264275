"""Static configurations: which route a call takes and how each kernel is cut and launched.

Nothing here is tuned at run time. Decisions look at sizes, dtype and decay form alone, never at
values, and inside `batch_invariant()` never at T, B or the packing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from rwkv7.wkv7.contract import Call

STEP = 16  # tokens that the chunked kernels take at a time
# Tokens between two states that forward saves for the backward pass, which walks between them
# again. With 64 more states cross memory, and both passes of 8x4096x64x64 take 1.5 % longer; with
# 256 0.5 % less, but every packed sequence begins a chunk.
CHUNK = 128
SPAN = 16  # tokens between two states that the token route saves, and rebuilds backward
LARGEST = 256
# K and V up to which calls go by chunks. The wide kernels are for Hopper, whose products read both
# factors from shared memory: compiled for 8.0 they keep nearly everything in local memory.
CHUNK_LARGEST, CHUNK_LARGEST_ELSEWHERE = 128, 64
# Sequences up to this length are walked token by token: a chunk would be mostly padding.
SHORT = 16


@dataclass(frozen=True, slots=True)
class Segments:
    """Up to how many (sequence, head) pairs are walked in segments, and in how many of them all."""

    pairs: int
    walks: int


@dataclass(frozen=True, slots=True)
class Launch:
    """Warps of a program, stages of its software pipeline, and the most registers of a thread."""

    warps: int
    stages: int = 1
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """How Triton takes it."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if self.registers is not None and torch.version.hip is None:
            options["maxnreg"] = self.registers
        return options


# The chunked route, measured on Hopper (bf16). Forward one warp prepares a step, and nothing in it
# waits for another. A multiprocessor's quarter has room for two of them, for three with 168
# registers, but what does not fit then costs more, backward too.
IMAGES = PREPARE = Launch(warps=1)
# A walk has 64 rows of V. With 128 registers four share a multiprocessor, and 512 are one wave;
# where they do not fill a card, more registers are faster.
WALK_ROWS = 64
WALK, WALK_FULL, FULL_WALKS = Launch(4, stages=3), Launch(4, stages=3, registers=128), 384
# Segments cost another walk of all of them and two more launches. At 96 pairs that is more than
# they gain forward; backward they gain 2 % of both passes there (8x4096x12x64). 256 walks forward,
# not 512, take 1 % off both passes of 1x8192x32x64 and add 0.6 % to 1x65536x32x64.
SEGMENTS, SEGMENTS_BACK, SHORTEST_SEGMENT = Segments(64, 256), Segments(96, 512), 512
CHAIN = Launch(warps=4)
# How many numbers the states of all steps of a slab have together: at 2^27 its scratch memory is a
# gigabyte, and its work fills any card.
SLAB = 2**27


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


def walk_launch(call: Call, walks: int) -> Launch:
    """How so many walks go, forward."""
    full = chunk_block(call.sizes[3]) == 64 and (call.invariant or walks >= FULL_WALKS)
    return WALK_FULL if full and _hopper(call.v) else WALK


def segment(call: Call, tokens: int, segments: Segments) -> int:
    """Tokens of the segments in which so many of every sequence are walked, a multiple of STEP."""
    pairs, count = call.sequences * call.sizes[2], 1
    if not call.invariant and call.cu_seqlens is None and pairs <= segments.pairs:
        count = max(1, min(segments.walks // pairs, tokens // SHORTEST_SEGMENT))
    return -(-tokens // (count * STEP)) * STEP


def rewalk(K: int, V: int) -> Launch:
    """The walks over steps, backward: a warp has 16 rows of V. With 128 registers 16 warps share a
    multiprocessor; wide states do not fit in so few."""
    registers = 128 if max(block(K), block(V)) <= 64 else None
    return Launch(warps=max(1, block(V) // 16), stages=3, registers=registers)


def map_rows(K: int) -> int:
    """Rows of M or F per program of the walk that finds a segment's, backward."""
    return min(block(K), WALK_ROWS)


def gradients(K: int, V: int) -> Launch:
    """The gradients of a step, backward: a warp has 32 channels of K. With 16 at 8x4096x64x64 they
    take 2.6 ms where these take 1.9, and a warp alone, 16 channels after the others, 2.4 (H200).
    States of 128 x 128 fit into registers with 16: 5.4 ms for 5.7 at 8x4096x32x128 (H100). Beside a
    V of 64 they need not, and ptxas compiles those eight warps wrongly in fp16 (docs/triton.md)."""
    return Launch(warps=max(1, block(K) // (16 if min(block(K), block(V)) > 64 else 32)))


def slab_chunks(chunks: int, width: int, K: int, V: int) -> int:
    """How many chunks a slab of the backward pass has, where each is there `width` times."""
    each = width * (CHUNK // STEP) * block(K) * block(V)
    return min(chunks, max(1, SLAB // each))


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
