"""Launching the backward kernels by chunks, which need no more than the states before the chunks.

They go through the sequences in slabs, the last first: what a slab's steps need is in memory only
meanwhile (kernels/slabs.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv7.wkv7.contract import Call

from .kernels.back_walks import gradient_maps, rewalk_steps
from .kernels.gradients import step_gradients
from .kernels.prepare import prepare_steps
from .launch import start
from .plan import (
    CHUNK,
    STEP,
    block,
    gradients,
    map_rows,
    prepare,
    products,
    rewalk,
    segment,
    slab_chunks,
)
from .saved import Saved, carve, chunk_count, operand_dtype
from .segments import states_before

STEPS = CHUNK // STEP


@dataclass(frozen=True, slots=True)
class _Slab:
    """What the kernels of a slab of steps tell each other, flat, as kernels/prepare.py and
    kernels/back_walks.py name it."""

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
        m, parts = steps * H, 2 if products(call.v) == "halves" else 1
        tile, square = STEP * K, STEP * STEP
        hats, through, direct, scores, states, dstates, moved = carve(
            call.v, operand_dtype(call),
            m * (4 + parts) * tile, m * 2 * parts * tile, m * 2 * parts * square, m * square,
            m * V * K, m * parts * V * K, m * 2 * STEP * V,
        )  # fmt: skip
        ends, units, scale, dscale = carve(call.v, torch.float32, m * 2 * K, m * 4, m, m)
        return cls(
            hats, through, direct, scores, ends, units, states, scale, dstates, dscale, moved
        )


def backward(
    call: Call, memory: Tensor, dy: Tensor | None, dfinal: Tensor | None
) -> tuple[Tensor, ...]:
    """The seven gradients, from what forward saved in `memory`."""
    B, T, H, K, V = call.sizes
    S = call.sequences
    packed = call.cu_seqlens is not None
    saved = Saved.view(call, memory)
    behind, dstate = _behind(call, dfinal)
    inputs = (call.r, call.w, call.k, call.v, call.a, call.b)
    dr, dw, dk, dv, da, db = (torch.empty_like(x) for x in inputs)
    # Chunks of each sequence, or of all of them where they are packed.
    chunks, width = (chunk_count(call), 1) if packed else (-(-T // CHUNK), B)
    most = slab_chunks(chunks, width * H, K, V)
    slab = _Slab.empty(call, most * width * STEPS)
    sizes = {"K": K, "BK": block(K), "C": CHUNK, "PACKED": packed, "HOW": products(call.v)}
    preparation, walk = prepare(K, products(call.v)).options(), rewalk(K, V).options()
    values = {"V": V, "BV": block(V)}
    logit, has_dy = call.decay == "logit", dy is not None
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
            (call.v, *images, saved.states, saved.states_scale, 1, None,
             slab.states, slab.states_scale, slab.moved, STEPS, *where),
            {**sizes, **values, "BACK": False, "HAS_X": True, **walk},
        )  # fmt: skip
        segments, span = _segments(call, low, count)
        if segments > 1:
            behind = _behind_segments(call, slab, dy, behind, segments, (span, low, count, T, H))
        begin, given = behind
        start(
            rewalk_steps, (S * H, segments),
            (dy, *images, begin, None, given, dstate,
             slab.dstates, slab.dstates_scale, slab.moved, span, *where),
            {**sizes, **values, "BACK": True, "HAS_X": has_dy, **walk},
        )  # fmt: skip
        behind = dstate, 1
        start(
            step_gradients, (programs * STEPS,),
            (call.w, call.v, dy, slab.hats, slab.moved, slab.scores, slab.units,
             slab.states, slab.states_scale, slab.dstates, slab.dstates_scale,
             dr, dw, dk, dv, da, db, *where),
            {**sizes, **values, "LOGIT": logit, "HAS_DY": has_dy, **gradients(K).options()},
        )  # fmt: skip
    return dr, dw, dk, dv, da, db, dstate


def _behind(call: Call, dfinal: Tensor | None) -> tuple[tuple[Tensor, int], Tensor]:
    """What E is behind the last tokens, and whether it is given or zeros; memory for what it is
    before the first. Packed, where a sequence may have no tokens, it begins there."""
    _, _, H, K, V = call.sizes
    shape = (call.sequences, H, V, K)
    if call.cu_seqlens is None:
        dstate = call.v.new_empty(shape, dtype=torch.float32)
        return (dstate, 0) if dfinal is None else (dfinal.float(), 1), dstate
    if dfinal is None:
        dstate = call.v.new_zeros(shape, dtype=torch.float32)
    else:
        dstate = dfinal.to(torch.float32, copy=True)
    return (dstate, 1), dstate


def _segments(call: Call, low: int, count: int) -> tuple[int, int]:
    """In how many segments a slab of `count` chunks from `low` on is walked, steps of each."""
    tokens = count * CHUNK
    if call.cu_seqlens is None:
        tokens = min(tokens, call.sizes[1] - low * CHUNK)
    span = segment(call, tokens)
    return -(-tokens // span), span // STEP


def _behind_segments(
    call: Call,
    slab: _Slab,
    dy: Tensor | None,
    behind: tuple[Tensor, int],
    segments: int,
    where: tuple[int, ...],
) -> tuple[Tensor, int]:
    """E behind every segment of a slab, fp32 [pairs, segments, V, K], the last tokens first, from
    that behind the slab; given. where: steps of a segment, the slab's first chunk, chunks, T, H."""
    _, _, H, K, V = call.sizes
    pairs, BK, rows = call.sequences * H, block(K), map_rows(K)
    sizes = {"K": K, "V": V, "BK": BK, "HOW": products(call.v)}

    def find_maps(maps: Tensor) -> None:
        start(
            gradient_maps, (pairs * (BK // rows + -(-V // rows)), segments - 1),
            (dy, slab.hats, slab.through, slab.direct, slab.ends, slab.units, maps, *where),
            {**sizes, "ROWS": rows, "C": CHUNK, "HAS_DY": dy is not None,
             **rewalk(K, rows).options()},
        )  # fmt: skip

    return states_before(call, segments, behind, sizes, find_maps), 1
