"""`batch._draw` on a GPU in one launch: each row's token by a program of its own.

The same whole-numbered probabilities, and the same token. What stays after the cuts is looked for
among the FEW likeliest tokens, which are gathered in the order of the vocabulary; where a cut may
lie beyond them, the id is UNSURE.
"""

import triton
import triton.language as tl

# Of the distance to the largest logit; finer near it. The last bin takes all that is far off.
_BINS = tl.constexpr(256)
_BINS_A_ROOT = tl.constexpr(40.0)
_FAR = tl.constexpr(45.0)


@triton.jit
def _key(z):
    """Whole numbers in the order of float32 ones; its own inverse but for the types."""
    bits = z.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _number(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _bin(z, top):
    distance = tl.minimum(top - z, _FAR)
    return tl.minimum((tl.sqrt(distance) * _BINS_A_ROOT).to(tl.int32), _BINS - 1)


@triton.jit
def _weights(z, top, temperature, SCALE: tl.constexpr):
    """exp((z - top) / temperature) as whole numbers; see `batch._weights`."""
    share = tl.exp((z.to(tl.float64) - top.to(tl.float64)) / temperature)
    return (share * SCALE + 0.5).to(tl.int64)


@triton.jit
def _row(logits_ptr, start, V: tl.constexpr, BV: tl.constexpr):
    """BV logits of a row, -inf beyond its end."""
    i = start + tl.arange(0, BV)
    return tl.load(logits_ptr + i, i < V, other=-float("inf")).to(tl.float32), i


@triton.jit
def _largest(logits_ptr, V: tl.constexpr, BV: tl.constexpr):
    """(the largest logit, the first place it is at, how many are NaN)."""
    top = tl.full([], -float("inf"), tl.float32)
    place = tl.full([], 0, tl.int32)
    broken = tl.full([], 0, tl.int32)
    for start in range(0, V, BV):
        z, i = _row(logits_ptr, start, V, BV)
        broken += tl.sum((z != z).to(tl.int32), 0)
        here = tl.max(z, 0)
        first = tl.min(tl.where(z == here, i, V), 0)
        place = tl.where(here > top, first, place)
        top = tl.maximum(here, top)
    return top, place, broken


@triton.jit
def _gathered(
    logits_ptr, near_ptr, ids_ptr, top, temperature,
    SCALE: tl.constexpr, FEW: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """(the last bin gathered, how many logits of it and those before, the weights of all V).

    Leaves them and their ids in scratch memory. -1 where already the first bin has more than FEW.
    """
    counts = tl.zeros([_BINS], tl.int32)
    total = tl.full([], 0, tl.int64)
    for start in range(0, V, BV):
        z, i = _row(logits_ptr, start, V, BV)
        counts += tl.histogram(_bin(z, top), _BINS)
        total += tl.sum(tl.where(i < V, _weights(z, top, temperature, SCALE), 0), 0)
    if V <= FEW:
        last = tl.full([], _BINS - 1, tl.int32)
    else:
        fits = (tl.cumsum(counts, 0) <= FEW) & (tl.arange(0, _BINS) < _BINS - 1)
        last = tl.sum(fits.to(tl.int32), 0) - 1
    found = tl.full([], 0, tl.int32)
    for start in range(0, V, BV):
        z, i = _row(logits_ptr, start, V, BV)
        chosen = ((_bin(z, top) <= last) & (i < V)).to(tl.int32)
        at = found + tl.cumsum(chosen, 0) - 1
        tl.store(near_ptr + at, z, chosen > 0)
        tl.store(ids_ptr + at, i, chosen > 0)
        found += tl.sum(chosen, 0)
    tl.debug_barrier()  # what one thread wrote others read
    return last, found, total


@triton.jit
def _cut(keys, weights, most, wanted):
    """The largest key, at most `most`, from which on the weights reach `wanted`; all do together.

    Three places at once quarter the range each time, which takes fewer waits for all threads.
    """
    low = tl.full([], -(1 << 31), tl.int64)
    high = most.to(tl.int64)
    quarters = 1 + tl.arange(0, 4)
    for _ in range(16):
        step = (high - low) // 4 + 1
        places = low + step * quarters
        reached = tl.sum(tl.where(keys[:, None] >= places[None, :], weights[:, None], 0), 0)
        enough = (reached.to(tl.float64) >= wanted) & (places <= high)
        low += step * tl.sum(enough.to(tl.int64), 0)
        high = tl.minimum(high, low + step - 1)
    return low.to(tl.int32)


@triton.jit
def _place(uniform, total):
    return tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def _drawn_of_all(
    logits_ptr, sums_ptr, top, temperature, uniform,
    SCALE: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A token of all V."""
    for start in range(0, V, BV):
        z, i = _row(logits_ptr, start, V, BV)
        weights = tl.where(i < V, _weights(z, top, temperature, SCALE), 0)
        tl.store(sums_ptr + start // BV, tl.sum(weights, 0))
    tl.debug_barrier()
    block = tl.arange(0, BLOCKS)
    sums = tl.load(sums_ptr + block, block < (V + BV - 1) // BV, other=0)
    below = tl.cumsum(sums, 0)
    place = _place(uniform, tl.sum(sums, 0))
    passed = below <= place
    z, i = _row(logits_ptr, tl.sum(passed.to(tl.int32), 0) * BV, V, BV)
    weights = tl.where(i < V, _weights(z, top, temperature, SCALE), 0)
    before = tl.sum(tl.where(passed, sums, 0), 0) + tl.cumsum(weights, 0)
    return tl.min(tl.where(before > place, i, V - 1), 0)


@triton.jit
def draw(
    logits_ptr: tl.tensor,
    stride: tl.tensor,
    table_ptr: tl.tensor,
    near_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    drawn_ptr: tl.tensor,
    SCALE: tl.constexpr,
    FEW: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BLOCKS: tl.constexpr,
    NONE: tl.constexpr,
    UNSURE: tl.constexpr,
):
    """drawn [B] from logits [B, V] and what `batch._Rows` holds, [B, 7] float64.

    `near` and `ids` [B, FEW] and `sums` [B, BLOCKS] are scratch memory.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    near_ptr += row * FEW
    ids_ptr += row * FEW
    table_ptr += row * 7
    top, token, broken = _largest(logits_ptr, V, BV)
    temperature = tl.load(table_ptr)
    top_k = tl.load(table_ptr + 1).to(tl.int64)
    top_p = tl.load(table_ptr + 2)
    log_min_p = tl.load(table_ptr + 3)
    hf = tl.load(table_ptr + 4) > 0
    uniform = tl.load(table_ptr + 6)
    possible = (broken == 0) & (tl.abs(top) < float("inf"))
    if possible & (tl.load(table_ptr + 5) == 0):
        by_k = (top_k > 0) & (top_k < V)
        if by_k | (top_p < 1) | (log_min_p > -float("inf")):
            level = tl.where(hf, temperature, 1.0)  # the temperature that top-p and min-p see
            last, found, total = _gathered(
                logits_ptr, near_ptr, ids_ptr, top, level, SCALE, FEW, V, BV
            )
            i = tl.arange(0, FEW)
            inside = i < found
            z = tl.load(near_ptr + i, inside, other=-float("inf"))
            keys = _key(z)
            least = tl.full([], -float("inf"), tl.float64)
            unsure = last < 0
            known = by_k & (top_k <= found)
            if known:
                kth = _cut(keys, inside.to(tl.int64), _key(top), top_k.to(tl.float64))
                least = _number(kth).to(tl.float64)
            shares = tl.where(inside, _weights(z, top, level, SCALE), 0)
            if hf & by_k:
                unsure |= top_k > found
                shares = tl.where(z >= least, shares, 0)
                total = tl.sum(shares, 0)
            wanted = top_p * total.to(tl.float64)
            if (top_p < 1) & (tl.sum(shares, 0).to(tl.float64) >= wanted):
                by_p = _number(_cut(keys, shares, _key(top), wanted))
                least = tl.maximum(least, by_p.to(tl.float64))
            least = tl.maximum(least, top.to(tl.float64) + log_min_p * level)
            # All that stays was gathered, unless the cut lies beyond.
            unsure |= _bin(least.to(tl.float32), top) > last
            weights = tl.where(inside & (z >= least), _weights(z, top, temperature, SCALE), 0)
            below = tl.cumsum(weights, 0)
            place = _place(uniform, tl.sum(weights, 0))
            at = tl.minimum(tl.sum((below <= place).to(tl.int32), 0), FEW - 1)
            token = tl.where(unsure, UNSURE, tl.load(ids_ptr + at))
        else:
            token = _drawn_of_all(
                logits_ptr, sums_ptr + row * BLOCKS, top, temperature, uniform,
                SCALE, V, BV, BLOCKS,
            )  # fmt: skip
    tl.store(drawn_ptr + row, tl.where(possible, token, NONE).to(tl.int64))
