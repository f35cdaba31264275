"""How one backend does on one shape: seconds, peak memory, and the errors beside them.

Which numbers count as right is `wkv7.tolerance`'s affair; showing them is that of `table`.
"""

from __future__ import annotations

import functools
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rwkv7.verification.problem import Operator, Problem, Sizes
from rwkv7.wkv7 import explain, wkv7
from rwkv7.wkv7.contract import log_decay
from rwkv7.wkv7.registry import backend_names
from rwkv7.wkv7.tolerance import compare

BASELINE = "token loop"
_BUDGET = 3.0  # seconds for the runs of one measurement, after which no other is begun
_RUNS = range(3, 21)  # how many runs at least and at most


@dataclass(frozen=True, slots=True)
class Shape:
    """B sequences of T tokens, H heads of N key and N value channels."""

    B: int
    T: int
    H: int
    N: int

    @staticmethod
    def parse(text: str) -> Shape:
        """The shape that "2x1024x4x64" names; ValueError for anything else."""
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", text):
            raise ValueError(f"shape: expected BxTxHxN such as 2x1024x4x64, found {text!r}")
        return Shape(*map(int, text.split("x")))

    def __str__(self) -> str:
        return f"{self.B}x{self.T}x{self.H}x{self.N}"


@dataclass(slots=True)
class Result:
    """The figures of one subject; None where it could not be measured (`note` says why)."""

    subject: str
    route: str = ""
    forward_s: float | None = None  # no gradient wanted
    training_s: float | None = None  # forward and backward, for y and the final state
    forward_mib: float | None = None  # peak memory beyond the inputs
    training_mib: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    ok: bool | None = None  # every error within its bound
    note: str = ""


def default_shapes(device: torch.device) -> list[Shape]:
    """What is timed when nothing is asked for: the headline shape of the device first."""
    if device.type == "cuda":
        return [Shape(8, 1024, 12, 64), Shape(1, 4096, 32, 64)]
    return [Shape(2, 1024, 4, 64)]


@dataclass(frozen=True, slots=True)
class Measurement:
    """A result that is still to be measured, by `run`."""

    subject: str
    run: Callable[[], Result] = field(repr=False)


def measurements(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Measurement]:
    """The baseline and every backend, to be measured one after the other.

    The baseline is a tight token loop: two einsums a token, autograd, in float32 (float64 for
    float64 inputs). A backend that refuses, and one that runs out of memory, come with a note.
    """
    sample = Sample(Problem(Sizes(shape.B, shape.T, shape.H, shape.N, shape.N), dtype))
    baseline = Result(BASELINE, "two einsums a token")
    plan = [Measurement(BASELINE, lambda: _measured(baseline, _token_loop, sample, device))]
    for name in backend_names():
        plan.append(Measurement(name, functools.partial(_backend, name, sample, device)))
    return plan


def _backend(name: str, sample: Sample, device: torch.device) -> Result:
    explanation = explain(*(x.to(device) for x in sample.problem.inputs), backend=name)
    if explanation.backend is None:
        return Result(name, note=explanation.refusals[name])
    operator = functools.partial(wkv7, backend=name)
    return _measured(Result(name, explanation.route or ""), operator, sample, device)


class Sample:
    """A problem whose right results are known for its first sequence and two heads.

    Heads and sequences do not feel each other, so that this judges the whole call, while a loop
    in float64 over all of it would take minutes and more memory than there is.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        sizes = problem.sizes
        self._part = Problem(Sizes(1, sizes.T, min(2, sizes.H), sizes.K, sizes.V), problem.dtype)
        self._part.inputs = [x[:1, :, :2] for x in problem.inputs]
        self._part.dy = problem.dy[:1, :, :2]
        self._part.dfinal = problem.dfinal[:1, :2]
        self._part.random = problem.random[:1, :2]

    def errors(self, found: dict[str, Tensor]) -> tuple[dict[str, float], bool]:
        """The errors by name, and whether all are within their bounds."""
        part = {
            name: x[:1, :2] if name in ("state", "dstate") else x[:1, :, :2]
            for name, x in found.items()
        }
        measures = compare(part, self._part.reference("random"), self.problem.dtype)
        errors = {name: measure.error for name, measure in measures.items()}
        return errors, all(measure.ok for measure in measures.values())


def _measured(result: Result, operator: Operator, sample: Sample, device: torch.device) -> Result:
    problem = sample.problem.to(device)

    def forward() -> dict[str, Tensor]:
        with torch.no_grad():
            return problem.run(operator, "random", device, gradients=False)

    def training() -> dict[str, Tensor]:
        return problem.run(operator, "random", device)

    try:
        result.errors, result.ok = sample.errors(training())
        result.forward_s = seconds(forward, device)
        result.training_s = seconds(training, device)
        result.forward_mib = peak_mib(forward, device)
        result.training_mib = peak_mib(training, device)
    except torch.OutOfMemoryError:
        result.note = "out of memory"
    return result


def _token_loop(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    dtype, S = state.dtype, state
    d = log_decay(w, "logit", dtype).exp()
    r, k, wide_v, a, b = (x.to(dtype) for x in (r, k, v, a, b))
    ys = []
    for t in range(r.shape[1]):
        Sa = torch.einsum("bhvk,bhk->bhv", S, a[:, t])
        S = S * d[:, t, :, None, :] + Sa[..., None] * b[:, t, :, None, :]
        S = S + wide_v[:, t, :, :, None] * k[:, t, :, None, :]
        ys.append(torch.einsum("bhvk,bhk->bhv", S, r[:, t]))
    return torch.stack(ys, 1).to(v.dtype), S


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """The median time of several runs, after one that is not counted."""
    _timed(function, device)
    times: list[float] = []
    while len(times) < _RUNS.start or (len(times) < _RUNS.stop - 1 and sum(times) < _BUDGET):
        times.append(_timed(function, device))
    return statistics.median(times)


def _timed(function: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_mib(function: Callable[[], object], device: torch.device) -> float | None:
    """The most memory in use at once during one run beyond what was before, in MiB, if known."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return _cpu_peak_mib(function) if device.type == "cpu" else None


def _cpu_peak_mib(function: Callable[[], object]) -> float | None:
    # torch keeps no peak for the CPU; its profiler sees every allocation. The list of them is not
    # a settled interface, and without it there is no figure.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells stderr of every start and stop
    try:
        from torch._C._profiler import _EventType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            kept = function()
        del kept
        assert profiler.profiler is not None
        waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
        changes = []
        while waiting:
            event = waiting.pop()
            waiting += event.children
            if event.typed[0] == _EventType.Allocation:
                changes.append((event.start_time_ns, event.typed[1].alloc_size))
    except (ImportError, AttributeError):
        return None
    live = peak = 0
    for _, size in sorted(changes):
        live += size
        peak = max(peak, live)
    return peak / 2**20
