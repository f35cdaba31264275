"""Backward, the walks over steps of 16 tokens: of the state in every chunk, and of its gradient.

One program walks with the state [V, K] in registers. Both walks are the same, S forward with W, N,
κ, β and V, E backward with W_b, Pᵀ, ρ, α and dY:

    S' = S∘enter     U = W·S'ᵀ + N·V     S ← (S' + Vᵀ·κ + Uᵀ·β)∘leave
"""

import triton
import triton.language as tl

from .slabs import STEPS, slab_chunk, slab_steps
from .tiles import hat_dot, load_scaled, narrow, split_hat, tile_unit


@triton.jit(do_not_specialize=["low", "L", "sequences", "T", "H"])
def rewalk_steps(
    x_ptr: tl.tensor,
    hats_ptr: tl.tensor,
    through_ptr: tl.tensor,
    direct_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    units_ptr: tl.tensor,
    begin_ptr: tl.tensor,
    begin_scale: tl.tensor,
    states_ptr: tl.tensor,
    states_scale: tl.tensor,
    moved_ptr: tl.tensor,
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
    PACKED: tl.constexpr,
    BACK: tl.constexpr,
    GIVEN: tl.constexpr,
    HOW: tl.constexpr,
):
    """states [m, H, V, K]: S' or E' of every step of a slab; states_scale [m, H], the power of two
    taken out of it; moved [m, H, 2, 16, V]: U or Z, divided by the same. For "halves" E' and Z are
    two numbers each, [m, H, 2, V, K] and [m, H, 3, 16, V].

    Forward a program walks one chunk from its saved state, begin [n, H, V, K] and begin_scale; back
    one sequence, from begin [S, H, V, K], which is then what E was before the slab."""
    h = tl.program_id(0) % H
    t = tl.arange(0, 16)
    kc = tl.arange(0, BK)
    vc = tl.arange(0, BV)
    k1 = kc < K
    v1 = vc < V
    square = vc[:, None] * K + kc[None, :]
    inside = v1[:, None] & k1[None, :]
    if BACK:
        start, tokens, begin, end, offset = slab_steps(
            tl.program_id(0) // H, low, L, cu, T, C, PACKED
        )
        begin_ptr += tl.program_id(0).to(tl.int64) * (V * K) + square
        if end <= begin:
            return
        S = tl.load(begin_ptr, inside, other=0.0)
    else:
        local = tl.program_id(0) // H
        chunk, start, tokens = slab_chunk(local, low, L, cu, sequences, T, C, PACKED)
        begin = 0
        end = tl.cdiv(tokens, 16)
        offset = local * STEPS
        if end <= begin:
            return
        saved = chunk.to(tl.int64) * H + h
        S = load_scaled(
            begin_ptr + saved * (V * K) + square, inside, begin_scale + saved * V + vc, v1
        )
    PARTS: tl.constexpr = 2 if HOW == "halves" else 1
    AREA: tl.constexpr = 16 * K
    SIDE: tl.constexpr = 1 if BACK else 0
    KEPT: tl.constexpr = PARTS if BACK else 1
    tile = t[:, None] * K + kc[None, :]
    in_tile = (t < 16)[:, None] & k1[None, :]
    small = t[:, None] * 16 + t[None, :]
    at_v = (t * (H * V))[:, None] + vc[None, :]
    moved = SIDE * 16 * V + t[:, None] * V + vc[None, :]
    in_moved = (t < 16)[:, None] & v1[None, :]
    hats_ptr += tile
    through_ptr += SIDE * PARTS * AREA + tile
    direct_ptr += SIDE * PARTS * 256 + small
    enter_ptr = ends_ptr + SIDE * K + kc
    leave_ptr = ends_ptr + (1 - SIDE) * K + kc
    n = end - 1 if BACK else begin
    index = (offset + n).to(tl.int64) * H + h
    later = -H if BACK else H
    S *= tl.load(enter_ptr + index * (2 * K), k1, other=0.0)[None, :]
    # Triton's pipeline asks early only for what a product reads as it is: for these the loop does.
    hat_unit = tl.load(units_ptr + index * 2 + SIDE)
    if GIVEN:
        x_ptr += (start * H + h) * V + at_v
        vv = (n * 16 + t < tokens)[:, None] & v1[None, :]
        x = tl.load(x_ptr + tl.cast(n * 16, tl.int64) * (H * V), vv, other=0.0)
    for i in range(end - begin):
        n = end - 1 - i if BACK else begin + i
        index = (offset + n).to(tl.int64) * H + h
        more = i + 1 < end - begin
        leave = tl.load(leave_ptr + index * (2 * K), k1, other=0.0)
        leave *= tl.load(enter_ptr + (index + later) * (2 * K), k1 & more, other=1.0)
        next_unit = tl.load(units_ptr + (index + later) * 2 + SIDE, more, other=1.0)
        W = tl.load(through_ptr + index * (2 * PARTS * AREA), in_tile, other=0.0)
        W_low = W
        if PARTS == 2:
            W_low = tl.load(through_ptr + index * (2 * PARTS * AREA) + AREA, in_tile, other=0.0)
        second = tl.load(hats_ptr + index * (5 * AREA) + (0 if BACK else AREA), in_tile, other=0.0)
        unit = tile_unit(S, HOW)
        if GIVEN:
            n += -1 if BACK else 1
            vv = (n * 16 + t < tokens)[:, None] & (v1 & more)[None, :]
            next_x = tl.load(x_ptr + tl.cast(n * 16, tl.int64) * (H * V), vv, other=0.0)
            first = tl.load(
                hats_ptr + index * (5 * AREA) + (3 if BACK else 2) * AREA, in_tile, other=0.0
            )
            D = tl.load(direct_ptr + index * (2 * PARTS * 256))
            if HOW != "ieee":
                unit = tl.maximum(unit, tile_unit(x, HOW) * hat_unit)
            xt = tl.trans(narrow(x.to(tl.float32) * (hat_unit / unit), HOW))
        S *= 1.0 / unit
        half, half_low = split_hat(S, HOW)
        tl.store(states_scale + index, unit)
        tl.store(states_ptr + index * (KEPT * V * K) + square, half, inside)
        if KEPT == 2:
            tl.store(states_ptr + index * (KEPT * V * K) + V * K + square, half_low, inside)
        U = tl.zeros([BV, 16], tl.float32)
        U = hat_dot(half, half_low, tl.trans(W), tl.trans(W_low), U, HOW)
        if GIVEN:
            U = tl.dot(xt, tl.trans(D), acc=U, input_precision="ieee")
            if PARTS == 2:
                D = tl.load(direct_ptr + index * (2 * PARTS * 256) + 256)
                U = tl.dot(xt, tl.trans(D), acc=U)
            S = tl.dot(xt, first, acc=S, input_precision="ieee")
        at_moved = moved_ptr + index * ((1 + PARTS) * 16 * V) + moved
        U, U_low = split_hat(U, HOW)
        S = tl.dot(U, second, acc=S, input_precision="ieee")
        tl.store(at_moved, tl.trans(U), in_moved)
        if KEPT == 2:
            tl.store(at_moved + 16 * V, tl.trans(U_low), in_moved)
        S *= (leave * unit)[None, :]
        hat_unit = next_unit
        if GIVEN:
            x = next_x
    if BACK:
        tl.store(begin_ptr, S, inside)
