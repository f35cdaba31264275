"""Where the backward pass finds a chunk and its steps of 16 tokens.

It goes through the sequences in slabs of chunks, the last first, so that what it keeps of a step
need not be there for all at once. A slab is L chunks of every sequence, from chunk `low` of each
on; of packed sequences, whose chunks have one numbering, it is the L chunks from `low` on.
"""

import triton
import triton.language as tl

from .tiles import chunk_bounds, first_chunk, sequence_bounds

STEP = tl.constexpr(16)


@triton.jit
def slab_chunk(
    local: tl.tensor,
    low: tl.tensor,
    L: tl.tensor,
    cu: tl.tensor,
    sequences: tl.tensor,
    T: tl.tensor,
    C: tl.constexpr,
    PACKED: tl.constexpr,
):
    """(number, first row, tokens) of chunk `local` of a slab; tokens ≤ 0 where it has none."""
    if PACKED:
        chunk = low + local
    else:
        chunk = local // L * tl.cdiv(T, C) + low + local % L
    start, tokens = chunk_bounds(chunk, cu, sequences, T, C, PACKED)
    return chunk, start, tokens


@triton.jit
def slab_step(
    step: tl.tensor,
    low: tl.tensor,
    L: tl.tensor,
    cu: tl.tensor,
    sequences: tl.tensor,
    T: tl.tensor,
    C: tl.constexpr,
    PACKED: tl.constexpr,
):
    """(first row, tokens) of step `step` of a slab; tokens ≤ 0 where it has none."""
    _, start, tokens = slab_chunk(step // (C // STEP), low, L, cu, sequences, T, C, PACKED)
    skipped = step % (C // STEP) * STEP
    return start + skipped, tokens - skipped


@triton.jit
def slab_steps(
    s: tl.tensor,
    low: tl.tensor,
    L: tl.tensor,
    cu: tl.tensor,
    T: tl.tensor,
    C: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Of sequence s: (first row, tokens, its first step in the slab, the one behind its last, what
    to add to a step's number to have that in the slab)."""
    start, tokens = sequence_bounds(s, cu, T, PACKED)
    if PACKED:
        offset = first_chunk(s, cu, T, C, True) - low
        begin = tl.maximum(-offset, 0)
        end = L - offset
    else:
        offset = s * L - low
        begin = low
        end = low + L
    STEPS: tl.constexpr = C // STEP
    end = tl.minimum(end * STEPS, tl.cdiv(tokens, STEP))
    return start, tokens, begin * STEPS, end, offset * STEPS
