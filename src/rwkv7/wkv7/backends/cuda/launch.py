"""Launching a compiled kernel on torch's current stream, through the CUDA driver.

A launch allocates nothing on the card and waits for nothing, so CUDA graphs can capture it; a
kernel's first launch on a card compiles or loads it, and belongs before the capture.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import compiler
from .compiler import checked
from .plan import Card, Kernel, Macros

_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


@functools.cache
def card(device: torch.device) -> Card:
    """What plans depend on, of an NVIDIA GPU."""
    found: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack an attribute
    return Card(found.multi_processor_count, found.shared_memory_per_block_optin)


def launch(
    kernel: Kernel,
    macros: Macros,
    device: torch.device,
    grids: Sequence[tuple[int, tuple[int, ...]]],
) -> None:
    """Start the kernel on the current stream of `device`, once for every grid, in order.

    Args:
        grids: how many blocks, and the arguments: addresses (0 for none) and 32-bit numbers, in the
            kernel's order, the same count for all.

    Raises:
        RuntimeError: the driver refuses; it says why.
    """
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, macros, device, grids)
    start, function, shared = load(kernel, macros, device.index)
    # As a number: torch.cuda.current_stream() makes an object, which takes longer than a launch.
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    how = (1, 1, kernel.threads, 1, 1, shared, stream)
    slots, doing = _slots.of(len(grids[0][1])), f"launching {kernel.entry}"
    for blocks, arguments in grids:
        slots.pack(slots.values, 0, *arguments)
        result = start(function, blocks, *how, slots.pointers, 0)
        if int(result[0]) == _INVALID_CONTEXT:
            # A thread of its own that has done nothing on the card so far.
            _make_current(device.index)
            result = start(function, blocks, *how, slots.pointers, 0)
        checked(result, doing)


class _Slots:
    """Eight bytes an argument, and where each lies, as the driver wants them.

    A kernel reads as many bytes of a slot as its parameter has.
    """

    def __init__(self, count: int) -> None:
        self.pack = struct.Struct(f"={count}Q").pack_into
        self.values = (ctypes.c_uint64 * count)()
        first = ctypes.addressof(self.values)
        self._places = (ctypes.c_uint64 * count)(*range(first, first + 8 * count, 8))
        self.pointers = ctypes.addressof(self._places)


class _SlotsOfThread(threading.local):
    """A thread's own, for the driver has copied them when a launch returns."""

    def __init__(self) -> None:
        self.of = functools.cache(_Slots)


_slots = _SlotsOfThread()


@functools.cache
def load(kernel: Kernel, macros: Macros, index: int) -> tuple[Callable[..., Any], Any, int]:
    """The kernel on card `index`, the current one: what starts it, the driver's function, and the
    bytes of shared memory of a block.

    Raises:
        RuntimeError: it does not compile, or the driver refuses it.
    """
    from cuda.bindings import driver

    target = compiler.architecture(torch.cuda.get_device_capability(index))
    cubin = compiler.compiled(kernel, macros, target)
    _make_current(index)
    doing = f"loading {kernel.entry} for {target}"
    module = checked(driver.cuModuleLoadData(cubin), doing)
    function = checked(driver.cuModuleGetFunction(module, kernel.entry.encode()), doing)
    attributes, shared = driver.CUfunction_attribute, kernel.shared_bytes(macros)
    for attribute, value in (
        (attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared),
        # In percent: as much as the card can give, for several blocks share a multiprocessor.
        (attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
    ):
        checked(driver.cuFuncSetAttribute(function, attribute, value), doing)
    return driver.cuLaunchKernel, function, shared


def _make_current(index: int) -> None:
    """Make torch's context of the card current in this thread, unless it has one."""
    from cuda.bindings import driver

    doing = f"opening card {index}"
    if int(checked(driver.cuCtxGetCurrent(), doing)) == 0:
        context = checked(driver.cuDevicePrimaryCtxRetain(driver.CUdevice(index)), doing)
        checked(driver.cuCtxSetCurrent(context), doing)
