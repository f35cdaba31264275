"""Launching the backward kernels by chunks, which need no more than the states before the chunks.

They go through the sequences in slabs, the last first: what a slab's steps need is in memory only
meanwhile (kernels/slabs.py).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv7.wkv7.contract import Call

from .kernels.back_walks import gradient_maps, rewalk_steps
from .kernels.gradients import step_gradients
from .kernels.prepare import prepare_steps
from .launch import Memory, Part, Variant, start
from .plan import (
    CHUNK,
    PREPARE,
    SEGMENTS_BACK,
    STEP,
    block,
    gradients,
    map_rows,
    products,
    rewalk,
    segment,
    slab_chunks,
)
from .saved import Saved, carve, operand_dtype, part_count
from .segments import states_before

STEPS = CHUNK // STEP


@dataclass(frozen=True, slots=True)
class _Slab:
    """What the kernels of a slab of steps tell each other, flat, as kernels/prepare.py and
    kernels/back_walks.py name it."""

    hats: Part
    through: Part
    direct: Part
    scores: Part
    ends: Part
    units: Part
    states: Part
    states_scale: Part
    dstates: Part
    dstates_scale: Part
    moved: Part

    @classmethod
    def empty(cls, call: Call, how: str, steps: int) -> _Slab:
        _, _, H, K, V = call.sizes
        m, parts = steps * H, 2 if how == "halves" else 1
        tile, square = STEP * K, STEP * STEP
        operand, word = operand_dtype(call), torch.float32
        return cls(*carve(
            call.v,
            (operand, m * (3 + parts) * tile), (operand, m * 2 * parts * tile),
            (operand, m * 2 * parts * square), (operand, m * square),
            (word, m * 2 * K), (word, m * 4),
            (operand, m * V * K), (word, m),
            (operand, m * parts * V * K), (word, m),
            (operand, m * 2 * STEP * V),
        ))  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Kernels:
    """Those of calls of one form."""

    prepare: Variant
    rewalk: Variant
    back: Variant
    gradients: Variant
    maps: Variant


@functools.cache
def _kernels(K: int, V: int, how: str, packed: bool, logit: bool, has_dy: bool) -> _Kernels:
    keys = {"K": K, "BK": block(K), "C": CHUNK, "HOW": how}
    sizes, rows = {**keys, "V": V, "BV": block(V), "PACKED": packed}, map_rows(K)
    walk = rewalk(K, V).options()
    return _Kernels(
        Variant(prepare_steps, **keys, PACKED=packed, LOGIT=logit, **PREPARE.options()),
        Variant(rewalk_steps, **sizes, BACK=False, HAS_X=True, **walk),
        Variant(rewalk_steps, **sizes, BACK=True, HAS_X=has_dy, **walk),
        Variant(step_gradients, **sizes, LOGIT=logit, HAS_DY=has_dy, **gradients(K, V).options()),
        Variant(gradient_maps, **keys, V=V, ROWS=rows, HAS_DY=has_dy, **rewalk(K, rows).options()),
    )


def backward(
    call: Call, memory: Tensor, dy: Tensor | None, dfinal: Tensor | None
) -> tuple[Tensor, ...]:
    """The seven gradients, from what forward saved in `memory`."""
    B, T, H, K, V = call.sizes
    S = call.sequences
    packed, how = call.cu_seqlens is not None, products(call.v)
    saved = Saved.view(call, memory)
    last, dstate = _behind(call, dfinal)
    behind: tuple[Memory, int] = last
    inputs = (call.r, call.w, call.k, call.v, call.a, call.b)
    dr, dw, dk, dv, da, db = (torch.empty_like(x) for x in inputs)
    # Chunks of each sequence, or of all of them where they are packed.
    chunks, width = (part_count(call, CHUNK), 1) if packed else (-(-T // CHUNK), B)
    most = slab_chunks(chunks, width * H, K, V)
    slab = _Slab.empty(call, how, most * width * STEPS)
    kernels = _kernels(K, V, how, packed, call.decay == "logit", dy is not None)
    images = slab.hats, slab.through, slab.direct, slab.ends, slab.units
    for low in reversed(range(0, chunks, most)):
        count = min(most, chunks - low)
        where = (call.cu_seqlens, low, count, S, T, H)
        programs = count * width * H
        start(
            kernels.prepare, (programs * STEPS,),
            (call.r, call.w, call.k, call.a, call.b,
             slab.hats, slab.through, slab.direct, slab.scores, slab.ends, slab.units, *where),
        )  # fmt: skip
        start(
            kernels.rewalk, (programs,),
            (call.v, *images, saved.states, saved.states_scale, 1, None,
             slab.states, slab.states_scale, slab.moved, STEPS, *where),
        )  # fmt: skip
        segments, span = _segments(call, low, count)
        if segments > 1:
            places = span, low, count, T, H
            behind = _behind_segments(call, kernels.maps, slab, dy, behind, how, segments, places)
        begin, given = behind
        start(
            kernels.back, (S * H, segments),
            (dy, *images, begin, None, given, dstate,
             slab.dstates, slab.dstates_scale, slab.moved, span, *where),
        )  # fmt: skip
        behind = dstate, 1
        start(
            kernels.gradients, (programs * STEPS,),
            (call.w, call.k, call.v, dy, slab.hats, slab.moved, slab.scores, slab.units,
             slab.states, slab.states_scale, slab.dstates, slab.dstates_scale,
             dr, dw, dk, dv, da, db, *where),
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
    span = segment(call, tokens, SEGMENTS_BACK)
    return -(-tokens // span), span // STEP


def _behind_segments(
    call: Call,
    kernel: Variant,
    slab: _Slab,
    dy: Tensor | None,
    behind: tuple[Memory, int],
    how: str,
    segments: int,
    where: tuple[int, ...],
) -> tuple[Part, int]:
    """E behind every segment of a slab, fp32 [pairs, segments, V, K], the last tokens first, from
    that behind the slab; given. where: steps of a segment, the slab's first chunk, chunks, T, H."""
    _, _, H, K, V = call.sizes
    pairs, BK, rows = call.sequences * H, block(K), map_rows(K)

    def find_maps(maps: Part) -> None:
        start(
            kernel, (pairs * (BK // rows + -(-V // rows)), segments - 1),
            (dy, slab.hats, slab.through, slab.direct, slab.ends, slab.units, maps, *where),
        )  # fmt: skip

    return states_before(call, segments, behind, BK, how, find_maps), 1
