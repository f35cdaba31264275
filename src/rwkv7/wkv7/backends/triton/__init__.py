"""The portable GPU backend: Triton kernels with static configurations, nothing tuned at run time.

Two routes. In steps of 16 tokens (RWKV-7's own decays, 16-bit inputs, K and V up
to 128, or 64 on other cards than Hopper's): steps are prepared all at once, then walked. Token by
token in fp32: the rest.
Importing this module imports no triton; the kernels are loaded by the first call that runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from rwkv7.wkv7.contract import Call

from . import plan
from .saved import Saved

Result = TypeVar("Result")


class TritonBackend:
    """Triton kernels on a GPU, or on the CPU under Triton's interpreter."""

    name = "triton"

    def refuses(self, call: Call) -> str | None:
        """Needs triton, a GPU (or TRITON_INTERPRET=1), 16- or 32-bit floats, K and V ≤ 256."""
        return _refuses(call.r, call.v)

    def route(self, call: Call) -> str:
        """By chunks or token by token, and why."""
        if plan.takes_chunks(call):
            return f"triton, in steps of {plan.STEP} tokens"
        return f"triton, token by token ({plan.why_tokens(call)})"

    def saved_shape(self, call: Call) -> tuple[int, ...]:
        """One flat tensor: states at boundaries, of chunks or of spans of tokens."""
        if _is_empty(call):
            return (0,)
        if plan.takes_chunks(call):
            return (Saved.words(call),)
        from .token_route import saved_spans

        _, _, H, K, V = call.sizes
        return (saved_spans(call) * H * V * K,)

    def forward(self, call: Call, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        """y [B, T, H, V], the final state [S, H, V, K] in fp32, and what `backward` needs."""
        saved = call.v.new_empty(self.saved_shape(call) if save else (0,), dtype=torch.float32)
        if _is_empty(call):
            return torch.empty_like(call.v), call.initial_state().clone(), saved
        call = _contiguous(call)
        with _on(call.r):
            y, final = _run(
                call,
                lambda: _forward(call, saved, save),
                (lambda: _backward(call, saved, torch.empty_like(call.v), None)) if save else None,
            )
        return y, final, saved

    def backward(
        self, call: Call, saved: Tensor, dy: Tensor | None, dstate: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Gradients of r, w, k, v, a, b in their dtypes and of the initial state in fp32."""
        if _is_empty(call):
            inputs = (call.r, call.w, call.k, call.v, call.a, call.b)
            initial = call.initial_state()
            last = torch.zeros_like(initial) if dstate is None else dstate.clone()
            return (*(torch.zeros_like(x) for x in inputs), last)
        call = _contiguous(call)
        dy = None if dy is None else dy.contiguous()
        dstate = None if dstate is None else dstate.contiguous()
        with _on(call.r):
            return _run(call, lambda: _backward(call, saved, dy, dstate))

    def refuses_step(self, r: Tensor, v: Tensor, state: Tensor) -> str | None:
        """As `refuses`; the pool must be contiguous, since its rows change in place."""
        return _refuses(r, v) or (None if state.is_contiguous() else "the pool is not contiguous")

    def step(
        self, inputs: tuple[Tensor, ...], state: Tensor, decay: str, slots: Tensor | None
    ) -> Tensor:
        """One token (r, w, k, v, a, b): y [B, H, V]; rows of the pool `state` change in place."""
        from .token_route import step

        if inputs[0].shape[0] == 0:
            return torch.empty_like(inputs[3])
        with _on(state):
            return step(tuple(x.contiguous() for x in inputs), state, decay, slots)


def _run(
    call: Call, route: Callable[[], Result], then: Callable[[], object] | None = None
) -> Result:
    """`run_together`, but for an interpreter, which compiles nothing."""
    if not call.r.is_cuda:
        return route()
    from .launch import run_together

    return run_together(route, then)


def _forward(call: Call, saved: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """y and the final state; it writes nothing that is there before but `saved`, all of it."""
    if plan.takes_chunks(call):
        from . import step_route

        return step_route.forward(call, Saved.view(call, saved) if save else None)
    from . import token_route

    return token_route.forward(call, saved, save)


def _backward(
    call: Call, saved: Tensor, dy: Tensor | None, dstate: Tensor | None
) -> tuple[Tensor, ...]:
    """The seven gradients; it writes nothing that is there before."""
    if plan.takes_chunks(call):
        from . import back_route

        return back_route.backward(call, saved, dy, dstate)
    from . import token_route

    return token_route.backward(call, saved, dy, dstate)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _refuses(r: Tensor, v: Tensor) -> str | None:
    K, V = r.shape[-1], v.shape[-1]
    if not _installed():
        return "triton is not installed (pip install triton)"
    if r.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs a GPU, the inputs are on {r.device} (TRITON_INTERPRET=1 emulates one)"
    if r.dtype == torch.float64:
        return "float64 is left to torch and reference"
    if max(K, V) > plan.LARGEST:
        return f"K and V up to {plan.LARGEST}, found K = {K}, V = {V}"
    return _card_refuses(r.device) if r.device.type == "cuda" else None


@functools.cache
def _card_refuses(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"needs compute capability 8.0 or later, found {major}.{minor}" if major < 8 else None


def _is_empty(call: Call) -> bool:
    B, T, *_ = call.sizes
    return B * T == 0 or call.sequences == 0


def _contiguous(call: Call) -> Call:
    state, offsets = call.state, call.cu_seqlens
    given = (call.r, call.w, call.k, call.v, call.a, call.b, state, offsets)
    if all(x is None or x.is_contiguous() for x in given):
        return call
    return replace(
        call,
        r=call.r.contiguous(),
        w=call.w.contiguous(),
        k=call.k.contiguous(),
        v=call.v.contiguous(),
        a=call.a.contiguous(),
        b=call.b.contiguous(),
        state=None if state is None else state.contiguous(),
        cu_seqlens=None if offsets is None else offsets.contiguous(),
    )


def _on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the current device, which need not be the inputs'."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
