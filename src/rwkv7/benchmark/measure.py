"""The measurements: which subjects on which sample, and what is kept of each.

The clock is in `clock`, the errors are a Judge's (`sample`); `table` shows the figures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import clock
from .sample import Judge, Sample, Shape
from .subjects import Prepared, Subject

WORKS = ("operator", "repeated key", "decoding")
_APART = 2**28  # bytes of state between two visits of one pool: more than a card's cache holds
_MOST_POOLS = 64


@dataclass(slots=True)
class Result:
    """The figures of one subject; None where it could not be measured (`note` says why).

    In decoding, `forward_s` is one step and `training_s` is None.
    """

    subject: str
    peer: bool = False
    route: str = ""
    first_call_s: float | None = None  # wall clock, forward and backward, compiling included
    forward_s: float | None = None  # no gradient wanted
    training_s: float | None = None  # forward and backward, for y and the final state
    forward_mib: float | None = None  # peak memory beyond the inputs and incoming gradients
    training_mib: float | None = None
    copy_share: float | None = None  # of the speed at which the device copies, in decoding
    errors: dict[str, float] = field(default_factory=dict)
    ok: bool | None = None  # every error within its bound
    note: str = ""
    kernels: list[dict[str, float | str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Measurement:
    """A result that is still to be measured, by `run`."""

    subject: str
    run: Callable[[], Result] = field(repr=False)


def default_shapes(work: str, device: torch.device, against: bool = False) -> list[Shape]:
    """What is measured when nothing is asked for; `against` other projects' kernels, or alone."""
    gpu = device.type == "cuda"
    if work == "repeated key":
        return [Shape(2, 256, 4, 64)]
    if work == "decoding":
        # The largest first: a peer that tunes itself on its first call does so where it counts.
        return [Shape(B, 1, 64, 64) for B in ((1024, 256, 64, 16, 1) if gpu else (16, 1))]
    if not gpu:
        return [Shape(2, 1024, 4, 64)]
    if not against:
        return [Shape(8, 1024, 12, 64), Shape(1, 4096, 32, 64)]
    # Many heads, few, one sequence, a long one; N = 128; packed; a T that no chunk divides.
    texts = "8x4096x64x64 8x4096x12x64 1x8192x32x64 1x65536x32x64 8x4096x32x128"
    return [Shape.parse(text) for text in f"{texts} 1x32768x64x64/16 8x4095x64x64".split()]


def measurements(
    work: str,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    subjects: Sequence[Subject],
    *,
    profile: bool = False,
) -> list[Measurement]:
    """What there is to measure for one of WORKS, one subject after the other.

    A subject that refuses, fails or runs out of memory comes with a note. `profile` adds the
    kernels of a forward and backward (in decoding: of a step).
    """
    if work == "decoding":
        if shape.T != 1 or shape.S:
            raise ValueError(f"shape: expected T = 1 for decoding, found {shape}")
        subjects = [subject for subject in subjects if subject.steps is not None]

    @functools.cache
    def sample() -> tuple[Sample, Judge]:
        made = Sample(shape, dtype, device, repeated_key=work == "repeated key")
        return made, Judge(made.beginning())

    measured = {"operator": _timed, "repeated key": _judged, "decoding": _stepped}[work]
    return [
        Measurement(subject.name, functools.partial(_kept, subject, sample, measured, profile))
        for subject in subjects
    ]


def _kept(
    subject: Subject,
    sample: Callable[[], tuple[Sample, Judge]],
    measured: Callable[[Result, Subject, Sample, Judge, bool], None],
    profile: bool,
) -> Result:
    """What `measured` filled in before it ended, however it ended."""
    result = Result(subject.name, subject.peer)
    inputs, judge = sample()
    reason = subject.refuses(inputs)
    if reason is not None:
        result.note = reason
        return result
    result.route = subject.route(inputs)
    try:
        measured(result, subject, inputs, judge, profile)
    except torch.OutOfMemoryError:
        result.note = "out of memory"
    except Exception as error:  # one that fails has failed; the others are still wanted
        result.note = f"failed: {type(error).__name__}: {' '.join(str(error).split())}"[:300]
        result.ok = False
    if inputs.device.type == "cuda":
        torch.cuda.empty_cache()  # the next one starts from the same
    return result


def _timed(result: Result, subject: Subject, sample: Sample, judge: Judge, profile: bool) -> None:
    prepared, device = subject.prepare(sample), sample.device
    result.first_call_s = clock.first_call(prepared.training, device)
    beginning = sample.beginning()
    judged = prepared if beginning is sample else subject.prepare(beginning)
    result.errors, result.ok = judge.errors(judged.training(), subject.form)
    del judged, beginning
    result.forward_s = clock.seconds(prepared.forward, device)
    result.training_s = clock.seconds(prepared.training, device)
    result.forward_mib = clock.peak_mib(prepared.forward, device)
    result.training_mib = clock.peak_mib(prepared.training, device)
    if profile:
        result.kernels = clock.kernels(prepared.training, device)


def _judged(result: Result, subject: Subject, sample: Sample, judge: Judge, profile: bool) -> None:
    prepared: Prepared = subject.prepare(sample.beginning())
    result.errors, result.ok = judge.errors(prepared.training(), subject.form)


def _stepped(result: Result, subject: Subject, sample: Sample, judge: Judge, profile: bool) -> None:
    """One step for all sequences, in a pool that has left the cache since its last one.

    So it is in a model, where every layer has a pool of its own. On a GPU all pools' steps are one
    CUDA graph, as decoding at full speed needs it, and the share is that of the kernels alone.
    """
    assert subject.steps is not None
    device, state = sample.device, sample.state
    once = subject.steps(sample, [state.clone()])
    found: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        result.first_call_s = clock.first_call(lambda: found.append(once()), device)
        y, final = found.pop()
        result.errors, result.ok = judge.errors({"y": y, "state": final}, subject.form)
        size = state.numel() * state.element_size()
        count = max(1, min(_MOST_POOLS, _APART // size))
        run = subject.steps(sample, [state.clone() for _ in range(count)])
        result.forward_s = clock.seconds(_graphed(run, device), device) / count
        token = sum(x.numel() * x.element_size() for x in (*sample.inputs, sample.dy))
        result.copy_share = (2 * size + token) / result.forward_s / _copy_speed(device)
        if profile:
            result.kernels = clock.kernels(once, device)


def _graphed(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    if device.type != "cuda":
        return run
    run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@functools.cache
def _copy_speed(device: torch.device) -> float:
    """Bytes read and written a second when the device copies a large tensor."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return moved / clock.seconds(lambda: target.copy_(source), device)
