"""The kernels as functions of tensors: a walk over a call's chunks, a walk back, and the chain.

They fill what they are given; what is run for a call, and in which order, is in `__init__`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv7.wkv7.contract import Call

from . import launch, plan

__all__ = ["chain", "walk", "walk_back"]


def walk(
    call: Call,
    final: Tensor,
    *,
    initial: Tensor | None = None,
    y: Tensor | None = None,
    saved: Tensor | None = None,
    values: bool = True,
) -> None:
    """Forward from `initial` [S, H, V, K] (None: empty) to `final` [S, H, V, K], fp32.

    Args:
        y: [B, T, H, V], or None where only the state is wanted.
        saved: receives the states before the chunks (`plan.saved_words`).
        values: False leaves v out and starts from the identity: `final` is then the map [K, K].
    """
    inputs, offsets = ready(*_inputs(call), initial), _offsets(call)
    arguments = (
        *_addresses(*inputs, y, final),
        *_saved_addresses(saved, call),
        *_addresses(offsets),
    )
    own = {"SAVE": saved is not None, "OUTPUT": y is not None, "VALUES": values}
    _launch("forward", call, own, arguments)


def walk_back(
    call: Call,
    dy: Tensor | None,
    dfinal: Tensor | None,
    dinitial: Tensor,
    *,
    saved: Tensor | None = None,
    gradients: tuple[Tensor, ...] | None = None,
) -> None:
    """From the gradients of y and of the final state to those of the inputs and initial state.

    Args:
        saved: what `walk` left there; not needed where `gradients` is None.
        gradients: of r, w, k, v, a, b; None where only `dinitial` is wanted.
    """
    given, offsets = ready(*_inputs(call), dy, dfinal), _offsets(call)
    arguments = (
        *_addresses(*given),
        *_saved_addresses(saved, call),
        *_addresses(*(gradients or (None,) * 6), dinitial, offsets),
    )
    _launch("backward", call, {"GRADIENTS": gradients is not None}, arguments)


def chain(
    call: Call, maps: Tensor, added: Tensor, given: Tensor | None, handed: Tensor, *, back: bool
) -> None:
    """States before (gradients of the states after, if `back`) every segment, into `handed`.

    Args:
        call: the whole one, before it was cut.
        maps, added, handed: [B · segments, H, V, K], fp32.
        given: [B, H, V, K]: the initial state, or the gradient of the final one; None: zeros.
    """
    B, _, H, *_ = call.sizes
    macros, device = plan.macros(call, {"BACK": back}), call.r.device
    (given,) = ready(given)
    arguments = (*_addresses(maps, added, given, handed), len(maps) // B, H)
    kernel = plan.kernel("chain", call, launch.card(device))
    launch.launch(kernel, macros, device, B * H, arguments)


def ready(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As the kernels read them: contiguous, and rows on 16 bytes."""
    return tuple(x if x is None else _aligned(x.contiguous()) for x in tensors)


def _launch(name: str, call: Call, own: dict[str, bool], arguments: tuple[int, ...]) -> None:
    _, T, H, *_ = call.sizes
    macros, device = plan.macros(call, own), call.r.device
    kernel = plan.kernel(name, call, launch.card(device))
    blocks = kernel.blocks * call.sequences * H
    launch.launch(kernel, macros, device, blocks, (*arguments, T, H))


def _inputs(call: Call) -> tuple[Tensor, ...]:
    return call.r, call.w, call.k, call.v, call.a, call.b


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _offsets(call: Call) -> Tensor | None:
    return None if call.cu_seqlens is None else call.cu_seqlens.to(torch.int64).contiguous()


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if x is None else x.data_ptr() for x in tensors)


def _saved_addresses(saved: Tensor | None, call: Call) -> tuple[int, int]:
    """Of the states and of their scales in the flat tensor."""
    if saved is None:
        return 0, 0
    _, _, H, K, V = call.sizes
    states = plan.chunk_count(call) * H * V * K // 2  # words
    return saved.data_ptr(), saved.data_ptr() + 4 * states
