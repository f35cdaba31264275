"""The operator's k, a, b and w from the projections they are made of, in one launch."""

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

KEY_NORM_EPS = 1e-12


def key_operands(
    k: Tensor,  # [..., C]
    rate: Tensor,  # [..., C]
    decay: Tensor,  # [..., C]
    a0: Tensor,  # [C]
    k_k: Tensor,  # [C]
    k_a: Tensor,  # [C]
    w0: Tensor,  # [C]
    heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator's k, a = -k̂, b = k̂ σ(a0 + rate) and w = w0 + decay, each [..., H, N].

    k̂ is the unit vector of k k_k in each head, of k as it was before the learning rate
    σ(a0 + rate) changes it into k (1 + (σ - 1) k_a). All are in the dtype of k but w, which is in
    the wider one of its two terms'.
    """
    if runs_fused(k, rate, decay, a0, k_k, k_a, w0):
        found: tuple[Tensor, Tensor, Tensor, Tensor]
        found = _key_operands(k, rate, decay, a0, k_k, k_a, w0, heads)
        return found
    # All of it in float32 at least, and rounded once.
    a = torch.sigmoid(a0 + rate)
    dtype, wide = k.dtype, wide_dtype(k.dtype)
    shape = (*k.shape[:-1], heads, k.shape[-1] // heads)
    k, a = k.to(wide), a.to(wide)
    unit = F.normalize((k * k_k).view(shape), dim=-1, eps=KEY_NORM_EPS)
    k = torch.addcmul(k, k * (a - 1), k_a).view(shape)
    w = (w0 + decay).view(shape)
    return k.to(dtype), (-unit).to(dtype), (unit * a.view(shape)).to(dtype), w


def _outputs(
    k: Tensor, decay: Tensor, w0: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (*k.shape[:-1], heads, k.shape[-1] // heads)
    key, remove, replace = (k.new_empty(shape) for _ in range(3))
    w = decay.new_empty(shape, dtype=torch.promote_types(decay.dtype, w0.dtype))
    return key, remove, replace, w


def _run(
    k: Tensor,
    rate: Tensor,
    decay: Tensor,
    a0: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    w0: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .kernels.heads import key_operands

    tile, rows = head_tile(k.shape[-1] // heads), rows_of(k)
    outputs = _outputs(k, decay, w0, heads)
    if rows:
        with on_device_of(k):
            key_operands[(-(-rows // tile["BT"]), heads)](
                k.contiguous(), rate.contiguous(), decay.contiguous(), a0, k_k, k_a, w0, *outputs,
                rows, heads, EPS=KEY_NORM_EPS, **tile, num_warps=TILE_WARPS,
            )  # fmt: skip
    return outputs


def _fake(
    k: Tensor,
    rate: Tensor,
    decay: Tensor,
    a0: Tensor,
    k_k: Tensor,
    k_a: Tensor,
    w0: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(k, decay, w0, heads)


def _run_back(
    dkey: Tensor,
    dremove: Tensor,
    dreplace: Tensor,
    dw: Tensor,
    k: Tensor,
    rate: Tensor,
    decay: torch.dtype,
    a0: Tensor,
    k_k: Tensor,
    k_a: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, rate and decay (in that dtype), and those of a0, k_k, k_a and w0 as [4, C]
    in fp32."""
    from .kernels.heads import key_operands_back

    (H, N), rows = dkey.shape[-2:], rows_of(k)
    tile = head_tile(N)
    tiles = rows_apiece(-(-rows // tile["BT"]), few=1, many=8)
    programs = -(-rows // (tiles * tile["BT"]))
    dk, drate = k.new_empty(k.shape), rate.new_empty(rate.shape)
    ddecay = dw.new_empty(k.shape, dtype=decay)
    parts = k.new_empty((programs, 4, H * N), dtype=torch.float32)
    if programs:
        with on_device_of(k):
            key_operands_back[(programs, H)](
                k.contiguous(), rate.contiguous(), a0, k_k, k_a,
                dkey.contiguous(), dremove.contiguous(), dreplace.contiguous(), dw.contiguous(),
                dk, drate, ddecay, parts, rows, H, tiles,
                EPS=KEY_NORM_EPS, **tile, num_warps=TILE_WARPS,
            )  # fmt: skip
    return dk, drate, ddecay, parts.sum(0)


def _fake_back(
    dkey: Tensor,
    dremove: Tensor,
    dreplace: Tensor,
    dw: Tensor,
    k: Tensor,
    rate: Tensor,
    decay: torch.dtype,
    a0: Tensor,
    k_k: Tensor,
    k_a: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = k.new_empty((4, k.shape[-1]), dtype=torch.float32)
    return k.new_empty(k.shape), rate.new_empty(k.shape), dw.new_empty(k.shape, dtype=decay), sums


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    k, rate, decay, *parameters, _ = inputs
    ctx.save_for_backward(k, rate, *parameters)
    ctx.decay = decay.dtype


def _differentiate(
    ctx: Any, dkey: Tensor, dremove: Tensor, dreplace: Tensor, dw: Tensor
) -> tuple[Tensor | None, ...]:
    k, rate, *parameters = ctx.saved_tensors
    *grads, sums = _key_operands_backward(
        dkey, dremove, dreplace, dw, k, rate, ctx.decay, *parameters[:3]
    )
    return (*grads, *of_parameters(sums, parameters), None)


_key_operands_backward = Operation("rwkv7::key_operands_backward", _run_back, _fake_back)
_key_operands = Operation("rwkv7::key_operands", _run, _fake)
_key_operands.differentiable(_setup_context, _differentiate)
