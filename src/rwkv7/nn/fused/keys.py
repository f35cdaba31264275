"""The operator's k, a and b from the key's projection and the learning rate's, in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv7.state import wide_dtype
from rwkv7.wkv7 import needs_operator

from .launch import TILE_WARPS, head_tile, on_device_of, rows_apiece, runs_fused

KEY_NORM_EPS = 1e-12


def key_operands(
    k: Tensor,  # [B, T, C]
    rate: Tensor,  # [B, T, C]
    a0: Tensor,  # [C]
    k_k: Tensor,  # [C]
    k_a: Tensor,  # [C]
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's k, a = -k̂ and b = k̂ σ(a0 + rate), each [B, T, H, N] in the dtype of k.

    k̂ is the unit vector of k k_k in each head, of k as it was before the learning rate
    σ(a0 + rate) changes it into k (1 + (σ - 1) k_a).
    """
    if runs_fused(k, rate, a0, k_k, k_a):
        run = _key_operands_operator if needs_operator(k) else _key_operands
        return run(k, rate, a0, k_k, k_a, heads)
    # All of it in float32 at least, and rounded once.
    a = torch.sigmoid(a0 + rate)
    dtype, wide = k.dtype, wide_dtype(k.dtype)
    shape = (*k.shape[:2], heads, k.shape[2] // heads)
    k, a = k.to(wide), a.to(wide)
    unit = F.normalize((k * k_k).view(shape), dim=-1, eps=KEY_NORM_EPS)
    k = torch.addcmul(k, k * (a - 1), k_a).view(shape)
    return k.to(dtype), (-unit).to(dtype), (unit * a.view(shape)).to(dtype)


def _key_operands(
    k: Tensor, rate: Tensor, a0: Tensor, k_k: Tensor, k_a: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    from .kernels.heads import key_operands

    B, T, C = k.shape
    tile = head_tile(C // heads)
    key, remove, replace = (k.new_empty(B, T, heads, C // heads) for _ in range(3))
    if B * T:
        with on_device_of(k):
            key_operands[(-(-B * T // tile["BT"]), heads)](
                k.contiguous(), rate.contiguous(), a0, k_k, k_a, key, remove, replace,
                B * T, heads, EPS=KEY_NORM_EPS, **tile, num_warps=TILE_WARPS,
            )  # fmt: skip
    return key, remove, replace


_key_operands_operator = torch.library.custom_op(
    "rwkv7::key_operands", _key_operands, mutates_args=()
)


@_key_operands_operator.register_fake
def _(
    k: Tensor, rate: Tensor, a0: Tensor, k_k: Tensor, k_a: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, C = k.shape
    key, remove, replace = (k.new_empty(B, T, heads, C // heads) for _ in range(3))
    return key, remove, replace


@torch.library.custom_op("rwkv7::key_operands_backward", mutates_args=())
def _key_operands_backward(
    dkey: Tensor,
    dremove: Tensor,
    dreplace: Tensor,
    k: Tensor,
    rate: Tensor,
    a0: Tensor,
    k_k: Tensor,
    k_a: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from .kernels.heads import key_operands_back

    B, T, H, N = dkey.shape
    tile = head_tile(N)
    tiles = rows_apiece(-(-B * T // tile["BT"]), few=1, many=8)
    programs = -(-B * T // (tiles * tile["BT"]))
    dk, drate = k.new_empty(k.shape), rate.new_empty(rate.shape)
    parts = k.new_empty((programs, 3, H * N), dtype=torch.float32)
    if programs:
        with on_device_of(k):
            key_operands_back[(programs, H)](
                k.contiguous(), rate.contiguous(), a0, k_k, k_a,
                dkey.contiguous(), dremove.contiguous(), dreplace.contiguous(),
                dk, drate, parts, B * T, H, tiles,
                EPS=KEY_NORM_EPS, **tile, num_warps=TILE_WARPS,
            )  # fmt: skip
    da0, dk_k, dk_a = (
        part.to(x.dtype, copy=True) for part, x in zip(parts.sum(0), (a0, k_k, k_a), strict=True)
    )
    return dk, drate, da0, dk_k, dk_a


@_key_operands_backward.register_fake
def _(
    dkey: Tensor,
    dremove: Tensor,
    dreplace: Tensor,
    k: Tensor,
    rate: Tensor,
    a0: Tensor,
    k_k: Tensor,
    k_a: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dk, drate, da0, dk_k, dk_a = (x.new_empty(x.shape) for x in (k, rate, a0, k_k, k_a))
    return dk, drate, da0, dk_k, dk_a


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5])


def _differentiate(
    ctx: Any, dkey: Tensor, dremove: Tensor, dreplace: Tensor
) -> tuple[Tensor | None, ...]:
    grads = torch.ops.rwkv7.key_operands_backward(dkey, dremove, dreplace, *ctx.saved_tensors)
    return (*grads, None)


_key_operands_operator.register_autograd(_differentiate, setup_context=_setup_context)
