"""One token of many sequences: time mix's low-rank products, each stage one launch for all."""

import triton
import triton.language as tl

from .elements import sigmoid


@triton.jit(do_not_specialize=["B"])
def low_products(
    mixed_ptr: tl.tensor,
    lows: tl.tuple,
    hidden_ptr: tl.tensor,
    B: tl.tensor,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """hidden [B, WIDTH] = tanh(x w1), x a1, sigmoid(x g1) and, after layer 0, x v1, side by side.

    Each has an input of its own among `mixed` [6, B, C], those of r, w, k, v, a, g. A program has
    BM rows and BD columns of one of them.
    """
    program = tl.program_id(0)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    here = (rows < B)[:, None]
    before = 0  # programs of the parts that came
    column = 0
    for part in tl.static_range(len(lows)):
        blocks = (RANKS[part] + BD - 1) // BD
        if (program >= before) & (program < before + blocks):
            d = (program - before) * BD + tl.arange(0, BD)
            x_ptr = mixed_ptr + ((1, 4, 5, 3)[part] * B + rows.to(tl.int64))[:, None] * C
            total = _product(x_ptr, lows[part], here, d, C, RANKS[part], BM, BD, BK, STAGES)
            if part == 0:
                total = 2.0 * sigmoid(2.0 * total) - 1.0  # tanh
            if part == 2:
                total = sigmoid(total)
            y_ptr = hidden_ptr + rows.to(tl.int64)[:, None] * WIDTH + column + d[None, :]
            tl.store(
                y_ptr, total.to(hidden_ptr.dtype.element_ty), here & (d < RANKS[part])[None, :]
            )
        before += blocks
        column += RANKS[part]


@triton.jit(do_not_specialize=["B"])
def high_products(
    hidden_ptr: tl.tensor,
    highs: tl.tuple,
    out_ptr: tl.tensor,
    B: tl.tensor,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out [3 or 4, B, C]: each part of `hidden` times its matrix [D, C]."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    rows = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    here = (rows < B)[:, None]
    column = 0
    for part in tl.static_range(len(highs)):
        if tl.program_id(2) == part:
            x_ptr = hidden_ptr + rows[:, None] * WIDTH + column
            total = _product(x_ptr, highs[part], here, c, RANKS[part], C, BM, BC, BK, STAGES)
            y_ptr = out_ptr + (part * B + rows)[:, None] * C + c[None, :]
            tl.store(y_ptr, total.to(out_ptr.dtype.element_ty), here & (c < C)[None, :])
        column += RANKS[part]


@triton.jit
def _product(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    here: tl.tensor,
    columns: tl.tensor,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows of x [.., K], which begin at `x_ptr` [BM, 1], times columns of w [K, WIDTH]."""
    k = tl.arange(0, BK)
    some = (columns < WIDTH)[None, :]
    total = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        at = start + k
        x = tl.load(x_ptr + at[None, :], here & (at < K)[None, :], other=0.0)
        w_at = w_ptr + at[:, None] * WIDTH + columns[None, :]
        w = tl.load(w_at, (at < K)[:, None] & some, other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
    return total
