"""Backward, all steps of 16 tokens at once, a program each: the gradients of a step's inputs."""

import triton
import triton.language as tl

from .slabs import slab_step
from .tiles import LOG2E, LOGIT_SCALE, counting, multiply, narrow


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
    """x y + acc; fp32 factors as they are."""
    return tl.dot(x, y, acc=acc, input_precision="ieee")


@triton.jit
def _as_products(x, HOW: tl.constexpr):
    """The tile [K, 16] in fp32 where products leave theirs, by a product with one; for "ieee",
    where the interpreter would multiply bf16 as integers, as it is."""
    if HOW == "ieee":
        x = x.to(tl.float32)
    else:
        t = tl.arange(0, 16)
        one = tl.where(t[:, None] == t[None, :], 1.0, 0.0).to(x.dtype)
        x = tl.dot(x, one)
    return x


@triton.jit
def _finite(w, HOW: tl.constexpr):
    """`_as_products` of w. An infinite number would be NaN there: beyond 1e4 decays and slopes are
    what they are at it."""
    if HOW == "ieee" or w.dtype == tl.float32:
        w = w.to(tl.float32)
    else:
        w = _as_products(tl.clamp(w.to(tl.float32), -1e4, 1e4).to(w.dtype), HOW)
    return w


@triton.jit(do_not_specialize=["low", "L", "sequences", "T", "H"])
def step_gradients(
    w_ptr: tl.tensor,
    k_ptr: tl.tensor,
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
    C: tl.constexpr,
    LOGIT: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_DY: tl.constexpr,
    HOW: tl.constexpr,
):
    """dr, dw, dk, da, db [B·T, H, K] and dv [B·T, H, V]."""
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
    moved_ptr += index * (32 * V) + (t[:, None] * V + vc[None, :])
    in_moved = (t < 16)[:, None] & v1[None, :]
    states_ptr += index * (V * K) + vc[:, None] * K
    dstates_ptr += index * (PARTS * V * K) + vc[:, None] * K
    hats_ptr += index * ((3 + PARTS) * 16 * K)
    kc = tl.arange(0, BK)
    k1 = kc < K
    inside = v1[:, None] & k1[None, :]
    in_k = (t < 16)[:, None] & k1[None, :]
    tile = t[:, None] * K + kc[None, :]
    at_k = first * K + (kc[:, None] + (t * (H * K))[None, :])
    kk = k1[:, None] & (t < tokens)[None, :]
    kt = (t < tokens)[:, None] & k1[None, :]
    scores_ptr += index * 256 + (t[:, None] * 16 + t[None, :])
    p_unit = tl.load(states_scale + index)
    q_unit = tl.load(dstates_scale + index)
    k_unit = tl.load(units_ptr + index * 4)
    r_unit = tl.load(units_ptr + index * 4 + 1)
    v_unit = tl.load(units_ptr + index * 4 + 2)
    y_unit = q_unit
    if HAS_DY:
        y_unit = tl.load(units_ptr + index * 4 + 3)
    # Inside a branch, though there always are tokens: loads elsewhere the compiler moves to where
    # they are read, and a warp then waits for memory several times.
    if tokens > 0:
        E = tl.load(dstates_ptr + kc[None, :], inside, other=0.0)
        S = tl.load(states_ptr + kc[None, :], inside, other=0.0)
        w = tl.load(w_ptr + at_k, kk, other=0.0)
        Z = tl.load(moved_ptr + 16 * V, in_moved, other=0.0)
        U = tl.load(moved_ptr, in_moved, other=0.0)
        v = tl.load(v_ptr + at_v, vv, other=0.0)
        dy = v
        G = tl.zeros([16, 16], hats_ptr.dtype.element_ty)
        alpha = tl.load(hats_ptr + tile, in_k, other=0.0)
        beta = tl.load(hats_ptr + 16 * K + tile, in_k, other=0.0)
        rho = tl.load(hats_ptr + 32 * K + tile, in_k, other=0.0)
        R = tl.load(hats_ptr + 48 * K + tile, in_k, other=0.0)
        k = tl.load(k_ptr + first * K + (t * (H * K))[:, None] + kc[None, :], kt, other=0.0)
        if HAS_DY:
            dy = tl.load(dy_ptr + at_v, vv, other=0.0)
            G = tl.load(scores_ptr)
    else:
        E = tl.zeros([BV, BK], hats_ptr.dtype.element_ty)
        S = E
        w = tl.zeros([BK, 16], w_ptr.dtype.element_ty)
        Z = tl.zeros([16, BV], hats_ptr.dtype.element_ty)
        U = Z
        v = tl.zeros([16, BV], v_ptr.dtype.element_ty)
        dy = v
        G = tl.zeros([16, 16], hats_ptr.dtype.element_ty)
        alpha = tl.zeros([16, BK], hats_ptr.dtype.element_ty)
        beta = alpha
        k = tl.zeros([16, BK], k_ptr.dtype.element_ty)
        rho = alpha
        R = alpha

    dv = _dot(E, tl.trans(R), tl.zeros([BV, 16], tl.float32))
    if PARTS == 2:
        dv = _dot(E, tl.trans(tl.load(hats_ptr + 64 * K + tile, in_k, other=0.0)), dv)
        E_low = tl.load(dstates_ptr + V * K + kc[None, :], inside, other=0.0)
        dv = _dot(E_low, tl.trans(R), dv)
    if HAS_DY:
        dy = narrow(dy.to(tl.float32) * (r_unit / y_unit), HOW)
        dv = _dot(tl.trans(dy), tl.trans(_by(G, y_unit / q_unit)), dv)
    at_vt = first * V + (vc[:, None] + (t * (H * V))[None, :])
    vvt = v1[:, None] & (t < tokens)[None, :]
    tl.store(dv_ptr + at_vt, (dv * (q_unit * k_unit)).to(dv_ptr.dtype.element_ty), vvt)

    # The gradients of the scores.
    kept = tl.sum(S.to(tl.float32) * E.to(tl.float32), 0)
    v = narrow(v.to(tl.float32) * (k_unit / v_unit), HOW)
    vp = v_unit / p_unit
    yq = y_unit / q_unit
    above = t[:, None] < t[None, :]
    from_it = t[:, None] <= t[None, :]
    no_cc = tl.zeros([16, 16], tl.float32)
    zt = tl.trans(Z)
    vz = narrow(tl.where(above, _dot(v, zt, no_cc), 0.0), HOW)
    uz = narrow(tl.where(above, _dot(U, zt, no_cc), 0.0), HOW)
    if HAS_DY:
        yt = tl.trans(dy)
        vy = narrow(tl.where(from_it, _dot(v, yt, no_cc), 0.0), HOW)
        uy = narrow(tl.where(from_it, _dot(U, yt, no_cc), 0.0), HOW)
    from_each = tl.where(t[:, None] >= t[None, :], 1.0, 0.0).to(tl.bfloat16)

    none = tl.zeros([BK, 16], tl.float32)
    decay, slope = _decay_and_slope(_finite(w, HOW), LOGIT)
    decay = tl.where(kk, decay, 0.0)
    g = multiply(decay, counting(16, 0), none, HOW)
    before = tl.exp2(multiply(decay, counting(16, 1), none, HOW))
    up = tl.exp2(g)
    down = tl.exp2(-g)
    kappa = narrow(_as_products(tl.trans(k), HOW) * (down * (1.0 / k_unit)), HOW)
    alpha = tl.trans(alpha)
    beta = tl.trans(beta)
    rho = tl.trans(rho)

    d = _dot(tl.trans(S), zt, none)
    d = _dot(kappa, _by(vz, vp), d)
    d = _dot(beta, uz, d) * (q_unit * p_unit)
    after = _as_products(alpha, HOW) * d
    tl.store(da_ptr + at_k, (d * before).to(da_ptr.dtype.element_ty), kk)
    arrives = after
    d = none
    if HAS_DY:
        d = _dot(tl.trans(S), yt, none)
        d = _dot(kappa, _by(vy, vp), d)
        d = _dot(beta, uy, d) * (y_unit * p_unit)
        arrives += _as_products(rho, HOW) * d
    tl.store(dr_ptr + at_k, (d * (up * (1.0 / r_unit))).to(dr_ptr.dtype.element_ty), kk)
    d = _dot(tl.trans(E), tl.trans(v), none)
    hat = kappa.to(tl.float32)
    passing = tl.sum(hat * d, 1) * (v_unit * q_unit)
    d = _dot(alpha, tl.trans(vz), d)
    if HAS_DY:
        d = _dot(rho, tl.trans(_by(vy, yq)), d)
    d *= v_unit * q_unit
    arrives -= hat * d
    tl.store(dk_ptr + at_k, (d * (down * (1.0 / k_unit))).to(dk_ptr.dtype.element_ty), kk)
    d = _dot(tl.trans(E), tl.trans(U), none)
    hat = _as_products(beta, HOW)
    passing += tl.sum(hat * d, 1) * (p_unit * q_unit)
    d = _dot(alpha, tl.trans(uz), d)
    if HAS_DY:
        d = _dot(rho, tl.trans(_by(uy, yq)), d)
    d *= p_unit * q_unit
    arrives -= hat * d
    tl.store(db_ptr + at_k, (d * down).to(db_ptr.dtype.element_ty), kk)

    # What arrives at the decays from this token on, and what passes to the state after the
    # step: all that keys leave there, and what was there.
    passing += kept * (p_unit * q_unit)
    dlog = multiply(arrives, from_each, none, HOW) - after + passing[:, None]
    tl.store(dw_ptr + at_k, (dlog * slope).to(dw_ptr.dtype.element_ty), kk)
