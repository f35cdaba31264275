"""Launching the chunked kernels and laying out what the backward pass needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv7.wkv7.contract import Call

from .kernels.gradients import chunk_gradients
from .kernels.maps import chunk_maps
from .kernels.outputs import chunk_outputs
from .kernels.walks import walk_states, walk_states_back
from .plan import (
    CHUNK,
    GRADIENTS,
    MAPS,
    OUTPUTS,
    chunk_block,
    gradients_part,
    products,
    walk_for,
)


def chunk_count(call: Call) -> int:
    """How many chunk numbers the call uses (packed: at most; some may have no tokens)."""
    B, T, *_ = call.sizes
    if call.cu_seqlens is None:
        return B * -(-T // CHUNK)
    return T // CHUNK + call.sequences


@dataclass(frozen=True, slots=True)
class Kept:
    """A chunk's maps as kernels/maps.py names them, and the state before every chunk.

    Views of one fp32 tensor: the first three fields are fp32, the others `map_dtype`, but for fp16
    inputs move is fp32 too. states [n, H, V, K] with states_scale [n, H, V].
    """

    states_scale: Tensor
    ends: Tensor
    scale: Tensor
    states: Tensor
    move: Tensor
    query: Tensor
    direct: Tensor
    write: Tensor
    remove: Tensor
    replace: Tensor
    joint: Tensor

    @staticmethod
    def shapes(call: Call, save: bool) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shape and dtype of each field, in order; empty where only a backward pass needs it, and
        the states where the walk needs none."""
        _, _, H, K, V = call.sizes
        n, C = chunk_count(call), CHUNK
        m = n if save else 0
        s = m if walk_for(call).outputs else n
        words = ((s, H, V), (n, H, 2 * K), (n, H, 7 * C))
        maps = ((s, H, V, K), (n, H, K, K), (n, H, C, K), (n, H, C, C), (n, H, C, K))
        backward = ((m, H, C, K), (m, H, C, K), (m, H, C, C))
        narrow = map_dtype(call)
        # fp16 inputs are held to finer bounds than an fp16 `move` keeps: see walk_product.
        move = torch.float32 if call.v.dtype == torch.float16 else narrow
        dtypes = (*(torch.float32,) * len(words), narrow, move, *(narrow,) * 6)
        return tuple(zip((*words, *maps, *backward), dtypes, strict=True))

    @classmethod
    def words(cls, call: Call, save: bool = True) -> int:
        """fp32 words that all of it takes."""
        return sum(_words(*field) for field in cls.shapes(call, save))

    @classmethod
    def view(cls, call: Call, memory: Tensor, save: bool = True) -> Kept:
        """The fields inside a flat fp32 tensor."""
        views, at = [], 0
        for shape, dtype in cls.shapes(call, save):
            size = _words(shape, dtype)
            part = memory[at : at + size].view(dtype)
            views.append(part[: torch.Size(shape).numel()].view(shape))
            at += size
        return cls(*views)


def map_dtype(call: Call) -> torch.dtype:
    """The dtype of the chunks' maps: fp16 with a scale per row for 16-bit inputs, else fp32."""
    return torch.float32 if products(call.v) == "ieee" else torch.float16


def _words(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """fp32 words of a field, rounded up so that every field starts on 16 bytes."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return -(-size // 16) * 4


def forward(call: Call, saved: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """y and the final state; `saved` receives what `Kept` names if `save`."""
    _, T, H, K, V = call.sizes
    S, n = call.sequences, chunk_count(call)
    how = products(call.v)
    packed = call.cu_seqlens is not None
    if not save:
        saved = call.v.new_empty(Kept.words(call, False), dtype=torch.float32)
    kept = Kept.view(call, saved, save)
    y = torch.empty_like(call.v)
    final = call.v.new_empty((S, H, V, K), dtype=torch.float32)
    sizes = {"K": K, "BK": chunk_block(K), "C": CHUNK}
    chunk_maps[(n * H,)](
        call.r, call.w, call.k, call.a, call.b,
        kept.ends, kept.move, kept.query, kept.direct, kept.write,
        kept.remove, kept.replace, kept.joint, kept.scale,
        call.cu_seqlens, S, T, H, **sizes,
        LOGIT=call.decay == "logit", PACKED=packed, SAVE=save, HOW=how,
        num_warps=MAPS.warps, num_stages=MAPS.stages,
    )  # fmt: skip
    walk = walk_for(call)
    walk_states[(S * H, -(-V // walk.rows))](
        kept.ends, kept.move, kept.query, kept.direct, kept.write, kept.scale, call.v,
        call.state, y, final, kept.states, kept.states_scale,
        call.cu_seqlens, T, H, **sizes, V=V, BV=walk.rows,
        PACKED=packed, GIVEN=call.state is not None, SAVE=save or not walk.outputs,
        OUT=walk.outputs, HOW=how, num_warps=walk.warps, num_stages=walk.stages,
    )  # fmt: skip
    if not walk.outputs:
        _outputs(call, kept.query, kept, call.v, kept.states, kept.states_scale, y, back=False)
    return y, final


def backward(
    call: Call, saved: Tensor, dy: Tensor | None, dfinal: Tensor | None
) -> tuple[Tensor, ...]:
    """The seven gradients."""
    _, T, H, K, V = call.sizes
    S, n = call.sequences, chunk_count(call)
    how = products(call.v)
    packed = call.cu_seqlens is not None
    kept = Kept.view(call, saved)
    dstates = torch.empty_like(kept.states)
    dstates_scale = torch.empty_like(kept.states_scale)
    dstate = call.v.new_empty((S, H, V, K), dtype=torch.float32)
    sizes = {"K": K, "V": V, "BK": chunk_block(K), "C": CHUNK}
    inputs = (call.r, call.w, call.k, call.v, call.a, call.b)
    dr, dw, dk, dv, da, db = (torch.empty_like(x) for x in inputs)
    walk = walk_for(call)
    walk_states_back[(S * H, -(-V // walk.rows))](
        kept.ends, kept.move, kept.query, kept.direct, kept.write, kept.scale,
        dy, dfinal, dstates, dstates_scale, dstate, dv,
        call.cu_seqlens, T, H, **sizes, BV=walk.rows,
        PACKED=packed, HAS_DY=dy is not None, HAS_DFINAL=dfinal is not None,
        OUT=walk.outputs, HOW=how, num_warps=walk.warps, num_stages=walk.stages,
    )  # fmt: skip
    if not walk.outputs:
        _outputs(call, kept.write, kept, dy, dstates, dstates_scale, dv, back=True)
    chunk_gradients[(n * H,)](
        *inputs, dy, kept.ends, kept.remove, kept.replace, kept.joint, kept.scale,
        kept.states, kept.states_scale, dstates, dstates_scale, dr, dw, dk, da, db,
        call.cu_seqlens, S, T, H, K=K, V=V, BK=64, BV=chunk_block(V), C=CHUNK,
        PART=gradients_part(call.v), LOGIT=call.decay == "logit", PACKED=packed,
        HAS_DY=dy is not None, HOW=how,
        num_warps=GRADIENTS.warps, num_stages=GRADIENTS.stages,
    )  # fmt: skip
    return dr, dw, dk, dv, da, db, dstate


def _outputs(
    call: Call,
    rows: Tensor,
    kept: Kept,
    x: Tensor | None,
    states: Tensor,
    scale: Tensor,
    out: Tensor,
    *,
    back: bool,
) -> None:
    """y, or dv with back, where the walk leaves it to a kernel over all chunks."""
    _, T, H, K, V = call.sizes
    chunk_outputs[(chunk_count(call) * H, -(-V // 64))](
        rows, kept.direct, kept.scale, x, states, scale, out, call.cu_seqlens,
        call.sequences, T, H, K=K, V=V, BK=chunk_block(K), BV=64, C=CHUNK,
        PACKED=call.cu_seqlens is not None, GIVEN=x is not None, BACK=back,
        HOW=products(call.v), num_warps=OUTPUTS.warps, num_stages=OUTPUTS.stages,
    )  # fmt: skip
