"""Residual sum, layer norm, token shift, mixes: x is read once, the sum and each mix written.

Rows are the B·T tokens of x [B, T, C] in a row; a program goes through a span of them and has all C
channels of a row at once. `sequence` [T] names each packed token's sequence. There are up to six
mixes; of the pointers beyond COUNT nothing is read.
"""

import triton
import triton.language as tl


@triton.jit
def _ends(n: tl.tensor, rows: tl.tensor, T: tl.tensor, sequence: tl.tensor, PACKED: tl.constexpr):
    """(the sequence of row n, whether it is its first token, whether it is its last)."""
    if PACKED:
        s = tl.load(sequence + n, (n >= 0) & (n < rows), other=0)
        first = tl.load(sequence + n - 1, (n > 0) & (n <= rows), other=-1) != s
        last = tl.load(sequence + n + 1, (n >= 0) & (n + 1 < rows), other=-1) != s
    else:
        s = n // T
        first = n % T == 0
        last = n % T == T - 1
    return s.to(tl.int64), first, last


@triton.jit
def _vector(pointer: tl.tensor, c, C: tl.constexpr):
    return tl.load(pointer + c, c < C, other=0.0).to(tl.float32)


@triton.jit
def _mix(normal, delta, m, y_ptr, at, inside):
    tl.store(y_ptr + at, (normal + delta * m).to(y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "T", "span", "eps"])
def norm_mix(
    x_ptr: tl.tensor,
    added_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    carried_ptr: tl.tensor,
    sequence: tl.tensor,
    m0_ptr: tl.tensor,
    m1_ptr: tl.tensor,
    m2_ptr: tl.tensor,
    m3_ptr: tl.tensor,
    m4_ptr: tl.tensor,
    m5_ptr: tl.tensor,
    y0: tl.tensor,
    y1: tl.tensor,
    y2: tl.tensor,
    y3: tl.tensor,
    y4: tl.tensor,
    y5: tl.tensor,
    total_ptr: tl.tensor,
    last_ptr: tl.tensor,
    moments_ptr: tl.tensor,
    rows: tl.tensor,
    T: tl.tensor,
    span: tl.tensor,
    eps: tl.tensor,
    C: tl.constexpr,
    BC: tl.constexpr,
    COUNT: tl.constexpr,
    PACKED: tl.constexpr,
    GIVEN: tl.constexpr,
    ADDED: tl.constexpr,
    KNOWN: tl.constexpr,
):
    """y_i = z + (before - z) m_i with z the norm of x + added, and what backward wants of the rows.

    That is the sum (`total`), and mean and 1 / deviation (`moments` [2, rows] in fp32), which are
    read where they are known: then no sum decides a bit. `last` [S, C] holds what empty sequences
    carry on already.
    """
    c = tl.arange(0, BC)
    cc = c < C
    weight = _vector(weight_ptr, c, C)
    bias = _vector(bias_ptr, c, C)
    m0 = _vector(m0_ptr, c, C)
    if COUNT == 6:
        m1 = _vector(m1_ptr, c, C)
        m2 = _vector(m2_ptr, c, C)
        m3 = _vector(m3_ptr, c, C)
        m4 = _vector(m4_ptr, c, C)
        m5 = _vector(m5_ptr, c, C)
    start = tl.program_id(0) * span
    end = tl.minimum(start + span, rows)
    row_before = tl.zeros([BC], tl.float32)
    # It begins one row early, writing nothing, so that every row's norm is made by the same code.
    for i in range(end - start + 1):
        n = start - 1 + i
        own = i > 0
        at = n.to(tl.int64) * C + c
        inside = cc & (n >= 0)
        x = tl.load(x_ptr + at, inside, other=0.0)
        if ADDED:
            added = tl.load(added_ptr + at, inside, other=0.0).to(tl.float32)
            x = (x.to(tl.float32) + added).to(x_ptr.dtype.element_ty)
            tl.store(total_ptr + at, x, cc & own)
        x = x.to(tl.float32)
        if KNOWN:
            mean = tl.load(moments_ptr + n, n >= 0, other=0.0)
            inverse = tl.load(moments_ptr + rows + n, n >= 0, other=0.0)
            x = tl.where(cc, x - mean, 0.0)
        else:
            mean = tl.sum(x, 0) / C
            x = tl.where(cc, x - mean, 0.0)
            inverse = 1.0 / tl.sqrt(tl.sum(x * x, 0) / C + eps)
            tl.store(moments_ptr + n, mean, own)
            tl.store(moments_ptr + rows + n, inverse, own)
        normal = x * inverse * weight + bias
        s, first, last = _ends(n, rows, T, sequence, PACKED)
        tl.store(last_ptr + s * C + c, normal.to(last_ptr.dtype.element_ty), cc & own & last)
        before = tl.where(first, 0.0, row_before)
        if GIVEN:
            # Where one of the two is read the other is zero.
            before += tl.load(carried_ptr + s * C + c, cc & own & first, other=0.0).to(tl.float32)
        delta = before - normal
        _mix(normal, delta, m0, y0, at, cc & own)
        if COUNT == 6:
            _mix(normal, delta, m1, y1, at, cc & own)
            _mix(normal, delta, m2, y2, at, cc & own)
            _mix(normal, delta, m3, y3, at, cc & own)
            _mix(normal, delta, m4, y4, at, cc & own)
            _mix(normal, delta, m5, y5, at, cc & own)
        row_before = normal


@triton.jit
def _gather(dy_ptr, m, at, inside, total, weighted):
    """(dy, total + dy, weighted + m dy)."""
    dy = tl.load(dy_ptr + at, inside, other=0.0).to(tl.float32)
    return dy, total + dy, weighted + m * dy


@triton.jit
def _unit(x_ptr, moments_ptr, n, rows, c, inside, C: tl.constexpr):
    """(x - mean) / deviation of row n, and 1 / deviation; zero where there is no row."""
    x = tl.load(x_ptr + n.to(tl.int64) * C + c, inside, other=0.0).to(tl.float32)
    mean = tl.load(moments_ptr + n, (n >= 0) & (n < rows), other=0.0)
    inverse = tl.load(moments_ptr + rows + n, (n >= 0) & (n < rows), other=0.0)
    return tl.where(inside, (x - mean) * inverse, 0.0), inverse


@triton.jit(do_not_specialize=["rows", "T", "span"])
def norm_mix_back(
    x_ptr: tl.tensor,
    moments_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    carried_ptr: tl.tensor,
    sequence: tl.tensor,
    m0_ptr: tl.tensor,
    m1_ptr: tl.tensor,
    m2_ptr: tl.tensor,
    m3_ptr: tl.tensor,
    m4_ptr: tl.tensor,
    m5_ptr: tl.tensor,
    dy0: tl.tensor,
    dy1: tl.tensor,
    dy2: tl.tensor,
    dy3: tl.tensor,
    dy4: tl.tensor,
    dy5: tl.tensor,
    dtotal_ptr: tl.tensor,
    dlast_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    dadded_ptr: tl.tensor,
    dcarried_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    rows: tl.tensor,
    T: tl.tensor,
    span: tl.tensor,
    C: tl.constexpr,
    BC: tl.constexpr,
    COUNT: tl.constexpr,
    PACKED: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_DTOTAL: tl.constexpr,
    HAS_DLAST: tl.constexpr,
    ADDED: tl.constexpr,
):
    """dx, dcarried, and what `span` rows give of the parameters' gradients, last row first.

    x is the sum; `dadded` is dx in another dtype. Every dy is read once, but for a span's last row,
    whose next one is its neighbour's too. The parts are [spans, 2 + COUNT, C] in fp32: weight, bias
    and the mixes. `dcarried` holds what empty sequences pass on already.
    """
    c = tl.arange(0, BC)
    cc = c < C
    weight = _vector(weight_ptr, c, C)
    bias = _vector(bias_ptr, c, C)
    m0 = _vector(m0_ptr, c, C)
    none = tl.zeros([BC], tl.float32)
    dweight = none
    dbias = none
    d0 = none
    if COUNT == 6:
        m1 = _vector(m1_ptr, c, C)
        m2 = _vector(m2_ptr, c, C)
        m3 = _vector(m3_ptr, c, C)
        m4 = _vector(m4_ptr, c, C)
        m5 = _vector(m5_ptr, c, C)
        d1 = none
        d2 = none
        d3 = none
        d4 = none
        d5 = none
    start = tl.program_id(0) * span
    end = tl.minimum(start + span, rows)
    # What the row after this one asks of it: Σ m_i dy_i there.
    asked = none
    at = end.to(tl.int64) * C + c
    beyond = cc & (end < rows)
    _, _, asked = _gather(dy0, m0, at, beyond, none, asked)
    if COUNT == 6:
        _, _, asked = _gather(dy1, m1, at, beyond, none, asked)
        _, _, asked = _gather(dy2, m2, at, beyond, none, asked)
        _, _, asked = _gather(dy3, m3, at, beyond, none, asked)
        _, _, asked = _gather(dy4, m4, at, beyond, none, asked)
        _, _, asked = _gather(dy5, m5, at, beyond, none, asked)
    unit, inverse = _unit(x_ptr, moments_ptr, end - 1, rows, c, cc, C)
    for i in range(end - start):
        n = end - 1 - i
        s, first, last = _ends(n, rows, T, sequence, PACKED)
        at = n.to(tl.int64) * C + c
        unit_before, inverse_before = _unit(x_ptr, moments_ptr, n - 1, rows, c, cc & (n > 0), C)
        before = tl.where(first, 0.0, unit_before * weight + bias)
        if GIVEN:
            before += tl.load(carried_ptr + s * C + c, cc & first, other=0.0).to(tl.float32)
        delta = before - (unit * weight + bias)
        dy, total, weighted = _gather(dy0, m0, at, cc, none, none)
        d0 += dy * delta
        if COUNT == 6:
            dy, total, weighted = _gather(dy1, m1, at, cc, total, weighted)
            d1 += dy * delta
            dy, total, weighted = _gather(dy2, m2, at, cc, total, weighted)
            d2 += dy * delta
            dy, total, weighted = _gather(dy3, m3, at, cc, total, weighted)
            d3 += dy * delta
            dy, total, weighted = _gather(dy4, m4, at, cc, total, weighted)
            d4 += dy * delta
            dy, total, weighted = _gather(dy5, m5, at, cc, total, weighted)
            d5 += dy * delta
        dnormal = total - weighted + tl.where(last, 0.0, asked)
        if HAS_DLAST:
            dnormal += tl.load(dlast_ptr + s * C + c, cc & last, other=0.0).to(tl.float32)
        dweight += dnormal * unit
        dbias += dnormal
        dunit = dnormal * weight
        along = tl.sum(dunit * unit, 0) / C
        dx = (dunit - tl.sum(dunit, 0) / C - unit * along) * inverse
        if HAS_DTOTAL:
            dx += tl.load(dtotal_ptr + at, cc, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), cc)
        if ADDED:
            tl.store(dadded_ptr + at, dx.to(dadded_ptr.dtype.element_ty), cc)
        if GIVEN:
            own = dcarried_ptr + s * C + c
            tl.store(own, weighted.to(dcarried_ptr.dtype.element_ty), cc & first)
        asked = weighted
        unit = unit_before
        inverse = inverse_before
    parts_ptr += tl.program_id(0).to(tl.int64) * ((2 + COUNT) * C) + c
    tl.store(parts_ptr, dweight, cc)
    tl.store(parts_ptr + C, dbias, cc)
    tl.store(parts_ptr + 2 * C, d0, cc)
    if COUNT == 6:
        tl.store(parts_ptr + 3 * C, d1, cc)
        tl.store(parts_ptr + 4 * C, d2, cc)
        tl.store(parts_ptr + 5 * C, d3, cc)
        tl.store(parts_ptr + 6 * C, d4, cc)
        tl.store(parts_ptr + 7 * C, d5, cc)
