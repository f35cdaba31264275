"""Starting Triton's kernels, and compiling all that a call will need at the same time.

Triton compiles a kernel when it is first launched, one after the other, in seconds each. Here the
routes of a first call are gone through without launching, and what they would launch is compiled in
threads: Triton's passes run without the interpreter's lock, and assemblers are other processes.
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


@dataclass(frozen=True, slots=True)
class _Launch:
    kernel: Any
    grid: Grid
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def form(self) -> tuple[object, ...]:
        """Launches of one form run the same compiled kernel."""
        kinds = tuple([x.dtype if isinstance(x, torch.Tensor) else type(x) for x in self.arguments])
        return self.kernel, kinds, tuple(self.options.items())

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
    if _recorded.launches is None:
        kernel[grid](*arguments, **options)
    else:
        _recorded.launches.append(_Launch(kernel, grid, arguments, options))


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
    device, different = torch.cuda.current_device(), {x.form: x for x in launches}.values()
    with ThreadPoolExecutor(max(1, min(len(different), os.cpu_count() or 1))) as pool:
        for done in [pool.submit(x.compile, device) for x in different]:
            done.result()
