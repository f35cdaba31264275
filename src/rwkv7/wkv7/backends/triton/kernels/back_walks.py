"""Backward, the walks over steps of 16 tokens: of the state in every chunk, and of its gradient.

One program walks with the state [V, K] in registers, S forward and E backward:

    S' = S∘enter     U = W·S'ᵀ + N·V        S ← (S' + Vᵀ·R + (W·S'ᵀ)ᵀ·β)∘leave
    E' = E∘enter     Z = W_b·E'ᵀ + Pᵀ·dY    E ← (E' + dYᵀ·ρ + Zᵀ·α)∘leave

Where pairs are few, a slab's E is walked in segments, numbered as they are walked, the last tokens
first. A segment takes E to E·M + F: `gradient_maps` walks M from the identity and F from zero,
`chain_segments` of walks.py passes E on, and then all segments are walked at once.
"""

import triton
import triton.language as tl

from .slabs import slab_chunk, slab_steps
from .tiles import hat_dot, load_scaled, narrow, power_below, split_hat, tile_largest


@triton.jit(do_not_specialize=["given", "span", "low", "L", "sequences", "T", "H"])
def rewalk_steps(
    x_ptr: tl.tensor,
    hats_ptr: tl.tensor,
    through_ptr: tl.tensor,
    direct_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    units_ptr: tl.tensor,
    begin_ptr: tl.tensor,
    begin_scale: tl.tensor,
    given: tl.tensor,
    final_ptr: tl.tensor,
    states_ptr: tl.tensor,
    states_scale: tl.tensor,
    moved_ptr: tl.tensor,
    span: tl.tensor,
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
    HAS_X: tl.constexpr,
    HOW: tl.constexpr,
):
    """states [m, H, V, K]: S' or E' of every step of a slab; states_scale [m, H], the power of two
    taken out of it; moved [m, H, 2, 16, V]: U or Z, divided by the same. For "halves" E' is two
    numbers, [m, H, 2, V, K].

    Forward a program walks one chunk from its saved state, begin [n, H, V, K] and begin_scale; back
    a segment of `span` steps of one sequence, from E behind it, begin [S · H, segments, V, K],
    zeros unless `given`, and final [S, H, V, K] is what E is before the slab: where there is one
    segment, begin may be it."""
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
        end -= tl.program_id(1) * span
        if end <= begin:
            return
        begin = tl.maximum(begin, end - span)
        behind = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        S = tl.load(begin_ptr + behind * (V * K) + square, inside & (given != 0), other=0.0)
    else:
        local = tl.program_id(0) // H
        chunk, start, tokens = slab_chunk(local, low, L, cu, sequences, T, C, PACKED)
        begin = 0
        end = tl.cdiv(tokens, 16)
        offset = local * (C // 16)
        if end <= begin:
            return
        saved = chunk.to(tl.int64) * H + h
        S = load_scaled(
            begin_ptr + saved * (V * K) + square, inside, begin_scale + saved * V + vc, v1
        )
    PARTS: tl.constexpr = 2 if HOW == "halves" else 1
    AREA: tl.constexpr = 16 * K
    HATS: tl.constexpr = (3 + PARTS) * AREA
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
    hat_unit = tl.load(units_ptr + index * 4 + SIDE)
    if HAS_X:
        x_ptr += (start * H + h) * V + at_v
        vv = (n * 16 + t < tokens)[:, None] & v1[None, :]
        x = tl.load(x_ptr + tl.cast(n * 16, tl.int64) * (H * V), vv, other=0.0)
    for i in range(end - begin):
        n = end - 1 - i if BACK else begin + i
        index = (offset + n).to(tl.int64) * H + h
        more = i + 1 < end - begin
        leave = tl.load(leave_ptr + index * (2 * K), k1, other=0.0)
        next_enter = tl.load(enter_ptr + (index + later) * (2 * K), k1 & more, other=1.0)
        next_unit = tl.load(units_ptr + (index + later) * 4 + SIDE, more, other=1.0)
        W = tl.load(through_ptr + index * (2 * PARTS * AREA), in_tile, other=0.0)
        W_low = W
        if PARTS == 2:
            W_low = tl.load(through_ptr + index * (2 * PARTS * AREA) + AREA, in_tile, other=0.0)
        second = tl.load(hats_ptr + index * HATS + (0 if BACK else AREA), in_tile, other=0.0)
        unit = 1.0
        if HOW != "ieee":
            unit = tile_largest(S)
        if HAS_X:
            n += -1 if BACK else 1
            vv = (n * 16 + t < tokens)[:, None] & (v1 & more)[None, :]
            next_x = tl.load(x_ptr + tl.cast(n * 16, tl.int64) * (H * V), vv, other=0.0)
            first = tl.load(hats_ptr + index * HATS + (2 if BACK else 3) * AREA, in_tile, other=0.0)
            D = tl.load(direct_ptr + index * (2 * PARTS * 256))
            x_unit = hat_unit
            if HOW != "ieee":
                x_largest = tile_largest(x)
                unit = power_below(tl.maximum(unit, x_largest * hat_unit))
                x_unit = tl.minimum(power_below(x_largest) * hat_unit, unit)  # less for zeros alone
            tl.store(units_ptr + index * 4 + 2 + SIDE, x_unit)
            xt = tl.trans(narrow(x.to(tl.float32) * (hat_unit / unit), HOW))
        elif HOW != "ieee":
            unit = power_below(unit)
        S *= 1.0 / unit
        half, half_low = split_hat(S, HOW)
        tl.store(states_scale + index, unit)
        tl.store(states_ptr + index * (KEPT * V * K) + square, half, inside)
        if KEPT == 2:
            tl.store(states_ptr + index * (KEPT * V * K) + V * K + square, half_low, inside)
        U = tl.zeros([BV, 16], tl.float32)
        U = hat_dot(half, half_low, tl.trans(W), tl.trans(W_low), U, HOW)
        if not BACK:
            S = tl.dot(narrow(U, HOW), second, acc=S, input_precision="ieee")
        if HAS_X:
            U = tl.dot(xt, tl.trans(D), acc=U, input_precision="ieee")
            if PARTS == 2:
                D = tl.load(direct_ptr + index * (2 * PARTS * 256) + 256)
                U = tl.dot(xt, tl.trans(D), acc=U)
            S = tl.dot(xt, first, acc=S, input_precision="ieee")
            if PARTS == 2 and not BACK:
                first = tl.load(hats_ptr + index * HATS + 4 * AREA, in_tile, other=0.0)
                S = tl.dot(xt, first, acc=S)
        U = narrow(U, HOW)
        if BACK:
            S = tl.dot(U, second, acc=S, input_precision="ieee")
        tl.store(moved_ptr + index * (32 * V) + moved, tl.trans(U), in_moved)
        # One factor after the other, as where a slab ends between them: bits do not depend on it.
        S *= (leave * unit)[None, :]
        S *= next_enter[None, :]
        hat_unit = next_unit
        if HAS_X:
            x = next_x
    if BACK:
        last = tl.program_id(1) == tl.num_programs(1) - 1
        final_ptr += tl.program_id(0).to(tl.int64) * (V * K)
        tl.store(final_ptr + square, S, inside & last)


@triton.jit(do_not_specialize=["span", "low", "L", "T", "H"])
def gradient_maps(
    dy_ptr: tl.tensor,
    hats_ptr: tl.tensor,
    through_ptr: tl.tensor,
    direct_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    units_ptr: tl.tensor,
    maps_ptr: tl.tensor,
    span: tl.tensor,
    low: tl.tensor,
    L: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    HAS_DY: tl.constexpr,
    HOW: tl.constexpr,
):
    """maps [pairs, segments, BK + V, BK]: M, then F, of a slab's segments but the last walked.

    Programs: (sequence, head) and block of those rows; segment of `span` steps. Rows have powers of
    two of their own: none waits for another, as where tiles are stored for the gradients.
    """
    BLOCKS: tl.constexpr = BK // ROWS + (V + ROWS - 1) // ROWS
    pair = tl.program_id(0) // BLOCKS
    h = pair % H
    # Not packed: any pointer does in the place of the offsets, which are not read.
    start, tokens, _, end, offset = slab_steps(pair // H, low, L, dy_ptr, T, C, False)
    end -= tl.program_id(1) * span
    PARTS: tl.constexpr = 2 if HOW == "halves" else 1
    AREA: tl.constexpr = 16 * K
    HATS: tl.constexpr = (3 + PARTS) * AREA
    t = tl.arange(0, 16)
    kc = tl.arange(0, BK)
    k1 = kc < K
    row = tl.program_id(0) % BLOCKS * ROWS + tl.arange(0, ROWS)
    vc = row - BK
    v1 = (vc >= 0) & (vc < V)
    tile = t[:, None] * K + kc[None, :]
    in_tile = (t < 16)[:, None] & k1[None, :]
    small = t[:, None] * 16 + t[None, :]
    hats_ptr += tile
    through_ptr += PARTS * AREA + tile
    direct_ptr += PARTS * 256 + small
    enter_ptr = ends_ptr + K + kc
    leave_ptr = ends_ptr + kc
    index = (offset + end - 1).to(tl.int64) * H + h
    S = tl.where(row[:, None] == kc[None, :], 1.0, 0.0)
    S *= tl.load(enter_ptr + index * (2 * K), k1, other=0.0)[None, :]
    unit = tl.load(units_ptr + index * 4 + 1)
    if HAS_DY:
        dy_ptr += (start * H + h) * V + ((t * (H * V))[:, None] + vc[None, :])
        n = end - 1
        vv = (n * 16 + t < tokens)[:, None] & v1[None, :]
        y = tl.load(dy_ptr + tl.cast(n * 16, tl.int64) * (H * V), vv, other=0.0)
    for i in range(span):
        n = end - 1 - i
        index = (offset + n).to(tl.int64) * H + h
        more = i + 1 < span
        leave = tl.load(leave_ptr + index * (2 * K), k1, other=0.0)
        leave *= tl.load(enter_ptr + (index - H) * (2 * K), k1 & more, other=1.0)
        next_unit = tl.load(units_ptr + (index - H) * 4 + 1, more, other=1.0)
        W = tl.load(through_ptr + index * (2 * PARTS * AREA), in_tile, other=0.0)
        W_low = W
        if PARTS == 2:
            W_low = tl.load(through_ptr + index * (2 * PARTS * AREA) + AREA, in_tile, other=0.0)
        alpha = tl.load(hats_ptr + index * HATS, in_tile, other=0.0)
        power = tl.full([ROWS], 1.0, tl.float32)
        if HOW != "ieee":
            power = tl.max(tl.abs(S), 1)
        if HAS_DY:
            vv = ((n - 1) * 16 + t < tokens)[:, None] & (v1 & more)[None, :]
            next_y = tl.load(dy_ptr + tl.cast((n - 1) * 16, tl.int64) * (H * V), vv, other=0.0)
            rho = tl.load(hats_ptr + index * HATS + 2 * AREA, in_tile, other=0.0)
            P = tl.load(direct_ptr + index * (2 * PARTS * 256))
            y = tl.trans(y.to(tl.float32)) * unit
            if HOW != "ieee":
                power = power_below(tl.maximum(power, tl.max(tl.abs(y), 1)))
            y = narrow(y * (1.0 / power)[:, None], HOW)
        elif HOW != "ieee":
            power = power_below(power)
        S *= (1.0 / power)[:, None]
        half, half_low = split_hat(S, HOW)
        Z = tl.zeros([ROWS, 16], tl.float32)
        Z = hat_dot(half, half_low, tl.trans(W), tl.trans(W_low), Z, HOW)
        if HAS_DY:
            Z = tl.dot(y, tl.trans(P), acc=Z, input_precision="ieee")
            if PARTS == 2:
                P = tl.load(direct_ptr + index * (2 * PARTS * 256) + 256)
                Z = tl.dot(y, tl.trans(P), acc=Z)
            S = tl.dot(y, rho, acc=S, input_precision="ieee")
        S = tl.dot(narrow(Z, HOW), alpha, acc=S, input_precision="ieee")
        S *= leave[None, :] * power[:, None]
        unit = next_unit
        if HAS_DY:
            y = next_y
    at = (pair.to(tl.int64) * (tl.num_programs(1) + 1) + tl.program_id(1)) * ((BK + V) * BK)
    tl.store(maps_ptr + at + row[:, None] * BK + kc[None, :], S, (row < BK + V)[:, None])
