"""Backward, all steps of 16 tokens at once, a warp each: the gradients of a step's inputs."""

import triton
import triton.language as tl

from .slabs import slab_step
from .steps import turned
from .tiles import LOG2E, LOGIT_SCALE, counting, multiply, narrow, tile_unit


@triton.jit
def _by(x, ratio):
    """x times powers of two, in its dtype."""
    return x * ratio.to(x.dtype)


@triton.jit
def _decay_and_slope(w, LOGIT: tl.constexpr):
    """(base-2 logarithm of the decay that w stands for, gradient of its natural one to w)."""
    w = w.to(tl.float32)
    if LOGIT:
        # Beyond -64 both vanish, and exp(-w) would be infinite.
        inverse = tl.exp2(tl.maximum(w, -64.0) * -LOG2E)
        # The square of an inverse root: a quotient takes three more instructions.
        root = tl.rsqrt(1.0 + inverse)
        rise = root * root
        log = rise * (-LOGIT_SCALE * LOG2E)
        slope = (rise * -LOGIT_SCALE) * (inverse * rise)
    else:
        log = w * LOG2E
        slope = tl.full(w.shape, 1.0, tl.float32)
    return log, slope


@triton.jit
def _dot(x, y, acc):
    return tl.dot(x, y, acc=acc, input_precision="ieee")


@triton.jit(do_not_specialize=["low", "L", "sequences", "T", "H"])
def step_gradients(
    w_ptr: tl.tensor,
    v_ptr: tl.tensor,
    dy_ptr: tl.tensor,
    hats_ptr: tl.tensor,
    moved_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    units_ptr: tl.tensor,
    states_ptr: tl.tensor,
    states_scale: tl.tensor,
    dstates_ptr: tl.tensor,
    dstates_scale: tl.tensor,
    dr_ptr: tl.tensor,
    dw_ptr: tl.tensor,
    dk_ptr: tl.tensor,
    dv_ptr: tl.tensor,
    da_ptr: tl.tensor,
    db_ptr: tl.tensor,
    cu: tl.tensor,
    low: tl.tensor,
    L: tl.tensor,
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
    """dr, dw, dk, da, db [B·T, H, K] and dv [B·T, H, V], PART channels of K at a time."""
    h = tl.program_id(0) % H
    start, tokens = slab_step(tl.program_id(0) // H, low, L, cu, sequences, T, C, PACKED)
    if tokens <= 0:
        return
    t = tl.arange(0, 16)
    vc = tl.arange(0, BV)
    v1 = vc < V
    vv = (t < tokens)[:, None] & v1[None, :]
    first = start * H + h
    index = tl.program_id(0).to(tl.int64)
    PARTS: tl.constexpr = 2 if HOW == "halves" else 1
    at_v = first * V + ((t * (H * V))[:, None] + vc[None, :])
    moved_ptr += index * ((1 + PARTS) * 16 * V) + (t[:, None] * V + vc[None, :])
    in_moved = (t < 16)[:, None] & v1[None, :]
    states_ptr += index * (V * K) + vc[:, None] * K
    dstates_ptr += index * (PARTS * V * K) + vc[:, None] * K
    hats_ptr += index * (80 * K)

    # dv, where a repeated key makes little of much: what κ, E and the scores lose would be seen.
    k_all = tl.arange(0, BK)
    E_all = tl.load(dstates_ptr + k_all[None, :], v1[:, None] & (k_all < K)[None, :], other=0.0)
    keys = hats_ptr + 32 * K + (t[:, None] * K + k_all[None, :])
    in_keys = (t < 16)[:, None] & (k_all < K)[None, :]
    keys_low = tl.load(keys + 32 * K, in_keys, other=0.0)
    keys = tl.load(keys, in_keys, other=0.0)
    scores = scores_ptr + index * (PARTS * 512) + (t[:, None] * 16 + t[None, :])
    A = tl.load(scores)
    Z = tl.load(moved_ptr + 16 * V, in_moved, other=0.0)
    if HAS_DY:
        A_r = tl.load(scores + PARTS * 256)
        dy = tl.load(dy_ptr + at_v, vv, other=0.0)
    U = tl.load(moved_ptr, in_moved, other=0.0)
    v = tl.load(v_ptr + at_v, vv, other=0.0)
    p_unit = tl.load(states_scale + index)
    q_unit = tl.load(dstates_scale + index)
    k_unit = tl.load(units_ptr + index * 2)
    r_unit = tl.load(units_ptr + index * 2 + 1)
    dv = _dot(keys, tl.trans(E_all), tl.zeros([16, BV], tl.float32))
    if HOW != "ieee":
        dv = _dot(keys_low, tl.trans(E_all), dv)
    if PARTS == 2:
        in_E = v1[:, None] & (k_all < K)[None, :]
        E_low = tl.load(dstates_ptr + V * K + k_all[None, :], in_E, other=0.0)
        dv = _dot(keys, tl.trans(E_low), dv)
        dv = _dot(tl.load(scores + 256), Z, dv)
        dv = _dot(A, tl.load(moved_ptr + 32 * V, in_moved, other=0.0), dv)
    dv = _dot(A, Z, dv)
    y_unit = q_unit
    if HAS_DY:
        y_unit = tl.minimum(tile_unit(dy, HOW) * r_unit, q_unit)  # less where dy is zero alone
        dy = narrow(dy.to(tl.float32) * (r_unit / y_unit), HOW)
        dv = _dot(_by(A_r, y_unit / q_unit), dy, dv)
    tl.store(dv_ptr + at_v, (dv * (q_unit * k_unit)).to(dv_ptr.dtype.element_ty), vv)

    # Tiles are asked for a part ahead of their use.
    c = tl.arange(0, PART)
    at = first * K + (c[:, None] + (t * (H * K))[None, :])
    hats = hats_ptr + (c[:, None] + (t * K)[None, :])
    kk = (c < K)[:, None] & (t < tokens)[None, :]
    w = tl.load(w_ptr + at, kk, other=0.0)
    alpha = tl.load(hats, kk, other=0.0)
    beta = tl.load(hats + 16 * K, kk, other=0.0)
    kappa = tl.load(hats + 32 * K, kk, other=0.0)
    rho = tl.load(hats + 48 * K, kk, other=0.0)

    # The gradients of the scores, and their transposes: both of the same sums.
    v_unit = tl.minimum(tile_unit(v, HOW) * k_unit, p_unit)
    v = narrow(v.to(tl.float32) * (k_unit / v_unit), HOW)
    vp = v_unit / p_unit
    yq = y_unit / q_unit
    below = t[:, None] > t[None, :]
    above = t[:, None] < t[None, :]
    upto = t[:, None] >= t[None, :]
    from_it = t[:, None] <= t[None, :]
    no_cc = tl.zeros([16, 16], tl.float32)
    vt = turned(v)
    ut = turned(U)
    zt = turned(Z)
    ak = turned(_by(narrow(tl.where(below, _dot(Z, vt, no_cc), 0.0), HOW), vp))
    ab = turned(narrow(tl.where(below, _dot(Z, ut, no_cc), 0.0), HOW))
    ka = turned(narrow(tl.where(above, _dot(v, zt, no_cc), 0.0), HOW))
    ba = turned(narrow(tl.where(above, _dot(U, zt, no_cc), 0.0), HOW))
    if HAS_DY:
        yt = turned(dy)
        rk = turned(_by(narrow(tl.where(upto, _dot(dy, vt, no_cc), 0.0), HOW), vp))
        rb = turned(narrow(tl.where(upto, _dot(dy, ut, no_cc), 0.0), HOW))
        kr = turned(_by(narrow(tl.where(from_it, _dot(v, yt, no_cc), 0.0), HOW), yq))
        br = turned(_by(narrow(tl.where(from_it, _dot(U, yt, no_cc), 0.0), HOW), yq))
    ones = tl.full([BV, 16], 1.0, tl.float32)
    from_each = tl.where(upto, 1.0, 0.0).to(tl.bfloat16)

    for part in range(0, K, PART):
        k1 = part + c < K
        at_k = at + part
        kk = k1[:, None] & (t < tokens)[None, :]
        inside = v1[:, None] & k1[None, :]
        S = tl.load(states_ptr + part + c[None, :], inside, other=0.0)
        E = tl.load(dstates_ptr + part + c[None, :], inside, other=0.0)
        later = (part + PART + c < K)[:, None] & (t < tokens)[None, :]
        next_w = tl.load(w_ptr + at_k + PART, later, other=0.0)
        next_alpha = tl.load(hats + (part + PART), later, other=0.0)
        next_beta = tl.load(hats + (part + PART + 16 * K), later, other=0.0)
        next_kappa = tl.load(hats + (part + PART + 32 * K), later, other=0.0)
        next_rho = tl.load(hats + (part + PART + 48 * K), later, other=0.0)
        none = tl.zeros([PART, 16], tl.float32)
        decay, slope = _decay_and_slope(w, LOGIT)
        decay = tl.where(kk, decay, 0.0)
        g = multiply(decay, counting(16, 0), none, HOW)
        before = tl.exp2(multiply(decay, counting(16, 1), none, HOW))
        up = tl.exp2(g)
        down = tl.exp2(-g)

        d = _dot(tl.trans(S), zt, none)
        d = _dot(kappa, ak, d)
        d = _dot(beta, ab, d) * (q_unit * p_unit)
        after = alpha.to(tl.float32) * d
        tl.store(da_ptr + at_k, (d * before).to(da_ptr.dtype.element_ty), kk)
        arrives = after
        d = none
        if HAS_DY:
            d = _dot(tl.trans(S), yt, none)
            d = _dot(kappa, rk, d)
            d = _dot(beta, rb, d) * (y_unit * p_unit)
            arrives += rho.to(tl.float32) * d
        tl.store(dr_ptr + at_k, (d * (up * (1.0 / r_unit))).to(dr_ptr.dtype.element_ty), kk)
        d = _dot(tl.trans(E), vt, none)
        hat = kappa.to(tl.float32)
        passing = tl.sum(hat * d, 1) * (v_unit * q_unit)
        d = _dot(alpha, ka, d)
        if HAS_DY:
            d = _dot(rho, kr, d)
        d *= v_unit * q_unit
        arrives -= hat * d
        tl.store(dk_ptr + at_k, (d * (down * (1.0 / k_unit))).to(dk_ptr.dtype.element_ty), kk)
        d = _dot(tl.trans(E), ut, none)
        hat = beta.to(tl.float32)
        passing += tl.sum(hat * d, 1) * (p_unit * q_unit)
        d = _dot(alpha, ba, d)
        if HAS_DY:
            d = _dot(rho, br, d)
        d *= p_unit * q_unit
        arrives -= hat * d
        tl.store(db_ptr + at_k, (d * down).to(db_ptr.dtype.element_ty), kk)

        # What arrives at the decays from this token on, and what passes to the state after the
        # step: all that keys leave there, and what was there.
        dlog = _dot(tl.trans(S * E), ones.to(S.dtype), none) * (p_unit * q_unit)
        dlog = multiply(arrives, from_each, dlog, HOW) - after + passing[:, None]
        tl.store(dw_ptr + at_k, (dlog * slope).to(dw_ptr.dtype.element_ty), kk)
        w, alpha, beta, kappa, rho = next_w, next_alpha, next_beta, next_kappa, next_rho
