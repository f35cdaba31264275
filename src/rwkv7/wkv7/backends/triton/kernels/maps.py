"""Forward, chunk by chunk and all chunks at once: what a chunk does to the state and to y.

S is the state before a chunk and D the diagonal of the whole chunk's decays; α, β, κ, ρ are a, b,
k, r times the decays from the chunk's start (α, ρ) or back to it (β, κ), β̄ and κ̄ times those to
its end; A_ab and its like are the lower triangles of their products and X = (I - A_ab)⁻¹:

    state after  S·D + S·M + Vᵀ·R        M = (X·α)ᵀ·β̄     R = κ̄ + Nᵀ·β̄      N = X·A_ak
    outputs      Q·Sᵀ + G·V              Q = ρ + A_rb·X·α  G = A_rk + A_rb·N

Nothing here needs the state or V, so little is left for the walk over chunks (walks.py), and the
backward pass reads the same maps: dV = Gᵀ·dY + R·Eᵀ. It also needs what the tokens remove,
U = N·V + W·Sᵀ with W = X·α, and its gradient Z = Pᵀ·dY + W_b·Eᵀ with P = A_rb·X, W_b = Xᵀ·β̄.
"""

import triton
import triton.language as tl

from .tiles import (
    chunk_bounds,
    counting,
    halved,
    log2_decay,
    lower_inverse,
    multiply,
    narrow,
    store_power,
    store_scaled,
)


@triton.jit(do_not_specialize=["sequences", "T", "H"])
def chunk_maps(
    r_ptr: tl.tensor,
    w_ptr: tl.tensor,
    k_ptr: tl.tensor,
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    move_ptr: tl.tensor,
    query_ptr: tl.tensor,
    direct_ptr: tl.tensor,
    write_ptr: tl.tensor,
    remove_ptr: tl.tensor,
    replace_ptr: tl.tensor,
    joint_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    cu: tl.tensor,
    sequences: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    LOGIT: tl.constexpr,
    PACKED: tl.constexpr,
    SAVE: tl.constexpr,
    HOW: tl.constexpr,
):
    """ends [n, H, 2, K]: the decays from the chunk's start to its middle and from there to its end;
    move [n, H, K, K] = M, query [n, H, C, K] = Q, direct [n, H, C, C] = G, write [n, H, C, K] = R
    for n chunks. With SAVE also remove [n, H, C, K] = W, replace [n, H, C, K] = W_b and joint
    [n, H, C, C]: N below the diagonal, Pᵀ on and above it. scale [n, H, 7, C] holds the powers of
    two of the rows of query, direct and Pᵀ and, as logarithms, those of α, β, κ, ρ."""
    chunk = tl.program_id(0) // H
    h = tl.program_id(0) % H
    start, tokens = chunk_bounds(chunk, cu, sequences, T, C, PACKED)
    if tokens <= 0:
        return
    t = tl.arange(0, C)
    kc = tl.arange(0, BK)
    t1 = t < C
    k1 = kc < K
    kk = (t < tokens)[:, None] & k1[None, :]
    # Scalars carry the 64-bit part of every address: a tile of 64-bit offsets fills the registers.
    first = start * H + h
    r_ptr += first * K
    w_ptr += first * K
    k_ptr += first * K
    a_ptr += first * K
    b_ptr += first * K
    at_k = (t * (H * K))[:, None] + kc[None, :]
    below = t[:, None] > t[None, :]
    above = t[:, None] < t[None, :]
    upto = t[:, None] >= t[None, :]
    index = tl.program_id(0).to(tl.int64)
    move_ptr += index * (K * K)
    query_ptr += index * (C * K)
    direct_ptr += index * (C * C)
    write_ptr += index * (C * K)
    remove_ptr += index * (C * K)
    replace_ptr += index * (C * K)
    joint_ptr += index * (C * C)
    scale_ptr += index * (7 * C) + t
    ck = t[:, None] * K + kc[None, :]
    in_ck = t1[:, None] & k1[None, :]
    cc = t[:, None] * C + t[None, :]
    in_cc = t1[:, None] & t1[None, :]

    # Rows past the end have decay 1 and zeros elsewhere. Exponents are taken from the middle of the
    # chunk: at RWKV-7's strongest decay they stay within ±C·0.44. Every tile is asked for long
    # before its use: what waits for memory here has no other program to hide behind.
    w = tl.load(w_ptr + at_k, kk, other=0.0)
    a = tl.load(a_ptr + at_k, kk, other=0.0)
    b = tl.load(b_ptr + at_k, kk, other=0.0)
    PRECISION: tl.constexpr = "tf32" if HOW != "ieee" else HOW  # fp16 operands take no notice
    no_cc = tl.zeros([C, C], tl.float32)
    no_ck = tl.zeros([C, BK], tl.float32)
    decay = tl.where(kk, log2_decay(w, LOGIT), 0.0)
    middle = tl.sum(tl.where((t < C // 2)[:, None], decay, 0.0), 0)
    last = tl.sum(decay, 0)
    g = multiply(tl.trans(counting(C, 0)), decay, no_ck, HOW)
    alpha = a.to(tl.float32) * tl.exp2(multiply(tl.trans(counting(C, 1)), decay, no_ck, HOW))
    beta = b.to(tl.float32) * tl.exp2(-g)
    to_start = tl.exp2(middle)
    to_end = tl.exp2(last - middle)
    tl.store(ends_ptr + index * (2 * K) + kc, to_start, k1)
    tl.store(ends_ptr + index * (2 * K) + K + kc, to_end, k1)
    if SAVE:
        store_power(alpha, scale_ptr + 3 * C, HOW)
        store_power(beta, scale_ptr + 4 * C, HOW)
    # What is referenced to the chunk's start or end does not exceed a, b, k: fp16 holds it.
    ending = narrow(beta * to_end[None, :], HOW)
    A_ab = tl.where(below, multiply(alpha, beta, no_cc, HOW, YT=True), 0.0)
    X = lower_inverse(A_ab, C, HOW)
    k = tl.load(k_ptr + at_k, kk, other=0.0)
    r = tl.load(r_ptr + at_k, kk, other=0.0)

    W = multiply(X, alpha, no_ck, HOW) * to_start[None, :]
    if HOW != "ieee" and move_ptr.dtype.element_ty == tl.float32:
        M = multiply(W, beta * to_end[None, :], tl.zeros([BK, BK], tl.float32), HOW, XT=True)
        W = narrow(W, HOW)
    else:
        W = narrow(W, HOW)
        M = tl.dot(tl.trans(W), ending, input_precision=PRECISION)
    if SAVE:
        tl.store(remove_ptr + ck, W, in_ck)
    square = move_ptr + kc[:, None] * K + kc[None, :]
    tl.store(square, M.to(move_ptr.dtype.element_ty), k1[:, None] & k1[None, :])
    kappa = k.to(tl.float32) * tl.exp2(-g)
    if SAVE:
        store_power(kappa, scale_ptr + 5 * C, HOW)
    # α·κᵀ as (κ·αᵀ)ᵀ: α is then read from shared memory, where X·α has put it.
    A_ka = tl.where(above, multiply(kappa, alpha, no_cc, HOW, YT=True), 0.0)
    N = narrow(multiply(X, A_ka, no_cc, HOW, YT=True), HOW)
    R = tl.dot(tl.trans(N), ending, acc=kappa * to_end[None, :], input_precision=PRECISION)
    tl.store(write_ptr + ck, narrow(R, HOW), in_ck)
    if SAVE:
        W_b = multiply(X, beta, no_ck, HOW, XT=True) * to_end[None, :]
        tl.store(replace_ptr + ck, narrow(W_b, HOW), in_ck)

    # What carries the size of r is divided by a power of two a row; the rest is near 1.
    rho = r.to(tl.float32) * tl.exp2(g)
    A_rb = tl.where(upto, multiply(rho, beta, no_cc, HOW, YT=True), 0.0)
    if SAVE:
        store_power(rho, scale_ptr + 6 * C, HOW)
        P, power = halved(multiply(X, A_rb, no_cc, HOW, XT=True, YT=True), HOW)
        tl.store(scale_ptr + 2 * C, power)
        tl.store(joint_ptr + cc, tl.where(below, N, P))
    A_rk = tl.where(upto, multiply(rho, kappa, no_cc, HOW, YT=True), 0.0)
    A_rb, power = halved(A_rb, HOW)
    G = A_rk + tl.dot(A_rb, N, input_precision=PRECISION) * power[:, None]
    store_scaled(G, direct_ptr + cc, in_cc, scale_ptr + C, t1)
    Q = rho * to_start[None, :] + tl.dot(A_rb, W, input_precision=PRECISION) * power[:, None]
    store_scaled(Q, query_ptr + ck, in_ck, scale_ptr, t1)
