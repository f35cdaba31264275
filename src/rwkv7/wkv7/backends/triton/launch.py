"""Starting Triton's kernels, and compiling all that a call lacks at the same time.

Triton compiles a kernel when it is first launched, one after the other, in seconds each. Here a
call that lacks one is gone through without launching, and what it would launch is compiled in
threads: Triton's passes run without the interpreter's lock, and assemblers are other processes.

A compiled kernel is kept and started itself from then on, with addresses in the place of tensors:
Triton's own way asks each argument again what it is, and the driver whose memory that is.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
Grid = tuple[int, ...]
# Launches of a variant that are of one form run the same compiled kernel: the device, kinds of the
# arguments and, on AMD cards, which of them are large.
Form = tuple[Any, ...]


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

    def keep(self, form: Form, compiled: Any) -> None:
        """Load what Triton compiled, and start it for launches of `form` from now on.

        Of an interpreter it is None, and nothing is kept.
        """
        if compiled is not None:
            start = _Compiled if torch.version.hip is None else _ByTriton
            self.compiled[form] = start(self, compiled, numbers=len(form[1]))


class _Compiled:
    """A kernel that Triton has compiled and loaded, with the constants that it is handed."""

    __slots__ = ("_constants", "_function", "_kernel", "_metadata", "_run", "_variant")

    def __init__(self, variant: Variant, kernel: Any, numbers: int) -> None:
        """`numbers`: of arguments, which constants follow."""
        self._variant, self._kernel = variant, kernel
        names = variant.kernel.arg_names[numbers:]
        self._constants = tuple(variant.options[x] for x in names)
        self._run, self._function = kernel.run, kernel.function  # the first loads it
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


class _ByTriton(_Compiled):
    """One that Triton finds and starts itself: on AMD cards, where ours has not been tried."""

    __slots__ = ()

    def start(self, grid: Grid, arguments: Arguments, addresses: Addresses, device: int) -> None:
        self._variant.kernel[grid](*_tensors(arguments), **self._variant.options)


class _NotCompiled(Exception):
    """A launch lacks its compiled kernel."""


class _Here(threading.local):
    """What `start` does in this thread.

    strict: raise `_NotCompiled` rather than compile.
    noted: if not None, start nothing, and note here what launches are of.
    """

    strict = False
    noted: dict[tuple[Variant, Form], None] | None = None


_here = _Here()
_compiling = threading.Lock()


def start(variant: Variant, grid: Grid, arguments: Arguments) -> None:
    """Launch a kernel on the current stream."""
    kinds, addresses = _seen(arguments)
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
    form: Form = device, kinds
    if torch.version.hip is not None:
        form = device, kinds, _large(arguments)
    if _here.noted is not None:
        _here.noted[variant, form] = None
    elif (found := variant.compiled.get(form)) is not None:
        found.start(grid, arguments, addresses, device)
    elif _here.strict:
        raise _NotCompiled
    else:
        variant.keep(form, variant.kernel[grid](*_tensors(arguments), **variant.options))


def run_together(run: Callable[[], Result], then: Callable[[], object] | None = None) -> Result:
    """What `run` gives; the kernels that its launches lack are compiled at the same time.

    Args:
        run: called once where nothing is lacking, else three times: until the first launch that
            lacks a kernel, without starting any, and as it is. So it may write what it allocates,
            and what it writes again each time, but change nothing else.
        then: what follows soon. If `run` lacks kernels, those of its launches are compiled too;
            they are not started.

    Raises:
        Exception: Triton's own, of a kernel that does not compile.
    """
    _here.strict = True
    try:
        return run()
    except _NotCompiled:
        pass  # here its traceback would keep alive what run() has allocated
    finally:
        _here.strict = False
    needed = _needed(run, then)
    with _compiling:  # another thread may have compiled the same meanwhile
        _compile_together([(x, form) for x, form in needed if form not in x.compiled])
    return run()


def _needed(*calls: Callable[[], object] | None) -> Iterable[tuple[Variant, Form]]:
    """What some calls would launch, each once; nothing is started.

    No memory of a call is kept, so that it is free for the next one.
    """
    noted: dict[tuple[Variant, Form], None] = {}
    _here.noted = noted
    try:
        for call in calls:
            if call is not None:
                call()
    finally:
        _here.noted = None
    return noted


def _compile_together(lacking: list[tuple[Variant, Form]]) -> None:
    with ThreadPoolExecutor(max(1, min(len(lacking), os.cpu_count() or 1))) as pool:
        for done in [pool.submit(_compile, *x) for x in lacking]:
            done.result()


def _compile(variant: Variant, form: Form) -> None:
    """As the first launch of the form would."""
    device, kinds, *large = form
    arguments = map(_stand_in, kinds, *(large or [[False] * len(kinds)]))
    with torch.cuda.device(device):  # a new thread's is 0
        variant.keep(form, variant.kernel.warmup(*arguments, grid=(1,), **variant.options))


class _StandIn:
    """In the place of a tensor for Triton, which asks no more of it when it compiles."""

    __slots__ = ("_address", "_size", "dtype")

    def __init__(self, dtype: torch.dtype, aligned: bool, large: bool) -> None:
        self.dtype, self._address, self._size = dtype, 0 if aligned else 1, 2**31 if large else 0

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        """Bytes of its memory: asked for AMD cards."""
        return self._size


def _stand_in(kind: object, large: bool) -> object:
    """An argument of a kind that `_seen` tells."""
    if isinstance(kind, bool):
        return 0 if kind else 2**31
    if isinstance(kind, torch.dtype):
        return _StandIn(kind, aligned=True, large=large)
    if isinstance(kind, tuple):
        return _StandIn(kind[0], aligned=False, large=large)
    return kind  # None


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


def _large(arguments: Arguments) -> tuple[bool, ...]:
    """Which are in 2 GB of memory or more: for AMD cards Triton compiles for less too."""
    memory = [x.tensor() if isinstance(x, Part) else x for x in arguments]
    return tuple([isinstance(x, Tensor) and x.untyped_storage().nbytes() >= 2**31 for x in memory])


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
