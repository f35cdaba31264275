"""Decoding one sequence: a whole layer for one token in seven launches on a GPU.

One row against a matrix is as fast as memory gives the matrix, if nothing stands between one
product and the next. So everything else is done inside the products' launches, and a launch asks
for its weights before the one in front has ended. Many sequences are those of `rows`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv7.wkv7 import DECAY_SCALE, checks_wanted

from .keys import KEY_NORM_EPS
from .launch import on_device_of, power_of_two, runs_fused
from .step import LARGEST_HEAD, StepParameters

# Sizes of a program, measured on an H100 (`benchmarks/engine.py bounds`): rows of a matrix and how
# much of them at once, columns of a low-rank matrix and how much of them, channels of a norm.
_ROWS, _ALONG, _WARPS = 4, 2048, 8
_COLUMNS, _DOWN = 16, 512
_CHANNELS = 512


class Norm(NamedTuple):
    """A layer norm over C channels."""

    weight: Tensor
    bias: Tensor
    eps: float


class TimeMixWeights(NamedTuple):
    """Time mix: its mixes in the order r, w, k, v, a, g, and its matrices.

    `lows` [C, D] and `highs` [D, C] are those of the decay, the learning rate, the gate and, after
    layer 0, the value's share.
    """

    mixes: tuple[Tensor, ...]
    rkv: tuple[Tensor, Tensor, Tensor]
    lows: tuple[Tensor, ...]
    highs: tuple[Tensor, ...]
    vectors: StepParameters
    eps: float
    output: Tensor


class ChannelMixWeights(NamedTuple):
    """Channel mix: its mix [C] and its matrices."""

    mix: Tensor
    key: Tensor
    value: Tensor


def runs_layers(x: Tensor, *pools: Tensor) -> bool:
    """Whether whole layers of a step take x [B, 1, C] and these pools, here or in `rows`.

    Not inside `checks()`, under autocast or in a trace.
    """
    return (
        x.shape[0] > 0
        and runs_fused(x, *pools)
        and type(x) is Tensor
        and all(pool.is_contiguous() for pool in pools)
        and all(pool.shape[-1] <= LARGEST_HEAD for pool in pools if pool.dim() == 4)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
        and not checks_wanted(x.device)
    )


def time_mix_of_one_(
    x: Tensor,  # [1, 1, C], the stream before the norm
    v_first: Tensor | None,  # [1, 1, C]
    norm: Norm,
    weights: TimeMixWeights,
    shift: Tensor,  # [P, C]
    state: Tensor,  # [P, H, N, N]
    slots: Tensor,  # [1]
) -> tuple[Tensor, Tensor]:
    """(x + TimeMix(norm(x)), layer 0's value), each [1, 1, C]; a row of both pools changes."""
    from .kernels.single import head, projections

    C = x.shape[-1]
    H, N = weights.vectors.r_k.shape
    ranks = tuple(low.shape[1] for low in weights.lows)
    pdl = _begins_early(x)
    with on_device_of(x):
        x, mixed = norm_mix(x, None, norm, weights.mixes, shift, slots)
        rkv = x.new_empty(3, 1, 1, C)
        hidden = x.new_empty(sum(ranks), dtype=torch.float32)
        programs = sum(-(-rank // _COLUMNS) for rank in ranks) + 3 * -(-C // _ROWS)
        projections[(programs,)](
            mixed, weights.rkv, weights.lows, rkv, hidden, RANKS=ranks, C=C,
            BD=_COLUMNS, BC=_DOWN, BR=_ROWS, BK=min(_ALONG, power_of_two(C)), **pdl,
        )  # fmt: skip
        out = torch.empty_like(x)
        head[(H,)](
            rkv, hidden, weights.highs, v_first, tuple(weights.vectors), state, slots, out,
            weights.eps, RANKS=ranks,
            TILES=tuple(max(16, power_of_two(rank)) for rank in ranks), DECAY_SCALE=DECAY_SCALE,
            KEY_EPS=KEY_NORM_EPS, C=C, N=N, BN=max(16, power_of_two(N)), **pdl,
        )  # fmt: skip
        x = _product(out, weights.output, x, pdl)
    return x, rkv[2] if v_first is None else v_first


def channel_mix_of_one_(
    x: Tensor,  # [1, 1, C], the stream before the norm
    norm: Norm,
    weights: ChannelMixWeights,
    shift: Tensor,  # [P, C]
    slots: Tensor,  # [1]
) -> Tensor:
    """x + ChannelMix(norm(x)), [1, 1, C]; a row of the pool `shift` changes."""
    pdl = _begins_early(x)
    with on_device_of(x):
        x, mixed = norm_mix(x, None, norm, (weights.mix,), shift, slots)
        hidden = _product(mixed, weights.key, None, pdl)
        return _product(hidden, weights.value, x, pdl)


def norm_mix(
    x: Tensor,  # [B, 1, C]
    added: Tensor | None,  # [B, 1, C]
    norm: Norm,
    mixes: tuple[Tensor, ...],  # each [C]
    shift: Tensor,  # [P, C]
    slots: Tensor,  # [B]
) -> tuple[Tensor, Tensor]:
    """(x + added, [len(mixes), B, 1, C]: n + (before - n) m for each m, n the norm of that).

    `before` are rows of the pool `shift`, whose place n takes.
    """
    from .kernels.single import norm_mix as kernel

    B, _, C = x.shape
    whole = power_of_two(C)
    # Where rows are few, several programs share one.
    block = min(_CHANNELS, whole) if B == 1 else whole
    mixed = x.new_empty(len(mixes), B, 1, C)
    total = None if added is None else torch.empty_like(x)
    warps = max(4, min(16, whole // 256))
    how = _begins_early(x) if B == 1 else {"PDL": False, "num_warps": warps}
    with on_device_of(x):
        kernel[(-(-C // block), B)](
            x.contiguous(), added, total, norm.weight, norm.bias, shift, slots, mixes, mixed, B,
            norm.eps, C=C, WHOLE=whole, BC=block, **how,
        )  # fmt: skip
    return x if total is None else total, mixed


def _product(x: Tensor, matrix: Tensor, residual: Tensor | None, pdl: Any) -> Tensor:
    """residual + W x; without a residual, max(W x, 0)²."""
    from .kernels.single import row_product

    rows, K = matrix.shape
    y = x.new_empty(1, 1, rows)
    row_product[(-(-rows // _ROWS),)](
        x, matrix, residual, y,
        ROWS=rows, K=K, BR=_ROWS, BK=min(_ALONG, power_of_two(K)), **pdl,
    )  # fmt: skip
    return y


def _begins_early(x: Tensor) -> dict[str, Any]:
    """How a kernel is launched: early, where the card knows that (from Hopper on)."""
    early = x.is_cuda and torch.version.hip is None
    early = early and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"PDL": early, "num_warps": _WARPS, **({"launch_pdl": True} if early else {})}
