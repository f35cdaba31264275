"""The recurrence token by token in fp32: exact for every decay, also exp(-inf), and any length.

One program walks one sequence of one head with a block of the state's rows [BV, K] in registers.
Slower than the chunked kernels on long sequences; nothing beats it on a few tokens.
"""

import triton
import triton.language as tl

from .tiles import decay_gradient, log2_decay, sequence_bounds


@triton.jit
def _advance(S, d, k, v, a, b):
    """(S_t, S_{t-1} a_t)."""
    Sa = tl.sum(S * a[None, :], 1)
    return S * d[None, :] + Sa[:, None] * b[None, :] + v[:, None] * k[None, :], Sa


@triton.jit(do_not_specialize=["T", "H"])
def walk_tokens(
    r_ptr: tl.tensor,
    w_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    state_ptr: tl.tensor,
    y_ptr: tl.tensor,
    final_ptr: tl.tensor,
    saved_ptr: tl.tensor,
    cu: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SPAN: tl.constexpr,
    LOGIT: tl.constexpr,
    PACKED: tl.constexpr,
    GIVEN: tl.constexpr,
    SAVE: tl.constexpr,
):
    """y and the final state; with SAVE also the state before every SPAN-th token."""
    pair = tl.program_id(0)
    s = pair // H
    h = pair % H
    kc = tl.arange(0, BK)
    vc = tl.program_id(1) * BV + tl.arange(0, BV)
    kk = kc < K
    vv = vc < V
    square = vc[:, None] * K + kc[None, :]
    inside = vv[:, None] & kk[None, :]
    start, tokens = sequence_bounds(s, cu, T, PACKED)
    S = tl.zeros([BV, BK], tl.float32)
    if GIVEN:
        S = tl.load(state_ptr + pair.to(tl.int64) * (V * K) + square, inside, other=0.0)
    if PACKED:
        slot = start // SPAN + s
    else:
        slot = (s * tl.cdiv(T, SPAN)).to(tl.int64)
    saved_ptr += (slot * H + h) * (V * K)
    stride = tl.cast(H, tl.int64) * (V * K)
    for t in range(tokens):
        if SAVE and t % SPAN == 0:
            tl.store(saved_ptr + (t // SPAN) * stride + square, S, inside)
        row = (start + t) * H + h
        d = tl.exp2(log2_decay(tl.load(w_ptr + row * K + kc, kk, other=0.0), LOGIT))
        k = tl.load(k_ptr + row * K + kc, kk, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + row * K + kc, kk, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + row * K + kc, kk, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + row * K + kc, kk, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + row * V + vc, vv, other=0.0).to(tl.float32)
        S, _ = _advance(S, d, k, v, a, b)
        y = tl.sum(S * r[None, :], 1)
        tl.store(y_ptr + row * V + vc, y.to(y_ptr.dtype.element_ty), vv)
    tl.store(final_ptr + pair.to(tl.int64) * (V * K) + square, S, inside)


@triton.jit(do_not_specialize=["T", "H", "rows"])
def walk_tokens_back(
    r_ptr: tl.tensor,
    w_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    dy_ptr: tl.tensor,
    dfinal_ptr: tl.tensor,
    saved_ptr: tl.tensor,
    scratch_ptr: tl.tensor,
    dr_ptr: tl.tensor,
    dw_ptr: tl.tensor,
    dk_ptr: tl.tensor,
    dv_ptr: tl.tensor,
    da_ptr: tl.tensor,
    db_ptr: tl.tensor,
    dstate_ptr: tl.tensor,
    cu: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    rows: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SPAN: tl.constexpr,
    LOGIT: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_DY: tl.constexpr,
    HAS_DFINAL: tl.constexpr,
):
    """All seven gradients, spans of tokens from the last to the first.

    dr, dw, dk, da, db are sums over V: program_id(1) = n writes the part of its rows at
    [n, B·T, H, K]. scratch holds the SPAN rebuilt states of each program.
    """
    pair = tl.program_id(0)
    s = pair // H
    h = pair % H
    kc = tl.arange(0, BK)
    vc = tl.program_id(1) * BV + tl.arange(0, BV)
    kk = kc < K
    vv = vc < V
    square = vc[:, None] * K + kc[None, :]
    inside = vv[:, None] & kk[None, :]
    part = tl.program_id(1).to(tl.int64) * rows
    start, tokens = sequence_bounds(s, cu, T, PACKED)
    if PACKED:
        slot = start // SPAN + s
    else:
        slot = (s * tl.cdiv(T, SPAN)).to(tl.int64)
    saved_ptr += (slot * H + h) * (V * K)
    stride = tl.cast(H, tl.int64) * (V * K)
    scratch_ptr += (pair.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (SPAN * BV * BK)
    own = tl.arange(0, BV)[:, None] * BK + kc[None, :]
    E = tl.zeros([BV, BK], tl.float32)
    if HAS_DFINAL:
        E = tl.load(dfinal_ptr + pair.to(tl.int64) * (V * K) + square, inside, other=0.0)
    spans = tl.cdiv(tokens, SPAN)
    for n in range(spans):
        span = spans - 1 - n
        first = span * SPAN
        count = tl.minimum(tokens - first, SPAN)
        S = tl.load(saved_ptr + span * stride + square, inside, other=0.0)
        for i in range(count):
            tl.store(scratch_ptr + i * (BV * BK) + own, S)
            row = (start + first + i) * H + h
            d = tl.exp2(log2_decay(tl.load(w_ptr + row * K + kc, kk, other=0.0), LOGIT))
            k = tl.load(k_ptr + row * K + kc, kk, other=0.0).to(tl.float32)
            a = tl.load(a_ptr + row * K + kc, kk, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + row * K + kc, kk, other=0.0).to(tl.float32)
            v = tl.load(v_ptr + row * V + vc, vv, other=0.0).to(tl.float32)
            S, _ = _advance(S, d, k, v, a, b)
        tl.debug_barrier()  # the states in scratch are read below, perhaps by other threads
        for j in range(count):
            i = count - 1 - j
            row = (start + first + i) * H + h
            w = tl.load(w_ptr + row * K + kc, kk, other=0.0)
            d = tl.exp2(log2_decay(w, LOGIT))
            k = tl.load(k_ptr + row * K + kc, kk, other=0.0).to(tl.float32)
            a = tl.load(a_ptr + row * K + kc, kk, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + row * K + kc, kk, other=0.0).to(tl.float32)
            v = tl.load(v_ptr + row * V + vc, vv, other=0.0).to(tl.float32)
            S = tl.load(scratch_ptr + i * (BV * BK) + own)
            S1, Sa = _advance(S, d, k, v, a, b)
            out = (part + row) * K + kc
            dr = tl.zeros([BK], tl.float32)
            if HAS_DY:
                r = tl.load(r_ptr + row * K + kc, kk, other=0.0).to(tl.float32)
                dy = tl.load(dy_ptr + row * V + vc, vv, other=0.0).to(tl.float32)
                E += dy[:, None] * r[None, :]
                dr = tl.sum(S1 * dy[:, None], 0)
            dSa = tl.sum(E * b[None, :], 1)
            dv = tl.sum(E * k[None, :], 1)
            dk = tl.sum(E * v[:, None], 0)
            da = tl.sum(S * dSa[:, None], 0)
            db = tl.sum(E * Sa[:, None], 0)
            dw = decay_gradient(d * tl.sum(S * E, 0), w, LOGIT)
            E = E * d[None, :] + dSa[:, None] * a[None, :]
            tl.store(dr_ptr + out, dr.to(dr_ptr.dtype.element_ty), kk)
            tl.store(dw_ptr + out, dw.to(dw_ptr.dtype.element_ty), kk)
            tl.store(dk_ptr + out, dk.to(dk_ptr.dtype.element_ty), kk)
            tl.store(da_ptr + out, da.to(da_ptr.dtype.element_ty), kk)
            tl.store(db_ptr + out, db.to(db_ptr.dtype.element_ty), kk)
            tl.store(dv_ptr + row * V + vc, dv.to(dv_ptr.dtype.element_ty), vv)
        tl.debug_barrier()
    tl.store(dstate_ptr + pair.to(tl.int64) * (V * K) + square, E, inside)


@triton.jit(do_not_specialize=["H"])
def step_in_place(
    r_ptr: tl.tensor,
    w_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    state_ptr: tl.tensor,
    y_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    H: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    LOGIT: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One token for one head of one sequence: its rows of the pool are read and written once."""
    pair = tl.program_id(0)
    s = pair // H
    h = pair % H
    slot = s.to(tl.int64)
    if SLOTS:
        slot = tl.load(slots_ptr + s).to(tl.int64)
    kc = tl.arange(0, BK)
    vc = tl.program_id(1) * BV + tl.arange(0, BV)
    kk = kc < K
    vv = vc < V
    row = pair.to(tl.int64)
    pool = state_ptr + (slot * H + h) * (V * K) + vc[:, None] * K + kc[None, :]
    inside = vv[:, None] & kk[None, :] & (slot >= 0)
    S = tl.load(pool, inside, other=0.0)
    d = tl.exp2(log2_decay(tl.load(w_ptr + row * K + kc, kk, other=0.0), LOGIT))
    k = tl.load(k_ptr + row * K + kc, kk, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + row * K + kc, kk, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + row * K + kc, kk, other=0.0).to(tl.float32)
    r = tl.load(r_ptr + row * K + kc, kk, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + row * V + vc, vv, other=0.0).to(tl.float32)
    S, _ = _advance(S, d, k, v, a, b)
    tl.store(pool, S, inside)
    y = tl.where(slot >= 0, tl.sum(S * r[None, :], 1), 0.0)
    tl.store(y_ptr + row * V + vc, y.to(y_ptr.dtype.element_ty), vv)
