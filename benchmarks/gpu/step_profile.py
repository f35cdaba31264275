"""Where a training step's time goes: by kernel, and by the module and operation that asked for it.

Kernels of the backward pass are put down to the operation of the forward pass they belong to, which
the profiler's sequence numbers tell.
"""

from __future__ import annotations

import bisect
import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from rwkv7.benchmark.clock import kernels, wait

TOP = 15
_MARK = "in:"
_BACKWARD = "autograd::engine::evaluate_function: "


def regions(model: nn.Module, step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """The TOP kernels of a step, and the TOP pairs of (module, operation) that launched them."""
    found = {"kernels": kernels(step, device)}
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with _marked(model), profile(activities=activities) as profiler:
        step()
        wait(device)
    places = _places(list(profiler.events() or ()), gpu)
    total = sum(places.values())
    rows = [
        {"part": f"{where}: {operation}", "ms": ms, "share": ms / total}
        for (where, operation), ms in sorted(places.items(), key=lambda item: -item[1])
    ]
    by_module: dict[str, float] = defaultdict(float)
    for (where, _), ms in places.items():
        by_module[where] += ms
    _show(found["kernels"], rows)
    modules = dict(sorted(by_module.items(), key=lambda item: -item[1]))
    return {**found, "rows": rows, "modules": modules, "step_ms": total}


@contextlib.contextmanager
def _marked(model: nn.Module) -> Iterator[None]:
    """Every module's forward pass carries its kind's name in the profile while this lasts."""
    open_marks: list[Any] = []

    def enter(module: nn.Module, _: Any) -> None:
        open_marks.append(record_function(_MARK + type(module).__name__))
        open_marks[-1].__enter__()

    def leave(_: nn.Module, __: Any, ___: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    hooks = []
    for module in model.modules():
        # A layer norm with hooks is run apart from what follows it.
        if module is not model and not isinstance(module, (nn.ModuleList, nn.LayerNorm)):
            hooks += [
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave),
            ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _places(events: list[Any], gpu: bool) -> dict[tuple[str, str], float]:
    """(module, operation of the forward pass) -> milliseconds, its share of going back included."""
    forward: dict[int, tuple[str, str]] = {}
    for event in events:
        backwards = any(e.name.startswith(_BACKWARD) for e in _up(event))
        if event.sequence_nr >= 0 and not backwards and not event.name.startswith(_MARK):
            # An operation has the number of the next node; the last one with it made the node.
            forward[event.sequence_nr] = _module(event), _operation(event)
    numbers = sorted(forward)
    found: dict[tuple[str, str], float] = defaultdict(float)
    # Marks and other annotations may be among the kernels, over the time of all those inside them.
    names = {event.name for event in events if event.device_type == DeviceType.CPU}
    for event in events:
        spent = event.self_cpu_time_total
        if gpu:
            spent = sum(kernel.duration for kernel in event.kernels if kernel.name not in names)
        if spent <= 0 or event.device_type != DeviceType.CPU:
            continue
        found[_place(event, forward, numbers)] += spent / 1000
    return found


def _place(event: Any, forward: dict[int, tuple[str, str]], numbers: list[int]) -> tuple[str, str]:
    node = next((e for e in _up(event) if e.name.startswith(_BACKWARD)), None)
    if node is None:
        return _module(event), _operation(event)
    name = node.name.removeprefix(_BACKWARD)
    if node.sequence_nr in forward:
        return forward[node.sequence_nr]
    # A node that Python made has a number between those of the operations around it.
    before = bisect.bisect(numbers, node.sequence_nr) - 1
    where = forward[numbers[before]][0] if before >= 0 and node.sequence_nr >= 0 else "backward"
    return where, name


def _up(event: Any) -> Iterator[Any]:
    """The event and those it happened in, innermost first."""
    while event is not None:
        yield event
        event = event.cpu_parent


def _module(event: Any) -> str:
    marks = [e.name.removeprefix(_MARK) for e in _up(event) if e.name.startswith(_MARK)]
    return " in ".join(marks[:2]) if marks else "outside"


def _operation(event: Any) -> str:
    """The outermost operation inside the innermost module: what its code called."""
    inside = event.name
    for outer in _up(event):
        if outer.name.startswith(_MARK):
            break
        inside = outer.name
    return inside.removeprefix(_MARK)


def _show(found: list[dict[str, float | str]], rows: list[dict[str, Any]]) -> None:
    print(f"{'ms':>9} {'calls':>6}  kernel")
    for kernel in found[:TOP]:
        print(f"{kernel['ms']:9.3f} {kernel['calls']:6.0f}  {str(kernel['kernel'])[:110]}")
    print(f"{'ms':>9} {'share':>6}  module, operation (with its backward pass)")
    for row in rows[: 2 * TOP]:
        print(f"{row['ms']:9.3f} {row['share']:6.1%}  {row['part']}")
