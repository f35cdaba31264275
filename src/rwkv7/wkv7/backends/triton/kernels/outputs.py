"""What a chunk gives out, all chunks at once: y from the state before it, or dv from the gradient
of the state after it.

For calls with few sequences and heads, whose walk (walks.py) is then left with the state alone.
"""

import triton
import triton.language as tl

from .tiles import (
    chunk_bounds,
    factor,
    load_powers,
    load_scaled,
    load_transposed,
    multiply,
)


@triton.jit(do_not_specialize=["sequences", "T", "H"])
def chunk_outputs(
    map_ptr: tl.tensor,
    direct_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    x_ptr: tl.tensor,
    states_ptr: tl.tensor,
    states_scale: tl.tensor,
    out_ptr: tl.tensor,
    cu: tl.tensor,
    sequences: tl.tensor,
    T: tl.tensor,
    H: tl.tensor,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PACKED: tl.constexpr,
    GIVEN: tl.constexpr,
    BACK: tl.constexpr,
    HOW: tl.constexpr,
):
    """out [B·T, H, V]: y = G·v + Q·Sᵀ of x = v and map = Q; with BACK dv = Gᵀ·dy + R·Eᵀ of x = dy
    and map = R, where dy is zero unless GIVEN. One program makes BV channels of one chunk and head.
    """
    chunk = tl.program_id(0) // H
    h = tl.program_id(0) % H
    start, tokens = chunk_bounds(chunk, cu, sequences, T, C, PACKED)
    if tokens <= 0:
        return
    index = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, C)
    kc = tl.arange(0, BK)
    vc = tl.program_id(1) * BV + tl.arange(0, BV)
    v1 = vc < V
    k1 = kc < K
    vv = (t < tokens)[:, None] & v1[None, :]
    at_v = (start * H + h) * V + ((t * (H * V))[:, None] + vc[None, :])
    scale_ptr += index * (7 * C)
    every = t < C
    square = index * (V * K) + (vc[:, None] * K + kc[None, :])
    S = tl.load(states_ptr + square, v1[:, None] & k1[None, :], other=0.0)
    ck = index * (C * K) + (t[:, None] * K + kc[None, :])
    rows = tl.load(map_ptr + ck, every[:, None] & k1[None, :], other=0.0)
    out = tl.dot(rows, tl.trans(S), input_precision="ieee" if HOW == "ieee" else "tf32")
    out *= load_powers(states_scale + index * V + vc, v1, HOW)[None, :]
    if not BACK:
        out *= load_powers(scale_ptr + t, every, HOW)[:, None]
    if GIVEN:
        x = factor(x_ptr + at_v, vv, HOW)
        direct_ptr += index * (C * C)
        if BACK:
            G = load_transposed(direct_ptr, scale_ptr + C, C, HOW)
        else:
            direct_ptr += t[:, None] * C + t[None, :]
            G = load_scaled(direct_ptr, every[:, None] & every[None, :], scale_ptr + C + t, every)
        out = multiply(G, x, out, HOW)
    tl.store(out_ptr + at_v, out.to(out_ptr.dtype.element_ty), vv)
