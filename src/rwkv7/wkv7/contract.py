"""What a call of the operator must look like: sizes, dtypes, state layout, values.

Everything is checked here, before any kernel runs, so that backends receive only valid calls.
Letters: B batch, T time, H heads, K key size per head, V value size per head, S sequences.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# RWKV-7 decays are exp(-e^(-1/2) sigmoid(w)): RWKV-LM, RWKV-v7/train_temp/src/model.py.
DECAY_SCALE = math.exp(-0.5)
DECAY_FORMS = ("logit", "log_bounded", "log")
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_modes = threading.local()


@contextlib.contextmanager
def checks() -> Iterator[None]:
    """Check the values of every call inside on any device (NaN, decay range, offsets, slots).

    On the CPU this always happens; on a GPU each check waits for the device, so it is asked for.
    """
    with _checking(True):
        yield


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Check no values inside, on any device: a NaN comes out as NaN, of its own sequence alone.

    For many sequences of many users in one call, where one that is broken must not end the others.
    """
    with _checking(False):
        yield


@contextlib.contextmanager
def batch_invariant() -> Iterator[None]:
    """Inside, a sequence's numbers depend on that sequence alone, bit for bit.

    A GPU backend then cuts a sequence by its own T, by H, K, V, dtype and card, never by B, S or
    packing. The `reference` and `torch` backends are batch invariant always.
    """
    before, _modes.invariant = invariance_wanted(), True
    try:
        yield
    finally:
        _modes.invariant = before


def checks_wanted(device: torch.device) -> bool:
    """Whether to look at values: on the CPU and inside `checks()`, but not inside `unchecked()`."""
    wanted = getattr(_modes, "checks", None)
    return device.type == "cpu" if wanted is None else wanted


def invariance_wanted() -> bool:
    """Whether the caller is inside `batch_invariant()`."""
    return getattr(_modes, "invariant", False)


@dataclass(frozen=True)
class Call:
    """One valid call of `wkv7`; the shapes are those of its docstring.

    Without slots: sizes are asked for some thirty times a call, and so found once.
    """

    r: Tensor
    w: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    state: Tensor | None
    decay: str
    cu_seqlens: Tensor | None
    invariant: bool = False

    @functools.cached_property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(B, T, H, K, V)."""
        return (*self.r.shape, self.v.shape[-1])

    @functools.cached_property
    def sequences(self) -> int:
        """S: the number of states in and out."""
        return self.r.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of states and of the arithmetic: float64 for float64 inputs, else float32."""
        return state_dtype(self.v.dtype)

    def initial_state(self) -> Tensor:
        """The given state, or zeros [S, H, V, K]."""
        if self.state is not None:
            return self.state
        _, _, H, K, V = self.sizes
        return self.v.new_zeros((self.sequences, H, V, K), dtype=self.state_dtype)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for every other input dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def log_decay(w: Tensor, decay: str, dtype: torch.dtype) -> Tensor:
    """The log of the decay (≤ 0) in `dtype`, from `w` in the form that `decay` names.

    The logit form goes through logsigmoid because its gradient keeps every digit where the
    sigmoid saturates; the derivative of torch.sigmoid is s(1 - s), which loses them.
    """
    w = w.to(dtype)
    if decay == "logit":
        return -DECAY_SCALE * torch.nn.functional.logsigmoid(w).exp()
    return w


def check_call(call: Call) -> None:
    """Raise ValueError or TypeError, naming argument, expected and found, unless `call` is valid.

    Looks at types, shapes, dtypes and devices alone; `check_values` looks inside the tensors.
    """
    check_decay_form(call.decay)
    check_inputs({"r": call.r, "w": call.w, "k": call.k, "v": call.v, "a": call.a, "b": call.b}, 4)
    if call.cu_seqlens is not None:
        _check_offsets(call.cu_seqlens, call.r)
    if call.state is not None:
        # A trace of torch.compile cannot enter cached properties, which take a lock up to 3.11.
        B, _, H, K = call.r.shape
        S = B if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
        check_state(call.state, (S, H, call.v.shape[-1], K), call.v)


def check_decay_form(decay: str) -> None:
    """`decay` must name one of the three forms."""
    if decay not in DECAY_FORMS:
        raise ValueError(
            f"decay: expected one of {', '.join(map(repr, DECAY_FORMS))}, found {decay!r}"
        )


def check_backend_name(backend: str | None) -> None:
    """`backend` must be a name or None; whether it exists and can run is for the registry."""
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend: expected a name or None, found {type(backend).__name__}")


def check_inputs(tensors: dict[str, Tensor], rank: int) -> None:
    """The six inputs share leading sizes, K, dtype (w: the same or float32) and device."""
    letters = "[B, T, H, {}]" if rank == 4 else "[B, H, {}]"
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, found {type(x).__name__}")
        if x.layout != torch.strided:
            raise TypeError(f"{name}: expected a dense tensor, found the layout {x.layout}")
        if x.dim() != rank:
            size = letters.format("V" if name == "v" else "K")
            raise ValueError(f"{name}: expected {size}, found the shape {list(x.shape)}")
    r = tensors["r"]
    shape, dtype, device = r.shape, r.dtype, r.device
    if dtype not in INPUT_DTYPES:
        raise TypeError(f"r: expected bfloat16, float16, float32 or float64, found {dtype}")
    for name, x in tensors.items():
        expected = (*shape[:-1], x.shape[-1]) if name == "v" else shape
        if x.shape != expected:
            raise ValueError(
                f"{name}: expected the shape {list(expected)} to go with r, found {list(x.shape)}"
            )
        if x.dtype != dtype and not (name == "w" and x.dtype == torch.float32):
            also = " or torch.float32" if name == "w" and dtype != torch.float32 else ""
            raise TypeError(f"{name}: expected {dtype}{also} (the dtype of r), found {x.dtype}")
        if x.device != device:
            raise ValueError(f"{name}: expected the device of r, {device}, found {x.device}")
    if 0 in (shape[-2], shape[-1], tensors["v"].shape[-1]):
        raise ValueError(f"r, v: H, K and V must be at least 1, found {list(shape)}")


def check_state(state: Tensor, shape: tuple[int, int, int, int], like: Tensor) -> None:
    """`state` must be [S, H, V, K] = `shape`, fp32 (fp64 for fp64 inputs), beside `like`."""
    if not isinstance(state, Tensor):
        raise TypeError(f"state: expected a torch.Tensor or None, found {type(state).__name__}")
    if tuple(state.shape) != shape:
        S, H, V, K = shape
        raise ValueError(
            f"state: expected [sequences, H, V, K] = {list(shape)}, found {list(state.shape)}. A "
            f"state of flash-linear-attention is the transpose, [{S}, {H}, {K}, {V}]: convert it "
            "with rwkv7.state_from_fla (the official kernels' [V, K]: rwkv7.state_from_official)"
        )
    expected = state_dtype(like.dtype)
    if state.dtype != expected:
        raise TypeError(f"state: expected {expected} for {like.dtype} inputs, found {state.dtype}")
    if state.device != like.device:
        raise ValueError(f"state: expected the device {like.device}, found {state.device}")


@contextlib.contextmanager
def _checking(wanted: bool) -> Iterator[None]:
    before, _modes.checks = getattr(_modes, "checks", None), wanted
    try:
        yield
    finally:
        _modes.checks = before


def _check_offsets(cu_seqlens: Tensor, like: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(
            f"cu_seqlens: expected an int32 or int64 tensor, found {type(cu_seqlens).__name__}"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected int32 or int64, found {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected [S + 1] offsets, found {list(cu_seqlens.shape)}")
    if like.shape[0] != 1:
        raise ValueError(f"cu_seqlens: packed inputs have B = 1, found B = {like.shape[0]}")
    if cu_seqlens.device != like.device:
        raise ValueError(
            f"cu_seqlens: expected the device {like.device}, found {cu_seqlens.device}"
        )


def check_values(call: Call) -> None:
    """Raise ValueError for NaN, a decay outside its form's range, or broken offsets.

    Does nothing on a GPU outside `checks()`, where it would have to wait for the device, and
    nothing inside `unchecked()`.
    """
    if not checks_wanted(call.r.device):
        return
    if call.cu_seqlens is not None:
        _check_offset_values(call.cu_seqlens, call.r.shape[1])
    check_input_values(
        {"r": call.r, "w": call.w, "k": call.k, "v": call.v, "a": call.a, "b": call.b}, call.decay
    )
    if call.state is not None:
        _check_no_nan("state", call.state)


def check_input_values(tensors: dict[str, Tensor], decay: str) -> None:
    """No NaN in any input, and w inside the range of its form."""
    for name, x in tensors.items():
        _check_no_nan(name, x)
    w = tensors["w"]
    if decay == "logit" or w.numel() == 0:
        return
    low, high = (float(x) for x in w.detach().aminmax())
    slack = 4 * torch.finfo(w.dtype).eps
    if decay == "log_bounded" and low < -DECAY_SCALE * (1 + slack):
        raise ValueError(
            f'w: decay="log_bounded" needs log decays of at least -e^(-1/2) = {-DECAY_SCALE:.6f}, '
            f'found {low:.6g}; decay="log" takes any log decay ≤ 0'
        )
    if high > (slack if decay == "log_bounded" else 0.0):
        raise ValueError(
            f'w: decay="{decay}" needs log decays ≤ 0, found {high:.6g}; '
            'RWKV-7\'s decay logits (w0 + low-rank term) go in with decay="logit"'
        )


def _check_no_nan(name: str, x: Tensor) -> None:
    # A sum is one cheap pass and is NaN whenever an element is; infinities of both signs also
    # make it NaN, so the exact test runs only then.
    x = x.detach()
    if bool(x.sum().isnan()) and (count := int(x.isnan().sum())):
        raise ValueError(f"{name}: expected numbers, found {count} NaN of {x.numel()} elements")


def _check_offset_values(cu_seqlens: Tensor, T: int) -> None:
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens: expected to start at 0, found {offsets[0]}")
    for i, (start, end) in enumerate(itertools.pairwise(offsets)):
        if end < start:
            raise ValueError(
                f"cu_seqlens: expected offsets that never fall, found {start} then {end} "
                f"at position {i + 1}"
            )
    if offsets[-1] != T:
        raise ValueError(f"cu_seqlens: expected to end at T = {T}, found {offsets[-1]}")
