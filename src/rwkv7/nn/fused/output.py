"""From the operator's y to what the output projection reads: group norm, bonus, gate, at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv7.state import wide_dtype
from rwkv7.wkv7 import needs_operator

from .launch import TILE_WARPS, head_tile, on_device_of, rows_apiece, runs_fused


def gated_output(
    y: Tensor,  # [B, T, H, N]
    r: Tensor,  # [B, T, H, N]
    k: Tensor,  # [B, T, H, N]
    v: Tensor,  # [B, T, H, N]
    g: Tensor,  # [B, T, C]
    r_k: Tensor,  # [H, N]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
) -> Tensor:
    """(group norm of y a head, plus the bonus (Σ r k r_k) v) g, [B, T, C] in the dtype of y."""
    if runs_fused(y, r, k, v, g, r_k, weight, bias):
        run = _gated_output_operator if needs_operator(y) else _gated_output
        return run(y, r, k, v, g, r_k, weight, bias, eps)
    # In float32 at least, and rounded once.
    B, T, H, N = y.shape
    dtype, wide = y.dtype, wide_dtype(y.dtype)
    r, k, v = r.to(wide), k.to(wide), v.to(wide)
    y = F.group_norm(y.to(wide).view(B * T, H * N), H, weight.to(wide), bias.to(wide), eps)
    y = y.view(B, T, H, N) + (r * k * r_k).sum(-1, keepdim=True) * v
    return (y.view(B, T, H * N) * g).to(dtype)


def _gated_output(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    from .kernels.heads import gated_output

    B, T, H, N = y.shape
    tile = head_tile(N)
    out = y.new_empty(B, T, H * N)
    if B * T:
        with on_device_of(y):
            gated_output[(-(-B * T // tile["BT"]), H)](
                *(x.contiguous() for x in (y, r, k, v, g)), r_k, weight, bias, out,
                B * T, H, eps, **tile, num_warps=TILE_WARPS,
            )  # fmt: skip
    return out


_gated_output_operator = torch.library.custom_op(
    "rwkv7::gated_output", _gated_output, mutates_args=()
)


@_gated_output_operator.register_fake
def _(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    B, T, H, N = y.shape
    return y.new_empty(B, T, H * N)


@torch.library.custom_op("rwkv7::gated_output_backward", mutates_args=())
def _gated_output_backward(
    dout: Tensor,
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from .kernels.heads import gated_output_back

    B, T, H, N = y.shape
    tile = head_tile(N)
    tiles = rows_apiece(-(-B * T // tile["BT"]), few=1, many=8)
    programs = -(-B * T // (tiles * tile["BT"]))
    dy, dr, dk, dv, dg = (x.new_empty(x.shape) for x in (y, r, k, v, g))
    parts = y.new_empty((programs, 3, H * N), dtype=torch.float32)
    if programs:
        with on_device_of(y):
            gated_output_back[(programs, H)](
                *(x.contiguous() for x in (y, r, k, v, g)), r_k, weight, bias,
                dout.contiguous(), dy, dr, dk, dv, dg, parts, B * T, H, tiles, eps,
                **tile, num_warps=TILE_WARPS,
            )  # fmt: skip
    dr_k, dweight, dbias = (
        part.view(x.shape).to(x.dtype, copy=True)
        for part, x in zip(parts.sum(0), (r_k, weight, bias), strict=True)
    )
    return dy, dr, dk, dv, dg, dr_k, dweight, dbias


@_gated_output_backward.register_fake
def _(
    dout: Tensor,
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    r_k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (y, r, k, v, g, r_k, weight, bias)
    dy, dr, dk, dv, dg, dr_k, dweight, dbias = (x.new_empty(x.shape) for x in inputs)
    return dy, dr, dk, dv, dg, dr_k, dweight, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, eps = inputs
    ctx.save_for_backward(*tensors)
    ctx.eps = eps


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.rwkv7.gated_output_backward(dout, *ctx.saved_tensors, ctx.eps), None)


_gated_output_operator.register_autograd(_differentiate, setup_context=_setup_context)
