"""Launching the forward kernels that go in steps of 16 tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv7.wkv7.contract import Call

from .kernels.images import step_images
from .kernels.walks import segment_maps, walk_segments
from .launch import start
from .plan import (
    CHUNK,
    IMAGES,
    STEP,
    WALK,
    WALK_ROWS,
    chunk_block,
    products,
    segment,
    walk_launch,
)
from .saved import Saved, carve, chunk_count, operand_dtype
from .segments import states_before


@dataclass(frozen=True, slots=True)
class Images:
    """What the walk reads of every step of 16 tokens, flat, as kernels/images.py names it."""

    tiles: Tensor
    write: Tensor
    direct: Tensor
    words: Tensor

    @classmethod
    def empty(cls, call: Call) -> Images:
        """Memory for all steps of a call."""
        how, v = products(call.v), call.v
        n, BK = chunk_count(call) * (CHUNK // STEP) * call.sizes[2], chunk_block(call.sizes[3])
        narrow, value = operand_dtype(call), torch.float32 if how == "ieee" else v.dtype
        parts, value_parts = 2 if how == "halves" else 1, n if how == "ieee" else 2 * n
        write, direct = carve(v, value, value_parts * STEP * BK, value_parts * STEP * STEP)
        return cls(
            v.new_empty(n * 3 * parts * STEP * BK, dtype=narrow),
            write,
            direct,
            v.new_empty(n * (BK + STEP), dtype=torch.float32),
        )


def forward(call: Call, saved: Saved | None) -> tuple[Tensor, Tensor]:
    """y and the final state; `saved` receives the state before every chunk."""
    _, T, H, K, V = call.sizes
    S, packed = call.sequences, call.cu_seqlens is not None
    y = torch.empty_like(call.v)
    final = call.v.new_empty((S, H, V, K), dtype=torch.float32)
    images = Images.empty(call)
    sizes = {"K": K, "BK": chunk_block(K), "C": CHUNK, "PACKED": packed, "HOW": products(call.v)}
    start(
        step_images, (chunk_count(call) * (CHUNK // STEP) * H,),
        (call.r, call.w, call.k, call.a, call.b,
         images.tiles, images.write, images.direct, images.words,
         call.cu_seqlens, S, T, H),
        {**sizes, "LOGIT": call.decay == "logit", **IMAGES.options()},
    )  # fmt: skip
    span = segment(call, T)
    segments, begin = 1 if packed else -(-T // span), _given(call.state, final)
    if segments > 1:
        begin = _segment_states(call, images, span, begin), 1
    walks = S * H * -(-V // WALK_ROWS)
    start(
        walk_segments, (walks, segments),
        (images.tiles, images.write, images.direct, images.words, call.v,
         *begin, y, final, saved and saved.states, saved and saved.states_scale,
         call.cu_seqlens, T, H, span),
        {**sizes, "V": V, "BV": WALK_ROWS, "SAVE": saved is not None,
         **walk_launch(call, walks * segments).options()},
    )  # fmt: skip
    return y, final


def _segment_states(call: Call, images: Images, span: int, begin: tuple[Tensor, int]) -> Tensor:
    """The state before every segment, fp32 [pairs, segments, V, K], from that before the first."""
    _, T, H, K, V = call.sizes
    pairs, segments, BK = call.sequences * H, -(-T // span), chunk_block(K)
    sizes = {"K": K, "V": V, "BK": BK, "HOW": products(call.v)}

    def find_maps(maps: Tensor) -> None:
        start(
            segment_maps, (pairs * (BK // WALK_ROWS + -(-V // WALK_ROWS)), segments - 1),
            (images.tiles, images.write, images.words, call.v, maps, T, H, span),
            {**sizes, "BV": WALK_ROWS, "C": CHUNK, **WALK.options()},
        )  # fmt: skip

    return states_before(call, segments, begin, sizes, find_maps)


def _given(state: Tensor | None, other: Tensor) -> tuple[Tensor, int]:
    """A state, or another tensor in its place, and whether it is one: so one compiled kernel serves
    calls with and without."""
    return (other, 0) if state is None else (state, 1)
