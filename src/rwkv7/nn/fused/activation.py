"""Channel mix's squared ReLU in one launch each way: torch's own takes several."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rwkv7.wkv7 import needs_operator

from .launch import on_device_of, runs_fused

_BLOCK = 2048
_WARPS = 8


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)² of x [..., C]."""
    if runs_fused(x):
        return (_squared_relu_operator if needs_operator(x) else _squared_relu)(x)
    return torch.relu(x).square()


def _squared_relu(x: Tensor) -> Tensor:
    from .kernels.elements import squared_relu

    y = x.new_empty(x.shape)
    if count := x.numel():
        C = x.shape[-1]
        with on_device_of(x):
            squared_relu[(-(-count // _BLOCK),)](
                x.contiguous(), y, count // C, C=C, BLOCK=_BLOCK, num_warps=_WARPS
            )
    return y


_squared_relu_operator = torch.library.custom_op(
    "rwkv7::squared_relu", _squared_relu, mutates_args=()
)


@_squared_relu_operator.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("rwkv7::squared_relu_backward", mutates_args=())
def _squared_relu_backward(dy: Tensor, x: Tensor) -> Tensor:
    from .kernels.elements import squared_relu_back

    dx = x.new_empty(x.shape)
    if count := x.numel():
        C = x.shape[-1]
        with on_device_of(x):
            squared_relu_back[(-(-count // _BLOCK),)](
                x.contiguous(), dy.contiguous(), dx, count // C, C=C, BLOCK=_BLOCK, num_warps=_WARPS
            )
    return dx


@_squared_relu_backward.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> Tensor:
    return torch.ops.rwkv7.squared_relu_backward(dy, *ctx.saved_tensors)


_squared_relu_operator.register_autograd(_differentiate, setup_context=_setup_context)
