"""Backward, all steps of 16 tokens at once, a warp each: what the walks and the gradients read.

Letters as in images.py, of a step and with exponents from its middle: U = W·Sᵀ + N·V is what the
tokens remove, Z = W_b·Eᵀ + Pᵀ·dY its gradient; W = X·α, N = X·A_ak, W_b = Xᵀ·β, P = A_rb·X; and
R = κ + Nᵀ·β, G = A_rk + A_rb·N, as forward, for dV = R·Eᵀ + Gᵀ·dY: what a repeated key takes away
is away in them, where from κ, A_ak and Z it would be a small sum of large terms.

Powers of two keep fp16 in its range: of κ and of ρ the size of k and r is taken out, and V and dY
take it on, for they come together everywhere.
"""

import triton
import triton.language as tl

from .slabs import slab_step
from .steps import dot_turned, load_inputs, step_inverse, step_operands
from .tiles import hat_dot, narrow, split_hat, tile_unit


@triton.jit
def _store_halves(tile, pointers, mask, gap: tl.constexpr, HOW: tl.constexpr):
    """Store a tile and, for "halves", `gap` further what rounding left."""
    high, low = split_hat(tile, HOW)
    tl.store(pointers, high, mask)
    if HOW == "halves":
        tl.store(pointers + gap, low, mask)


@triton.jit(do_not_specialize=["low", "L", "sequences", "T", "H"])
def prepare_steps(
    r_ptr: tl.tensor,
    w_ptr: tl.tensor,
    k_ptr: tl.tensor,
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    hats_ptr: tl.tensor,
    through_ptr: tl.tensor,
    direct_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    units_ptr: tl.tensor,
    cu: tl.tensor,
    low: tl.tensor,
    L: tl.tensor,
    sequences: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    LOGIT: tl.constexpr,
    PACKED: tl.constexpr,
    HOW: tl.constexpr,
):
    """For m steps of a slab: hats [m, H, 4, 16, K] = α, β, ρ, R; through [m, H, 2, 16, K] = W,
    W_b; direct [m, H, 2, 16, 16] = N, Pᵀ (for "halves" two numbers each of R, W, W_b, N and Pᵀ);
    scores [m, H, 16, 16] = Gᵀ; ends [m, H, 2, K], the decays from the step's start to its middle
    and from there to its end; units [m, H, 4], the powers of two out of κ and ρ, and room for those
    of v and dY, which the walks leave."""
    h = tl.program_id(0) % H
    start, tokens = slab_step(tl.program_id(0) // H, low, L, cu, sequences, T, C, PACKED)
    if tokens <= 0:
        return
    t = tl.arange(0, 16)
    kc = tl.arange(0, BK)
    k1 = kc < K
    kk = (t < tokens)[:, None] & k1[None, :]
    first = (start * H + h) * K
    at = (t * (H * K))[:, None] + kc[None, :]
    r, w, k, a, b = load_inputs(r_ptr, w_ptr, k_ptr, a_ptr, b_ptr, first, at, kk)
    index = tl.program_id(0).to(tl.int64)
    PARTS: tl.constexpr = 2 if HOW == "halves" else 1
    AREA: tl.constexpr = 16 * K
    tile = t[:, None] * K + kc[None, :]
    in_tile = (t < 16)[:, None] & k1[None, :]
    square = t[:, None] * 16 + t[None, :]
    every = (t < 16)[:, None] & (t < 16)[None, :]
    hats_ptr += index * ((3 + PARTS) * AREA) + tile
    through_ptr += index * (2 * PARTS * AREA) + tile
    direct_ptr += index * (2 * PARTS * 256) + square
    scores_ptr += index * 256 + square
    below = t[:, None] > t[None, :]
    above = t[:, None] < t[None, :]
    upto = t[:, None] >= t[None, :]
    from_it = t[:, None] <= t[None, :]
    none = tl.zeros([16, 16], tl.float32)
    no_k = tl.zeros([16, BK], tl.float32)
    PAIR: tl.constexpr = "ieee" if HOW == "ieee" else "halves"

    k_unit = tile_unit(k, HOW)
    r_unit = tile_unit(r, HOW)
    tl.store(units_ptr + index * 4, k_unit)
    tl.store(units_ptr + index * 4 + 1, r_unit)
    k = k.to(tl.float32) * (1.0 / k_unit)
    r = r.to(tl.float32) * (1.0 / r_unit)
    alpha, beta, kappa, rho, middle, whole = step_operands(r, w, k, a, b, kk, LOGIT, HOW)
    tl.store(ends_ptr + index * (2 * K) + kc, tl.exp2(middle), k1)
    tl.store(ends_ptr + index * (2 * K) + K + kc, tl.exp2(whole - middle), k1)
    al, al_low = split_hat(alpha, PAIR)
    be, be_low = split_hat(beta, PAIR)
    ka, ka_low = split_hat(kappa, PAIR)
    rh, rh_low = split_hat(rho, HOW)
    tl.store(hats_ptr, al, in_tile)
    tl.store(hats_ptr + AREA, be, in_tile)
    tl.store(hats_ptr + 2 * AREA, rh, in_tile)
    A_ab = tl.where(below, dot_turned(al, al_low, be, be_low, none, HOW), 0.0)
    A_ba = tl.where(above, dot_turned(be, be_low, al, al_low, none, HOW), 0.0)
    X, Xt = step_inverse(A_ab, A_ba, PAIR)
    x, x_low = split_hat(X, PAIR)
    xt, xt_low = split_hat(Xt, PAIR)
    A = tl.where(above, dot_turned(ka, ka_low, al, al_low, none, PAIR), 0.0)
    A, A_low = split_hat(A, PAIR)
    _store_halves(dot_turned(x, x_low, A, A_low, none, PAIR), direct_ptr, every, 256, HOW)
    n, n_low = split_hat(dot_turned(A, A_low, x, x_low, none, PAIR), PAIR)
    A = tl.where(upto, dot_turned(rh, rh_low, be, be_low, none, HOW), 0.0)
    A, A_low = split_hat(A, PAIR)
    P = dot_turned(xt, xt_low, A, A_low, none, PAIR)
    _store_halves(P, direct_ptr + PARTS * 256, every, 256, HOW)
    G = tl.where(from_it, dot_turned(ka, ka_low, rh, rh_low, none, HOW), 0.0)
    tl.store(scores_ptr, narrow(dot_turned(n, n_low, A, A_low, G, PAIR), HOW))
    W = hat_dot(x, x_low, al, al_low, no_k, PAIR)
    _store_halves(W, through_ptr, in_tile, AREA, HOW)
    W = hat_dot(xt, xt_low, be, be_low, no_k, PAIR)
    _store_halves(W, through_ptr + PARTS * AREA, in_tile, AREA, HOW)
    R = hat_dot(n, n_low, be, be_low, no_k, PAIR)
    if PAIR == "halves":
        # A product with one adds κ where the sum is, which keeps fewer registers till here.
        one = tl.where(t[:, None] == t[None, :], 1.0, 0.0).to(ka.dtype)
        R = tl.dot(one, ka, acc=R)
        R = tl.dot(one, ka_low, acc=R)
    else:
        R += kappa
    _store_halves(R, hats_ptr + 3 * AREA, in_tile, AREA, HOW)
