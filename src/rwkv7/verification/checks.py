"""Every backend that can run here against the recurrence in float64, and what a mistake costs.

Other projects' kernels and packages are in `peers`; tables and plots are made elsewhere.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rwkv7.wkv7 import wkv7, wkv7_step_
from rwkv7.wkv7.contract import Call
from rwkv7.wkv7.registry import backend_names, get_backend
from rwkv7.wkv7.tolerance import BOUNDS, Measure, compare

from .problem import STATES, Operator, Problem, Sizes

__all__ = ["Check", "Refusal", "Row", "Sizes", "backend_checks"]

TRANSPOSED = "state transposed"


@dataclass(frozen=True, slots=True)
class Row:
    """The errors of one subject for one dtype and initial state, each beside its bound."""

    subject: str  # a backend's name, or a peer's
    device: str
    dtype: torch.dtype
    state: str
    measures: Mapping[str, Measure]
    mistake: bool = False  # made on purpose: right is when the comparison sees it
    crash: str = ""  # what the subject raised instead of giving results
    peer: bool = False  # another project's: shown beside the bounds, which are ours to keep

    @property
    def ok(self) -> bool:
        """Whether every error is within its bound; for a mistake, whether y and state are not."""
        if self.crash:
            return False
        if self.mistake:
            return not any(self.measures[name].ok for name in ("y", "state"))
        return all(measure.ok for measure in self.measures.values())


@dataclass(frozen=True, slots=True)
class Check:
    """A row that is still to be found out, by `run`."""

    subject: str
    device: str
    run: Callable[[], list[Row]] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A subject that cannot run here, and why."""

    subject: str
    reason: str


def backend_checks(sizes: Sizes, devices: list[torch.device]) -> tuple[list[Check], list[Refusal]]:
    """All checks of this library's own backends on these devices, and who refuses.

    The last check is a mistake made on purpose: the random state handed over transposed.
    """
    checks, refusals = [], []
    problems = {dtype: Problem(sizes, dtype) for dtype in BOUNDS}
    for name in backend_names():
        operator = functools.partial(wkv7, backend=name)
        places = list(itertools.product(devices, problems.values()))
        reasons = [_refusal(name, problem, device) for device, problem in places]
        for (device, problem), reason in zip(places, reasons, strict=True):
            if reason is None:
                checks += [operator_check(name, problem, kind, device, operator) for kind in STATES]
        if None not in reasons:
            refusals.append(Refusal(name, "; ".join(dict.fromkeys(map(str, reasons)))))
    for device in devices:
        for problem in problems.values():
            if _can_hold(device, problem.dtype):
                checks += [
                    operator_check("wkv7_step_", problem, kind, device, _by_steps, False)
                    for kind in STATES
                ]
    exact = problems[torch.float32]
    checks.append(operator_check(TRANSPOSED, exact, "random", devices[0], _transposed))
    return checks, refusals


def operator_check(
    subject: str,
    problem: Problem,
    kind: str,
    device: torch.device,
    operator: Operator,
    gradients: bool = True,
) -> Check:
    """The check of one operator on one problem with one kind of initial state."""

    def run() -> list[Row]:
        row = functools.partial(Row, subject, device.type, problem.dtype, kind)
        try:
            found = problem.run(operator, kind, device, gradients=gradients)
        except Exception as error:  # one that crashes has failed; the others are still wanted
            return [row({}, crash=f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])]
        measures = compare(found, problem.reference(kind), problem.dtype)
        return [row(measures, mistake=subject == TRANSPOSED)]

    return Check(subject, device.type, run)


def _can_hold(device: torch.device, dtype: torch.dtype) -> bool:
    return not (device.type == "mps" and dtype == torch.float64)


def _refusal(name: str, problem: Problem, device: torch.device) -> str | None:
    if not _can_hold(device, problem.dtype):
        return f"{device.type} has no {problem.dtype}"
    r, w, k, v, a, b = (x.to(device) for x in problem.inputs)
    return get_backend(name).refuses(Call(r, w, k, v, a, b, None, "logit", None))


def _transposed(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    *inputs, state = arguments
    r, w, k, v, a, b = inputs
    return wkv7(r, w, k, v, a, b, state.transpose(-1, -2))


def _by_steps(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    pool = Call(r, w, k, v, a, b, state, "logit", None).initial_state().clone()
    ys = [
        wkv7_step_(r[:, t], w[:, t], k[:, t], v[:, t], a[:, t], b[:, t], pool)
        for t in range(r.shape[1])
    ]
    return torch.stack(ys, 1), pool
