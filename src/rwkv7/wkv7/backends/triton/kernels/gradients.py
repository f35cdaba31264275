"""Backward, all chunks at once: the gradients of a chunk's inputs, by rows and then by columns.

Takes the state S before the chunk and the gradient E of the state after it (walks.py), so that no
chunk waits for another and nothing is ever divided by a decay, and what maps.py kept. The scores
A[t, s] join token t's α or ρ (rows) with token s's β or κ (columns): `row_gradients` makes da and
dr, `column_gradients` dk, then db and dw. One kernel for all would not fit in registers.
"""

import triton
import triton.language as tl

from .tiles import (
    chunk_bounds,
    decay_gradient,
    evened,
    factor,
    halved,
    load_powers,
    load_transposed,
    log2_decay,
    multiply,
    store_halved,
)


@triton.jit
def _decays(w, inside, t, C: tl.constexpr, LOGIT: tl.constexpr):
    """(base-2 log decays, their sum from the middle of the chunk, factors to its start and end).

    The same operands, from the same reference, as in maps.py: what rows and columns share then
    cancels exactly in dw.
    """
    decay = tl.where(inside, log2_decay(w, LOGIT), 0.0)
    middle = tl.sum(tl.where((t < C // 2)[:, None], decay, 0.0), 0)
    to_end = tl.exp2(tl.sum(decay, 0) - middle)
    return decay, tl.cumsum(decay, 0) - middle[None, :], tl.exp2(middle), to_end


@triton.jit
def _score_gradient(
    x, x_power, y, y_power, kept, HOW: tl.constexpr, COARSE: tl.constexpr, PRECISION: tl.constexpr
):
    """x·yᵀ of two `halved` tiles where `kept`; COARSE rounds to bf16: see plan.rounds_scores."""
    product = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    product = tl.where(kept, product * x_power[:, None] * y_power[None, :], 0.0)
    if COARSE:
        product = product.to(tl.bfloat16)
    return product


@triton.jit(do_not_specialize=["sequences", "T", "H"])
def row_gradients(
    r_ptr: tl.tensor,
    w_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    dy_ptr: tl.tensor,
    remove_ptr: tl.tensor,
    replace_ptr: tl.tensor,
    inner_ptr: tl.tensor,
    mix_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    states_ptr: tl.tensor,
    states_scale: tl.tensor,
    dstates_ptr: tl.tensor,
    dstates_scale: tl.tensor,
    u_ptr: tl.tensor,
    z_ptr: tl.tensor,
    uz_scale: tl.tensor,
    dlog_ptr: tl.tensor,
    dr_ptr: tl.tensor,
    da_ptr: tl.tensor,
    cu: tl.tensor,
    sequences: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    LOGIT: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_DY: tl.constexpr,
    HOW: tl.constexpr,
    COARSE: tl.constexpr,
):
    """dr, da [B·T, H, K]; for the columns U, Z [n, H, C, V] (uz_scale [n, H, 2·C]: the powers of
    two of their rows) and the part of the log decays' gradient that is known, dlog [n, H, C, K]."""
    chunk = tl.program_id(0) // H
    h = tl.program_id(0) % H
    start, tokens = chunk_bounds(chunk, cu, sequences, T, C, PACKED)
    if tokens <= 0:
        return
    t = tl.arange(0, C)
    kc = tl.arange(0, BK)
    vc = tl.arange(0, BV)
    t1 = t < C
    k1 = kc < K
    v1 = vc < V
    kk = (t < tokens)[:, None] & k1[None, :]
    vv = (t < tokens)[:, None] & v1[None, :]
    # Scalars carry the 64-bit part of every address.
    first = start * H + h
    index = tl.program_id(0).to(tl.int64)
    at_k = (t * (H * K))[:, None] + kc[None, :]
    at_v = (t * (H * V))[:, None] + vc[None, :]
    ck = index * (C * K) + (t[:, None] * K + kc[None, :])
    cv = index * (C * V) + (t[:, None] * V + vc[None, :])
    in_ck = t1[:, None] & k1[None, :]
    in_cv = t1[:, None] & v1[None, :]
    square = index * (V * K) + (vc[:, None] * K + kc[None, :])
    inside = v1[:, None] & k1[None, :]
    below = t[:, None] > t[None, :]
    upto = t[:, None] >= t[None, :]
    uz_scale += index * (2 * C) + t
    PRECISION: tl.constexpr = "tf32" if HOW == "pair" else HOW  # fp16 operands take no notice

    # What the tokens remove, U = N·V + W·Sᵀ.
    cc = index * (C * C) + (t[:, None] * C + t[None, :])
    in_cc = t1[:, None] & t1[None, :]
    v, v_power = halved(factor(v_ptr + first * V + at_v, vv, HOW).to(tl.float32), HOW)
    v, v_all = evened(v, v_power, HOW)
    N = tl.load(inner_ptr + cc, in_cc, other=0.0)
    U = tl.dot(N, v, input_precision=PRECISION) * v_all
    S = tl.load(states_ptr + square, inside, other=0.0)
    s_power = load_powers(states_scale + index * V + vc, v1, HOW)
    W = tl.load(remove_ptr + ck, in_ck, other=0.0)
    U += tl.dot(W, tl.trans(S), input_precision=PRECISION) * s_power[None, :]
    U, u_power = halved(U, HOW)
    store_halved(U, u_power, u_ptr + cv, in_cv, uz_scale, t1)
    # Its gradient Z = Pᵀ·dY + W_b·Eᵀ.
    E = tl.load(dstates_ptr + square, inside, other=0.0)
    e_power = load_powers(dstates_scale + index * V + vc, v1, HOW)
    W = tl.load(replace_ptr + ck, in_ck, other=0.0)
    Z = tl.dot(W, tl.trans(E), input_precision=PRECISION)
    Z *= e_power[None, :]
    if HAS_DY:
        dy = factor(dy_ptr + first * V + at_v, vv, HOW)
        P = load_transposed(mix_ptr + index * (C * C), scale_ptr + index * (3 * C) + 2 * C, C, HOW)
        Z = multiply(P, dy, Z, HOW)
    Z, z_power = halved(Z, HOW)
    store_halved(Z, z_power, z_ptr + cv, in_cv, uz_scale + C, t1)

    w = tl.load(w_ptr + first * K + at_k, kk, other=0.0)
    decay, g, to_start, to_end = _decays(w, kk, t, C, LOGIT)
    S, s_all = evened(S, s_power, HOW)
    E, e_all = evened(E, e_power, HOW)
    passing = tl.sum(S.to(tl.float32) * E.to(tl.float32), 0)
    passing *= s_all * e_all * to_start * to_end
    v_power = tl.zeros([C], tl.float32) + v_all
    kappa = tl.load(k_ptr + first * K + at_k, kk, other=0.0).to(tl.float32) * tl.exp2(-g)
    beta = tl.load(b_ptr + first * K + at_k, kk, other=0.0).to(tl.float32) * tl.exp2(-g)
    dA = _score_gradient(Z, z_power, v, v_power, below, HOW, COARSE, PRECISION)
    dx = tl.dot(Z, S, input_precision=PRECISION) * (z_power * s_all)[:, None] * to_start[None, :]
    dx = multiply(dA, kappa, dx, HOW)
    dA = _score_gradient(Z, z_power, U, u_power, below, HOW, COARSE, PRECISION)
    dx = multiply(dA, beta, dx, HOW) * tl.exp2(g - decay)
    tl.store(da_ptr + first * K + at_k, dx.to(da_ptr.dtype.element_ty), kk)
    a = tl.load(a_ptr + first * K + at_k, kk, other=0.0).to(tl.float32)
    # What arrives at the decays before a token, `after`, and at those up to it, `upon`.
    after = a * dx
    upon = after
    dx = tl.zeros([C, BK], tl.float32)
    if HAS_DY:
        dy, y_power = halved(dy.to(tl.float32), HOW)
        dA = _score_gradient(dy, y_power, v, v_power, upto, HOW, COARSE, PRECISION)
        dx = tl.dot(dy, S, input_precision=PRECISION)
        dx *= (y_power * s_all)[:, None] * to_start[None, :]
        dx = multiply(dA, kappa, dx, HOW)
        dA = _score_gradient(dy, y_power, U, u_power, upto, HOW, COARSE, PRECISION)
        dx = multiply(dA, beta, dx, HOW) * tl.exp2(g)
        upon += tl.load(r_ptr + first * K + at_k, kk, other=0.0).to(tl.float32) * dx
    tl.store(dr_ptr + first * K + at_k, dx.to(dr_ptr.dtype.element_ty), kk)
    dlog = (tl.sum(upon, 0) + passing)[None, :] - tl.cumsum(upon, 0) + upon - after
    tl.store(dlog_ptr + ck, dlog, in_ck)


@triton.jit(do_not_specialize=["sequences", "T", "H"])
def column_gradients(
    r_ptr: tl.tensor,
    w_ptr: tl.tensor,
    a_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    dy_ptr: tl.tensor,
    dstates_ptr: tl.tensor,
    dstates_scale: tl.tensor,
    z_ptr: tl.tensor,
    uz_scale: tl.tensor,
    dlog_ptr: tl.tensor,
    dkey_ptr: tl.tensor,
    dw_ptr: tl.tensor,
    cu: tl.tensor,
    sequences: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    LOGIT: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_DY: tl.constexpr,
    HOW: tl.constexpr,
    COARSE: tl.constexpr,
    LAST: tl.constexpr,
):
    """The gradient of one of the two keys written to the state: first of k, with V as its value,
    adding to dlog what arrives at the decays; then (LAST) of b, with U, and dw from dlog."""
    chunk = tl.program_id(0) // H
    h = tl.program_id(0) % H
    start, tokens = chunk_bounds(chunk, cu, sequences, T, C, PACKED)
    if tokens <= 0:
        return
    t = tl.arange(0, C)
    kc = tl.arange(0, BK)
    vc = tl.arange(0, BV)
    t1 = t < C
    k1 = kc < K
    v1 = vc < V
    kk = (t < tokens)[:, None] & k1[None, :]
    vv = (t < tokens)[:, None] & v1[None, :]
    first = start * H + h
    index = tl.program_id(0).to(tl.int64)
    at_k = (t * (H * K))[:, None] + kc[None, :]
    at_v = (t * (H * V))[:, None] + vc[None, :]
    cv = index * (C * V) + (t[:, None] * V + vc[None, :])
    in_cv = t1[:, None] & v1[None, :]
    square = index * (V * K) + (vc[:, None] * K + kc[None, :])
    inside = v1[:, None] & k1[None, :]
    after = t[:, None] < t[None, :]
    since = t[:, None] <= t[None, :]
    uz_scale += index * (2 * C) + t
    PRECISION: tl.constexpr = "tf32" if HOW == "pair" else HOW  # fp16 operands take no notice

    w = tl.load(w_ptr + first * K + at_k, kk, other=0.0)
    decay, g, _, to_end = _decays(w, kk, t, C, LOGIT)
    E = tl.load(dstates_ptr + square, inside, other=0.0)
    e_power = load_powers(dstates_scale + index * V + vc, v1, HOW)
    ck = index * (C * K) + (t[:, None] * K + kc[None, :])
    in_ck = t1[:, None] & k1[None, :]
    E, e_all = evened(E, e_power, HOW)
    if LAST:
        x = tl.load(value_ptr + cv, in_cv, other=0.0)
        x_power = load_powers(uz_scale, t1, HOW)
    else:
        x = factor(value_ptr + first * V + at_v, vv, HOW).to(tl.float32)
        x, x_power = halved(x, HOW)
    Z = tl.load(z_ptr + cv, in_cv, other=0.0)
    z_power = load_powers(uz_scale + C, t1, HOW)
    alpha = tl.load(a_ptr + first * K + at_k, kk, other=0.0).to(tl.float32) * tl.exp2(g - decay)
    dA = _score_gradient(x, x_power, Z, z_power, after, HOW, COARSE, PRECISION)
    dkey = multiply(dA, alpha, tl.zeros([C, BK], tl.float32), HOW)
    if HAS_DY:
        dy = factor(dy_ptr + first * V + at_v, vv, HOW).to(tl.float32)
        dy, y_power = halved(dy, HOW)
        rho = tl.load(r_ptr + first * K + at_k, kk, other=0.0).to(tl.float32) * tl.exp2(g)
        dA = _score_gradient(x, x_power, dy, y_power, since, HOW, COARSE, PRECISION)
        dkey = multiply(dA, rho, dkey, HOW)
    up = tl.exp2(-g)
    dkey *= up
    to_state = tl.dot(x, E, input_precision=PRECISION) * (x_power * e_all)[:, None]
    to_state *= to_end[None, :] * up
    every = dkey + to_state
    tl.store(dkey_ptr + first * K + at_k, every.to(dkey_ptr.dtype.element_ty), kk)
    key = tl.load(key_ptr + first * K + at_k, kk, other=0.0).to(tl.float32)
    every *= key
    ck = index * (C * K) + (t[:, None] * K + kc[None, :])
    in_ck = t1[:, None] & k1[None, :]
    dlog = tl.load(dlog_ptr + ck, in_ck, other=0.0)
    dlog += tl.cumsum(every, 0) - every - tl.sum(key * dkey, 0)[None, :]
    if LAST:
        w = tl.load(w_ptr + first * K + at_k, kk, other=0.0)
        dw = decay_gradient(dlog, w, LOGIT)
        tl.store(dw_ptr + first * K + at_k, dw.to(dw_ptr.dtype.element_ty), kk)
    else:
        tl.store(dlog_ptr + ck, dlog, in_ck)
