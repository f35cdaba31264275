"""Launching the forward kernels that go in steps of 16 tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv7.wkv7.contract import Call

from .kernels.images import step_images
from .kernels.walks import segment_maps, walk_segments
from .launch import Memory, Part, Variant, start
from .plan import (
    CHUNK,
    IMAGES,
    SEGMENTS,
    STEP,
    WALK,
    WALK_ROWS,
    Launch,
    chunk_block,
    products,
    segment,
    walk_launch,
)
from .saved import Saved, carve, operand_dtype, part_count
from .segments import states_before


@dataclass(frozen=True, slots=True)
class Images:
    """What the walk reads of every step of 16 tokens, flat, as kernels/images.py names it."""

    tiles: Part
    write: Part
    direct: Part
    words: Part

    @classmethod
    def empty(cls, call: Call, how: str) -> Images:
        """Memory for all steps of a call."""
        n, BK = part_count(call, STEP) * call.sizes[2], chunk_block(call.sizes[3])
        value, values = (torch.float32, n) if how == "ieee" else (call.v.dtype, 2 * n)
        tiles = n * 3 * (2 if how == "halves" else 1)
        return cls(
            *carve(
                call.v,
                (operand_dtype(call), tiles * STEP * BK),
                (value, values * STEP * BK),
                (value, values * STEP * STEP),
                (torch.float32, n * (BK + 2 * STEP)),
            )
        )


@functools.cache
def _images(K: int, packed: bool, how: str, logit: bool) -> Variant:
    sizes = {"K": K, "BK": chunk_block(K), "PACKED": packed, "HOW": how}
    return Variant(step_images, **sizes, LOGIT=logit, **IMAGES.options())


@functools.cache
def _walk(K: int, V: int, packed: bool, how: str, save: bool, launch: Launch) -> Variant:
    sizes = {"K": K, "BK": chunk_block(K), "C": CHUNK, "PACKED": packed, "HOW": how}
    return Variant(walk_segments, **sizes, V=V, BV=WALK_ROWS, SAVE=save, **launch.options())


@functools.cache
def _maps(K: int, V: int, how: str) -> Variant:
    sizes = {"K": K, "V": V, "BK": chunk_block(K), "HOW": how}
    return Variant(segment_maps, **sizes, BV=WALK_ROWS, **WALK.options())


def forward(call: Call, saved: Saved | None) -> tuple[Tensor, Tensor]:
    """y and the final state; `saved` receives the state before every chunk."""
    _, T, H, K, V = call.sizes
    S, packed, how = call.sequences, call.cu_seqlens is not None, products(call.v)
    y = torch.empty_like(call.v)
    final = call.v.new_empty((S, H, V, K), dtype=torch.float32)
    images = Images.empty(call, how)
    start(
        _images(K, packed, how, call.decay == "logit"),
        (part_count(call, STEP) * H,),
        (call.r, call.w, call.k, call.a, call.b,
         images.tiles, images.write, images.direct, images.words,
         call.cu_seqlens, S, T, H),
    )  # fmt: skip
    span = segment(call, T, SEGMENTS)
    segments = 1 if packed else -(-T // span)
    begin: tuple[Memory, int] = _given(call.state, final)
    if segments > 1:
        begin = _segment_states(call, images, how, span, begin), 1
    kept = (None, None) if saved is None else (saved.states, saved.states_scale)
    walks = S * H * -(-V // WALK_ROWS)
    start(
        _walk(K, V, packed, how, saved is not None, walk_launch(call, walks * segments)),
        (walks, segments),
        (images.tiles, images.write, images.direct, images.words, call.v,
         *begin, y, final, *kept,
         call.cu_seqlens, T, H, span),
    )  # fmt: skip
    return y, final


def _segment_states(
    call: Call, images: Images, how: str, span: int, begin: tuple[Memory, int]
) -> Part:
    """The state before every segment, fp32 [pairs, segments, V, K], from that before the first."""
    _, T, H, K, V = call.sizes
    pairs, segments, BK = call.sequences * H, -(-T // span), chunk_block(K)

    def find_maps(maps: Part) -> None:
        start(
            _maps(K, V, how),
            (pairs * (BK // WALK_ROWS + -(-V // WALK_ROWS)), segments - 1),
            (images.tiles, images.write, images.words, call.v, maps, T, H, span),
        )

    return states_before(call, segments, begin, BK, how, find_maps)


def _given(state: Tensor | None, other: Tensor) -> tuple[Tensor, int]:
    """A state, or another tensor in its place, and whether it is one: so one compiled kernel serves
    calls with and without."""
    return (other, 0) if state is None else (state, 1)
