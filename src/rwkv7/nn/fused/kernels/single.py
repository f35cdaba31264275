"""One token of one sequence: a layer in seven launches, each of which streams its weights once.

A launch begins while the one before it still runs (PDL, from Hopper on): it asks for weights, which
nothing changes, and only then waits for what that one writes. `wait` stands before everything else.
"""

import triton
import triton.language as tl

from .elements import sigmoid
from .step import channels, head_step


@triton.jit
def _wait(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit(do_not_specialize=["B", "eps"])
def norm_mix(
    x_ptr: tl.tensor,
    added_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    pool_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    mixes: tl.tuple,
    y_ptr: tl.tensor,
    B: tl.tensor,
    eps: tl.tensor,
    C: tl.constexpr,
    WHOLE: tl.constexpr,
    BC: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[i] = n + (the pool's vector - n) mixes[i], n the layer norm of x, which takes its place.

    Of B rows, each with as many programs as it takes to do its C channels BC at a time; each of
    them finds the norm of all C. Where something is `added` to x, the norm is the sum's, and kept.
    """
    row = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, WHOLE)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < C
    weight = channels(weight_ptr, c, inside)
    bias = channels(bias_ptr, c, inside)
    # Loads are not moved over stores: all of them come first.
    shares = ()
    for m in tl.static_range(len(mixes)):
        shares += (channels(mixes[m], c, inside),)
    _wait(PDL)
    x = channels(x_ptr + row * C, i, i < C)
    mine = channels(x_ptr + row * C, c, inside)
    if added_ptr is not None:
        dtype: tl.constexpr = sum_ptr.dtype.element_ty
        x = (x + channels(added_ptr + row * C, i, i < C)).to(dtype).to(tl.float32)
        mine = (mine + channels(added_ptr + row * C, c, inside)).to(dtype).to(tl.float32)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    used = inside & (slot >= 0)
    before = channels(pool_ptr + slot * C, c, used)
    mean = tl.sum(x, 0) / C
    x = tl.where(i < C, x - mean, 0.0)
    deviation = tl.sqrt(tl.sum(x * x, 0) / C + eps)
    n = (mine - mean) / deviation * weight + bias
    kept = n.to(pool_ptr.dtype.element_ty)
    n = kept.to(tl.float32)
    for m in tl.static_range(len(mixes)):
        y = n + (before - n) * shares[m]
        tl.store(y_ptr + (m * B + row) * C + c, y.to(y_ptr.dtype.element_ty), inside)
    tl.store(pool_ptr + slot * C + c, kept, used)
    if added_ptr is not None:
        tl.store(sum_ptr + row * C + c, mine.to(sum_ptr.dtype.element_ty), inside)


@triton.jit
def _rows(x_ptr, w_ptr, n, rows, K: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):
    """The numbers `n` of W x, W [rows, K]."""
    k = tl.arange(0, BK)
    at = n.to(tl.int64)[:, None] * K + k[None, :]
    some = (n < rows)[:, None]
    w = tl.load(w_ptr + at, some & (k < K)[None, :], other=0.0)
    _wait(PDL)
    total = w.to(tl.float32) * channels(x_ptr, k, k < K)[None, :]
    for start in range(BK, K, BK):
        inside = start + k < K
        w = tl.load(w_ptr + at + start, some & inside[None, :], other=0.0)
        total += w.to(tl.float32) * channels(x_ptr, start + k, inside)[None, :]
    return tl.sum(total, 1)


@triton.jit
def row_product(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    y_ptr: tl.tensor,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = residual + W x; without a residual, y = max(W x, 0)²."""
    n = tl.program_id(0) * BR + tl.arange(0, BR)
    y = _rows(x_ptr, w_ptr, n, ROWS, K, BK, PDL)
    if residual_ptr is not None:
        y += channels(residual_ptr, n, n < ROWS)
    else:
        y = tl.where(y < 0, 0.0, y)  # NaN stays NaN
        y = y * y
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), n < ROWS)


@triton.jit
def projections(
    mixed_ptr: tl.tensor,
    matrices: tl.tuple,
    lows: tl.tuple,
    rkv_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    RANKS: tl.constexpr,
    C: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """r, k, v [3, C], and what is between the low-rank matrices of w, rate, g and share.

    `mixed` are the inputs of r, w, k, v, a, g [6, C], `lows` w1, a1, g1 and, after layer 0, v1.
    """
    program = tl.program_id(0)
    before = 0  # programs of the parts that came
    column = 0  # of `hidden`
    for part in tl.static_range(len(lows)):
        blocks = (RANKS[part] + BD - 1) // BD
        if (program >= before) & (program < before + blocks):
            d = (program - before) * BD + tl.arange(0, BD)
            x_ptr = mixed_ptr + (1, 4, 5, 3)[part] * C
            low = _columns(x_ptr, lows[part], d, RANKS[part], C, BD, BC, PDL)
            if part == 0:
                low = 2.0 * sigmoid(2.0 * low) - 1.0  # tanh
            if part == 2:
                low = sigmoid(low)
            tl.store(hidden_ptr + column + d, low, d < RANKS[part])
        before += blocks
        column += RANKS[part]
    blocks = (C + BR - 1) // BR
    for part in tl.static_range(3):
        if (program >= before) & (program < before + blocks):
            n = (program - before) * BR + tl.arange(0, BR)
            y = _rows(mixed_ptr + (0, 2, 3)[part] * C, matrices[part], n, C, C, BK, PDL)
            tl.store(rkv_ptr + part * C + n, y.to(rkv_ptr.dtype.element_ty), n < C)
        before += blocks


@triton.jit
def _columns(
    x_ptr, w_ptr, d, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The numbers `d` of x W, W [C, D]."""
    c = tl.arange(0, BC)
    some = (d < D)[None, :]
    w = tl.load(w_ptr + c[:, None] * D + d[None, :], some & (c < C)[:, None], other=0.0)
    _wait(PDL)
    total = w.to(tl.float32) * channels(x_ptr, c, c < C)[:, None]
    for start in range(BC, C, BC):
        inside = start + c < C
        at = (start + c)[:, None] * D + d[None, :]
        w = tl.load(w_ptr + at, some & inside[:, None], other=0.0)
        total += w.to(tl.float32) * channels(x_ptr, start + c, inside)[:, None]
    return tl.sum(total, 0)


@triton.jit
def _tile(w_ptr, own, inside, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr):
    """A head's columns of a low-rank matrix [D, C]."""
    d = tl.arange(0, BD)
    return tl.load(w_ptr + d[:, None] * C + own[None, :], (d < D)[:, None] & inside[None, :], 0.0)


@triton.jit
def _times(hidden_ptr, w, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    return tl.sum(channels(hidden_ptr, d, d < D)[:, None] * w.to(tl.float32), 0)


@triton.jit(do_not_specialize=["eps"])
def head(
    rkv_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    highs: tl.tuple,
    v_first_ptr: tl.tensor,
    vectors: tl.tuple,
    state_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    out_ptr: tl.tensor,
    eps: tl.tensor,
    RANKS: tl.constexpr,
    TILES: tl.constexpr,
    DECAY_SCALE: tl.constexpr,
    KEY_EPS: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """The second low-rank products and `time_mix_step`, for one head.

    `highs` are w2, a2, g2 and, after layer 0, v2; `hidden` what `projections` made for them.
    """
    h = tl.program_id(0)
    i = tl.arange(0, BN)
    inside = i < N
    own = h * N + i
    w2 = _tile(highs[0], own, inside, RANKS[0], TILES[0], C)
    a2 = _tile(highs[1], own, inside, RANKS[1], TILES[1], C)
    g2 = _tile(highs[2], own, inside, RANKS[2], TILES[2], C)
    if len(highs) == 4:
        v2 = _tile(highs[3], own, inside, RANKS[3], TILES[3], C)
    slot = tl.load(slots_ptr).to(tl.int64)
    square = (slot * (C // N) + h) * (N * N) + i[:, None] * N + i[None, :]
    used = inside[:, None] & inside[None, :] & (slot >= 0)
    S = tl.load(state_ptr + square, used, other=0.0)
    _wait(PDL)
    w = _times(hidden_ptr, w2, RANKS[0], TILES[0])
    rate = _times(hidden_ptr + RANKS[0], a2, RANKS[1], TILES[1])
    g = _times(hidden_ptr + RANKS[0] + RANKS[1], g2, RANKS[2], TILES[2])
    v = channels(rkv_ptr + 2 * C, own, inside)
    if len(highs) == 4:
        share = _times(hidden_ptr + RANKS[0] + RANKS[1] + RANKS[2], v2, RANKS[3], TILES[3])
        share = sigmoid(channels(vectors[2], own, inside) + share)
        v += (channels(v_first_ptr, own, inside) - v) * share
    r = channels(rkv_ptr, own, inside)
    k = channels(rkv_ptr + C, own, inside)
    S, out = head_step(S, r, w, k, v, rate, g, vectors, own, inside, eps, DECAY_SCALE, KEY_EPS, N)
    tl.store(state_ptr + square, S, used)
    tl.store(out_ptr + own, out.to(out_ptr.dtype.element_ty), inside)
