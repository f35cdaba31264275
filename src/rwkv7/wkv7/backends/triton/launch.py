"""Starting Triton's kernels, and compiling all that a call will need at the same time.

Triton compiles a kernel when it is first launched, one after the other, in seconds each. Here the
routes of a first call are gone through without launching, and what they would launch is compiled in
threads: Triton's passes run without the interpreter's lock, and assemblers are other processes.

A compiled kernel is kept and started itself from then on, with addresses in the place of tensors:
Triton's own way asks each argument again what it is, and the driver whose memory that is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, ...]
# Launches of a variant that are of one form run the same compiled kernel.
Form = tuple[object, ...]


class Part:
    """Some elements of a flat tensor's memory, handed to kernels as tensors are.

    To make a tensor of each takes the host longer than a launch; here only Triton's own way to a
    kernel needs one.
    """

    __slots__ = ("_begin", "_count", "_memory", "address", "dtype", "kind")

    def __init__(
        self, memory: Tensor, address: int, dtype: torch.dtype, begin: int, count: int
    ) -> None:
        """`count` elements of `dtype` from byte `begin` of `memory` on, which is at `address`."""
        self._memory, self._begin, self._count = memory, begin, count
        self.dtype, self.address = dtype, address + begin
        self.kind = _kind(dtype, self.address)

    def tensor(self) -> Tensor:
        """The same memory as a flat tensor."""
        end = self._begin + self._count * self.dtype.itemsize
        return self._memory.view(torch.uint8)[self._begin : end].view(self.dtype)


Memory = Tensor | Part
Arguments = tuple[Memory | int | None, ...]
Addresses = list[int | None]


class Variant:
    """A kernel, its constants, and how it is compiled and launched: made once for many calls.

    Args:
        kernel: what `triton.jit` made.
        options: as Triton takes them, by name.
    """

    __slots__ = ("compiled", "kernel", "options")

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel, self.options = kernel, options
        self.compiled: dict[Form, _Compiled] = {}


class _Compiled:
    """A kernel that Triton has compiled and loaded, with the constants that it is handed."""

    __slots__ = ("_constants", "_function", "_kernel", "_metadata", "_run")

    def __init__(self, kernel: Any, constants: tuple[Any, ...]) -> None:
        self._kernel, self._constants = kernel, constants
        self._run, self._function = kernel.run, kernel.function
        self._metadata = kernel.packed_metadata

    def start(self, grid: Grid, arguments: Arguments, addresses: Addresses, device: int) -> None:
        x, y, z = (*grid, 1, 1)[:3]
        if _is_watched():
            self._kernel[x, y, z](*_tensors(arguments), *self._constants)
            return
        # As a number: torch.cuda.current_stream() makes an object.
        stream = torch._C._cuda_getCurrentRawStream(device)
        nobody = None, None, None  # what is told to hooks, and those before and after
        self._run(
            x, y, z, stream, self._function, self._metadata, *nobody, *addresses, *self._constants
        )


@dataclass(frozen=True, slots=True)
class _Launch:
    variant: Variant
    grid: Grid
    arguments: Arguments

    def form(self) -> Form:
        """Equal for launches of the same compiled kernel."""
        return self.variant, _seen(self.arguments)[0]

    def compile(self, device: int) -> None:
        """As the launch would; the subscript also makes what hands the arguments over."""
        kernel, arguments = self.variant.kernel, _tensors(self.arguments)
        with torch.cuda.device(device):  # a new thread's is 0
            kernel.warmup(*arguments, grid=self.grid, **self.variant.options)[self.grid]


class _Recorded(threading.local):
    """Launches of this thread that are recorded instead of started; None: they are started."""

    launches: list[_Launch] | None = None


_recorded = _Recorded()


def start(variant: Variant, grid: Grid, arguments: Arguments) -> None:
    """Launch a kernel on the current stream."""
    if _recorded.launches is not None:
        _recorded.launches.append(_Launch(variant, grid, arguments))
        return
    if torch.version.hip is not None:
        # There Triton also compiles for arguments of less than 2 GB, which no form tells.
        variant.kernel[grid](*_tensors(arguments), **variant.options)
        return
    kinds, addresses = _seen(arguments)
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
    form = device, kinds
    if (found := variant.compiled.get(form)) is not None:
        found.start(grid, arguments, addresses, device)
        return
    kernel, options = variant.kernel, variant.options
    compiled = kernel[grid](*_tensors(arguments), **options)
    if compiled is not None:  # an interpreter's is
        constants = tuple(options[x] for x in kernel.arg_names[len(arguments) :])
        variant.compiled[form] = _Compiled(compiled, constants)


def _seen(arguments: Arguments) -> tuple[Form, Addresses]:
    """All of the arguments that Triton compiles for (dtypes, addresses on 16 bytes, the width of
    numbers), and the arguments as numbers.

    Numbers are not compiled in: kernels name them in `do_not_specialize`.
    """
    kinds: list[object] = []
    addresses: Addresses = []
    for x in arguments:
        if isinstance(x, Part):
            kinds.append(x.kind)
            addresses.append(x.address)
        elif x is None or isinstance(x, int):
            kinds.append(x if x is None else x.bit_length() < 32)
            addresses.append(x)
        else:
            address = x.data_ptr()
            kinds.append(_kind(x.dtype, address))
            addresses.append(address)
    return tuple(kinds), addresses


def _kind(dtype: torch.dtype, address: int) -> object:
    return dtype if address % 16 == 0 else (dtype, "anywhere")


def _tensors(arguments: Arguments) -> tuple[Tensor | int | None, ...]:
    return tuple([x.tensor() if isinstance(x, Part) else x for x in arguments])


def _is_watched() -> bool:
    """Whether somebody, a profiler say, is to be called before or after every launch."""
    place = _place_of_hooks()
    before, after = place.launch_enter_hook, place.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


@functools.cache
def _place_of_hooks() -> Any:
    """Triton's settings; before 3.4 it had none, and hooks were with its compiled kernels."""
    triton = importlib.import_module("triton")
    if hasattr(triton, "knobs"):
        return triton.knobs.runtime
    return importlib.import_module("triton.compiler").CompiledKernel


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
    different = {x.form(): x for x in launches}.values()
    with ThreadPoolExecutor(max(1, min(len(different), os.cpu_count() or 1))) as pool:
        for done in [pool.submit(x.compile, device) for x in different]:
            done.result()
