"""Layer 0's value mixed into a later layer's, in one launch each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rwkv7.wkv7 import Operation

from .launch import (
    TILE_WARPS,
    head_tile,
    of_parameters,
    on_device_of,
    rows_apiece,
    rows_of,
    runs_fused,
)


def mixed_value(
    v: Tensor,  # [..., C]
    first: Tensor,  # [..., C]
    share: Tensor,  # [..., C]
    v0: Tensor,  # [C]
    heads: int,
) -> Tensor:
    """v + (first - v) σ(v0 + share), [..., C] in the dtype of v.

    `heads` cuts the channels for the kernel; it changes nothing in the result.
    """
    if runs_fused(v, first, share, v0):
        found: Tensor = _mixed_value(v, first, share, v0, heads)
        return found
    return torch.addcmul(v, first - v, torch.sigmoid(v0 + share).to(v.dtype))


def _run(v: Tensor, first: Tensor, share: Tensor, v0: Tensor, heads: int) -> Tensor:
    from .kernels.heads import mixed_value

    tile, rows = head_tile(v.shape[-1] // heads), rows_of(v)
    out = v.new_empty(v.shape)
    if rows:
        with on_device_of(v):
            mixed_value[(-(-rows // tile["BT"]), heads)](
                *(x.contiguous() for x in (v, first, share)), v0, out, rows, heads,
                **tile, num_warps=TILE_WARPS,
            )  # fmt: skip
    return out


def _fake(v: Tensor, first: Tensor, share: Tensor, v0: Tensor, heads: int) -> Tensor:
    return v.new_empty(v.shape)


def _run_back(
    dout: Tensor, v: Tensor, first: Tensor, share: Tensor, v0: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of v, first and share, and that of v0 as [1, C] in fp32."""
    from .kernels.heads import mixed_value_back

    C, rows = v.shape[-1], rows_of(v)
    tile = head_tile(C // heads)
    tiles = rows_apiece(-(-rows // tile["BT"]), few=1, many=8)
    programs = -(-rows // (tiles * tile["BT"]))
    dv, dfirst, dshare = (x.new_empty(x.shape) for x in (v, first, share))
    parts = v.new_empty((programs, 1, C), dtype=torch.float32)
    if programs:
        with on_device_of(v):
            mixed_value_back[(programs, heads)](
                *(x.contiguous() for x in (v, first, share)), v0, dout.contiguous(),
                dv, dfirst, dshare, parts, rows, heads, tiles, **tile, num_warps=TILE_WARPS,
            )  # fmt: skip
    return dv, dfirst, dshare, parts.sum(0)


def _fake_back(
    dout: Tensor, v: Tensor, first: Tensor, share: Tensor, v0: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dv, dfirst, dshare = (x.new_empty(x.shape) for x in (v, first, share))
    return dv, dfirst, dshare, v.new_empty((1, *v0.shape), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, v0 = ctx.saved_tensors
    *grads, sums = _mixed_value_backward(dout, *tensors, v0, ctx.heads)
    return (*grads, *of_parameters(sums, (v0,)), None)


_mixed_value_backward = Operation("rwkv7::mixed_value_backward", _run_back, _fake_back)
_mixed_value = Operation("rwkv7::mixed_value", _run, _fake)
_mixed_value.differentiable(_setup_context, _differentiate)
