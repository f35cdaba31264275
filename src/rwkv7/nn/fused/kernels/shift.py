"""Token shift and its mixes: x is read once and each mix written; backward the other way round.

Rows are the B·T tokens of x [B, T, C] in a row; `sequence` [T] names each packed token's sequence.
There are up to six mixes; of the pointers beyond COUNT nothing is read.
"""

import triton
import triton.language as tl


@triton.jit
def _ends(n: tl.tensor, rows: tl.tensor, T: tl.tensor, sequence: tl.tensor, PACKED: tl.constexpr):
    """(the sequence of rows n, whether they are its first token, whether they are its last)."""
    if PACKED:
        s = tl.load(sequence + n, n < rows, other=0)
        first = tl.load(sequence + n - 1, (n > 0) & (n <= rows), other=-1) != s
        last = tl.load(sequence + n + 1, n + 1 < rows, other=-1) != s
    else:
        s = n // T
        first = n % T == 0
        last = n % T == T - 1
    return s.to(tl.int64), first, last


@triton.jit
def _mix(x, delta, m_ptr, y_ptr, c, at, inside, C: tl.constexpr):
    m = tl.load(m_ptr + c, c < C, other=0.0).to(tl.float32)
    y = x + delta * m[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "T"])
def shift_mix(
    x_ptr: tl.tensor,
    carried_ptr: tl.tensor,
    sequence: tl.tensor,
    m0: tl.tensor,
    m1: tl.tensor,
    m2: tl.tensor,
    m3: tl.tensor,
    m4: tl.tensor,
    m5: tl.tensor,
    y0: tl.tensor,
    y1: tl.tensor,
    y2: tl.tensor,
    y3: tl.tensor,
    y4: tl.tensor,
    y5: tl.tensor,
    last_ptr: tl.tensor,
    rows: tl.tensor,
    T: tl.tensor,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    COUNT: tl.constexpr,
    PACKED: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """y_i = x + (before - x) m_i for BR rows of BC channels, and each sequence's last x.

    `last` [S, C] holds what empty sequences carry on already.
    """
    n = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (n < rows)[:, None] & (c < C)[None, :]
    s, first, last = _ends(n, rows, T, sequence, PACKED)
    at = n.to(tl.int64)[:, None] * C + c[None, :]
    own = s[:, None] * C + c[None, :]
    x = tl.load(x_ptr + at, inside, other=0.0)
    tl.store(last_ptr + own, x, inside & last[:, None])
    x = x.to(tl.float32)
    before = tl.load(x_ptr + at - C, inside & (first == 0)[:, None], other=0.0).to(tl.float32)
    if GIVEN:
        # Where one of the two is read the other is zero.
        before += tl.load(carried_ptr + own, inside & first[:, None], other=0.0).to(tl.float32)
    delta = before - x
    _mix(x, delta, m0, y0, c, at, inside, C)
    if COUNT == 6:
        _mix(x, delta, m1, y1, c, at, inside, C)
        _mix(x, delta, m2, y2, c, at, inside, C)
        _mix(x, delta, m3, y3, c, at, inside, C)
        _mix(x, delta, m4, y4, c, at, inside, C)
        _mix(x, delta, m5, y5, c, at, inside, C)


@triton.jit
def _gather(dy_ptr, m_ptr, at, c, inside, total, weighted, C: tl.constexpr):
    """(dy, total + dy, weighted + m dy)."""
    dy = tl.load(dy_ptr + at, inside, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + c, c < C, other=0.0).to(tl.float32)
    return dy, total + dy, weighted + m * dy


@triton.jit(do_not_specialize=["rows", "T", "span"])
def shift_mix_back(
    x_ptr: tl.tensor,
    carried_ptr: tl.tensor,
    sequence: tl.tensor,
    m0: tl.tensor,
    m1: tl.tensor,
    m2: tl.tensor,
    m3: tl.tensor,
    m4: tl.tensor,
    m5: tl.tensor,
    dy0: tl.tensor,
    dy1: tl.tensor,
    dy2: tl.tensor,
    dy3: tl.tensor,
    dy4: tl.tensor,
    dy5: tl.tensor,
    dlast_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    dcarried_ptr: tl.tensor,
    dm_ptr: tl.tensor,
    rows: tl.tensor,
    T: tl.tensor,
    span: tl.tensor,
    C: tl.constexpr,
    BC: tl.constexpr,
    COUNT: tl.constexpr,
    PACKED: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_DLAST: tl.constexpr,
):
    """dx, dcarried, and the part of each mix's gradient that `span` rows give, last row first.

    Every dy is read once, but for a span's last row, whose next one is its neighbour's too. dm is
    [spans, COUNT, C] in fp32; `dcarried` holds what empty sequences pass on already.
    """
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    cc = c < C
    start = tl.program_id(0) * span
    end = tl.minimum(start + span, rows)
    none = tl.zeros([BC], tl.float32)
    d0 = none
    d1 = none
    d2 = none
    d3 = none
    d4 = none
    d5 = none
    # What the row after this one asks of it: Σ m_i dy_i there.
    asked = none
    at = end.to(tl.int64) * C + c
    beyond = cc & (end < rows)
    _, _, asked = _gather(dy0, m0, at, c, beyond, none, asked, C)
    if COUNT == 6:
        _, _, asked = _gather(dy1, m1, at, c, beyond, none, asked, C)
        _, _, asked = _gather(dy2, m2, at, c, beyond, none, asked, C)
        _, _, asked = _gather(dy3, m3, at, c, beyond, none, asked, C)
        _, _, asked = _gather(dy4, m4, at, c, beyond, none, asked, C)
        _, _, asked = _gather(dy5, m5, at, c, beyond, none, asked, C)
    x = tl.load(x_ptr + at - C, cc, other=0.0).to(tl.float32)
    for i in range(end - start):
        n = end - 1 - i
        s, first, last = _ends(n, rows, T, sequence, PACKED)
        at = n.to(tl.int64) * C + c
        row_before = tl.load(x_ptr + at - C, cc & (n > 0), other=0.0).to(tl.float32)
        before = tl.where(first, 0.0, row_before)
        if GIVEN:
            before += tl.load(carried_ptr + s * C + c, cc & first, other=0.0).to(tl.float32)
        delta = before - x
        dy, total, weighted = _gather(dy0, m0, at, c, cc, none, none, C)
        d0 += dy * delta
        if COUNT == 6:
            dy, total, weighted = _gather(dy1, m1, at, c, cc, total, weighted, C)
            d1 += dy * delta
            dy, total, weighted = _gather(dy2, m2, at, c, cc, total, weighted, C)
            d2 += dy * delta
            dy, total, weighted = _gather(dy3, m3, at, c, cc, total, weighted, C)
            d3 += dy * delta
            dy, total, weighted = _gather(dy4, m4, at, c, cc, total, weighted, C)
            d4 += dy * delta
            dy, total, weighted = _gather(dy5, m5, at, c, cc, total, weighted, C)
            d5 += dy * delta
        dx = total - weighted + tl.where(last, 0.0, asked)
        if HAS_DLAST:
            dx += tl.load(dlast_ptr + s * C + c, cc & last, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), cc)
        if GIVEN:
            own = dcarried_ptr + s * C + c
            tl.store(own, weighted.to(dcarried_ptr.dtype.element_ty), cc & first)
        asked = weighted
        x = row_before
    dm_ptr += tl.program_id(0).to(tl.int64) * (COUNT * C) + c
    tl.store(dm_ptr, d0, cc)
    if COUNT == 6:
        tl.store(dm_ptr + C, d1, cc)
        tl.store(dm_ptr + 2 * C, d2, cc)
        tl.store(dm_ptr + 3 * C, d3, cc)
        tl.store(dm_ptr + 4 * C, d4, cc)
        tl.store(dm_ptr + 5 * C, d5, cc)
