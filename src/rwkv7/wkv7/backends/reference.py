"""The recurrence itself, token by token: the oracle that every other backend is measured against.

Plain torch operations and autograd, in fp64 when the inputs are. Nothing here is fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv7.wkv7.contract import Call, log_decay


class ReferenceBackend:
    """S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_tᵀ + v_t k_tᵀ,  y_t = S_t r_t."""

    name = "reference"

    def refuses(self, call: Call) -> str | None:
        """Takes every valid call."""
        return None

    def route(self, call: Call) -> str:
        """One route: a loop over tokens."""
        return "token by token, plain torch"

    def saved_shape(self, call: Call) -> tuple[int, ...]:
        """Keeps nothing for the backward pass: it runs the recurrence again."""
        return (0,)

    def forward(self, call: Call, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        """y [B, T, H, V] in the dtype of v, the final state [S, H, V, K], and nothing saved."""
        y, state = _recurrence(call)
        return y, state, state.new_empty(0)

    def backward(
        self, call: Call, saved: Tensor, dy: Tensor | None, dstate: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Gradients of r, w, k, v, a, b and the initial state, by autograd through the loop."""
        inputs = [call.r, call.w, call.k, call.v, call.a, call.b, call.initial_state()]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs]
            r, w, k, v, a, b, state = leaves
            outputs = _recurrence(Call(r, w, k, v, a, b, state, call.decay, call.cu_seqlens))
            pairs = [(o, d) for o, d in zip(outputs, (dy, dstate), strict=True) if d is not None]
            roots, seeds = zip(*pairs, strict=True)
            return torch.autograd.grad(roots, leaves, seeds, materialize_grads=True)


def _recurrence(call: Call) -> tuple[Tensor, Tensor]:
    dtype = call.state_dtype
    offsets = [0, call.r.shape[1]] if call.cu_seqlens is None else call.cu_seqlens.tolist()
    # Contiguous, so that the order of a sum, and with it the last bit, never depends on strides.
    inputs = (call.r, call.k, call.v, call.a, call.b)
    r, k, v, a, b = (x.to(dtype).contiguous() for x in inputs)
    d = log_decay(call.w, call.decay, dtype).exp().contiguous()
    initial = call.initial_state().contiguous()
    states = [initial] if call.cu_seqlens is None else [S[None] for S in initial.unbind()]
    ys, finals = [], []
    for S, start, end in zip(states, offsets[:-1], offsets[1:], strict=True):
        for t in range(start, end):
            Sa = (S * a[:, t, :, None, :]).sum(-1)
            S = S * d[:, t, :, None, :] + Sa[..., None] * b[:, t, :, None, :]
            S = S + v[:, t, :, :, None] * k[:, t, :, None, :]
            ys.append((S * r[:, t, :, None, :]).sum(-1))
        finals.append(S)
    y = torch.stack(ys, 1) if ys else v.clone()
    state = torch.cat(finals) if finals else initial
    return y.to(call.v.dtype), state.clone()
