"""The two walks over a sequence's chunks: the state forward, its gradient backward.

One program walks one sequence of one head with a block of the state's rows [BV, K] in registers.
What a chunk does was prepared by maps.py. With OUT the walk also makes what the chunk gives out, y
or dv; else the walk is as short as can be, and `chunk_outputs` makes that for all chunks at once.
"""

import triton
import triton.language as tl

from .tiles import (
    factor,
    first_chunk,
    load_scaled,
    load_transposed,
    multiply,
    row_powers,
    sequence_bounds,
)


@triton.jit
def walk_product(
    S: tl.tensor,
    half: tl.tensor,
    power: tl.tensor,
    M: tl.tensor,
    HOW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """S·M, or S·Mᵀ: of S as `halved` gives it where M is fp16, of S itself where M is fp32.

    S·D + S·M is smaller than either where a chunk forgets much, so for fp16 inputs, held to finer
    bounds than bf16 ones, M is kept in fp32.
    """
    if M.dtype == tl.float32:
        product = multiply(S, M, tl.zeros(S.shape, tl.float32), HOW, YT=TRANSPOSED)
    else:
        product = tl.dot(half, tl.trans(M) if TRANSPOSED else M) * power[:, None]
    return product


@triton.jit(do_not_specialize=["T", "H"])
def walk_states(
    ends_ptr: tl.tensor,
    move_ptr: tl.tensor,
    query_ptr: tl.tensor,
    direct_ptr: tl.tensor,
    write_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    v_ptr: tl.tensor,
    state_ptr: tl.tensor,
    y_ptr: tl.tensor,
    final_ptr: tl.tensor,
    states_ptr: tl.tensor,
    states_scale: tl.tensor,
    cu: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PACKED: tl.constexpr,
    GIVEN: tl.constexpr,
    SAVE: tl.constexpr,
    OUT: tl.constexpr,
    HOW: tl.constexpr,
):
    """The final state, and y with OUT; with SAVE the state before every chunk, states [n, H, V, K]
    and the powers of two of its rows, states_scale [n, H, V]."""
    pair = tl.program_id(0)
    s = pair // H
    h = pair % H
    t = tl.arange(0, C)
    kc = tl.arange(0, BK)
    vc = tl.program_id(1) * BV + tl.arange(0, BV)
    k1 = kc < K
    v1 = vc < V
    square = vc[:, None] * K + kc[None, :]
    inside = v1[:, None] & k1[None, :]
    start, tokens = sequence_bounds(s, cu, T, PACKED)
    chunk = first_chunk(s, cu, T, C, PACKED).to(tl.int64)
    S = tl.zeros([BV, BK], tl.float32)
    if GIVEN:
        S = tl.load(state_ptr + pair.to(tl.int64) * (V * K) + square, inside, other=0.0)
    for n in range(tl.cdiv(tokens, C)):
        index = (chunk + n) * H + h
        scale = scale_ptr + index * (7 * C) + t
        M = tl.load(
            move_ptr + index * (K * K) + kc[:, None] * K + kc[None, :],
            k1[:, None] & k1[None, :],
            other=0.0,
        )
        ck = index * (C * K) + (t[:, None] * K + kc[None, :])
        in_ck = (t < C)[:, None] & k1[None, :]
        R = tl.load(write_ptr + ck, in_ck, other=0.0).to(tl.float32)
        at_v = ((start + n * C) * H + h) * V + (t * (H * V))[:, None] + vc[None, :]
        vv = (n * C + t < tokens)[:, None] & v1[None, :]
        v = factor(v_ptr + at_v, vv, HOW)
        if OUT:
            Q = tl.load(query_ptr + ck, in_ck, other=0.0)
            cc = index * (C * C) + (t[:, None] * C + t[None, :])
            G = load_scaled(direct_ptr + cc, (t[:, None] < C) & (t[None, :] < C), scale + C, t < C)
            Y = multiply(G, v, tl.zeros([C, BV], tl.float32), HOW)
        B = multiply(v, R, tl.zeros([BV, BK], tl.float32), HOW, XT=True)
        D = tl.load(ends_ptr + index * (2 * K) + kc, k1, other=0.0)
        D *= tl.load(ends_ptr + index * (2 * K) + K + kc, k1, other=0.0)
        kept = states_ptr + index * (V * K) + square
        if HOW != "ieee":
            power = row_powers(S)
            half = (S * (1.0 / power)[:, None]).to(tl.float16)
            if SAVE:
                tl.store(states_scale + index * V + vc, power, v1)
                tl.store(kept, half, inside)
            S_M = walk_product(S, half, power, M, HOW, False)
            S = S * D[None, :] + B + S_M
            if OUT:
                rows = tl.load(scale, t < C, other=0.0)
                Y += tl.dot(Q, tl.trans(half)) * rows[:, None] * power[None, :]
        else:
            if SAVE:
                tl.store(kept, S, inside)
            if OUT:
                Y = tl.dot(Q, tl.trans(S), acc=Y, input_precision=HOW)
            S = tl.dot(S, M, acc=S * D[None, :] + B, input_precision=HOW)
        if OUT:
            tl.store(y_ptr + at_v, Y.to(y_ptr.dtype.element_ty), vv)
    tl.store(final_ptr + pair.to(tl.int64) * (V * K) + square, S, inside)


@triton.jit(do_not_specialize=["T", "H"])
def walk_states_back(
    ends_ptr: tl.tensor,
    move_ptr: tl.tensor,
    query_ptr: tl.tensor,
    direct_ptr: tl.tensor,
    write_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    dy_ptr: tl.tensor,
    dfinal_ptr: tl.tensor,
    dstates_ptr: tl.tensor,
    dstates_scale: tl.tensor,
    dstate_ptr: tl.tensor,
    dv_ptr: tl.tensor,
    cu: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_DY: tl.constexpr,
    HAS_DFINAL: tl.constexpr,
    OUT: tl.constexpr,
    HOW: tl.constexpr,
):
    """The gradient of the state after every chunk, dstates [n, H, V, K] with dstates_scale
    [n, H, V], and of the initial one; with OUT also dv [B·T, H, V]."""
    pair = tl.program_id(0)
    s = pair // H
    h = pair % H
    t = tl.arange(0, C)
    kc = tl.arange(0, BK)
    vc = tl.program_id(1) * BV + tl.arange(0, BV)
    k1 = kc < K
    v1 = vc < V
    square = vc[:, None] * K + kc[None, :]
    inside = v1[:, None] & k1[None, :]
    start, tokens = sequence_bounds(s, cu, T, PACKED)
    chunk = first_chunk(s, cu, T, C, PACKED).to(tl.int64)
    chunks = tl.cdiv(tokens, C)
    E = tl.zeros([BV, BK], tl.float32)
    if HAS_DFINAL:
        E = tl.load(dfinal_ptr + pair.to(tl.int64) * (V * K) + square, inside, other=0.0)
    for step in range(chunks):
        n = chunks - 1 - step
        index = (chunk + n) * H + h
        M = tl.load(
            move_ptr + index * (K * K) + kc[:, None] * K + kc[None, :],
            k1[:, None] & k1[None, :],
            other=0.0,
        )
        D = tl.load(ends_ptr + index * (2 * K) + kc, k1, other=0.0)
        D *= tl.load(ends_ptr + index * (2 * K) + K + kc, k1, other=0.0)
        F = E * D[None, :]
        ck = index * (C * K) + (t[:, None] * K + kc[None, :])
        in_ck = (t < C)[:, None] & k1[None, :]
        at_v = ((start + n * C) * H + h) * V + (t * (H * V))[:, None] + vc[None, :]
        vv = (n * C + t < tokens)[:, None] & v1[None, :]
        if OUT:
            R = tl.load(write_ptr + ck, in_ck, other=0.0)
            dv = tl.zeros([C, BV], tl.float32)
        if HAS_DY:
            scale = scale_ptr + index * (7 * C)
            Q = load_scaled(query_ptr + ck, in_ck, scale + t, t < C)
            dy = factor(dy_ptr + at_v, vv, HOW)
            if OUT:
                G = load_transposed(direct_ptr + index * (C * C), scale + C, C, HOW)
                dv = multiply(G, dy, dv, HOW)
            F = multiply(dy, Q, F, HOW, XT=True)
        kept = dstates_ptr + index * (V * K) + square
        if HOW != "ieee":
            power = row_powers(E)
            half = (E * (1.0 / power)[:, None]).to(tl.float16)
            tl.store(dstates_scale + index * V + vc, power, v1)
            tl.store(kept, half, inside)
            if OUT:
                dv += tl.dot(R, tl.trans(half)) * power[None, :]
            E = F + walk_product(E, half, power, M, HOW, True)
        else:
            tl.store(kept, E, inside)
            if OUT:
                dv = tl.dot(R, tl.trans(E), acc=dv, input_precision=HOW)
            E = tl.dot(E, tl.trans(M), acc=F, input_precision=HOW)
        if OUT:
            tl.store(dv_ptr + at_v, dv.to(dv_ptr.dtype.element_ty), vv)
    tl.store(dstate_ptr + pair.to(tl.int64) * (V * K) + square, E, inside)
