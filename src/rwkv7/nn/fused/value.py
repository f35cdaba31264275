"""Layer 0's value mixed into a later layer's, in one launch each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rwkv7.wkv7 import needs_operator

from .launch import TILE_WARPS, head_tile, on_device_of, rows_apiece, runs_fused


def mixed_value(
    v: Tensor,  # [B, T, C]
    first: Tensor,  # [B, T, C]
    share: Tensor,  # [B, T, C]
    v0: Tensor,  # [C]
    heads: int,
) -> Tensor:
    """v + (first - v) σ(v0 + share), [B, T, C] in the dtype of v.

    `heads` cuts the channels for the kernel; it changes nothing in the result.
    """
    if runs_fused(v, first, share, v0):
        run = _mixed_value_operator if needs_operator(v) else _mixed_value
        return run(v, first, share, v0, heads)
    return torch.addcmul(v, first - v, torch.sigmoid(v0 + share).to(v.dtype))


def _mixed_value(v: Tensor, first: Tensor, share: Tensor, v0: Tensor, heads: int) -> Tensor:
    from .kernels.heads import mixed_value

    B, T, C = v.shape
    tile = head_tile(C // heads)
    out = v.new_empty(v.shape)
    if B * T:
        with on_device_of(v):
            mixed_value[(-(-B * T // tile["BT"]), heads)](
                *(x.contiguous() for x in (v, first, share)), v0, out, B * T, heads,
                **tile, num_warps=TILE_WARPS,
            )  # fmt: skip
    return out


_mixed_value_operator = torch.library.custom_op("rwkv7::mixed_value", _mixed_value, mutates_args=())


@_mixed_value_operator.register_fake
def _(v: Tensor, first: Tensor, share: Tensor, v0: Tensor, heads: int) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.custom_op("rwkv7::mixed_value_backward", mutates_args=())
def _mixed_value_backward(
    dout: Tensor, v: Tensor, first: Tensor, share: Tensor, v0: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .kernels.heads import mixed_value_back

    B, T, C = v.shape
    tile = head_tile(C // heads)
    tiles = rows_apiece(-(-B * T // tile["BT"]), few=1, many=8)
    programs = -(-B * T // (tiles * tile["BT"]))
    dv, dfirst, dshare = (x.new_empty(x.shape) for x in (v, first, share))
    parts = v.new_empty((programs, C), dtype=torch.float32)
    if programs:
        with on_device_of(v):
            mixed_value_back[(programs, heads)](
                *(x.contiguous() for x in (v, first, share)), v0, dout.contiguous(),
                dv, dfirst, dshare, parts, B * T, heads, tiles, **tile, num_warps=TILE_WARPS,
            )  # fmt: skip
    return dv, dfirst, dshare, parts.sum(0).to(v0.dtype)


@_mixed_value_backward.register_fake
def _(
    dout: Tensor, v: Tensor, first: Tensor, share: Tensor, v0: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dv, dfirst, dshare, dv0 = (x.new_empty(x.shape) for x in (v, first, share, v0))
    return dv, dfirst, dshare, dv0


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.rwkv7.mixed_value_backward(dout, *ctx.saved_tensors, ctx.heads), None)


_mixed_value_operator.register_autograd(_differentiate, setup_context=_setup_context)
