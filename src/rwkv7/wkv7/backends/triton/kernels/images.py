"""Forward, all steps of 16 tokens at once: what the walk reads of each.

Letters as in the algebra of docs/kernels.md: with exponents from the middle of a step, α, β, κ, ρ
are its decayed a, b, k, r and A_ab and its like the lower triangles of their products. To the
state before it, S, a step does

    Y = Q·Sᵀ + G·V      U = W·Sᵀ      S·D + Vᵀ·R + Uᵀ·B

    X = (I - A_ab)⁻¹    W = X·α       N = X·A_ak      P = A_rb·X
    Q = ρ + P·α         R = κ + Nᵀ·β  G = A_rk + A_rb·N   B = β

with W and Q taken to the step's start, R and B to its end, where none is larger than a, b, k or r.
Nothing here needs the state or V. A program is one warp, so that nothing in it waits for another:
what a product gives stays in its registers until the next one.
"""

import triton
import triton.language as tl

from .steps import dot_turned, load_inputs, step_inverse, step_operands, turned
from .tiles import chunk_bounds, hat_dot, high_part, low_part, split_hat, tile_power


@triton.jit
def store_parts(tile: tl.tensor, pointers: tl.tensor, gap: tl.constexpr, PARTS: tl.constexpr):
    """Store a tile in the dtype of `pointers` and, of two PARTS, what that leaves `gap` further."""
    dtype: tl.constexpr = pointers.dtype.element_ty
    if PARTS == 2 and dtype == tl.bfloat16:
        tl.store(pointers, high_part(tile))
        tl.store(pointers + gap, low_part(tile))
    else:
        high = tile.to(dtype)
        tl.store(pointers, high)
        if PARTS == 2:
            tl.store(pointers + gap, (tile - high.to(tl.float32)).to(dtype))


@triton.jit
def load_parts(pointers: tl.tensor, gap: tl.constexpr, PARTS: tl.constexpr):
    """What `store_parts` stored; of one part the same twice."""
    high = tl.load(pointers)
    low = high
    if PARTS == 2:
        low = tl.load(pointers + gap)
    return high, low


@triton.jit
def _step_power(x, x_ptr, first, at, inside, kc, K: tl.constexpr, BK: tl.constexpr):
    """The power of two of r or k, which have no natural size; x: the first 64 channels."""
    power = tile_power(x.to(tl.float32))
    for part in tl.static_range(64, BK, 64):
        more = tl.load(x_ptr + first + part + at, inside & (part + kc < K)[None, :], other=0.0)
        power = tl.maximum(power, tile_power(more.to(tl.float32)))
    return power


@triton.jit
def _step_squares(A_ab, A_ba, A_ka, A_rb, A_rk, HOW: tl.constexpr):
    """(X, Nᵀ, P as operands, G) of a step's products of rows of α, β, κ, ρ; A_ba = A_abᵀ."""
    t = tl.arange(0, 16)
    below = t[:, None] > t[None, :]
    above = t[:, None] < t[None, :]
    upto = t[:, None] >= t[None, :]
    none = tl.zeros([16, 16], tl.float32)
    X, Xt = step_inverse(tl.where(below, A_ab, 0.0), tl.where(above, A_ba, 0.0), HOW)
    x, x_low = split_hat(X, HOW)
    xt, xt_low = split_hat(Xt, HOW)
    ka, ka_low = split_hat(tl.where(above, A_ka, 0.0), HOW)
    rb, rb_low = split_hat(tl.where(upto, A_rb, 0.0), HOW)
    n, n_low = split_hat(dot_turned(ka, ka_low, x, x_low, none, HOW), HOW)
    p, p_low = split_hat(dot_turned(rb, rb_low, xt, xt_low, none, HOW), HOW)
    G = dot_turned(rb, rb_low, n, n_low, tl.where(upto, A_rk, 0.0), HOW)
    return x, x_low, n, n_low, p, p_low, G


@triton.jit(do_not_specialize=["sequences", "T", "H"])
def step_images(
    r_ptr: tl.tensor,
    w_ptr: tl.tensor,
    k_ptr: tl.tensor,
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    write_ptr: tl.tensor,
    direct_ptr: tl.tensor,
    words_ptr: tl.tensor,
    cu: tl.tensor,
    sequences: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    K: tl.constexpr,
    BK: tl.constexpr,
    LOGIT: tl.constexpr,
    PACKED: tl.constexpr,
    HOW: tl.constexpr,
):
    """tiles [m, H, 3 · PARTS, 16, BK] = W, Q, for HOW "halves" what fp16 left of both, B and what
    it left; write [m, H, 2, 16, BK] = R and direct [m, H, 2, 16, 16] = G in two numbers of the
    dtype of v each ("ieee": one); words [m, H, BK + 32] = D and, 16 times each, the powers of two
    of r, which Q and G lack, and of k, which for HOW "halves" R and G lack (a 16th of it).

    m counts steps; packed, some numbers are unused and not written. Channels go in parts of
    64, the last of which stays in registers.
    """
    h = tl.program_id(0) % H
    step = tl.program_id(0) // H
    start, tokens = chunk_bounds(step, cu, sequences, T, 16, PACKED)
    if tokens <= 0:
        return
    PARTS: tl.constexpr = 2 if HOW == "halves" else 1
    VALUE_PARTS: tl.constexpr = 1 if HOW == "ieee" else 2
    PAIR: tl.constexpr = "ieee" if HOW == "ieee" else "halves"
    AREA: tl.constexpr = 16 * BK
    t = tl.arange(0, 16)
    kc = tl.arange(0, 64)
    at = (t * (H * K))[:, None] + kc[None, :]
    square = t[:, None] * 16 + t[None, :]
    none = tl.zeros([16, 16], tl.float32)
    index = tl.program_id(0).to(tl.int64)
    tile = t[:, None] * BK + kc[None, :]
    tiles_ptr += index * (3 * PARTS * AREA) + tile
    write_ptr += index * (VALUE_PARTS * AREA) + tile
    words_ptr += index * (BK + 32)
    first = (start * H + h) * K
    inside = (t < tokens)[:, None]
    kk = inside & (kc < K)[None, :]
    r, w, k, a, b = load_inputs(r_ptr, w_ptr, k_ptr, a_ptr, b_ptr, first, at, kk)
    r_power = _step_power(r, r_ptr, first, at, inside, kc, K, BK)
    k_power = _step_power(k, k_ptr, first, at, inside, kc, K, BK)
    tl.store(words_ptr + BK + t, r_power)
    written_power = k_power
    if HOW == "halves":
        # Room for small keys beside a large one, where fp16 has no more digits.
        written_power = 16.0
        tl.store(words_ptr + BK + 16 + t, k_power * (1.0 / written_power))
    A_ab, A_ba, A_ka, A_rb, A_rk = none, none, none, none, none
    for part in tl.static_range(0, BK, 64):
        kk = inside & (part + kc < K)[None, :]
        if part > 0:
            r, w, k, a, b = load_inputs(r_ptr, w_ptr, k_ptr, a_ptr, b_ptr, first + part, at, kk)
        alpha, beta, kappa, rho, middle, whole = step_operands(r, w, k, a, b, kk, LOGIT, HOW)
        al, al_low = split_hat(alpha, HOW)
        be, be_low = split_hat(beta, PAIR)
        kappa *= 1.0 / k_power
        rho *= 1.0 / r_power
        ka, ka_low = split_hat(kappa, HOW)
        rh, rh_low = split_hat(rho, HOW)
        A_ab = dot_turned(al, al_low, be, be_low, A_ab, HOW)
        A_ba = dot_turned(be, be_low, al, al_low, A_ba, HOW)
        A_ka = dot_turned(ka, ka_low, al, al_low, A_ka, HOW)
        A_rb = dot_turned(rh, rh_low, be, be_low, A_rb, HOW)
        A_rk = dot_turned(rh, rh_low, ka, ka_low, A_rk, HOW)
    x, x_low, n, n_low, p, p_low, G = _step_squares(A_ab, A_ba, A_ka, A_rb, A_rk, HOW)
    G *= written_power
    store_parts(G, direct_ptr + index * (VALUE_PARTS * 256) + square, 256, VALUE_PARTS)
    for back in tl.static_range(0, BK, 64):
        part = BK - 64 - back
        if back > 0:
            kk = inside & (part + kc < K)[None, :]
            r, w, k, a, b = load_inputs(r_ptr, w_ptr, k_ptr, a_ptr, b_ptr, first + part, at, kk)
            alpha, beta, kappa, rho, middle, whole = step_operands(r, w, k, a, b, kk, LOGIT, HOW)
            al, al_low = split_hat(alpha, HOW)
            be, be_low = split_hat(beta, PAIR)
            kappa *= 1.0 / k_power
            rho *= 1.0 / r_power
        to_start = tl.exp2(middle)[None, :]
        to_end = tl.exp2(whole - middle)
        tl.store(words_ptr + part + kc, tl.exp2(whole))
        # Right factors with tokens as rows: the way through shared memory is shorter here.
        be, be_low = tl.trans(turned(be)), tl.trans(turned(be_low))
        R = hat_dot(n, n_low, be, be_low, kappa, HOW)
        if HOW == "half":
            # On a repeated key little is left of κ, and every step leaves its error in the state.
            R = tl.dot(n, be_low, acc=R)
        store_parts(R * (to_end * written_power)[None, :], write_ptr + part, AREA, VALUE_PARTS)
        store_parts(beta * to_end[None, :], tiles_ptr + 2 * PARTS * AREA + part, AREA, PARTS)
        al, al_low = tl.trans(turned(al)), tl.trans(turned(al_low))
        W = hat_dot(x, x_low, al, al_low, tl.zeros([16, 64], tl.float32), HOW)
        store_parts(W * to_start, tiles_ptr + part, 2 * AREA, PARTS)
        Q = hat_dot(p, p_low, al, al_low, rho, HOW)
        store_parts(Q * to_start, tiles_ptr + AREA + part, 2 * AREA, PARTS)
