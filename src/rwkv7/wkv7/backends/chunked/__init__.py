"""The `torch` backend: the recurrence in chunks of tokens, as matrix products of plain torch.

A chunk acts on the state as an affine map, S -> S M + B, so all chunks are prepared at once and
only one small product per chunk is left in sequence. Works through time in pieces, so that memory
does not grow with T. `layout` cuts the call into pieces, `algebra` is the mathematics of one
piece, `bounded` and `unbounded` its two ways to weigh pairs of tokens by their decays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv7.wkv7.contract import DECAY_SCALE, Call, log_decay

from . import algebra
from .layout import CHUNK, Piece, Plan, make_plan


class ChunkedBackend:
    """Chunked matrix products on any torch device; arithmetic in fp32 (fp64 for fp64 inputs)."""

    name = "torch"

    def refuses(self, call: Call) -> str | None:
        """Takes every valid call, but for fp64 where the device has none."""
        if call.state_dtype == torch.float64 and call.r.device.type == "mps":
            return "float64 does not exist on MPS"
        return None

    def route(self, call: Call) -> str:
        """Pair weights from two exponentials a token, or, without a decay floor, by halving."""
        how = "by halving, for any log decay" if call.decay == "log" else "in one product"
        return f"chunks of up to {CHUNK} tokens, matrix products, pairs weighed {how}"

    def saved_shape(self, call: Call) -> tuple[int, ...]:
        """One state a chunk, taken before it; for packed calls room for the most there can be."""
        B, T, H, K, V = call.sizes
        if call.cu_seqlens is None:
            return (B * -(-T // CHUNK), H, V, K)
        return (T // CHUNK + call.sequences, H, V, K)

    def forward(self, call: Call, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        """y, the final state, and the states at chunk starts when `save`."""
        y = torch.empty_like(call.v, memory_format=torch.contiguous_format)
        final = call.initial_state().clone(memory_format=torch.contiguous_format)
        # Zeros, because a packed call seldom fills all of it.
        saved = final.new_zeros(self.saved_shape(call) if save else (0,))
        plan = make_plan(call)
        for group in plan.groups:
            state = final[group.rows]
            for piece in group.pieces:
                chunks = _load(call, plan, piece)
                prepared = algebra.prepare(chunks, call.decay == "log")
                starts = saved[piece.chunks] if save else prepared.new_states()
                state = algebra.scan_states(prepared, state, starts, piece.counts)
                plan.scatter(y, algebra.outputs(prepared, starts), piece)
            final[group.rows] = state
        return y, final, saved

    def backward(
        self, call: Call, saved: Tensor, dy: Tensor | None, dstate: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Gradients of the six inputs and of the initial state; pieces are prepared again."""
        inputs = (call.r, call.w, call.k, call.v, call.a, call.b)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        if dstate is None:
            dinitial = torch.zeros_like(call.initial_state())
        else:
            dinitial = dstate.clone(memory_format=torch.contiguous_format)
        plan = make_plan(call)
        for group in plan.groups:
            E = dinitial[group.rows]
            for piece in reversed(group.pieces):
                chunks = _load(call, plan, piece)
                prepared = algebra.prepare(chunks, call.decay == "log")
                dY = None if dy is None else plan.gather(dy, piece, prepared.state_dtype)
                ends = prepared.new_states()
                E = algebra.scan_gradients(prepared, E, dY, ends, piece.counts)
                pieces = algebra.gradients(prepared, saved[piece.chunks], ends, dY)
                dlogd = pieces[1]
                if call.decay == "logit":
                    w = chunks.w
                    dlogd *= torch.sigmoid(w).mul_(torch.sigmoid(-w)).mul_(-DECAY_SCALE)
                for grad, part in zip(grads, pieces, strict=True):
                    plan.scatter(grad, part, piece)
            dinitial[group.rows] = E
        return (*grads, dinitial)


def _load(call: Call, plan: Plan, piece: Piece) -> algebra.Chunks:
    dtype = call.state_dtype
    w = plan.gather(call.w, piece, dtype)
    logd = log_decay(w, call.decay, dtype)
    plan.zero_padding(logd, piece)  # a padded token must not decay the state
    C, K, V = piece.chunk, w.shape[-1], call.v.shape[-1]
    m = w.shape[0]
    ra, kb = w.new_empty(m, 2 * C, K), w.new_empty(m, 2 * C, K)
    vu = w.new_empty(m, 2 * C, V)
    for x, out in (
        (call.r, ra[:, :C]),
        (call.a, ra[:, C:]),
        (call.k, kb[:, :C]),
        (call.b, kb[:, C:]),
        (call.v, vu[:, :C]),
    ):
        plan.gather(x, piece, dtype, out)
    return algebra.Chunks(w, logd, ra, kb, vu)
