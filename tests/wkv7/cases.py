"""Calls of the operator that every backend must get right, and how they are judged.

A case is a recipe; `make_inputs` draws it in fp64 and rounds it to a dtype, so that a backend and
the oracle, the recurrence in fp64, see the same numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from rwkv7.wkv7 import wkv7
from rwkv7.wkv7.contract import DECAY_SCALE, Call, state_dtype
from rwkv7.wkv7.registry import backend_names, get_backend
from rwkv7.wkv7.tolerance import GRADIENTS, compare

STATES = ("none", "zero", "random")
THROUGH = ("y", "state", "both")  # what the loss reads
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (0, 1, 2, 15, 16, 17, 63, 64, 65, 200, 1000)
PACKED = (0, 1, 1, 34, 34, 35, 100, 164, 164)  # empty and one-token sequences among others


Operator = Callable[..., tuple[Tensor, Tensor]]


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
    wide_w: bool = False  # w in fp32 beside inputs of 16 bits

    def __str__(self) -> str:
        sizes = f"{self.B}x{self.T}x{self.H}x{self.K}x{self.V}"
        packed = "-packed" if self.offsets else ""
        wide = "-wide w" if self.wide_w else ""
        return f"{self.values}-{self.decay}-{sizes}{packed}-{self.state}-{self.through}{wide}"

    def dtypes(self, dtype: torch.dtype) -> list[torch.dtype]:
        """Of r, w, k, v, a, b and the state in a call whose inputs are `dtype`."""
        wide = self.wide_w and dtype.itemsize < 4
        return [dtype, torch.float32 if wide else dtype, *[dtype] * 4, state_dtype(dtype)]


# Fewer channels than a chunk has tokens: products cancel, and what was rounded before them shows.
FEW_CHANNELS = (
    Case(T=50, H=1, state="none"),
    Case(
        H=1, V=64, decay="log_bounded", through="y", values="decay one", offsets=(0, 12, 184, 184)
    ),
    Case(
        decay="log_bounded",
        state="zero",
        through="state",
        values="decay one",
        offsets=(0, 43, 43, 47, 163, 165, 165),
        wide_w=True,
    ),
)


@dataclass(frozen=True)
class Place:
    """A backend, and the device that it is tested on."""

    backend: str
    device: str = "cpu"

    def dtypes(self, case: Case) -> list[torch.dtype]:
        """The dtypes of inputs in which the backend takes the case there."""
        return [dtype for dtype in DTYPES if _accepts(self.backend, self.device, dtype, case)]

    def fit(self, case: Case) -> Case:
        """The case, with K = V = 64 where the backend takes no other sizes.

        Skips the test where it takes the case in no dtype (a form of the decay, say).
        """
        for fitting in (case, replace(case, K=64, V=64)):
            if self.dtypes(fitting):
                return fitting
        pytest.skip(f"{self.backend} takes no such call")

    def dtype(self, case: Case) -> torch.dtype:
        """One dtype for tests that need no more: fp32 where the backend takes it, else bf16."""
        return torch.float32 if torch.float32 in self.dtypes(case) else torch.bfloat16


def places() -> list:
    """Every backend on the CPU that runs there, and on a GPU (marked so) every one that is fast.

    The oracle is left out on the GPU: it is plain torch, and a launch for every token.
    """
    cpu = [name for name in backend_names() if _accepts(name, "cpu", torch.float32, Case())]
    fast = [name for name in backend_names() if name != "reference"]
    return [pytest.param(Place(name), id=name) for name in cpu] + [
        pytest.param(Place(name, "cuda"), id=f"{name}-cuda", marks=pytest.mark.gpu) for name in fast
    ]


def devices() -> list:
    """The CPU, and a GPU (marked so)."""
    return ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _accepts(backend: str, device: str, dtype: torch.dtype, case: Case) -> bool:
    key, value = (torch.zeros(1, 1, 1, N, dtype=dtype, device=device) for N in (case.K, case.V))
    call = Call(key, key, key, value, key, key, None, case.decay, None)
    return get_backend(backend).refuses(call) is None


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
        v = v * (32 if dtype == torch.float16 else 1e4)  # with 100, db leaves the range of fp16
    w = logit if case.decay == "logit" else -DECAY_SCALE * torch.sigmoid(logit)
    if case.values == "strong":  # decays without a floor, -50 and -inf among them
        w = -5 * uniform()
        w[uniform() < 0.05] = -50.0
        w[uniform() < 0.05] = -float("inf")
    state = torch.randn(S, case.H, case.V, case.K, generator=g, dtype=torch.float64)
    if case.state == "zero":
        state = torch.zeros_like(state)
    drawn = (r, w, k, v, -unit, unit * rate, state)
    return [x.to(kind) for x, kind in zip(drawn, case.dtypes(dtype), strict=True)]


def arguments(
    case: Case, inputs: list[Tensor], place: Place, dtype: torch.dtype
) -> tuple[list[Tensor], dict]:
    """Copies of the inputs as the case calls wkv7 with them in `dtype` at `place`, and options."""
    device = place.device
    cast = zip(inputs, case.dtypes(dtype), strict=True)
    given = [x.detach().to(device, kind, copy=True) for x, kind in cast]
    offsets = None
    if case.offsets is not None:
        offsets = torch.tensor(case.offsets, dtype=torch.int32, device=device)
    options = {"decay": case.decay, "cu_seqlens": offsets, "backend": place.backend}
    return given if case.state != "none" else given[:6], options


def evaluate(
    case: Case,
    inputs: list[Tensor],
    place: Place,
    dtype: torch.dtype,
    operator: Operator = wkv7,
) -> dict[str, Tensor]:
    """y, the final state and every gradient of the case, computed in `dtype` at `place`."""
    given, options = arguments(case, inputs, place, dtype)
    given = [x.requires_grad_() for x in given]
    y, state = operator(*given, **options)
    g = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=g, dtype=torch.float64).to(inputs[3].dtype)
    dstate = torch.randn(state.shape, generator=g, dtype=torch.float64).float()
    seeds = {"y": (y, dy), "state": (state, dstate)}
    chosen = seeds.values() if case.through == "both" else [seeds[case.through]]
    outputs, grads = zip(*((out, seed.to(out)) for out, seed in chosen), strict=True)
    found = torch.autograd.grad(outputs, given, grads, materialize_grads=True)
    return {"y": y.detach(), "state": state.detach(), **dict(zip(GRADIENTS, found, strict=False))}


@functools.lru_cache(maxsize=8)
def exact(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The case's results by the recurrence in fp64, on the CPU, of inputs rounded to `dtype`."""
    return evaluate(case, make_inputs(case, dtype), Place("reference"), torch.float64)


def failures(
    case: Case, place: Place, dtype: torch.dtype, operator: Operator = wkv7
) -> dict[str, str]:
    """What of a case is out of bounds against the recurrence in fp64; empty when all is well.

    Args:
        operator: called in the place of wkv7, with the same arguments.
    """
    found = evaluate(case, make_inputs(case, dtype), place, dtype, operator)
    measures = compare(found, exact(case, dtype), dtype)
    return {n: f"{m.error:.2e} > {m.bound:.0e}" for n, m in measures.items() if not m.ok}
