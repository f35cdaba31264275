"""Channel mix's squared ReLU in one launch each way: torch's own takes several."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rwkv7.wkv7 import Operation

from .launch import on_device_of, runs_fused

_BLOCK = 2048
_WARPS = 8


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)² of x [..., C]."""
    if runs_fused(x):
        found: Tensor = _squared_relu(x)
        return found
    return torch.relu(x).square()


def _run(x: Tensor) -> Tensor:
    from .kernels.elements import squared_relu

    y = x.new_empty(x.shape)
    if count := x.numel():
        C = x.shape[-1]
        with on_device_of(x):
            squared_relu[(-(-count // _BLOCK),)](
                x.contiguous(), y, count // C, C=C, BLOCK=_BLOCK, num_warps=_WARPS
            )
    return y


def _fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _run_back(dy: Tensor, x: Tensor) -> Tensor:
    from .kernels.elements import squared_relu_back

    dx = x.new_empty(x.shape)
    if count := x.numel():
        C = x.shape[-1]
        with on_device_of(x):
            squared_relu_back[(-(-count // _BLOCK),)](
                x.contiguous(), dy.contiguous(), dx, count // C, C=C, BLOCK=_BLOCK, num_warps=_WARPS
            )
    return dx


def _fake_back(dy: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor]:
    return (_squared_relu_backward(dy, *ctx.saved_tensors),)


_squared_relu_backward = Operation("rwkv7::squared_relu_backward", _run_back, _fake_back)
_squared_relu = Operation("rwkv7::squared_relu", _run, _fake)
_squared_relu.differentiable(_setup_context, _differentiate)
