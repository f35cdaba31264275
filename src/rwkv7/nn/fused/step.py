"""Decoding: one token of many sequences, whose states are rows of pools, with two launches a layer.

For inference only, and on a GPU without host synchronisation, so that a CUDA graph may hold it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rwkv7.nn.token_shift import Slots, shift_in_pool_
from rwkv7.wkv7 import DECAY_SCALE, Operation, checks_wanted, is_traced

from .keys import KEY_NORM_EPS
from .launch import channel_block, on_device_of, runs_fused
from .shift import MOST_MIXES, products_dtype, six

LARGEST_HEAD = 128  # a program holds a head's whole state in registers


class Projections(NamedTuple):
    """What time mix makes of a token by matrix products, each [B, T, C], or [B, C] in a step."""

    r: Tensor
    w: Tensor  # of the decay, before w0 is added
    k: Tensor
    v: Tensor
    rate: Tensor  # of the learning rate, before a0 and the sigmoid
    share: Tensor | None  # of layer 0's value, before v0 and the sigmoid; None in layer 0
    g: Tensor  # the gate


class StepParameters(NamedTuple):
    """The vectors [C] (r_k [H, N]) of time mix that stand between its products."""

    w0: Tensor
    a0: Tensor
    v0: Tensor | None
    k_k: Tensor
    k_a: Tensor
    r_k: Tensor
    weight: Tensor  # of the group norm, as is bias
    bias: Tensor


def mixed_in_pool_(
    x: Tensor,  # [B, C]
    pool: Tensor,  # [P, C]
    slots: Slots,
    mixes: tuple[Tensor, ...],  # each [C]
) -> tuple[Tensor, ...]:
    """x + (before - x) m for each m, `before` the rows of `pool`, whose place x takes."""
    # torch registers no operation that changes an argument and returns a list of tensors; in a
    # compiled step the compiler fuses the plain one.
    if len(mixes) in (1, MOST_MIXES) and not is_traced(pool) and _runs(pool, x, *mixes):
        return _mix_in_pool_(x, pool, slots.wkv, list(mixes))
    delta = shift_in_pool_(x, pool, slots)
    return tuple(torch.addcmul(x, delta, m) for m in mixes)


def runs_fused_step(state: Tensor, projections: Projections) -> bool:
    """Whether `time_mix_step_` takes this. Not inside `checks()`, since it looks at no values."""
    return state.shape[-1] <= LARGEST_HEAD and _runs(
        state, *(x for x in projections if x is not None)
    )


def time_mix_step_(
    projections: Projections,  # of B tokens
    v_first: Tensor | None,  # [B, 1, C]
    parameters: StepParameters,
    eps: float,
    state: Tensor,  # [P, H, N, N]
    slots: Tensor,  # [B]
) -> Tensor:
    """From time mix's projections to its gated output, as they are [B, C] or [B, 1, C], in one
    launch.

    The value residual, `key_operands`, `wkv7_step_` on rows of the pool `state` and
    `gated_output`, with nothing rounded between them. `eps` is the group norm's.
    """
    out: Tensor = _time_mix_step_(*projections, v_first, *parameters, eps, state, slots)
    return out


def _runs(pool: Tensor, *tensors: Tensor) -> bool:
    return pool.is_contiguous() and runs_fused(pool, *tensors) and not checks_wanted(pool.device)


def _mix_in_pool_(
    x: Tensor, pool: Tensor, slots: Tensor, mixes: list[Tensor]
) -> tuple[Tensor, ...]:
    from .kernels.step import mix_in_pool

    B, C = x.shape
    mixed = [x.new_empty(x.shape, dtype=products_dtype(x)) for _ in mixes]
    if B:
        block = channel_block(C)
        with on_device_of(x):
            mix_in_pool[(B, -(-C // block))](
                x.contiguous(), pool, slots.contiguous(), *six(mixes), *six(mixed),
                C=C, BC=block, COUNT=len(mixes), num_warps=2,
            )  # fmt: skip
    return tuple(mixed)


def _run(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    share: Tensor | None,
    g: Tensor,
    v_first: Tensor | None,
    w0: Tensor,
    a0: Tensor,
    v0: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    state: Tensor,
    slots: Tensor,
) -> Tensor:
    from .kernels.step import time_mix_step

    B = r.shape[0]
    H, N = r_k.shape
    out = v.new_empty(v.shape)
    given = (None if x is None else x.contiguous() for x in (r, w, k, v, rate, share, g, v_first))
    *projections, v_first = given
    if B:
        with on_device_of(state):
            time_mix_step[(B * H,)](
                tuple(projections), v_first, (w0, a0, v0, k_k, k_a, r_k, weight, bias), state,
                slots.contiguous(), out, H, eps, DECAY_SCALE=DECAY_SCALE, KEY_EPS=KEY_NORM_EPS,
                MIXES_VALUE=share is not None and v_first is not None,
                N=N, BN=max(16, 1 << (N - 1).bit_length()), num_warps=2 if N <= 64 else 8,
            )  # fmt: skip
    return out


def _fake(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    share: Tensor | None,
    g: Tensor,
    v_first: Tensor | None,
    w0: Tensor,
    a0: Tensor,
    v0: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    state: Tensor,
    slots: Tensor,
) -> Tensor:
    return v.new_empty(v.shape)


_time_mix_step_ = Operation("rwkv7::time_mix_step_", _run, _fake, changes=("state",))
