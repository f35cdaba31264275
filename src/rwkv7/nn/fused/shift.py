"""What a mix of a layer begins with, in one launch: residual sum, layer norm, token shift, mixes.

`token_shift` says what stands before a token; without a GPU it is what runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv7.nn.again import again
from rwkv7.nn.token_shift import Packing, token_shift
from rwkv7.wkv7 import Operation

from .launch import of_parameters, on_device_of, power_of_two, rows_apiece, runs_fused

MOST_MIXES = 6
MOST_CHANNELS = 8192  # a row is one program's


class Shifted(NamedTuple):
    """What `shifted_mixes` gives."""

    x: Tensor  # [B, T, C], the sum
    mixed: tuple[Tensor, ...]  # each [B, T, C]
    last: Tensor  # [S, C], the norms to carry on
    moments: Tensor | None  # of the rows, with which the same call gives the same bits again


def shifted_mixes(
    x: Tensor,  # [B, T, C]
    added: Tensor | None,  # [B, T, C]
    norm: nn.LayerNorm,
    carried: Tensor | None,  # [S, C]
    packed: Packing | None,
    mixes: tuple[Tensor, ...],  # each [C]
    moments: Tensor | None = None,
) -> Shifted:
    """z + (before - z) m for each m of `mixes`, with z = norm(x + added) and before the z before.

    `carried` and `packed` are as in `token_shift`. There are one or six mixes. Under autocast the
    kernel writes autocast's dtype, which the matrix products that follow would cast to. A norm of
    another kind, or with hooks, is called. `moments`: what an earlier call gave for the same sum.
    """
    if added is not None and torch.promote_types(x.dtype, added.dtype) != x.dtype:
        x, added = x + added, None
    tensors = [x, *mixes] if added is None else [x, added, *mixes]
    if len(mixes) in (1, MOST_MIXES) and _is_plain(norm) and runs_fused(*tensors, norm.weight):
        sequences = x.shape[0] if packed is None else packed.sequences
        sequence = None if packed is None else packed.sequence
        outputs = _norm_mix(
            x, added, norm.weight, norm.bias, norm.eps, moments, carried, sequence, sequences,
            products_dtype(x), *mixes, *[None] * (MOST_MIXES - len(mixes)),
        )  # fmt: skip
        *mixed, last, moments = outputs if added is None else outputs[:-1]
        return Shifted(x if added is None else outputs[-1], tuple(mixed), last, moments)
    if added is not None:
        x = x + added
    (normal,) = again(lambda x: (norm(x),), x)
    before, last = token_shift(normal, carried, packed)
    return Shifted(x, mix(normal, before, mixes), last, None)


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


def _is_plain(norm: nn.LayerNorm) -> bool:
    affine = type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None
    hooked = bool(norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks)
    return affine and not hooked and norm.weight.numel() <= MOST_CHANNELS


def _row(channels: int) -> dict[str, int]:
    """The block of a row's channels, and its warps: each thread has eight of a long row."""
    block = power_of_two(channels)
    return {"C": channels, "BC": block, "num_warps": max(1, min(16, block // 256))}


def _outputs(
    x: Tensor, mixes: int, dtype: torch.dtype, sums: bool, measures: bool
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """The mixes, the moments of the rows (or of none) and, if it sums two terms, their sum."""
    mixed = [x.new_empty(x.shape, dtype=dtype) for _ in range(mixes)]
    rows = x.shape[0] * x.shape[1] if measures else 0
    moments = x.new_empty((2, rows), dtype=torch.float32)
    return mixed, moments, x.new_empty(x.shape) if sums else None


def _run(
    x: Tensor,
    added: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    known: Tensor | None,
    carried: Tensor | None,
    sequence: Tensor | None,
    sequences: int,
    dtype: torch.dtype,
    m0: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    m3: Tensor | None,
    m4: Tensor | None,
    m5: Tensor | None,
) -> list[Tensor]:
    """The mixes, what each sequence carries on, the rows' moments (nothing where they are known)
    and, of two terms, their sum."""
    from .kernels.shift import norm_mix

    B, T, C = x.shape
    mixes = [m for m in (m0, m1, m2, m3, m4, m5) if m is not None]
    last = x.new_zeros(sequences, C) if carried is None else carried.to(x.dtype, copy=True)
    last = last.contiguous()
    mixed, moments, total = _outputs(x, len(mixes), dtype, added is not None, known is None)
    if B * T:
        span = rows_apiece(B * T, few=2, many=16)
        with on_device_of(x):
            norm_mix[(-(-B * T // span),)](
                x.contiguous(), _contiguous(added), weight, bias, _contiguous(carried), sequence,
                *six(mixes), *six(mixed), total, last, moments if known is None else known,
                B * T, T, span, eps, COUNT=len(mixes), PACKED=sequence is not None,
                GIVEN=carried is not None, ADDED=added is not None, KNOWN=known is not None,
                **_row(C),
            )  # fmt: skip
    return [*mixed, last, moments, *([] if total is None else [total])]


def _fake(
    x: Tensor,
    added: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    known: Tensor | None,
    carried: Tensor | None,
    sequence: Tensor | None,
    sequences: int,
    dtype: torch.dtype,
    m0: Tensor,
    m1: Tensor | None,
    m2: Tensor | None,
    m3: Tensor | None,
    m4: Tensor | None,
    m5: Tensor | None,
) -> list[Tensor]:
    count = sum(m is not None for m in (m0, m1, m2, m3, m4, m5))
    last = x.new_empty(sequences, x.shape[2])
    mixed, moments, total = _outputs(x, count, dtype, added is not None, known is None)
    return [*mixed, last, moments, *([] if total is None else [total])]


def _run_back(
    dmixed: list[Tensor],
    dlast: Tensor | None,
    dtotal: Tensor | None,
    x: Tensor,
    moments: Tensor,
    weight: Tensor,
    bias: Tensor,
    carried: Tensor | None,
    sequence: Tensor | None,
    mixes: list[Tensor],
    added: torch.dtype,
) -> list[Tensor]:
    """Gradients of x and, as [2 + mixes, C] in fp32, of the norm's parameters and the mixes; then,
    where they are something else, of what was added (in another dtype than x) and of `carried`."""
    from .kernels.shift import norm_mix_back

    B, T, C = x.shape
    count, span = len(mixes), rows_apiece(B * T, few=16, many=64)
    programs = -(-B * T // span)
    dx = x.new_empty(x.shape)
    dadded = None if added == x.dtype else x.new_empty(x.shape, dtype=added)
    dcarried = carried
    if carried is not None:
        # What an empty sequence carries on is what it was given.
        dcarried = carried.new_zeros(carried.shape)
        if dlast is not None:
            dcarried.copy_(dlast)
    parts = x.new_empty((programs, 2 + count, C), dtype=torch.float32)
    if programs:
        packed, given, halved = (z is not None for z in (sequence, carried, dadded))
        with on_device_of(x):
            norm_mix_back[(programs,)](
                x.contiguous(), moments, weight, bias, _contiguous(carried), sequence,
                *six(mixes), *six([dy.contiguous() for dy in dmixed]), _contiguous(dtotal),
                _contiguous(dlast), dx, dadded, dcarried, parts, B * T, T, span,
                COUNT=count, PACKED=packed, GIVEN=given, HAS_DTOTAL=dtotal is not None,
                HAS_DLAST=dlast is not None, ADDED=halved, **_row(C),
            )  # fmt: skip
    return [dx, parts.sum(0), *(x for x in (dadded, dcarried) if x is not None)]


def _fake_back(
    dmixed: list[Tensor],
    dlast: Tensor | None,
    dtotal: Tensor | None,
    x: Tensor,
    moments: Tensor,
    weight: Tensor,
    bias: Tensor,
    carried: Tensor | None,
    sequence: Tensor | None,
    mixes: list[Tensor],
    added: torch.dtype,
) -> list[Tensor]:
    sums = x.new_empty((2 + len(mixes), x.shape[2]), dtype=torch.float32)
    dadded = [] if added == x.dtype else [x.new_empty(x.shape, dtype=added)]
    dcarried = [] if carried is None else [carried.new_empty(carried.shape)]
    return [x.new_empty(x.shape), sums, *dadded, *dcarried]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, added, weight, bias, _, known, carried, sequence, _, _, *mixes = inputs
    mixes = [m for m in mixes if m is not None]
    count = len(mixes)
    total = x if added is None else output[-1]
    moments = output[count + 1] if known is None else known
    ctx.save_for_backward(total, moments, weight, bias, carried, sequence, *mixes)
    ctx.set_materialize_grads(False)
    ctx.mixed = output[0].dtype
    ctx.added = None if added is None else added.dtype


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, moments, weight, bias, carried, sequence, *mixes = ctx.saved_tensors
    count = len(mixes)
    dmixed = [x.new_zeros(x.shape, dtype=ctx.mixed) if g is None else g for g in grads[:count]]
    dtotal = None if ctx.added is None else grads[-1]
    dtype = x.dtype if ctx.added is None else ctx.added
    dx, sums, *rest = _norm_mix_backward(
        dmixed, grads[count], dtotal, x, moments, weight, bias, carried, sequence, mixes, dtype
    )
    dweight, dbias, *dmixes = of_parameters(sums, (weight, bias, *mixes))
    dadded = None if ctx.added is None else dx if dtype == x.dtype else rest[0]
    dcarried = None if carried is None else rest[-1]
    none = [None] * (MOST_MIXES - count)
    return dx, dadded, dweight, dbias, None, None, dcarried, None, None, None, *dmixes, *none


_norm_mix_backward = Operation("rwkv7::norm_mix_backward", _run_back, _fake_back)
_norm_mix = Operation("rwkv7::norm_mix", _run, _fake)
_norm_mix.differentiable(_setup_context, _differentiate)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
