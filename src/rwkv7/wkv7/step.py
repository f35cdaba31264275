"""`wkv7_step_`: one token for a batch of sequences, the state pool updated in place."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import (
    check_decay_form,
    check_input_values,
    check_inputs,
    checks_wanted,
    log_decay,
    state_dtype,
)
from .operation import Operation
from .registry import select_step


def wkv7_step_(
    r: Tensor,  # [B, H, K]
    w: Tensor,  # [B, H, K]
    k: Tensor,  # [B, H, K]
    v: Tensor,  # [B, H, V]
    a: Tensor,  # [B, H, K]
    b: Tensor,  # [B, H, K]
    state: Tensor,  # [P, H, V, K]
    *,
    decay: str = "logit",
    slots: Tensor | None = None,  # [B]
) -> Tensor:
    """One token of `wkv7` for B sequences, updating rows of the pool `state` **in place**.

    Args:
        r, w, k, v, a, b: as in `wkv7`, without the time axis.
        state: a pool of P states, [P, H, V, K], float32 (float64 for float64 inputs); changed.
        decay: the form of w, as in `wkv7`.
        slots: the row of the pool that each sequence uses, [B], int32 or int64; -1 skips a row,
            whose y is 0. None means row i for sequence i (then P = B).

    Returns:
        y [B, H, V] in the dtype of v.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit; a slot out of range or
            named twice and NaN in the inputs (on the CPU, elsewhere inside `rwkv7.checks()`).
        RuntimeError: a tensor requires grad while grad mode is on; a step is for inference only.
    """
    inputs = {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}
    check_decay_form(decay)
    check_inputs(inputs, 3)
    _check_pool(state, slots, r, v)
    if torch.is_grad_enabled():
        _refuse_gradients({**inputs, "state": state})
    y: Tensor = _step(r, w, k, v, a, b, state, decay, slots)
    return y


def _refuse_gradients(tensors: dict[str, Tensor]) -> None:
    for name, x in tensors.items():
        if x.requires_grad:
            raise RuntimeError(
                f"{name}: requires grad, and wkv7_step_ changes the state in place, for inference "
                "only. Use wkv7 with T = 1, or torch.no_grad()"
            )


def _check_pool(state: Tensor, slots: Tensor | None, r: Tensor, v: Tensor) -> None:
    if not isinstance(state, Tensor):
        raise TypeError(f"state: expected a torch.Tensor, found {type(state).__name__}")
    B, H, K, V = *r.shape, v.shape[-1]
    rows = "B" if slots is None else "P"
    if state.dim() != 4 or tuple(state.shape[1:]) != (H, V, K):
        raise ValueError(
            f"state: expected [{rows}, H, V, K] = [{rows}, {H}, {V}, {K}], found "
            f"{list(state.shape)}. flash-linear-attention keeps [{rows}, {H}, {K}, {V}]: convert "
            "it with rwkv7.state_from_fla"
        )
    if slots is None and state.shape[0] != B:
        raise ValueError(
            f"state: expected {B} rows, one a sequence, found {state.shape[0]}; "
            "give slots to choose rows of a larger pool"
        )
    if state.dtype != state_dtype(v.dtype):
        raise TypeError(f"state: expected {state_dtype(v.dtype)}, found {state.dtype}")
    if state.device != r.device:
        raise ValueError(f"state: expected the device {r.device}, found {state.device}")
    if 0 in state.stride() and state.numel() > 1:
        raise ValueError("state: expected rows of their own to write to, found an expanded tensor")
    if slots is None:
        return
    if not isinstance(slots, Tensor):
        raise TypeError(f"slots: expected a torch.Tensor or None, found {type(slots).__name__}")
    if slots.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"slots: expected int32 or int64, found {slots.dtype}")
    if tuple(slots.shape) != (B,):
        raise ValueError(f"slots: expected the shape [{B}], found {list(slots.shape)}")
    if slots.device != r.device:
        raise ValueError(f"slots: expected the device {r.device}, found {slots.device}")


def _advance(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    decay: str,
    slots: Tensor | None,
) -> Tensor:
    if checks_wanted(r.device):
        check_input_values({"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}, decay)
        if slots is not None:
            _check_slots(slots, state.shape[0])
    if state.shape[0] == 0:
        return torch.zeros_like(v)  # every sequence is skipped
    if backend := select_step(r, v, state):
        return backend.step((r, w, k, v, a, b), state, decay, slots)
    dtype, v_dtype = state.dtype, v.dtype
    r, k, v, a, b = (x.to(dtype) for x in (r, k, v, a, b))
    d = log_decay(w, decay, dtype).exp()
    if slots is not None and (first := first_of_run(slots)) is not None:
        state, slots = state.narrow(0, first, len(slots)), None
    # A skipped row reads row 0 and writes nothing back. Products and sums are elementwise: for
    # matrices this small they are faster than matrix products, and autocast leaves them alone.
    S = state if slots is None else state.index_select(0, slots.clamp(min=0))
    Sa = (S * a[:, :, None, :]).sum(-1, keepdim=True)
    S.mul_(d[:, :, None, :])
    S.addcmul_(Sa, b[:, :, None, :]).addcmul_(v[..., None], k[:, :, None, :])
    y = (S * r[:, :, None, :]).sum(-1)
    if slots is not None:
        used = slots >= 0
        state.index_copy_(0, slots[used].long(), S[used])
        y = torch.where(used[:, None, None], y, 0.0)
    return y.to(v_dtype)


def _fake(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    decay: str,
    slots: Tensor | None,
) -> Tensor:
    return v.new_empty(v.shape)


_step = Operation("rwkv7::wkv7_step_", _advance, _fake, changes=("state",))


def first_of_run(slots: Tensor) -> int | None:
    """Where rows that follow each other begin: a view of the pool, so that nothing is copied.

    None for other rows, and on a GPU, which would have to be waited for.
    """
    if type(slots) is not Tensor or slots.device.type != "cpu" or not len(slots):
        return None
    rows = slots.tolist()
    return rows[0] if rows[0] >= 0 and rows == [*range(rows[0], rows[0] + len(rows))] else None


def _check_slots(slots: Tensor, pool: int) -> None:
    used = slots[slots >= 0]
    if slots.numel() and (int(slots.min()) < -1 or int(slots.max()) >= pool):
        rows = f" or rows 0 to {pool - 1} of the pool" if pool else " alone, for the pool is empty"
        raise ValueError(
            f"slots: expected -1 (skip){rows}, found {int(slots.min())} to {int(slots.max())}"
        )
    if used.unique().numel() != used.numel():
        raise ValueError(f"slots: a row may be named once only, found {slots.tolist()}")
