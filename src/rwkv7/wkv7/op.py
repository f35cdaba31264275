"""The public operator: `wkv7` for sequences, `wkv7_step_` for one token, `explain`.

Checks the call, hands it to a backend and registers the whole with torch.library, so that
torch.compile, activation checkpointing and FSDP2 see one opaque differentiable operation.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from .contract import (
    Call,
    batch_invariant,
    check_backend_name,
    check_call,
    check_values,
    checks,
    invariance_wanted,
    unchecked,
)
from .operation import Operation, is_traced
from .registry import Explanation, explanation, select
from .step import wkv7_step_

__all__ = ["batch_invariant", "checks", "explain", "unchecked", "wkv7", "wkv7_step_"]

# Asked once: torch.compile cannot trace the question in every version.
_AUTOCAST_DEVICES = {
    name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name)
}


def wkv7(
    r: Tensor,  # [B, T, H, K]
    w: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, H, V]
    a: Tensor,  # [B, T, H, K]
    b: Tensor,  # [B, T, H, K]
    state: Tensor | None = None,  # [B, H, V, K]
    *,
    decay: str = "logit",
    cu_seqlens: Tensor | None = None,  # [S + 1]
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RWKV-7's recurrence over a batch of sequences, with the state explicit.

    Per head (arXiv:2503.14456, section 3), S the state [V, K] and d the decay that `w` stands for:

        S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_tᵀ + v_t k_tᵀ          y_t = S_t r_t

    B batch, T time (any T ≥ 0), H heads, K and V key and value size per head, S packed sequences.
    r, k, v, a, b share one dtype: bfloat16, float16, float32 or float64. No scale factor is
    applied, no argument is changed, and any strides are accepted.

    Args:
        r: receptance, [B, T, H, K].
        w: the decay, [B, T, H, K], in the form that `decay` names; the dtype of r, or float32.
        k: key, [B, T, H, K].
        v: value, [B, T, H, V].
        a: in-context "remove" vector, [B, T, H, K]; the model passes -k̂, k̂ the unit key.
        b: in-context "replace" vector, [B, T, H, K]; the model passes k̂ times the learning rate.
        state: the state before the first token, [B, H, V, K] ([S, H, V, K] when packed), float32
            (float64 for float64 inputs). None means zeros.
        decay: what w is. "logit": RWKV-7's decay pre-activation, d = exp(-e^(-1/2) sigmoid(w)).
            "log_bounded": the log decay, -e^(-1/2) ≤ w ≤ 0 within rounding. "log": any log
            decay ≤ 0, -inf (forget all) included.
        cu_seqlens: packed sequences (B = 1): rising offsets, [S + 1], int32 or int64, 0 to T; equal
            neighbours are an empty sequence.
        backend: a name, or None for the first that accepts the call (see `explain`). A named
            backend that cannot run the call raises; it never falls back to another.

    Returns:
        y [B, T, H, V] in the dtype of v, and the state after the last token, always, in the shape
        and dtype of `state`, never aliasing it. Gradients flow to all six inputs and to the
        initial state, from y, from the final state, or from both.

    Raises:
        ValueError, TypeError: a shape, dtype, device, form or backend that does not fit; on the
            CPU (elsewhere inside `rwkv7.checks()`) also NaN and values out of range.

    Under torch.autocast r, k, v, a, b are cast to its dtype, w is not. Derivatives are first order,
    reverse mode. A token that is not finite may spoil all of its own sequence, never another.
    """
    r, k, v, a, b = _autocast(r, k, v, a, b)
    check_call(Call(r, w, k, v, a, b, state, decay, cu_seqlens))
    check_backend_name(backend)
    given = (r, w, k, v, a, b, state)
    _refuse_forward_mode(*given)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    y, final, _ = _operation(*given, decay, cu_seqlens, backend, save, invariance_wanted())
    return y, final


def explain(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    decay: str = "logit",
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Explanation:
    """Which backend `wkv7` would run with the same arguments, by which route, and why no other.

    The result prints well; `.backend`, `.route` and `.refusals` hold the same as data. Shapes,
    dtypes and devices that do not fit raise as in `wkv7`; values are not looked at.
    """
    r, k, v, a, b = _autocast(r, k, v, a, b)
    call = Call(r, w, k, v, a, b, state, decay, cu_seqlens, invariance_wanted())
    check_call(call)
    check_backend_name(backend)
    return explanation(call, backend)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    if not (isinstance(tensors[0], Tensor) and _is_autocast(tensors[0])):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.dtype != torch.float64 else x for x in tensors
    )


def _is_autocast(x: Tensor) -> bool:
    device = x.device.type
    return device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """The caller's autocast has done its work: products inside are in the dtypes chosen there."""
    if _is_autocast(x):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def _refuse_forward_mode(*tensors: Tensor | None) -> None:
    # The registered operator would drop a tangent without a word.
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level < 0:
        return  # outside dual_level() there is none
    for x in tensors:
        if x is not None and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                "wkv7: forward-mode derivatives (jvp, dual tensors) are not offered; use reverse "
                "mode (backward, torch.autograd.grad)"
            )


def _forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    decay: str,
    cu_seqlens: Tensor | None,
    backend: str | None,
    save: bool,
    invariant: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(r, w, k, v, a, b, state, decay, cu_seqlens, invariant)
    check_values(call)
    with _without_autocast(r):
        return select(call, backend).forward(call, save)


def _fake(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    decay: str,
    cu_seqlens: Tensor | None,
    backend: str | None,
    save: bool,
    invariant: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(r, w, k, v, a, b, state, decay, cu_seqlens, invariant)
    _, _, H, K, V = call.sizes
    saved = select(call, backend).saved_shape(call) if save else (0,)
    final = v.new_empty((call.sequences, H, V, K), dtype=call.state_dtype)
    return v.new_empty(v.shape), final, v.new_empty(saved, dtype=call.state_dtype)


# Defined by schema, not as a custom_op, which would switch autograd off inside: `reference`
# differentiates its loop there.
torch.library.define(
    "rwkv7::wkv7_backward",
    "(Tensor? dy, Tensor? dstate, Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, "
    "Tensor? state, Tensor saved, str decay, Tensor? cu_seqlens, str? backend, bool invariant) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _backward(
    dy: Tensor | None,
    dstate: Tensor | None,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    saved: Tensor,
    decay: str,
    cu_seqlens: Tensor | None,
    backend: str | None,
    invariant: bool,
) -> tuple[Tensor, ...]:
    call = Call(r, w, k, v, a, b, state, decay, cu_seqlens, invariant)
    with _without_autocast(r):
        return select(call, backend).backward(call, saved, dy, dstate)


torch.library.impl("rwkv7::wkv7_backward", "CompositeExplicitAutograd", _backward)


@torch.library.register_fake("rwkv7::wkv7_backward")
def _(
    dy: Tensor | None,
    dstate: Tensor | None,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    saved: Tensor,
    decay: str,
    cu_seqlens: Tensor | None,
    backend: str | None,
    invariant: bool,
) -> tuple[Tensor, ...]:
    call = Call(r, w, k, v, a, b, state, decay, cu_seqlens, invariant)
    _, _, H, K, V = call.sizes
    dinitial = v.new_empty((call.sequences, H, V, K), dtype=call.state_dtype)
    return (*(x.new_empty(x.shape) for x in (r, w, k, v, a, b)), dinitial)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    r, w, k, v, a, b, state, decay, cu_seqlens, backend, _, invariant = inputs
    ctx.save_for_backward(r, w, k, v, a, b, state, cu_seqlens, output[2])
    ctx.options = decay, backend, invariant
    ctx.set_materialize_grads(False)  # a gradient that is absent costs neither memory nor time


def _differentiate(
    ctx: Any, dy: Tensor | None, dstate: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    r, w, k, v, a, b, state, cu_seqlens, saved = ctx.saved_tensors
    decay, backend, invariant = ctx.options
    none = (None,) * 5
    if dy is None and dstate is None:
        return (None,) * 7 + none
    run = torch.ops.rwkv7.wkv7_backward if is_traced(r) else _backward
    *grads, dinitial = run(
        dy, dstate, r, w, k, v, a, b, state, saved, decay, cu_seqlens, backend, invariant
    )
    return (*grads, None if state is None else dinitial, *none)


_operation = Operation("rwkv7::wkv7", _forward, _fake)
_operation.differentiable(_setup_context, _differentiate)
