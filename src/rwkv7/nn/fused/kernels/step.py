"""One token of many sequences whose states are rows of a pool: all between the projections.

A slot of -1 skips its sequence: no row of the pool is read or written for it.
"""

import triton
import triton.language as tl

from .elements import LOG2E, sigmoid


@triton.jit
def _store_mix(x, delta, m_ptr, y_ptr, c, at, inside):
    m = tl.load(m_ptr + c, inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (x + delta * m).to(y_ptr.dtype.element_ty), inside)


@triton.jit
def mix_in_pool(
    x_ptr: tl.tensor,
    pool_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    m0: tl.tensor,
    m1: tl.tensor,
    m2: tl.tensor,
    m3: tl.tensor,
    m4: tl.tensor,
    m5: tl.tensor,
    y0: tl.tensor,
    y1: tl.tensor,
    y2: tl.tensor,
    y3: tl.tensor,
    y4: tl.tensor,
    y5: tl.tensor,
    C: tl.constexpr,
    BC: tl.constexpr,
    COUNT: tl.constexpr,
):
    """y_i = x + (the pool's vector - x) m_i for BC channels of one token; x takes its place."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    used = inside & (slot >= 0)
    at = row * C + c
    x = tl.load(x_ptr + at, inside, other=0.0)
    before = tl.load(pool_ptr + slot * C + c, used, other=0.0).to(tl.float32)
    tl.store(pool_ptr + slot * C + c, x.to(pool_ptr.dtype.element_ty), used)
    x = x.to(tl.float32)
    delta = before - x
    _store_mix(x, delta, m0, y0, c, at, inside)
    if COUNT == 6:
        _store_mix(x, delta, m1, y1, c, at, inside)
        _store_mix(x, delta, m2, y2, c, at, inside)
        _store_mix(x, delta, m3, y3, c, at, inside)
        _store_mix(x, delta, m4, y4, c, at, inside)
        _store_mix(x, delta, m5, y5, c, at, inside)


@triton.jit
def channels(pointer: tl.tensor, at: tl.tensor, inside: tl.tensor):
    """Numbers of one head, in float32."""
    return tl.load(pointer + at, inside, other=0.0).to(tl.float32)


@triton.jit
def head_step(
    S: tl.tensor,
    r: tl.tensor,
    w: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    rate: tl.tensor,
    g: tl.tensor,
    vectors: tl.tuple,
    own: tl.tensor,
    inside: tl.tensor,
    eps: tl.tensor,
    DECAY_SCALE: tl.constexpr,
    KEY_EPS: tl.constexpr,
    N: tl.constexpr,
):
    """(the state after a token, the gated output) of one head from its projections [BN].

    `v` is mixed with layer 0's already. `vectors` are those of `StepParameters`, `own` the head's
    channels in them.
    """
    w0, a0, _, k_k, k_a, r_k, weight, bias = vectors
    w = sigmoid(channels(w0, own, inside) + w)
    a = sigmoid(channels(a0, own, inside) + rate)
    unit = k * channels(k_k, own, inside)
    unit = unit / tl.maximum(tl.sqrt(tl.sum(unit * unit, 0)), KEY_EPS)
    key = k + k * (a - 1.0) * channels(k_a, own, inside)

    removed = tl.sum(S * unit[None, :], 1)
    S = S * tl.exp2(w * (-DECAY_SCALE * LOG2E))[None, :]
    S = S - removed[:, None] * (unit * a)[None, :] + v[:, None] * key[None, :]

    y = tl.sum(S * r[None, :], 1)
    y = tl.where(inside, y - tl.sum(y, 0) / N, 0.0)
    y = y / tl.sqrt(tl.sum(y * y, 0) / N + eps)
    bonus = tl.sum(r * key * channels(r_k, own, inside), 0)
    out = y * channels(weight, own, inside) + channels(bias, own, inside) + bonus * v
    return S, out * g


@triton.jit(do_not_specialize=["H", "eps"])
def time_mix_step(
    projections: tl.tuple,
    v_first_ptr: tl.tensor,
    vectors: tl.tuple,
    state_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    out_ptr: tl.tensor,
    H: tl.tensor,
    eps: tl.tensor,
    DECAY_SCALE: tl.constexpr,
    KEY_EPS: tl.constexpr,
    MIXES_VALUE: tl.constexpr,
    N: tl.constexpr,
    BN: tl.constexpr,
):
    """The operator's arguments, the recurrence in place and the gated output, for one head.

    `projections` and `vectors` are those of `Projections` and `StepParameters`.
    """
    row = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    slot = tl.load(slots_ptr + row).to(tl.int64)
    # Rows of the state are value channels, columns key channels.
    i = tl.arange(0, BN)
    inside = i < N
    own = h * N + i
    at = row * H * N + own
    square = (slot * H + h) * (N * N) + i[:, None] * N + i[None, :]
    used = inside[:, None] & inside[None, :] & (slot >= 0)
    # No state is met again in this layer: it must not drive the weights out of the cache.
    S = tl.load(state_ptr + square, used, other=0.0, eviction_policy="evict_first")
    v = channels(projections[3], at, inside)
    if MIXES_VALUE:
        share = sigmoid(channels(vectors[2], own, inside) + channels(projections[5], at, inside))
        v += (channels(v_first_ptr, at, inside) - v) * share
    S, out = head_step(
        S,
        channels(projections[0], at, inside),
        channels(projections[1], at, inside),
        channels(projections[2], at, inside),
        v,
        channels(projections[4], at, inside),
        channels(projections[6], at, inside),
        vectors, own, inside, eps, DECAY_SCALE, KEY_EPS, N,
    )  # fmt: skip
    tl.store(state_ptr + square, S, used, eviction_policy="evict_first")
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), inside)
