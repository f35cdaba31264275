"""The operator on one sequence held in pieces by several ranks, states and gradients exact.

A piece acts on the state as an affine map, S -> S M + B, with M [K, K] and B [V, K]. B is where the
piece leads from zero; M is where it leads from the identity without values, and the outputs q of
that walk say how y depends on what arrives: y_t = S q_t + … . So all ranks walk at once, tell each
other (M, B), and know what arrives at them; backward, what arrives has the gradient F = dYᵀ q plus
the next rank's, times Mᵀ. One exchange forward, one backward, and no second graph.

What it costs beside one call on the piece: a walk for M and q where something arrives, a walk for
B where something leaves (of those tokens alone: with short packed sequences next to nothing), and q
kept until backward, as large as r.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rwkv7.state import wide_dtype
from rwkv7.wkv7 import wkv7

from .exchange import gather
from .piece import Piece

__all__ = ["wkv7_in_pieces"]


def wkv7_in_pieces(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    state: Tensor | None,
    piece: Piece,
    *,
    group: dist.ProcessGroup | None = None,
    decay: str = "logit",
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`wkv7` on this rank's tokens, going on from what the ranks before leave.

    A collective, in backward too: all ranks of `group` call it, and either use its results for a
    gradient or do not.

    Args:
        inputs: r, w, k, v, a, b of this rank's tokens, as `wkv7` takes them.
        state: [R, H, V, K], what the sequences begin with; only the rows of those that begin here
            count. All ranks give one, or none does.
        piece: which tokens these are; R = B, or its number of packed sequences.
        group: the ranks that hold the sequence; None means all processes.
        decay, backend: as for `wkv7`.
        cu_seqlens: the piece's offsets as a tensor [R + 1], when packed.

    Returns:
        y [B, T, H, V] and the states [R, H, V, K] after each sequence's last token here.
    """
    r, w, k, v, a, b = inputs
    keys, values = k.shape[-1], v.shape[-1]
    if state is None:
        rows = len(piece.numbers) if piece.packed else r.shape[0]
        state = r.new_zeros((rows, r.shape[2], values, keys), dtype=wide_dtype(v.dtype))
    head = piece.head if piece.spans or torch.is_grad_enabled() else 0
    with torch.no_grad():
        q, through = _through(inputs, head, decay, backend)
        built = _built(inputs, state, piece, decay, backend)
        handed = through if piece.spans else torch.zeros_like(through)
        maps = gather(torch.cat((handed, built), 2), group)
        maps = [x.split((keys, values), 2) for x in maps]
        arrived = torch.zeros_like(built)
        for M, B in maps[: piece.rank]:
            arrived = _product(arrived, M) + B
    begin = _Arrive.apply(state, arrived, piece)
    y, final = wkv7(r, w, k, v, a, b, begin, decay=decay, cu_seqlens=cu_seqlens, backend=backend)
    Ms = [M.clone() for M, _ in maps[piece.rank + 1 :]]  # without the B that lies beside it
    y, final = _Leave.apply(y, final, q, through, Ms, piece, group)
    return y, final


def _through(
    inputs: tuple[Tensor, ...], head: int, decay: str, backend: str | None
) -> tuple[Tensor, Tensor]:
    """(q [B, head, H, K], M [B, H, K, K]) of the tokens that what arrives passes through."""
    r, w, k, _, a, b = (x[:, :head] for x in inputs)
    B, _, H, K = r.shape
    one = torch.eye(K, dtype=wide_dtype(r.dtype), device=r.device).expand(B, H, K, K)
    return wkv7(r, w, k, torch.zeros_like(r), a, b, one, decay=decay, backend=backend)


def _built(
    inputs: tuple[Tensor, ...], state: Tensor, piece: Piece, decay: str, backend: str | None
) -> Tensor:
    """B [B, H, V, K]: what the tokens that a later rank goes on from make by themselves."""
    start = piece.tokens - piece.tail
    r, w, k, v, a, b = (x[:, start:] for x in inputs)
    begin = state[piece.leaving]
    if piece.spans or not piece.tail:
        begin = torch.zeros_like(begin)
    return wkv7(r, w, k, v, a, b, begin, decay=decay, backend=backend)[1]


class _Arrive(torch.autograd.Function):
    """The states to begin with. No gradient goes back to the ranks before: `_Leave` brings it."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, arrived: Tensor, piece: Piece) -> Tensor:
        ctx.piece = piece
        begin = state.clone()
        if piece.head:
            begin[piece.arriving] = arrived
        return begin

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].clone()
        if ctx.piece.head:
            grad[ctx.piece.arriving] = 0
        return grad, None, None


class _Leave(torch.autograd.Function):
    """y and the states as they are; going back, the states' gradient from the ranks after."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        final: Tensor,
        q: Tensor,
        through: Tensor,
        after: list[Tensor],
        piece: Piece,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, through, *after)
        ctx.piece, ctx.group = piece, group
        return y.view_as(y), final.view_as(final)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, dfinal = grads
        q, through, *after = ctx.saved_tensors
        piece, rank = ctx.piece, ctx.piece.rank
        # The gradient of what arrives, as seen from here alone: through y, and through the state.
        seen = _outer(dy[:, : piece.head], q, dfinal.dtype)
        if piece.head:
            seen = seen + _product(dfinal[piece.arriving], through.mT)
        everyone = gather(seen, ctx.group)
        if piece.tail:
            leaving = torch.zeros_like(seen)
            for M, seen_there in zip(reversed(after), reversed(everyone[rank + 1 :]), strict=True):
                leaving = _product(leaving, M.mT) + seen_there
            dfinal = dfinal.clone()
            dfinal[piece.leaving] += leaving
        return dy, dfinal, None, None, None, None, None


def _product(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return x @ y


def _outer(dy: Tensor, q: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_t dy_t q_tᵀ: [B, T, H, V] and [B, T, H, K] -> [B, H, V, K]."""
    return _product(dy.to(dtype).permute(0, 2, 3, 1), q.to(dtype).transpose(1, 2))
