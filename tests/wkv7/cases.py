"""Calls of the operator that every backend must get right, and how they are judged.

A case is a recipe; `make_inputs` draws it in fp64 and rounds it to a dtype, so that a backend and
the oracle, the recurrence in fp64, see the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv7.wkv7 import wkv7
from rwkv7.wkv7.contract import DECAY_SCALE, state_dtype
from rwkv7.wkv7.registry import backend_names, get_backend
from rwkv7.wkv7.tolerance import GRADIENTS, compare

STATES = ("none", "zero", "random")
THROUGH = ("y", "state", "both")  # what the loss reads
LENGTHS = (0, 1, 2, 15, 16, 17, 63, 64, 65, 200, 1000)
PACKED = (0, 1, 1, 34, 34, 35, 100, 164, 164)  # empty and one-token sequences among others


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: sizes, state, decay form, what its values are like, what the loss reads."""

    T: int = 65
    B: int = 2
    H: int = 2
    K: int = 16
    V: int = 16
    decay: str = "logit"
    state: str = "random"
    through: str = "both"
    values: str = "model"
    offsets: tuple[int, ...] | None = None

    def __str__(self) -> str:
        sizes = f"{self.B}x{self.T}x{self.H}x{self.K}x{self.V}"
        packed = "-packed" if self.offsets else ""
        return f"{self.values}-{self.decay}-{sizes}{packed}-{self.state}-{self.through}"


def backends() -> list[str]:
    """Every backend of the table that can run a plain call on this machine."""
    from rwkv7.wkv7.contract import Call

    x = torch.zeros(1, 1, 1, 16)
    call = Call(x, x, x, x, x, x, None, "logit", None)
    return [name for name in backend_names() if get_backend(name).refuses(call) is None]


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """r, w, k, v, a, b and the state of a case, drawn as a model's would be, rounded to `dtype`."""
    g = torch.Generator().manual_seed(seed)
    B, S = (1, len(case.offsets) - 1) if case.offsets else (case.B, case.B)
    T = case.offsets[-1] if case.offsets else case.T

    def normal(size: int) -> Tensor:
        return torch.randn(B, T, case.H, size, generator=g, dtype=torch.float64)

    def uniform() -> Tensor:
        return torch.rand(B, T, case.H, case.K, generator=g, dtype=torch.float64)

    r, k, v, logit = normal(case.K), normal(case.K), normal(case.V), uniform() * 6 - 6
    unit, rate = torch.nn.functional.normalize(normal(case.K), dim=-1), uniform()
    if case.values == "same key":
        unit = unit[:, :1].expand_as(unit) + 0.01 * normal(case.K)
        unit = torch.nn.functional.normalize(unit, dim=-1)
        rate, logit = torch.full_like(rate, 0.98), torch.full_like(logit, -8.0)
    elif case.values == "decay floor":
        logit = torch.full_like(logit, 12.0)
    elif case.values == "decay one":
        logit = torch.full_like(logit, -30.0)
    elif case.values == "large v":
        v = v * (100 if dtype == torch.float16 else 1e4)
    w = logit if case.decay == "logit" else -DECAY_SCALE * torch.sigmoid(logit)
    if case.values == "strong":  # decays without a floor, -50 and -inf among them
        w = -5 * uniform()
        w[uniform() < 0.05] = -50.0
        w[uniform() < 0.05] = -float("inf")
    state = torch.randn(S, case.H, case.V, case.K, generator=g, dtype=torch.float64)
    if case.state == "zero":
        state = torch.zeros_like(state)
    return [x.to(dtype) for x in (r, w, k, v, -unit, unit * rate)] + [state.to(state_dtype(dtype))]


def evaluate(
    case: Case, inputs: list[Tensor], backend: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """y, the final state and every gradient of the case, computed in `dtype` by `backend`."""
    arithmetic = state_dtype(dtype)
    cast = [x.to(dtype) for x in inputs[:6]] + [inputs[6].to(arithmetic)]
    leaves = [x.detach().clone().requires_grad_() for x in cast]
    given = leaves if case.state != "none" else leaves[:6]
    offsets = None if case.offsets is None else torch.tensor(case.offsets, dtype=torch.int32)
    y, state = wkv7(*given, decay=case.decay, cu_seqlens=offsets, backend=backend)
    g = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=g, dtype=torch.float64).to(inputs[3].dtype)
    dstate = torch.randn(state.shape, generator=g, dtype=torch.float64).float()
    seeds = {"y": (y, dy), "state": (state, dstate)}
    chosen = seeds.values() if case.through == "both" else [seeds[case.through]]
    outputs, grads = zip(*((out, seed.to(out.dtype)) for out, seed in chosen), strict=True)
    found = torch.autograd.grad(outputs, given, grads, materialize_grads=True)
    return {"y": y.detach(), "state": state.detach(), **dict(zip(GRADIENTS, found, strict=False))}


def failures(case: Case, backend: str, dtype: torch.dtype) -> dict[str, str]:
    """What of a case is out of bounds against the recurrence in fp64; empty when all is well."""
    inputs = make_inputs(case, dtype)
    found = evaluate(case, inputs, backend, dtype)
    reference = evaluate(case, inputs, "reference", torch.float64)
    measures = compare(found, reference, dtype)
    return {n: f"{m.error:.2e} > {m.bound:.0e}" for n, m in measures.items() if not m.ok}
