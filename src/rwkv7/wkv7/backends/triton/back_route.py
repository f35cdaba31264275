"""Launching the backward kernels by chunks, which need no more than the states before the chunks.

They go through the sequences in slabs, the last first: what a slab's steps need is in memory only
meanwhile (kernels/slabs.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv7.wkv7.contract import Call

from .kernels.back_walks import rewalk_steps
from .kernels.gradients import step_gradients
from .kernels.prepare import prepare_steps
from .launch import start
from .plan import (
    CHUNK,
    GRADIENTS,
    GRADIENTS_PART,
    STEP,
    block,
    prepare,
    products,
    rewalk,
    slab_chunks,
)
from .saved import Saved, chunk_count, operand_dtype

STEPS = CHUNK // STEP


@dataclass(frozen=True, slots=True)
class _Slab:
    """What the kernels of a slab of m steps tell each other, as kernels/prepare.py and
    kernels/back_walks.py name it; (d)states_scale [m, H] belongs to (d)states."""

    hats: Tensor
    through: Tensor
    direct: Tensor
    scores: Tensor
    ends: Tensor
    units: Tensor
    states: Tensor
    states_scale: Tensor
    dstates: Tensor
    dstates_scale: Tensor
    moved: Tensor

    @classmethod
    def empty(cls, call: Call, steps: int) -> _Slab:
        _, _, H, K, V = call.sizes
        parts = 2 if products(call.v) == "halves" else 1
        narrow, wide = operand_dtype(call), torch.float32
        shapes = (
            ((5, STEP, K), narrow),
            ((2, parts, STEP, K), narrow),
            ((2, parts, STEP, STEP), narrow),
            ((2, parts, STEP, STEP), narrow),
            ((2, K), wide),
            ((2,), wide),
            ((V, K), narrow),
            ((), wide),
            ((parts, V, K), narrow),
            ((), wide),
            ((1 + parts, STEP, V), narrow),
        )
        return cls(*(call.v.new_empty((steps, H, *s), dtype=dtype) for s, dtype in shapes))


def backward(
    call: Call, memory: Tensor, dy: Tensor | None, dfinal: Tensor | None
) -> tuple[Tensor, ...]:
    """The seven gradients, from what forward saved in `memory`."""
    B, T, H, K, V = call.sizes
    S = call.sequences
    packed = call.cu_seqlens is not None
    saved = Saved.view(call, memory)
    if dfinal is None:
        dstate = call.v.new_zeros((S, H, V, K), dtype=torch.float32)
    else:
        dstate = dfinal.to(torch.float32, copy=True)
    inputs = (call.r, call.w, call.k, call.v, call.a, call.b)
    dr, dw, dk, dv, da, db = (torch.empty_like(x) for x in inputs)
    # Chunks of each sequence, or of all of them where they are packed.
    chunks, width = (chunk_count(call), 1) if packed else (-(-T // CHUNK), B)
    most = slab_chunks(chunks, width * H, K, V)
    slab = _Slab.empty(call, most * width * STEPS)
    sizes = {"K": K, "BK": block(K), "C": CHUNK, "PACKED": packed, "HOW": products(call.v)}
    preparation, walk = prepare(K, products(call.v)).options(), rewalk(K, V).options()
    values = {"V": V, "BV": block(V)}
    logit, given = call.decay == "logit", dy is not None
    for low in reversed(range(0, chunks, most)):
        count = min(most, chunks - low)
        where = (call.cu_seqlens, low, count, S, T, H)
        programs = count * width * H
        start(
            prepare_steps, (programs * STEPS,),
            (call.r, call.w, call.k, call.a, call.b,
             slab.hats, slab.through, slab.direct, slab.scores, slab.ends, slab.units, *where),
            {**sizes, "LOGIT": logit, **preparation},
        )  # fmt: skip
        images = (slab.hats, slab.through, slab.direct, slab.ends, slab.units)
        start(
            rewalk_steps, (programs,),
            (call.v, *images, saved.states, saved.states_scale,
             slab.states, slab.states_scale, slab.moved, *where),
            {**sizes, **values, "BACK": False, "GIVEN": True, **walk},
        )  # fmt: skip
        start(
            rewalk_steps, (S * H,),
            (dy, *images, dstate, None, slab.dstates, slab.dstates_scale, slab.moved, *where),
            {**sizes, **values, "BACK": True, "GIVEN": given, **walk},
        )  # fmt: skip
        start(
            step_gradients, (programs * STEPS,),
            (call.w, call.v, dy, slab.hats, slab.moved, slab.scores, slab.units,
             slab.states, slab.states_scale, slab.dstates, slab.dstates_scale,
             dr, dw, dk, dv, da, db, *where),
            {**sizes, **values, "PART": min(GRADIENTS_PART, block(K)), "LOGIT": logit,
             "HAS_DY": given, **GRADIENTS.options()},
        )  # fmt: skip
    return dr, dw, dk, dv, da, db, dstate
