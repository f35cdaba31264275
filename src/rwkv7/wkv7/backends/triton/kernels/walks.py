"""The walk over a sequence's steps of 16 tokens, and over its segments where pairs are few.

One program walks a block of the state's rows [BV, K] of one (sequence, head) in registers, and
reads of a step what `step_images` prepared. A segment of a sequence takes a state S to S·M + B:
`segment_maps` walks M from the identity and B from zero, `chain_segments` passes the state on, and
then all segments are walked at once.
"""

import triton
import triton.language as tl

from .images import load_parts
from .tiles import first_chunk, hat_dot, multiply, row_powers, sequence_bounds, split_hat


@triton.jit
def _step_words(words_ptr, kc, row, there, BK: tl.constexpr, HOW: tl.constexpr):
    """(D, the powers of r and k for every row) of a step that may not be `there`.

    That of k is 1 but for fp16 inputs: the dtype of R and G has its range.

    What no product reads Triton's pipeline leaves where it is, so it is asked for a step ahead; the
    powers at 16 places, for the compiler waits at once for what is the same in all threads.
    """
    D = tl.load(words_ptr + kc, (kc < BK) & there, other=0.0)
    r_power = tl.load(words_ptr + BK + row % 16, (row >= 0) & there, other=0.0)
    k_power = tl.full(row.shape, 1.0, tl.float32)
    if HOW == "halves":
        k_power = tl.load(words_ptr + BK + 16 + row % 16, (row >= 0) & there, other=0.0)
    return D, r_power, k_power


@triton.jit
def _scaled_state(S, HOW: tl.constexpr):
    """(The powers of two of a state's rows, the state without them, the same as an operand.)"""
    power = tl.full([S.shape[0]], 1.0, tl.float32)
    if HOW != "ieee":
        power = row_powers(S)
        S *= (1.0 / power)[:, None]
    half, low = split_hat(S, HOW)
    return power, S, half, low


@triton.jit
def _value_dot(v, x, x_low, acc, HOW: tl.constexpr):
    """acc + v·x, x in two numbers of the dtype of v: v needs no scale then."""
    if HOW == "ieee":
        acc = tl.dot(v.to(tl.float32), x, acc=acc, input_precision="ieee")
    else:
        acc = tl.dot(v, x, acc=acc)
        acc = tl.dot(v, x_low, acc=acc)
    return acc


@triton.jit
def _next_state(S, U, power, k_power, v, R, R_low, B, B_low, D, HOW: tl.constexpr):
    """S·D + v·R + U·B, where S and U lack the powers of the rows, and R that of k.

    One sum takes on one after the other: two would need more registers than there are.
    """
    U, U_low = split_hat(U, HOW)
    S = hat_dot(U, U_low, B, B_low, S * D[None, :], HOW) * (power * (1.0 / k_power))[:, None]
    return _value_dot(v, R, R_low, S, HOW) * k_power[:, None]


@triton.jit(do_not_specialize=["given", "T", "H", "span"])
def walk_segments(
    tiles_ptr: tl.tensor,
    write_ptr: tl.tensor,
    direct_ptr: tl.tensor,
    words_ptr: tl.tensor,
    v_ptr: tl.tensor,
    state_ptr: tl.tensor,
    given: tl.tensor,
    y_ptr: tl.tensor,
    final_ptr: tl.tensor,
    states_ptr: tl.tensor,
    states_scale: tl.tensor,
    cu: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    span: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PACKED: tl.constexpr,
    SAVE: tl.constexpr,
    HOW: tl.constexpr,
):
    """y [B·T, H, V] and the final state; with SAVE also the state before every chunk, in states
    [n, H, V, K], and the powers of two of its rows, states_scale [n, H, V].

    Programs: (sequence, head) and, next to each other as they read the same, block of V; segment
    of `span` tokens, a multiple of 16. state: that before every segment, [pairs, segments, V, K],
    zeros unless `given`.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    pair = tl.program_id(0) // BLOCKS
    segment = tl.program_id(1)
    s = pair // H
    h = pair % H
    start, tokens = sequence_bounds(s, cu, T, PACKED)
    last = (segment + 1) * span >= tokens
    before = segment * span // 16  # steps
    start += segment * span
    tokens = tl.minimum(tokens - segment * span, span)
    PARTS: tl.constexpr = 2 if HOW == "halves" else 1
    VALUE_PARTS: tl.constexpr = 1 if HOW == "ieee" else 2
    AREA: tl.constexpr = 16 * BK
    t = tl.arange(0, 16)
    kc = tl.arange(0, BK)
    vc = tl.program_id(0) % BLOCKS * BV + tl.arange(0, BV)
    v1 = vc < V
    square = vc[:, None] * K + kc[None, :]
    inside = v1[:, None] & (kc < K)[None, :]
    given_state = pair.to(tl.int64) * tl.num_programs(1) + segment
    S = tl.load(state_ptr + given_state * (V * K) + square, inside & (given != 0), other=0.0)
    tile = t[:, None] * BK + kc[None, :]
    two_tiles = tl.arange(0, 32)[:, None] * BK + kc[None, :]
    small = t[:, None] * 16 + t[None, :]
    at_v = (t * (H * V))[:, None] + vc[None, :]
    steps = tl.cdiv(tokens, 16)
    image = (first_chunk(s, cu, T, 16, PACKED).to(tl.int64) + before) * H + h
    chunk = first_chunk(s, cu, T, C, PACKED).to(tl.int64)
    words_ptr += image * (BK + 32)
    next_D, next_r, next_k = _step_words(words_ptr, kc, vc, steps > 0, BK, HOW)
    for n in range(steps):
        index = image + n * H
        tiles = tiles_ptr + index * (3 * PARTS * AREA)
        write = write_ptr + index * (VALUE_PARTS * AREA) + tile
        direct = direct_ptr + index * (VALUE_PARTS * 256) + small
        WQ, WQ_low = load_parts(tiles + two_tiles, 2 * AREA, PARTS)
        B, B_low = load_parts(tiles + 2 * PARTS * AREA + tile, AREA, PARTS)
        R, R_low = load_parts(write, AREA, VALUE_PARTS)
        G, G_low = load_parts(direct, 256, VALUE_PARTS)
        D, r_power, k_power = next_D, next_r, next_k
        words_ptr += H * (BK + 32)
        next_D, next_r, next_k = _step_words(words_ptr, kc, vc, n + 1 < steps, BK, HOW)
        at = ((start + n * 16) * H + h) * V
        vv = (n * 16 + t < tokens)[:, None] & v1[None, :]
        v = tl.trans(tl.load(v_ptr + at + at_v, vv, other=0.0))
        power, S, half, low = _scaled_state(S, HOW)
        if SAVE:
            where = (chunk + (before + n) // (C // 16)) * H + h
            kept = (before + n) % (C // 16) == 0
            tl.store(states_ptr + where * (V * K) + square, half, kept & inside)
            if HOW != "ieee":
                tl.store(states_scale + where * V + vc, power, kept & v1)
        both = tl.zeros([BV, 32], tl.float32)
        both = hat_dot(half, low, tl.trans(WQ), tl.trans(WQ_low), both, HOW)
        U, Y = tl.split(tl.permute(tl.reshape(both, [BV, 2, 16]), (0, 2, 1)))
        Y *= (power * (1.0 / k_power))[:, None]
        Y = _value_dot(v, tl.trans(G), tl.trans(G_low), Y, HOW)
        Y = Y * k_power[:, None] * r_power[:, None]
        S = _next_state(S, U, power, k_power, v, R, R_low, B, B_low, D, HOW)
        tl.store(y_ptr + at + at_v, tl.trans(Y).to(y_ptr.dtype.element_ty), vv)
    tl.store(final_ptr + pair.to(tl.int64) * (V * K) + square, S, inside & last)


@triton.jit(do_not_specialize=["T", "H", "span"])
def segment_maps(
    tiles_ptr: tl.tensor,
    write_ptr: tl.tensor,
    words_ptr: tl.tensor,
    v_ptr: tl.tensor,
    maps_ptr: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    span: tl.tensor,
    V: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HOW: tl.constexpr,
):
    """maps [pairs, segments, BK + V, BK]: M, then B, of every segment but a sequence's last.

    Programs: (sequence, head) and block of those rows; segment of `span` tokens, a multiple of 16.
    """
    BLOCKS: tl.constexpr = BK // BV + (V + BV - 1) // BV
    pair = tl.program_id(0) // BLOCKS
    segment = tl.program_id(1)
    h = pair % H
    PARTS: tl.constexpr = 2 if HOW == "halves" else 1
    VALUE_PARTS: tl.constexpr = 1 if HOW == "ieee" else 2
    AREA: tl.constexpr = 16 * BK
    t = tl.arange(0, 16)
    kc = tl.arange(0, BK)
    row = tl.program_id(0) % BLOCKS * BV + tl.arange(0, BV)
    vc = row - BK
    vv = (t < 16)[:, None] & ((vc >= 0) & (vc < V))[None, :]
    at_v = (t * (H * V))[:, None] + vc[None, :]
    tile = t[:, None] * BK + kc[None, :]
    S = tl.where(row[:, None] == kc[None, :], 1.0, 0.0)
    start = (pair // H).to(tl.int64) * T + segment * span
    image = ((pair // H).to(tl.int64) * tl.cdiv(T, 16) + segment * span // 16) * H + h
    steps = span // 16
    words_ptr += image * (BK + 32)
    next_D, _, next_k = _step_words(words_ptr, kc, row, steps > 0, BK, HOW)
    for n in range(steps):
        index = image + n * H
        tiles = tiles_ptr + index * (3 * PARTS * AREA) + tile
        write = write_ptr + index * (VALUE_PARTS * AREA) + tile
        W, W_low = load_parts(tiles, 2 * AREA, PARTS)
        B, B_low = load_parts(tiles + 2 * PARTS * AREA, AREA, PARTS)
        R, R_low = load_parts(write, AREA, VALUE_PARTS)
        D, k_power = next_D, next_k
        words_ptr += H * (BK + 32)
        next_D, _, next_k = _step_words(words_ptr, kc, row, n + 1 < steps, BK, HOW)
        at = ((start + n * 16) * H + h) * V
        v = tl.trans(tl.load(v_ptr + at + at_v, vv, other=0.0))
        power, S, half, low = _scaled_state(S, HOW)
        U = tl.zeros([BV, 16], tl.float32)
        U = hat_dot(half, low, tl.trans(W), tl.trans(W_low), U, HOW)
        S = _next_state(S, U, power, k_power, v, R, R_low, B, B_low, D, HOW)
    at = (pair.to(tl.int64) * (tl.num_programs(1) + 1) + segment) * ((BK + V) * BK)
    tl.store(maps_ptr + at + row[:, None] * BK + kc[None, :], S, (row < BK + V)[:, None])


@triton.jit(do_not_specialize=["given", "segments"])
def chain_segments(
    maps_ptr: tl.tensor,
    state_ptr: tl.tensor,
    given: tl.tensor,
    states_ptr: tl.tensor,
    segments: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HOW: tl.constexpr,
):
    """The state before every segment, states [pairs, segments, V, K], from maps as above."""
    pair = tl.program_id(0).to(tl.int64)
    kc = tl.arange(0, BK)
    vc = tl.program_id(1) * BV + tl.arange(0, BV)
    v1 = (vc < V)[:, None]
    inside = v1 & (kc < K)[None, :]
    square = vc[:, None] * K + kc[None, :]
    S = tl.load(state_ptr + pair * (V * K) + square, inside & (given != 0), other=0.0)
    states_ptr += pair * segments * (V * K)
    maps_ptr += pair * segments * ((BK + V) * BK)
    tl.store(states_ptr + square, S, inside)
    for _n in range(1, segments):
        M = tl.load(maps_ptr + kc[:, None] * BK + kc[None, :])
        B = tl.load(maps_ptr + (BK + vc)[:, None] * BK + kc[None, :], v1, other=0.0)
        S = multiply(S, M, B, HOW)
        maps_ptr += (BK + V) * BK
        states_ptr += V * K
        tl.store(states_ptr + square, S, inside)
