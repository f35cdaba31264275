"""What the kernels share: where a tile's tokens lie, decays, operands of products.

Letters: S sequences, T time, H heads, K key size, V value size, C tokens in a chunk. Logarithms of
decays are to base 2 in every kernel.
"""

import triton
import triton.language as tl

from rwkv7.wkv7.contract import DECAY_SCALE

LOG2E = tl.constexpr(1.4426950408889634)
LOGIT_SCALE = tl.constexpr(DECAY_SCALE)


@triton.jit
def sequence_bounds(s: tl.tensor, cu: tl.tensor, T: tl.tensor, PACKED: tl.constexpr):
    """(first row, number of tokens) of sequence s among the rows [B·T] of the inputs."""
    if PACKED:
        start = tl.load(cu + s).to(tl.int64)
        tokens = (tl.load(cu + s + 1).to(tl.int64) - start).to(tl.int32)
    else:
        start = s.to(tl.int64) * T
        tokens = T
    return start, tokens


@triton.jit
def first_chunk(s: tl.tensor, cu: tl.tensor, T: tl.tensor, C: tl.constexpr, PACKED: tl.constexpr):
    """The number of the first chunk of sequence s, when every sequence starts its own chunks.

    Packed sequences may leave a number unused between them, so that no sum over the lengths of
    the sequences before is needed: Σ ceil(n_i / C) ≤ ⌊Σ n_i / C⌋ + s.
    """
    if PACKED:
        chunk = tl.load(cu + s).to(tl.int32) // C + s
    else:
        chunk = s * tl.cdiv(T, C)
    return chunk


@triton.jit
def chunk_bounds(
    chunk: tl.tensor,
    cu: tl.tensor,
    sequences: tl.tensor,
    T: tl.tensor,
    C: tl.constexpr,
    PACKED: tl.constexpr,
):
    """(first row, number of tokens) of a chunk; no tokens when its number is unused."""
    if PACKED:
        low = 0
        high = sequences
        while high - low > 1:
            middle = (low + high) // 2
            if tl.load(cu + middle).to(tl.int32) // C + middle <= chunk:
                low = middle
            else:
                high = middle
        start, tokens = sequence_bounds(low, cu, T, PACKED)
        skipped = (chunk - first_chunk(low, cu, T, C, PACKED)) * C
    else:
        per_sequence = tl.cdiv(T, C)
        start, tokens = sequence_bounds(chunk // per_sequence, cu, T, PACKED)
        skipped = (chunk % per_sequence) * C
    return start + skipped, tl.minimum(tokens - skipped, C)


@triton.jit
def log2_decay(w: tl.tensor, LOGIT: tl.constexpr):
    """The base-2 logarithm of the decay that w stands for, in fp32."""
    w = w.to(tl.float32)
    if LOGIT:
        # The square of an inverse root: a quotient takes three more instructions.
        root = tl.rsqrt(1.0 + tl.exp2(w * -LOG2E))
        log = root * root * (-LOGIT_SCALE * LOG2E)
    else:
        log = w * LOG2E
    return log


@triton.jit
def decay_gradient(gradient: tl.tensor, w: tl.tensor, LOGIT: tl.constexpr):
    """The gradient of w from that of the natural logarithm of the decay.

    σ(-w) is exp(-w)·σ(w): 1 - σ(w) loses it where the sigmoid saturates.
    """
    if LOGIT:
        # Beyond -64 the gradient vanishes, and exp(-w) would be infinite.
        inverse = tl.exp2(tl.maximum(w.to(tl.float32), -64.0) * -LOG2E)
        rise = 1.0 / (1.0 + inverse)
        slope = (rise * -LOGIT_SCALE) * (inverse * rise)
        gradient = gradient * slope
    return gradient


@triton.jit
def high_part(x: tl.tensor):
    """The upper half of an fp32 number: a bf16 number towards zero, without a conversion."""
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def low_part(x: tl.tensor):
    """What `high_part` leaves, to 8 bits."""
    high = (x.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
    return (x - high).to(tl.bfloat16)


@triton.jit
def multiply(x: tl.tensor, y: tl.tensor, acc: tl.tensor, HOW: tl.constexpr):
    """acc + x·y in fp32.

    But for HOW "ieee" each operand is the sum of two bf16 numbers, 16 bits together with the range
    of fp32; a bf16 operand is one of them already.
    """
    if HOW != "ieee":
        x_high = x if x.dtype == tl.bfloat16 else high_part(x)
        y_high = y if y.dtype == tl.bfloat16 else high_part(y)
        acc = tl.dot(x_high, y_high, acc=acc)
        if x.dtype != tl.bfloat16:
            acc = tl.dot(low_part(x), y_high, acc=acc)
        if y.dtype != tl.bfloat16:
            acc = tl.dot(x_high, low_part(y), acc=acc)
    else:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
        acc = tl.dot(x, y, acc=acc, input_precision=HOW)
    return acc


@triton.jit
def power_below(largest: tl.tensor):
    """The power of two at or below a number (1 for zero and NaN)."""
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where((largest > 1e-30) & (largest < 1e30), power, 1.0)


@triton.jit
def row_powers(tile: tl.tensor):
    """For each row the power of two at or below its largest element (1 for zeros and NaN)."""
    return power_below(tl.max(tl.abs(tile), 1))


@triton.jit
def tile_largest(tile: tl.tensor):
    """A tile's largest element without its sign, a scalar."""
    return tl.max(tl.max(tl.abs(tile.to(tl.float32)), 1), 0)


@triton.jit
def tile_power(tile: tl.tensor):
    """The power of two at or below a tile's largest element, a scalar (1 for zeros and NaN)."""
    return power_below(tile_largest(tile))


@triton.jit
def tile_unit(tile: tl.tensor, HOW: tl.constexpr):
    """The power of two at or below a tile's largest element; 1 for "ieee"."""
    power = 1.0
    if HOW != "ieee":
        power = tile_power(tile)
    return power


@triton.jit
def split_hat(tile: tl.tensor, HOW: tl.constexpr):
    """An operand of `hat_dot`: the tile in fp16 and, for "halves", what rounding left."""
    high = tile
    low = tile
    if HOW != "ieee":
        high = tile.to(tl.float16)
        low = high
    if HOW == "halves":
        low = (tile - high.to(tl.float32)).to(tl.float16)
    return high, low


@triton.jit
def hat_dot(
    x: tl.tensor,
    x_low: tl.tensor,
    y: tl.tensor,
    y_low: tl.tensor,
    acc: tl.tensor,
    HOW: tl.constexpr,
):
    """acc + x·y of two operands from `split_hat`."""
    if HOW == "ieee":
        acc = tl.dot(x, y, acc=acc, input_precision="ieee")
    else:
        acc = tl.dot(x, y, acc=acc)
    if HOW == "halves":
        acc = tl.dot(x_low, y, acc=acc)
        acc = tl.dot(x, y_low, acc=acc)
    return acc


@triton.jit
def counting(C: tl.constexpr, SKIP: tl.constexpr):
    """[C, C], whose product with rows [., C] is their running sum, SKIP elements behind, counted
    from the middle of the row and negative before it."""
    t = tl.arange(0, C)
    ones = tl.where(t[:, None] + SKIP <= t[None, :], 1.0, 0.0)
    return (ones - tl.where((t < C // 2)[:, None], 1.0, 0.0)).to(tl.bfloat16)


@triton.jit
def narrow(tile: tl.tensor, HOW: tl.constexpr):
    """The tile in fp16 as it is, for values near 1; with HOW "ieee" unchanged."""
    if HOW != "ieee":
        tile = tile.to(tl.float16)
    return tile


@triton.jit
def load_scaled(pointers: tl.tensor, mask: tl.tensor, scales: tl.tensor, rows: tl.tensor):
    """A tile in fp32 that was stored so, or in fp16 with a power of two a row at `scales`."""
    tile = tl.load(pointers, mask, other=0.0).to(tl.float32)
    if pointers.dtype.element_ty != tl.float32:
        tile = tile * tl.load(scales, rows, other=0.0)[:, None]
    return tile
