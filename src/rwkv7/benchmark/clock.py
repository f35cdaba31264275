"""How long a call takes, how much memory it adds, and which kernels it spends its time in."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch

_BUDGET = 3.0  # seconds for the runs of one measurement, after which no other is begun
_RUNS = range(3, 21)  # how many runs at least and at most
_STRETCH = 0.02  # seconds of work between two readings of a GPU's clock, so that it is kept busy
_MOST_CALLS = 20
_PROFILED_CALLS = 3


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """The median time of one call over several runs, after two calls that are not counted.

    On a GPU a run is several calls in a row between two events, so that the host works ahead as
    it does in a program; elsewhere a run is one call.
    """
    _run(function, device, 1)
    once = _run(function, device, 1)
    calls = 1
    if device.type == "cuda":
        calls = max(1, min(_MOST_CALLS, round(_STRETCH / max(once, 1e-6))))
    times: list[float] = []
    spent = 0.0
    while len(times) < _RUNS.start or (len(times) < _RUNS.stop - 1 and spent < _BUDGET):
        spent += (taken := _run(function, device, calls))
        times.append(taken / calls)
    return statistics.median(times)


def first_call(function: Callable[[], object], device: torch.device) -> float:
    """The wall-clock time of one call, compiling and tuning included."""
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def _run(function: Callable[[], object], device: torch.device, calls: int) -> float:
    wait(device)
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1000
    began = time.perf_counter()
    for _ in range(calls):
        function()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def kernels(function: Callable[[], object], device: torch.device) -> list[dict[str, float | str]]:
    """The kernels of one call, the longest first: name, calls and milliseconds a call of it.

    On the CPU: torch's operations, their own time.
    """
    from torch.profiler import ProfilerActivity, profile

    gpu = device.type == "cuda"
    _quiet()
    function()
    wait(device)
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(_PROFILED_CALLS):
            function()
        wait(device)
    found: list[dict[str, float | str]] = []
    for event in profiler.key_averages():
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        if spent > 0:
            calls, ms = event.count / _PROFILED_CALLS, spent / _PROFILED_CALLS / 1000
            found.append({"kernel": event.key, "calls": calls, "ms": ms})
    return sorted(found, key=lambda kernel: -float(kernel["ms"]))


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
    _quiet()
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


def _quiet() -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells stderr of every start and stop
