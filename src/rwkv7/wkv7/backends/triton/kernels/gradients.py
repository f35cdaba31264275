"""Backward, all chunks at once: the gradients of a chunk's inputs.

Takes the state S before the chunk and the gradient E of the state after it (walks.py), so that no
chunk waits for another and nothing is ever divided by a decay, and what maps.py kept. The scores
A[t, s] join token t's α or ρ (rows) with token s's β or κ (columns).

Every product has fp16 operands with powers of two taken out: of α, β, κ and ρ one a token, and the
gradient of a score carries the powers of its row and its column. One tile then serves the product
that sums over columns and the one that sums over rows.
"""

import triton
import triton.language as tl

from .tiles import (
    LIFT,
    chunk_bounds,
    counting,
    decay_gradient,
    evened,
    hat_dot,
    hat_values,
    leveled,
    load_powers,
    log2_decay,
    multiply,
    split_hat,
    tile_power,
)


@triton.jit
def _through_states(
    remove_ptr, states_ptr, replace_ptr, dstates_ptr, t, vc,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(W·Sᵀ, W_b·Eᵀ), BK channels of K at a time."""
    U = tl.zeros([t.shape[0], vc.shape[0]], tl.float32)
    Z = tl.zeros([t.shape[0], vc.shape[0]], tl.float32)
    for part in tl.static_range(0, K, BK):
        kc = part + tl.arange(0, BK)
        k1 = kc[None, :] < K
        ck = t[:, None] * K + kc[None, :]
        square = vc[:, None] * K + kc[None, :]
        W = tl.load(remove_ptr + ck, k1, other=0.0)
        S = tl.load(states_ptr + square, (vc < V)[:, None] & k1, other=0.0)
        W_b = tl.load(replace_ptr + ck, k1, other=0.0)
        E = tl.load(dstates_ptr + square, (vc < V)[:, None] & k1, other=0.0)
        U = tl.dot(W, tl.trans(S), acc=U, input_precision=PRECISION)
        Z = tl.dot(W_b, tl.trans(E), acc=Z, input_precision=PRECISION)
    return U, Z


@triton.jit
def _score_gradient(x, x_power, y, y_power, kept, HOW: tl.constexpr, PRECISION: tl.constexpr):
    """x·yᵀ with powers of two a row and a column where `kept`, as an operand: (high, low, the
    power taken out of all)."""
    product = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    product = tl.where(kept, product * x_power[:, None] * y_power[None, :], 0.0)
    power = tile_power(product) * (1.0 / LIFT)
    high, low = split_hat(product * (1.0 / power), HOW)
    return high, low, power


@triton.jit
def _query_gradient(
    S, seed, scale, powers, to_k, k_low, k_all, to_b, b_low, b_all,
    kappa, kappa_low, beta, beta_low, HOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of α from Z as seed, or of ρ from dY, [PART, C]: through the state and through
    the scores with κ and β, whose gradients are to_k and to_b."""
    d = tl.dot(tl.trans(S), tl.trans(seed), input_precision=PRECISION)
    d *= powers[None, :] * (scale / k_all)[:, None]
    d = hat_dot(kappa, kappa_low, tl.trans(to_k), tl.trans(k_low), d, HOW) * (k_all / b_all)
    return hat_dot(beta, beta_low, tl.trans(to_b), tl.trans(b_low), d, HOW) * b_all


@triton.jit
def _key_gradient(
    d, to_a, a_low, a_all, to_r, r_low, r_all, alpha, alpha_low, rho, rho_low,
    HAS_DY: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """The gradient of κ or of β, [PART, C]: d is what comes through the state, to_a and to_r are
    the gradients of the scores with α and ρ."""
    d = hat_dot(alpha, alpha_low, to_a, a_low, d * (1.0 / a_all), HOW) * a_all
    if HAS_DY:
        d = hat_dot(rho, rho_low, to_r, r_low, d * (1.0 / r_all), HOW) * r_all
    return d


@triton.jit(do_not_specialize=["sequences", "T", "H"])
def chunk_gradients(
    r_ptr: tl.tensor,
    w_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    dy_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    remove_ptr: tl.tensor,
    replace_ptr: tl.tensor,
    joint_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    states_ptr: tl.tensor,
    states_scale: tl.tensor,
    dstates_ptr: tl.tensor,
    dstates_scale: tl.tensor,
    dr_ptr: tl.tensor,
    dw_ptr: tl.tensor,
    dk_ptr: tl.tensor,
    da_ptr: tl.tensor,
    db_ptr: tl.tensor,
    cu: tl.tensor,
    sequences: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PART: tl.constexpr,
    C: tl.constexpr,
    LOGIT: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_DY: tl.constexpr,
    HOW: tl.constexpr,
):
    """dr, dw, dk, da, db [B·T, H, K], in the end PART channels of K at a time."""
    chunk = tl.program_id(0) // H
    h = tl.program_id(0) % H
    start, tokens = chunk_bounds(chunk, cu, sequences, T, C, PACKED)
    if tokens <= 0:
        return
    t = tl.arange(0, C)
    vc = tl.arange(0, BV)
    v1 = vc < V
    vv = (t < tokens)[:, None] & v1[None, :]
    # Scalars carry the 64-bit part of every address.
    first = start * H + h
    index = tl.program_id(0).to(tl.int64)
    at_v = (t * (H * V))[:, None] + vc[None, :]
    below = t[:, None] > t[None, :]
    upto = t[:, None] >= t[None, :]
    v_ptr += first * V
    remove_ptr += index * (C * K)
    replace_ptr += index * (C * K)
    states_ptr += index * (V * K)
    dstates_ptr += index * (V * K)
    ends_ptr += index * (2 * K)
    scale_ptr += index * (7 * C) + t
    PRECISION: tl.constexpr = "tf32" if HOW != "ieee" else HOW  # fp16 operands take no notice

    # Tiles are asked for long before their use: what waits for memory here has no other program to
    # hide behind.
    cc = index * (C * C) + (t[:, None] * C + t[None, :])
    joint = tl.load(joint_ptr + cc)
    v = tl.load(v_ptr + at_v, vv, other=0.0)
    if HAS_DY:
        dy = tl.load(dy_ptr + first * V + at_v, vv, other=0.0)
    s_power = load_powers(states_scale + index * V + vc, v1, HOW)
    e_power = load_powers(dstates_scale + index * V + vc, v1, HOW)
    p_power = load_powers(scale_ptr + 2 * C, t < C, HOW)
    a_power = tl.exp2(tl.load(scale_ptr + 3 * C))
    b_power = tl.exp2(tl.load(scale_ptr + 4 * C))
    k_power = tl.exp2(tl.load(scale_ptr + 5 * C))
    r_power = tl.exp2(tl.load(scale_ptr + 6 * C))
    # What the tokens remove, U = N·V + W·Sᵀ, and its gradient, Z = Pᵀ·dY + W_b·Eᵀ.
    U, Z = _through_states(
        remove_ptr, states_ptr, replace_ptr, dstates_ptr, t, vc, K, V, BK, PRECISION
    )
    v, v_all = leveled(v, HOW)
    U *= (s_power * (1.0 / v_all))[None, :]
    U = tl.dot(tl.where(below, joint, 0.0), v, acc=U, input_precision=PRECISION)
    U, u_all = leveled(U * v_all, HOW)
    Z *= e_power[None, :]
    if HAS_DY:
        dy, y_all = leveled(dy, HOW)
        p_power *= y_all
        Z *= (1.0 / p_power)[:, None]
        Z = tl.dot(tl.where(below, 0.0, joint), dy, acc=Z, input_precision=PRECISION)
        Z *= p_power[:, None]
    else:
        dy, y_all = v, v_all  # not read
    Z, z_all = leveled(Z, HOW)

    # The gradients of the four score matrices, with the powers of both their tokens.
    ak, ak_low, ak_all = _score_gradient(Z, a_power, v, k_power, below, HOW, PRECISION)
    ab, ab_low, ab_all = _score_gradient(Z, a_power, U, b_power, below, HOW, PRECISION)
    ak_all *= z_all * v_all
    ab_all *= z_all * u_all
    if HAS_DY:
        rk, rk_low, rk_all = _score_gradient(dy, r_power, v, k_power, upto, HOW, PRECISION)
        rb, rb_low, rb_all = _score_gradient(dy, r_power, U, b_power, upto, HOW, PRECISION)
        rk_all *= y_all * v_all
        rb_all *= y_all * u_all
    else:
        rk, rk_low, rk_all = ak, ak_low, ak_all  # not read
        rb, rb_low, rb_all = ab, ab_low, ab_all

    # From here on tiles are [PART, C]: sums over tokens stay within a warp. The loop is a real one:
    # unrolled, its tiles would be in registers at once.
    for part in range(0, K, PART):
        kc = part + tl.arange(0, PART)
        k1 = kc < K
        kk = k1[:, None] & (t < tokens)[None, :]
        at = first * K + (kc[:, None] + (t * (H * K))[None, :])
        square = vc[:, None] * K + kc[None, :]
        inside = v1[:, None] & k1[None, :]
        w = tl.load(w_ptr + at, kk, other=0.0)
        k = tl.load(k_ptr + at, kk, other=0.0)
        b = tl.load(b_ptr + at, kk, other=0.0)
        a = tl.load(a_ptr + at, kk, other=0.0)
        r = tl.load(r_ptr + at, kk, other=0.0)
        S = tl.load(states_ptr + square, inside, other=0.0)
        E = tl.load(dstates_ptr + square, inside, other=0.0)
        to_start = tl.load(ends_ptr + kc, k1, other=0.0)
        to_end = tl.load(ends_ptr + K + kc, k1, other=0.0)
        a_shift = tl.load(scale_ptr + 3 * C)
        b_shift = tl.load(scale_ptr + 4 * C)
        k_shift = tl.load(scale_ptr + 5 * C)
        r_shift = tl.load(scale_ptr + 6 * C)
        decay = tl.where(kk, log2_decay(w, LOGIT), 0.0)
        # What rows and columns of scores share comes from the same operands: it then cancels
        # exactly in dw.
        none = tl.zeros([PART, C], tl.float32)
        g = multiply(decay, counting(C, 0), none, HOW)
        S, s_all = evened(S, s_power, HOW)
        E, e_all = evened(E, e_power, HOW)
        passing = tl.sum(S.to(tl.float32) * E.to(tl.float32), 0)
        passing *= s_all * e_all * to_start * to_end

        down = tl.exp2(-g - k_shift[None, :])
        x, x_low = split_hat(k.to(tl.float32) * down, HOW)
        down = tl.exp2(-g - b_shift[None, :])
        y, y_low = split_hat(b.to(tl.float32) * down, HOW)
        up = tl.exp2(g - decay - a_shift[None, :])
        d = _query_gradient(
            S, Z, to_start * (z_all * s_all), tl.exp2(a_shift),
            ak, ak_low, ak_all, ab, ab_low, ab_all, x, x_low, y, y_low, HOW, PRECISION,
        )  # fmt: skip
        z, z_low = split_hat(a.to(tl.float32) * up, HOW)
        after = hat_values(z, z_low, HOW) * d
        tl.store(da_ptr + at, (d * up).to(da_ptr.dtype.element_ty), kk)
        arrives = after
        d = none
        up = tl.exp2(g - r_shift[None, :])
        q, q_low = split_hat(r.to(tl.float32) * up, HOW)
        if HAS_DY:
            d = _query_gradient(
                S, dy, to_start * (y_all * s_all), tl.exp2(r_shift),
                rk, rk_low, rk_all, rb, rb_low, rb_all, x, x_low, y, y_low, HOW, PRECISION,
            )  # fmt: skip
            arrives += hat_values(q, q_low, HOW) * d
        tl.store(dr_ptr + at, (d * up).to(dr_ptr.dtype.element_ty), kk)
        # Keys act on tokens of this chunk, and through the state on later chunks (passing).
        whole = hat_values(x, x_low, HOW)
        d = tl.dot(tl.trans(E), tl.trans(v), input_precision=PRECISION)
        d *= tl.exp2(k_shift)[None, :] * (to_end * (v_all * e_all))[:, None]
        passing += tl.sum(whole * d, 1)
        d = _key_gradient(
            d, ak, ak_low, ak_all, rk, rk_low, rk_all, z, z_low, q, q_low, HAS_DY, HOW
        )
        arrives -= whole * d
        down = tl.exp2(-g - k_shift[None, :])
        tl.store(dk_ptr + at, (d * down).to(dk_ptr.dtype.element_ty), kk)
        whole = hat_values(y, y_low, HOW)
        d = tl.dot(tl.trans(E), tl.trans(U), input_precision=PRECISION)
        d *= tl.exp2(b_shift)[None, :] * (to_end * (u_all * e_all))[:, None]
        passing += tl.sum(whole * d, 1)
        d = _key_gradient(
            d, ab, ab_low, ab_all, rb, rb_low, rb_all, z, z_low, q, q_low, HAS_DY, HOW
        )
        arrives -= whole * d
        down = tl.exp2(-g - b_shift[None, :])
        tl.store(db_ptr + at, (d * down).to(db_ptr.dtype.element_ty), kk)
        # What arrives at the decays from this token on (all of it, less what does before; running
        # sums begin in the middle), less what a takes at this one.
        dlog = passing + tl.sum(tl.where((t >= C // 2)[None, :], arrives, 0.0), 1)
        dlog = dlog[:, None] + (arrives - after) - multiply(arrives, counting(C, 0), none, HOW)
        dw = decay_gradient(dlog, w, LOGIT)
        tl.store(dw_ptr + at, dw.to(dw_ptr.dtype.element_ty), kk)
