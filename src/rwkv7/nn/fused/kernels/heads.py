"""What is done to one token of one head at a time: the value, the key's operands, the gated output.

A program has BT tokens by the N channels of head program_id(1), one vector of C = H·N channels a
token. Going back it takes several such tiles, and writes its part of the parameters' gradients.
"""

import triton
import triton.language as tl

from .elements import sigmoid


@triton.jit
def _tile(first: tl.tensor, rows: tl.tensor, H: tl.tensor, N: tl.constexpr, BT: tl.constexpr,
          BN: tl.constexpr):  # fmt: skip
    """(offsets, mask) of tokens first to first + BT of this program's head."""
    n = first + tl.arange(0, BT)
    c = tl.arange(0, BN)
    at = (n.to(tl.int64)[:, None] * H + tl.program_id(1)) * N + c[None, :]
    return at, (n < rows)[:, None] & (c < N)[None, :]


@triton.jit
def _vector(pointer: tl.tensor, N: tl.constexpr, BN: tl.constexpr):
    """A parameter's channels for this program's head, [1, BN] in fp32."""
    c = tl.arange(0, BN)
    return tl.load(pointer + tl.program_id(1) * N + c, c < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _keep_part(pointer, which: tl.constexpr, count: tl.constexpr, tile, H, N: tl.constexpr,
               BN: tl.constexpr):  # fmt: skip
    """Store the sum of a tile over its tokens as row `which` of [programs, count, C]."""
    c = tl.arange(0, BN)
    row = tl.program_id(0).to(tl.int64) * count + which
    tl.store(pointer + (row * H + tl.program_id(1)) * N + c, tl.sum(tile, 0), c < N)


@triton.jit(do_not_specialize=["rows", "H"])
def mixed_value(
    v_ptr: tl.tensor,
    first_ptr: tl.tensor,
    share_ptr: tl.tensor,
    v0_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    H: tl.tensor,
    N: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """v + (first - v) σ(v0 + share)."""
    at, inside = _tile(tl.program_id(0) * BT, rows, H, N, BT, BN)
    v = tl.load(v_ptr + at, inside, other=0.0).to(tl.float32)
    first = tl.load(first_ptr + at, inside, other=0.0).to(tl.float32)
    share = tl.load(share_ptr + at, inside, other=0.0).to(tl.float32)
    out = v + (first - v) * sigmoid(_vector(v0_ptr, N, BN) + share)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "H", "tiles"])
def mixed_value_back(
    v_ptr: tl.tensor,
    first_ptr: tl.tensor,
    share_ptr: tl.tensor,
    v0_ptr: tl.tensor,
    dout_ptr: tl.tensor,
    dv_ptr: tl.tensor,
    dfirst_ptr: tl.tensor,
    dshare_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    rows: tl.tensor,
    H: tl.tensor,
    tiles: tl.tensor,
    N: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """dv, dfirst, dshare, and the parts [programs, C] of the gradient of v0."""
    v0 = _vector(v0_ptr, N, BN)
    dv0 = tl.zeros([BT, BN], tl.float32)
    for i in range(tiles):
        at, inside = _tile((tl.program_id(0) * tiles + i) * BT, rows, H, N, BT, BN)
        v = tl.load(v_ptr + at, inside, other=0.0).to(tl.float32)
        first = tl.load(first_ptr + at, inside, other=0.0).to(tl.float32)
        share = v0 + tl.load(share_ptr + at, inside, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + at, inside, other=0.0).to(tl.float32)
        s = sigmoid(share)
        rest = sigmoid(-share)
        dshare = dout * (first - v) * s * rest
        tl.store(dv_ptr + at, (dout * rest).to(dv_ptr.dtype.element_ty), inside)
        tl.store(dfirst_ptr + at, (dout * s).to(dfirst_ptr.dtype.element_ty), inside)
        tl.store(dshare_ptr + at, dshare.to(dshare_ptr.dtype.element_ty), inside)
        dv0 += dshare
    _keep_part(parts_ptr, 0, 1, dv0, H, N, BN)


@triton.jit(do_not_specialize=["rows", "H"])
def key_operands(
    k_ptr: tl.tensor,
    rate_ptr: tl.tensor,
    decay_ptr: tl.tensor,
    a0_ptr: tl.tensor,
    k_k_ptr: tl.tensor,
    k_a_ptr: tl.tensor,
    w0_ptr: tl.tensor,
    key_ptr: tl.tensor,
    remove_ptr: tl.tensor,
    replace_ptr: tl.tensor,
    w_ptr: tl.tensor,
    rows: tl.tensor,
    H: tl.tensor,
    EPS: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """The operator's k, a, b and w from the key and the two pre-activations."""
    at, inside = _tile(tl.program_id(0) * BT, rows, H, N, BT, BN)
    k = tl.load(k_ptr + at, inside, other=0.0).to(tl.float32)
    rate = tl.load(rate_ptr + at, inside, other=0.0).to(tl.float32)
    a = sigmoid(_vector(a0_ptr, N, BN) + rate)
    unit = k * _vector(k_k_ptr, N, BN)
    unit = unit / tl.maximum(tl.sqrt(tl.sum(unit * unit, 1)), EPS)[:, None]
    key = k + k * (a - 1.0) * _vector(k_a_ptr, N, BN)
    tl.store(key_ptr + at, key.to(key_ptr.dtype.element_ty), inside)
    tl.store(remove_ptr + at, (-unit).to(remove_ptr.dtype.element_ty), inside)
    tl.store(replace_ptr + at, (unit * a).to(replace_ptr.dtype.element_ty), inside)
    decay = tl.load(decay_ptr + at, inside, other=0.0).to(tl.float32)
    tl.store(w_ptr + at, (_vector(w0_ptr, N, BN) + decay).to(w_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "H", "tiles"])
def key_operands_back(
    k_ptr: tl.tensor,
    rate_ptr: tl.tensor,
    a0_ptr: tl.tensor,
    k_k_ptr: tl.tensor,
    k_a_ptr: tl.tensor,
    dkey_ptr: tl.tensor,
    dremove_ptr: tl.tensor,
    dreplace_ptr: tl.tensor,
    dw_ptr: tl.tensor,
    dk_ptr: tl.tensor,
    drate_ptr: tl.tensor,
    ddecay_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    rows: tl.tensor,
    H: tl.tensor,
    tiles: tl.tensor,
    EPS: tl.constexpr,
    N: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """dk, drate, ddecay, and the parts [programs, 4, C] of the gradients of a0, k_k, k_a, w0."""
    a0 = _vector(a0_ptr, N, BN)
    k_k = _vector(k_k_ptr, N, BN)
    k_a = _vector(k_a_ptr, N, BN)
    da0 = tl.zeros([BT, BN], tl.float32)
    dk_k = tl.zeros([BT, BN], tl.float32)
    dk_a = tl.zeros([BT, BN], tl.float32)
    dw0 = tl.zeros([BT, BN], tl.float32)
    for i in range(tiles):
        at, inside = _tile((tl.program_id(0) * tiles + i) * BT, rows, H, N, BT, BN)
        k = tl.load(k_ptr + at, inside, other=0.0).to(tl.float32)
        rate = a0 + tl.load(rate_ptr + at, inside, other=0.0).to(tl.float32)
        dkey = tl.load(dkey_ptr + at, inside, other=0.0).to(tl.float32)
        dremove = tl.load(dremove_ptr + at, inside, other=0.0).to(tl.float32)
        dreplace = tl.load(dreplace_ptr + at, inside, other=0.0).to(tl.float32)
        # 1 - σ(x) is computed as σ(-x), which keeps its digits where the sigmoid saturates.
        a = sigmoid(rate)
        rest = sigmoid(-rate)
        unit = k * k_k
        norm = tl.sqrt(tl.sum(unit * unit, 1))[:, None]
        scale = 1.0 / tl.maximum(norm, EPS)
        unit = unit * scale
        dunit = dreplace * a - dremove
        # Below EPS the divisor is a constant.
        along = tl.where(norm < EPS, 0.0, tl.sum(unit * dunit, 1)[:, None])
        dscaled = (dunit - unit * along) * scale
        drate = (dreplace * unit + dkey * k * k_a) * a * rest
        dk = dkey * (1.0 - rest * k_a) + dscaled * k_k
        tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), inside)
        tl.store(drate_ptr + at, drate.to(drate_ptr.dtype.element_ty), inside)
        dw = tl.load(dw_ptr + at, inside, other=0.0).to(tl.float32)
        tl.store(ddecay_ptr + at, dw.to(ddecay_ptr.dtype.element_ty), inside)
        da0 += drate
        dk_k += dscaled * k
        dk_a -= dkey * k * rest
        dw0 += dw
    _keep_part(parts_ptr, 0, 4, da0, H, N, BN)
    _keep_part(parts_ptr, 1, 4, dk_k, H, N, BN)
    _keep_part(parts_ptr, 2, 4, dk_a, H, N, BN)
    _keep_part(parts_ptr, 3, 4, dw0, H, N, BN)


@triton.jit
def _normalised(y, inside, eps, N: tl.constexpr):
    """((y - mean) / deviation, 1 / deviation [BT, 1]) of each row's N numbers."""
    y = y - (tl.sum(y, 1) / N)[:, None]
    y = tl.where(inside, y, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(y * y, 1) / N + eps)[:, None]
    return y * inverse, inverse


@triton.jit(do_not_specialize=["rows", "H", "eps"])
def gated_output(
    y_ptr: tl.tensor,
    r_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    g_ptr: tl.tensor,
    r_k_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    H: tl.tensor,
    eps: tl.tensor,
    N: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """(group norm of y, plus (r·k·r_k) v) times the gate g."""
    at, inside = _tile(tl.program_id(0) * BT, rows, H, N, BT, BN)
    y = tl.load(y_ptr + at, inside, other=0.0).to(tl.float32)
    r = tl.load(r_ptr + at, inside, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + at, inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + at, inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, inside, other=0.0).to(tl.float32)
    y, _ = _normalised(y, inside, eps, N)
    bonus = tl.sum(r * k * _vector(r_k_ptr, N, BN), 1)[:, None]
    out = (y * _vector(weight_ptr, N, BN) + _vector(bias_ptr, N, BN) + bonus * v) * g
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "H", "tiles", "eps"])
def gated_output_back(
    y_ptr: tl.tensor,
    r_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    g_ptr: tl.tensor,
    r_k_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    dout_ptr: tl.tensor,
    dy_ptr: tl.tensor,
    dr_ptr: tl.tensor,
    dk_ptr: tl.tensor,
    dv_ptr: tl.tensor,
    dg_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    rows: tl.tensor,
    H: tl.tensor,
    tiles: tl.tensor,
    eps: tl.tensor,
    N: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """Five gradients, and the parts [programs, 3, C] of those of r_k, weight and bias."""
    r_k = _vector(r_k_ptr, N, BN)
    weight = _vector(weight_ptr, N, BN)
    bias = _vector(bias_ptr, N, BN)
    dr_k = tl.zeros([BT, BN], tl.float32)
    dweight = tl.zeros([BT, BN], tl.float32)
    dbias = tl.zeros([BT, BN], tl.float32)
    for i in range(tiles):
        at, inside = _tile((tl.program_id(0) * tiles + i) * BT, rows, H, N, BT, BN)
        y = tl.load(y_ptr + at, inside, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + at, inside, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + at, inside, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at, inside, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, inside, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + at, inside, other=0.0).to(tl.float32)
        y, inverse = _normalised(y, inside, eps, N)
        bonus = tl.sum(r * k * r_k, 1)[:, None]
        dg = dout * (y * weight + bias + bonus * v)
        dsum = dout * g  # the gradient of what is gated
        dbonus = tl.sum(dsum * v, 1)[:, None]
        dnormal = dsum * weight
        along = (tl.sum(dnormal * y, 1) / N)[:, None]
        dy = (dnormal - (tl.sum(dnormal, 1) / N)[:, None] - y * along) * inverse
        tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), inside)
        tl.store(dr_ptr + at, (dbonus * k * r_k).to(dr_ptr.dtype.element_ty), inside)
        tl.store(dk_ptr + at, (dbonus * r * r_k).to(dk_ptr.dtype.element_ty), inside)
        tl.store(dv_ptr + at, (dsum * bonus).to(dv_ptr.dtype.element_ty), inside)
        tl.store(dg_ptr + at, dg.to(dg_ptr.dtype.element_ty), inside)
        dr_k += dbonus * r * k
        dweight += dsum * y
        dbias += dsum
    _keep_part(parts_ptr, 0, 3, dr_k, H, N, BN)
    _keep_part(parts_ptr, 1, 3, dweight, H, N, BN)
    _keep_part(parts_ptr, 2, 3, dbias, H, N, BN)
