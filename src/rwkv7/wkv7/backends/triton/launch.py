"""Starting Triton's kernels, and compiling all that a call will need at the same time.

Triton compiles a kernel when it is first launched, one after the other, in seconds each. Here the
routes of a first call are gone through without launching, and what they would launch is compiled in
threads: Triton's passes run without the interpreter's lock, and assemblers are other processes.

A compiled kernel is kept and started itself from then on: Triton's way to it through the function
takes 23 to 28 µs of the host for some twenty-five arguments, this one 14 to 16 (Triton 3.6).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

Grid = tuple[int, ...]
# Launches of one form run the same compiled kernel: kept with the constants that it is handed.
Form = tuple[object, ...]
_compiled: dict[Form, tuple[Any, tuple[Any, ...]]] = {}


@dataclass(frozen=True, slots=True)
class _Launch:
    kernel: Any
    grid: Grid
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def compile(self, device: int) -> None:
        """As the launch would; the subscript also makes what hands the arguments over."""
        with torch.cuda.device(device):  # a new thread's is 0
            self.kernel.warmup(*self.arguments, grid=self.grid, **self.options)[self.grid]


class _Recorded(threading.local):
    """Launches of this thread that are recorded instead of started; None: they are started."""

    launches: list[_Launch] | None = None


_recorded = _Recorded()


def start(kernel: Any, grid: Grid, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Launch a kernel on the current stream.

    Args:
        kernel: what `triton.jit` made.
        options: its constants, and how it is compiled and launched, by name.
    """
    if _recorded.launches is not None:
        _recorded.launches.append(_Launch(kernel, grid, arguments, options))
        return
    form = _form(kernel, arguments, options)
    if (found := _compiled.get(form)) is not None:
        compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*arguments, *constants)
    elif (compiled := kernel[grid](*arguments, **options)) is not None:  # an interpreter's is
        _compiled[form] = compiled, tuple(options[x] for x in kernel.arg_names[len(arguments) :])


def _form(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Form:
    """All that Triton compiles for: dtypes, addresses on 16 bytes, the width of numbers, options.

    Numbers are not compiled in: kernels name them in `do_not_specialize`.
    """
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    return kernel, device, tuple([_kind(x) for x in arguments]), tuple(options.items())


def _kind(x: torch.Tensor | int | None) -> object:
    if isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    return x if x is None else x.bit_length() < 32


@contextlib.contextmanager
def compiling_together() -> Iterator[None]:
    """Inside, `start` starts nothing; at the end all its kernels are compiled at the same time.

    Raises:
        Exception: Triton's own, of a kernel that does not compile.
    """
    launches: list[_Launch] = []
    _recorded.launches = launches
    try:
        yield
    finally:
        _recorded.launches = None
    device = torch.cuda.current_device()
    different = {_form(x.kernel, x.arguments, x.options): x for x in launches}.values()
    with ThreadPoolExecutor(max(1, min(len(different), os.cpu_count() or 1))) as pool:
        for done in [pool.submit(x.compile, device) for x in different]:
            done.result()
