"""The table of backends, and which one a call gets.

A backend is one object in one file; its line in `_TABLE` is all that the rest of the library
knows of it. Its module is imported when a call first asks about it, never by `import rwkv7`.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from .contract import Call

# In order of preference: a call that names no backend gets the first that accepts it.
_TABLE = {
    "cuda": "rwkv7.wkv7.backends.cuda:CudaBackend",
    "triton": "rwkv7.wkv7.backends.triton:TritonBackend",
    "torch": "rwkv7.wkv7.backends.chunked:ChunkedBackend",
    "reference": "rwkv7.wkv7.backends.reference:ReferenceBackend",
}


class Backend(Protocol):
    """What a backend offers. It receives validated calls and owns its gradient."""

    name: str

    def refuses(self, call: Call) -> str | None:
        """Why this call cannot run here (sizes, dtype, device, missing software), or None."""
        ...

    def route(self, call: Call) -> str:
        """In a few words, how an accepted call would be computed."""
        ...

    def saved_shape(self, call: Call) -> tuple[int, ...]:
        """The shape of what `forward` saves for `backward`, in the call's state dtype."""
        ...

    def forward(self, call: Call, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(y [B, T, H, V], state [S, H, V, K], saved); `saved` may be empty unless `save`."""
        ...

    def backward(
        self, call: Call, saved: Tensor, dy: Tensor | None, dstate: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Gradients of r, w, k, v, a, b (in their dtypes) and of the initial state.

        At least one of dy and dstate is given; None means zeros.
        """
        ...


@runtime_checkable
class StepBackend(Protocol):
    """What a backend offers on top when it has a kernel for `wkv7_step_`."""

    def refuses_step(self, r: Tensor, v: Tensor, state: Tensor) -> str | None:
        """Why a token of r [B, H, K], v [B, H, V] on the pool `state` cannot run, or None."""
        ...

    def step(
        self, inputs: tuple[Tensor, ...], state: Tensor, decay: str, slots: Tensor | None
    ) -> Tensor:
        """One token (r, w, k, v, a, b): y [B, H, V]; rows of the pool `state` change in place."""
        ...


@runtime_checkable
class CompiledBackend(Protocol):
    """What a backend offers on top when it compiles kernels of its own."""

    def kernels(self) -> dict[str, str]:
        """For `rwkv7 doctor`: its compiler, where it keeps kernels, and which ones there are."""
        ...


def backend_names() -> tuple[str, ...]:
    """All backends, the preferred first."""
    return tuple(_TABLE)


@functools.cache
def get_backend(name: str) -> Backend:
    """The backend called `name`; ValueError lists the names there are."""
    if name not in _TABLE:
        raise ValueError(f"backend: expected one of {', '.join(_TABLE)}, found {name!r}")
    module, attribute = _TABLE[name].split(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend


def select(call: Call, name: str | None) -> Backend:
    """The named backend, or the first that accepts the call. ValueError says who refused, and why.

    A named backend that cannot run the call raises: it never falls back to another.
    """
    if name is not None:
        backend = get_backend(name)
        if reason := backend.refuses(call):
            raise ValueError(f"backend: {name!r} cannot run this call: {reason}")
        return backend
    for candidate in _TABLE:
        backend = get_backend(candidate)
        if backend.refuses(call) is None:
            return backend
    raise ValueError(f"backend: none accepts this call\n{explanation(call, None)}")


def select_step(r: Tensor, v: Tensor, state: Tensor) -> StepBackend | None:
    """The first backend with a step kernel that takes these tensors, or None: plain torch then."""
    for name in _TABLE:
        backend = _step_backend(name)
        if backend is not None and backend.refuses_step(r, v, state) is None:
            return backend
    return None


@functools.cache
def _step_backend(name: str) -> StepBackend | None:
    # Kept: to ask whether an object has a protocol takes Python longer than a small step's sums.
    backend = get_backend(name)
    return backend if isinstance(backend, StepBackend) else None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which backend a call gets, by which route, and why each other one is not used."""

    backend: str | None
    route: str | None
    refusals: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.route}" if self.backend else "no backend accepts it"]
        lines += [f"  not {name}: {reason}" for name, reason in self.refusals.items()]
        return "\n".join(lines)

    __repr__ = __str__


def explanation(call: Call, name: str | None) -> Explanation:
    """What `select` would do with the same arguments, without running or raising."""
    if name is not None:
        get_backend(name)  # raises for a name that is not in the table
    backends = [get_backend(candidate) for candidate in _TABLE]
    reasons = {backend.name: backend.refuses(call) for backend in backends}
    chosen: str | None
    if name is not None:
        chosen = name if reasons[name] is None else None
    else:
        chosen = next((n for n, reason in reasons.items() if reason is None), None)
    default = "another was named" if name else f"accepts it, but {chosen} is preferred"
    refusals = {n: reason or default for n, reason in reasons.items() if n != chosen}
    return Explanation(chosen, get_backend(chosen).route(call) if chosen else None, refusals)
