"""Token shift with the mixes that follow it: x + (before - x) m for each m, in one launch.

`token_shift` says what stands before a token; without a GPU it is what runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rwkv7.nn.token_shift import Packing, token_shift
from rwkv7.wkv7 import needs_operator

from .launch import channel_block, on_device_of, rows_apiece, runs_fused

MOST_MIXES = 6
_ROWS = 16  # a forward program's
_WARPS = {"forward": 4, "backward": 2}


def shifted_mixes(
    x: Tensor,  # [B, T, C]
    carried: Tensor | None,  # [S, C]
    packed: Packing | None,
    mixes: tuple[Tensor, ...],  # each [C]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """(x + (before - x) m for each m of `mixes`, each [B, T, C]; the vectors to carry on [S, C]).

    `carried` and `packed` are as in `token_shift`. There are one or six mixes. Under autocast the
    kernel writes autocast's dtype, which the matrix products that follow would cast to.
    """
    if len(mixes) in (1, MOST_MIXES) and runs_fused(x, *mixes):
        sequences = x.shape[0] if packed is None else packed.sequences
        sequence = None if packed is None else packed.sequence
        run = _shift_mix_operator if needs_operator(x) else _shift_mix
        *mixed, last = run(x, carried, sequence, list(mixes), sequences, products_dtype(x))
        return tuple(mixed), last
    before, last = token_shift(x, carried, packed)
    return mix(x, before, mixes), last


def mix(x: Tensor, before: Tensor, mixes: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """x + (before - x) m for each m, in plain torch."""
    delta = before - x
    return tuple(torch.addcmul(x, delta, m) for m in mixes)


def products_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of x would be cast to: autocast's dtype under it, else x's own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def six(tensors: list[Tensor]) -> list[Tensor]:
    """One or six tensors as the six arguments of a kernel, which reads the first COUNT of them."""
    return [*tensors, *tensors[:1] * (MOST_MIXES - len(tensors))]


def _shift_mix(
    x: Tensor,
    carried: Tensor | None,
    sequence: Tensor | None,
    mixes: list[Tensor],
    sequences: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The mixes and, last, what each sequence carries on."""
    from .kernels.shift import shift_mix

    B, T, C = x.shape
    last = x.new_zeros(sequences, C) if carried is None else carried.to(x.dtype, copy=True)
    last = last.contiguous()
    mixed = [x.new_empty(x.shape, dtype=dtype) for _ in mixes]
    if B * T:
        block = channel_block(C)
        grid = (-(-B * T // _ROWS), -(-C // block))
        with on_device_of(x):
            shift_mix[grid](
                x.contiguous(), _contiguous(carried), sequence,
                *six(mixes), *six(mixed), last, B * T, T,
                C=C, BR=_ROWS, BC=block, COUNT=len(mixes), PACKED=sequence is not None,
                GIVEN=carried is not None, num_warps=_WARPS["forward"],
            )  # fmt: skip
    return [*mixed, last]


_shift_mix_operator = torch.library.custom_op("rwkv7::shift_mix", _shift_mix, mutates_args=())


@_shift_mix_operator.register_fake
def _(
    x: Tensor,
    carried: Tensor | None,
    sequence: Tensor | None,
    mixes: list[Tensor],
    sequences: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    mixed = [x.new_empty(x.shape, dtype=dtype) for _ in mixes]
    return [*mixed, x.new_empty(sequences, x.shape[2])]


@torch.library.custom_op("rwkv7::shift_mix_backward", mutates_args=())
def _shift_mix_backward(
    dmixed: list[Tensor],
    dlast: Tensor | None,
    x: Tensor,
    carried: Tensor | None,
    sequence: Tensor | None,
    mixes: list[Tensor],
) -> list[Tensor]:
    """Gradients of x, of each mix and, when there is one, of `carried`."""
    from .kernels.shift import shift_mix_back

    B, T, C = x.shape
    count, block = len(mixes), channel_block(C)
    span = rows_apiece(B * T, few=16, many=64)
    programs = -(-B * T // span)
    dx = x.new_empty(x.shape)
    dcarried = carried
    if carried is not None:
        # What an empty sequence carries on is what it was given.
        dcarried = carried.new_zeros(carried.shape)
        if dlast is not None:
            dcarried.copy_(dlast)
    parts = x.new_empty((programs, count, C), dtype=torch.float32)
    if programs:
        with on_device_of(x):
            shift_mix_back[(programs, -(-C // block))](
                x.contiguous(), _contiguous(carried), sequence, *six(mixes),
                *six([dy.contiguous() for dy in dmixed]), _contiguous(dlast),
                dx, dcarried, parts, B * T, T, span,
                C=C, BC=block, COUNT=count, PACKED=sequence is not None,
                GIVEN=carried is not None, HAS_DLAST=dlast is not None,
                num_warps=_WARPS["backward"],
            )  # fmt: skip
    dmixes = parts.sum(0)
    grads = [dx, *(dmixes[i].to(m.dtype, copy=True) for i, m in enumerate(mixes))]
    return grads if dcarried is None else [*grads, dcarried]


@_shift_mix_backward.register_fake
def _(
    dmixed: list[Tensor],
    dlast: Tensor | None,
    x: Tensor,
    carried: Tensor | None,
    sequence: Tensor | None,
    mixes: list[Tensor],
) -> list[Tensor]:
    grads = [x.new_empty(x.shape), *(m.new_empty(m.shape) for m in mixes)]
    return grads if carried is None else [*grads, carried.new_empty(carried.shape)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, carried, sequence, mixes, _, _ = inputs
    ctx.save_for_backward(x, carried, sequence, *mixes)
    ctx.set_materialize_grads(False)
    ctx.like = [(y.shape, y.dtype, y.device) for y in output[:-1]]


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, carried, sequence, *mixes = ctx.saved_tensors
    *given, dlast = grads
    dmixed = [
        torch.zeros(shape, dtype=dtype, device=device) if dy is None else dy
        for dy, (shape, dtype, device) in zip(given, ctx.like, strict=True)
    ]
    dx, *rest = torch.ops.rwkv7.shift_mix_backward(dmixed, dlast, x, carried, sequence, mixes)
    dcarried = None if carried is None else rest[-1]
    return dx, dcarried, None, rest[: len(mixes)], None, None


_shift_mix_operator.register_autograd(_differentiate, setup_context=_setup_context)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
