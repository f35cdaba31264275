"""Launching the token-by-token kernels: forward, backward and the step in place."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rwkv7.wkv7.contract import Call

from .kernels.tokens import step_in_place, walk_tokens, walk_tokens_back
from .launch import Variant, start
from .plan import SPAN, block, token_rows

WARPS = 4


def saved_spans(call: Call) -> int:
    """How many states [H, V, K] the forward pass saves."""
    B, T, *_ = call.sizes
    if call.cu_seqlens is None:
        return B * -(-T // SPAN)
    return T // SPAN + call.sequences


@functools.cache
def _walk(K: int, V: int, logit: bool, packed: bool, given: bool, save: bool) -> Variant:
    options = {"LOGIT": logit, "PACKED": packed, "GIVEN": given, "SAVE": save}
    return Variant(walk_tokens, **_sizes(K, V), SPAN=SPAN, **options)


@functools.cache
def _walk_back(
    K: int, V: int, logit: bool, packed: bool, has_dy: bool, has_dfinal: bool
) -> Variant:
    options = {"LOGIT": logit, "PACKED": packed, "HAS_DY": has_dy, "HAS_DFINAL": has_dfinal}
    return Variant(walk_tokens_back, **_sizes(K, V), SPAN=SPAN, **options)


@functools.cache
def _step(K: int, V: int, logit: bool, slots: bool) -> Variant:
    return Variant(step_in_place, **_sizes(K, V), LOGIT=logit, SLOTS=slots)


def _sizes(K: int, V: int) -> dict[str, int]:
    return {"K": K, "V": V, "BK": block(K), "BV": token_rows(K, V), "num_warps": WARPS}


def forward(call: Call, saved: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """y and the final state; `saved` receives a state every SPAN tokens if `save`."""
    _, T, H, K, V = call.sizes
    S, rows = call.sequences, token_rows(K, V)
    logit, packed = call.decay == "logit", call.cu_seqlens is not None
    y = torch.empty_like(call.v)
    final = call.v.new_empty((S, H, V, K), dtype=torch.float32)
    start(
        _walk(K, V, logit, packed, call.state is not None, save), (S * H, -(-V // rows)),
        (call.r, call.w, call.k, call.v, call.a, call.b,
         call.state, y, final, saved, call.cu_seqlens, T, H),
    )  # fmt: skip
    return y, final


def backward(
    call: Call, saved: Tensor, dy: Tensor | None, dfinal: Tensor | None
) -> tuple[Tensor, ...]:
    """The seven gradients. Sums over blocks of V are made here, in a fixed order, in fp32."""
    B, T, H, K, V = call.sizes
    S, rows = call.sequences, token_rows(K, V)
    parts = -(-V // rows)
    inputs = (call.r, call.w, call.k, call.a, call.b)
    grads = [torch.empty_like(x) for x in inputs]
    if parts > 1:
        grads = [x.new_empty((parts, *x.shape), dtype=torch.float32) for x in inputs]
    dr, dw, dk, da, db = grads
    dv = torch.empty_like(call.v)
    dstate = call.v.new_empty((S, H, V, K), dtype=torch.float32)
    scratch = call.v.new_empty((S * H * parts, SPAN, rows, block(K)), dtype=torch.float32)
    logit, packed = call.decay == "logit", call.cu_seqlens is not None
    kernel = _walk_back(K, V, logit, packed, dy is not None, dfinal is not None)
    start(
        kernel, (S * H, parts),
        (call.r, call.w, call.k, call.v, call.a, call.b,
         dy, dfinal, saved, scratch, dr, dw, dk, dv, da, db, dstate,
         call.cu_seqlens, T, H, B * T * H),
    )  # fmt: skip
    if parts > 1:
        dr, dw, dk, da, db = (g.sum(0).to(x.dtype) for g, x in zip(grads, inputs, strict=True))
    return dr, dw, dk, dv, da, db, dstate


def step(inputs: tuple[Tensor, ...], state: Tensor, decay: str, slots: Tensor | None) -> Tensor:
    """One token: y [B, H, V], the pool `state` [P, H, V, K] updated in place."""
    r, w, k, v, a, b = inputs
    B, H, K = r.shape
    V = v.shape[-1]
    y = torch.empty_like(v)
    rows = token_rows(K, V)
    start(
        _step(K, V, decay == "logit", slots is not None),
        (B * H, -(-V // rows)),
        (r, w, k, v, a, b, state, y, slots, H),
    )
    return y
