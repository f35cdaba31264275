"""Static configurations: which route a call takes and how each kernel is cut and launched.

Nothing here is tuned at run time. Decisions look at sizes, dtype and decay form alone, never at
values, and inside `batch_invariant()` never at T, B or the packing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rwkv7.wkv7.contract import Call

CHUNK = 64
SPAN = 16  # tokens between two states that the token route saves, and rebuilds backward
LARGEST = 256
CHUNK_LARGEST = 64
# Sequences up to this length are walked token by token: a chunk would be mostly padding.
SHORT = 16


@dataclass(frozen=True, slots=True)
class Launch:
    """Warps of a program and stages of its software pipeline, Triton's num_warps, num_stages."""

    warps: int
    stages: int = 1


@dataclass(frozen=True, slots=True)
class Walk(Launch):
    """A walk over chunks; rows: how many rows of V one program carries."""

    rows: int = 64


# The chunked route, for K and V up to 64. Measured on an H100 (bf16): 8 warps are slower (a tile of
# 64 rows has work for four), a pipeline gains nothing but in a walk with few programs.
MAPS = Launch(warps=4)
GRADIENTS = Launch(warps=4)
WALK = Walk(warps=4, rows=64)
WALK_FEW = Walk(warps=4, stages=3, rows=32)
WALK_BACK = Walk(warps=4, rows=64)
# With fewer (sequence, head) pairs than this a card is not full, and V is cut further.
FEW_PAIRS = 256
# From this many tokens, counted once a head, errors in bf16 average out: see rounds_scores.
MANY_TOKENS = 2048


def block(size: int) -> int:
    """The power of two, at least 16, that holds `size` channels."""
    return max(16, 1 << (size - 1).bit_length())


def chunk_block(size: int) -> int:
    """`block` for the chunked route, at least 64: smaller tiles save nothing there."""
    return max(64, block(size))


def takes_chunks(call: Call) -> bool:
    """Whether the call runs by chunks; else it is walked token by token."""
    _, T, _, K, V = call.sizes
    if call.decay == "log" or max(K, V) > CHUNK_LARGEST or _exact_on_gpu(call):
        return False
    return call.invariant or T > SHORT


def why_tokens(call: Call) -> str:
    """Why `takes_chunks` says no."""
    _, _, _, K, V = call.sizes
    if call.decay == "log":
        return 'decay="log" has no floor; "log_bounded" is faster'
    if max(K, V) > CHUNK_LARGEST:
        return f"chunks take K and V up to {CHUNK_LARGEST}"
    if _exact_on_gpu(call):
        return "float32 inputs: true float32 products"
    return "a short sequence"


def _exact_on_gpu(call: Call) -> bool:
    # The chunked kernels with three-product tf32 spill most of their registers and compile for
    # a minute; under the interpreter they run in fp32.
    return call.v.is_cuda and call.v.dtype == torch.float32


def walk_for(call: Call) -> Walk:
    """The forward walk: rows of V are cut where pairs are few; the sequences count unless the
    call must not depend on its batch."""
    pairs = call.sizes[2] * (1 if call.invariant else call.sequences)
    return WALK if pairs >= FEW_PAIRS else WALK_FEW


def token_rows(K: int, V: int) -> int:
    """Rows of the state per program of the token route: about 32 floats a thread at most."""
    return max(1, min(block(V), 4096 // block(K)))


def products(v: torch.Tensor) -> str:
    """How the chunked kernels multiply: see `multiply` in kernels/tiles.py.

    "pair" for 16-bit inputs on NVIDIA's cards; true fp32 elsewhere (the interpreter has no bf16
    products).
    """
    return "pair" if v.is_cuda and torch.version.hip is None else "ieee"


def rounds_scores(call: Call) -> bool:
    """Whether backward rounds the gradients of a chunk's scores to bf16 before the last products.

    That spares a third of those products and moves gradients in bf16 by 1.7e-3 to 2e-3 at K = 64
    (3e-3 are allowed, rounding them at the end takes 1.7e-3). With fewer channels than a chunk has
    tokens the last products cancel more (2.7e-3), and in a call of few tokens a few numbers decide
    (2.3e-3): there nothing is rounded.
    """
    B, T, H, K, _ = call.sizes
    narrow = products(call.v) == "pair" and call.v.dtype == torch.bfloat16
    return narrow and K >= CHUNK and B * T * H >= MANY_TOKENS and not call.invariant
