"""From the operator's y to what the output projection reads: group norm, bonus, gate, at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv7.state import wide_dtype
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


def gated_output(
    y: Tensor,  # [..., H, N]
    r: Tensor,  # [..., H, N]
    k: Tensor,  # [..., H, N]
    v: Tensor,  # [..., H, N]
    g: Tensor,  # [..., C]
    r_k: Tensor,  # [H, N]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
) -> Tensor:
    """(group norm of y a head, plus the bonus (Σ r k r_k) v) g, [..., C] in the dtype of y."""
    if runs_fused(y, r, k, v, g, r_k, weight, bias):
        found: Tensor = _gated_output(y, r, k, v, g, r_k, weight, bias, eps)
        return found
    # In float32 at least, and rounded once.
    H, N = y.shape[-2:]
    dtype, wide = y.dtype, wide_dtype(y.dtype)
    r, k, v = r.to(wide), k.to(wide), v.to(wide)
    y = F.group_norm(y.to(wide).view(-1, H * N), H, weight.to(wide), bias.to(wide), eps)
    y = y.view(v.shape) + (r * k * r_k).sum(-1, keepdim=True) * v
    return (y.view(g.shape) * g).to(dtype)


def _run(
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

    H, N = y.shape[-2:]
    tile, rows = head_tile(N), rows_of(g)
    out = y.new_empty(g.shape)
    if rows:
        with on_device_of(y):
            gated_output[(-(-rows // tile["BT"]), H)](
                *(x.contiguous() for x in (y, r, k, v, g)), r_k, weight, bias, out,
                rows, H, eps, **tile, num_warps=TILE_WARPS,
            )  # fmt: skip
    return out


def _fake(
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
    return y.new_empty(g.shape)


def _run_back(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y, r, k, v and g, and those of the parameters as [3, C] in fp32."""
    from .kernels.heads import gated_output_back

    (H, N), rows = y.shape[-2:], rows_of(g)
    tile = head_tile(N)
    tiles = rows_apiece(-(-rows // tile["BT"]), few=1, many=8)
    programs = -(-rows // (tiles * tile["BT"]))
    dy, dr, dk, dv, dg = (x.new_empty(x.shape) for x in (y, r, k, v, g))
    parts = y.new_empty((programs, 3, H * N), dtype=torch.float32)
    if programs:
        with on_device_of(y):
            gated_output_back[(programs, H)](
                *(x.contiguous() for x in (y, r, k, v, g)), r_k, weight, bias,
                dout.contiguous(), dy, dr, dk, dv, dg, parts, rows, H, tiles, eps,
                **tile, num_warps=TILE_WARPS,
            )  # fmt: skip
    return dy, dr, dk, dv, dg, parts.sum(0)


def _fake_back(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dy, dr, dk, dv, dg = (x.new_empty(x.shape) for x in (y, r, k, v, g))
    return dy, dr, dk, dv, dg, y.new_empty((3, weight.shape[0]), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, eps = inputs
    ctx.save_for_backward(*tensors)
    ctx.eps = eps


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    *grads, sums = _gated_output_backward(dout, *tensors, ctx.eps)
    return (*grads, *of_parameters(sums, tensors[5:]), None)


_gated_output_backward = Operation("rwkv7::gated_output_backward", _run_back, _fake_back)
_gated_output = Operation("rwkv7::gated_output", _run, _fake)
_gated_output.differentiable(_setup_context, _differentiate)
