"""flash-linear-attention's three RWKV-7 functions, by their names, arguments and defaults.

Signatures and meanings are those of fla-core 0.6.0, fla/ops/rwkv7/. Their w is the log decay,
d = exp(w), and their states are [N, H, K, V]; both are converted here, at the edge, and `wkv7`
does the work on any device. An argument that is not in their signature is a TypeError.

N sequences: B, or as many as cu_seqlens holds. The other letters are those of `wkv7`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rwkv7.state import state_from_fla, state_to_fla
from rwkv7.wkv7 import wkv7
from rwkv7.wkv7.contract import DECAY_SCALE, state_dtype

__all__ = ["chunk_rwkv7", "fused_mul_recurrent_rwkv7", "fused_recurrent_rwkv7"]


def chunk_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False,
    chunk_size: int | None = None,
    disable_recompute: bool = False,
    cp_context: object | None = None,
    lower_bound: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """RWKV-7 over whole sequences, with gradients, as `fla.ops.rwkv7.chunk_rwkv7`.

    Args:
        r, k, a, b: [B, T, H, K], one dtype.
        w: log decay, [B, T, H, K], the same dtype or float32.
        v: [B, T, H, V].
        scale: multiplies y; None stands for 1/sqrt(K).
        initial_state: [N, H, K, V], any floating dtype; None means zeros.
        output_final_state: whether to return the final state.
        cu_seqlens: offsets [N + 1] of packed sequences (then B = 1).
        cu_seqlens_cpu, safe_gate, chunk_size, disable_recompute: taken, and without effect:
            they choose among that library's kernels and never change what is computed.
        cp_context: context parallelism is not offered here; anything but None is an error.
        lower_bound: the caller's word that w ≥ lower_bound. One within RWKV-7's own range,
            -e^(-1/2) or above, selects wkv7's `log_bounded` form, which lets every route run.

    Returns:
        y [B, T, H, V] in the dtype of v, and the final state [N, H, K, V], float32 (float64 for
        float64 inputs), or None unless output_final_state.

    Raises:
        ValueError, TypeError: as `wkv7`, and for a lower_bound that is not negative.
    """
    if cp_context is not None:
        raise ValueError(
            "cp_context: expected None, context parallelism is not offered; split the sequence "
            "and pass the state along with initial_state and output_final_state"
        )
    if lower_bound is not None and not lower_bound < 0:
        raise ValueError(f"lower_bound: expected a negative log decay, found {lower_bound}")
    decay = "log"
    if lower_bound is not None and lower_bound >= -DECAY_SCALE * (1 + 1e-6):
        decay = "log_bounded"
    return _run(r, w, k, v, a, b, scale, initial_state, output_final_state, cu_seqlens, decay=decay)


def fused_recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `fla.ops.rwkv7.fused_recurrent_rwkv7`; gradients flow here, where theirs raises.

    Arguments, result and errors are those of `chunk_rwkv7`, except for two defaults, which are
    theirs: scale=None, which divides y by sqrt(K) (RWKV-7 itself wants 1.0), and
    output_final_state=True.
    """
    return _run(r, w, k, v, a, b, scale, initial_state, output_final_state, cu_seqlens)


def fused_mul_recurrent_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kk: Tensor,
    a: Tensor,
    scale: float | None = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `fla.ops.rwkv7.fused_mul_recurrent_rwkv7`, with gradients besides.

    Args:
        kk: the unit key k̂, [B, T, H, K].
        a: the in-context learning rate, [B, T, H, K]: the recurrence gets -k̂ and k̂·a, a product
            that bf16 and fp16 inputs form in float32, as theirs do.
        reverse: each sequence runs from its last token to its first.
        r, w, k, v, scale, initial_state, output_final_state, cu_seqlens: as in `chunk_rwkv7`.

    Returns:
        What `chunk_rwkv7` returns; y in the order of the inputs, reversed or not.
    """
    dtype = v.dtype
    wide = state_dtype(dtype)
    r, w, k, v, kk, a = (x.to(wide) for x in (r, w, k, v, kk, a))
    inputs = [r, w, k, v, -kk, kk * a]
    order = _reversal(r, cu_seqlens) if reverse else None
    if order is not None:
        inputs = [x[:, order] for x in inputs]
    r, w, k, v, a, b = inputs
    y, state = _run(r, w, k, v, a, b, scale, initial_state, output_final_state, cu_seqlens)
    # A reversal undoes itself.
    return (y if order is None else y[:, order]).to(dtype), state


def _run(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    decay: str = "log",
) -> tuple[Tensor, Tensor | None]:
    dtype = v.dtype
    scale = k.shape[-1] ** -0.5 if scale is None else float(scale)
    if scale != 1.0:
        if not _is_power_of_two(scale):
            # A half-precision r times anything else would be rounded once more.
            r, w, k, v, a, b = (x.to(state_dtype(dtype)) for x in (r, w, k, v, a, b))
        r = r * scale
    state = None
    if initial_state is not None:
        _check_initial_state(initial_state, k, v, cu_seqlens)
        state = state_from_fla(initial_state).to(state_dtype(dtype))
    y, final = wkv7(r, w, k, v, a, b, state, decay=decay, cu_seqlens=cu_seqlens)
    return y.to(dtype), state_to_fla(final) if output_final_state else None


def _is_power_of_two(x: float) -> bool:
    return abs(math.frexp(x)[0]) == 0.5


def _check_initial_state(state: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    N = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    expected = [N, *k.shape[-2:], v.shape[-1]]
    if list(state.shape) != expected:
        raise ValueError(
            f"initial_state: expected [N, H, K, V] = {expected}, found {list(state.shape)}; "
            "rwkv7's own states, [N, H, V, K], become these with rwkv7.state_to_fla"
        )


def _reversal(r: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[T] positions that read every sequence backwards, where it stands."""
    T = r.shape[1]
    position = torch.arange(T, device=r.device)
    if cu_seqlens is None:
        return T - 1 - position
    mirror = cu_seqlens[:-1] + cu_seqlens[1:] - 1
    lengths = cu_seqlens.diff()
    return torch.repeat_interleave(mirror, lengths, output_size=T) - position
