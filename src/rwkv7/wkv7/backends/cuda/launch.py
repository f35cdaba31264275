"""Launching a compiled kernel on torch's current stream, through the CUDA driver.

A launch allocates nothing on the card and waits for nothing, so CUDA graphs can capture it; a
kernel's first launch on a card compiles or loads it, and belongs before the capture.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch

from . import compiler
from .compiler import checked
from .plan import Card, Kernel, Macros


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
    from cuda.bindings import driver

    # A kernel reads as many bytes of a slot as its parameter has; the driver copies them at once.
    count = len(grids[0][1])
    slots = (ctypes.c_uint64 * count)()
    first = ctypes.addressof(slots)
    pointers = (ctypes.c_uint64 * count)(*range(first, first + 8 * count, 8))
    with torch.cuda.device(device):
        function = load(kernel, macros, device.index)
        stream = torch.cuda.current_stream().cuda_stream
        rest = (1, 1, kernel.threads, 1, 1, kernel.shared_bytes(macros), stream)
        how = (*rest, ctypes.addressof(pointers), 0)
        for blocks, arguments in grids:
            slots[:] = list(arguments)
            (status,) = driver.cuLaunchKernel(function, blocks, *how)
            if status == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
                # A thread of its own that has done nothing on the card so far.
                _make_current(device.index)
                (status,) = driver.cuLaunchKernel(function, blocks, *how)
            checked((status,), f"launching {kernel.entry}")


@functools.cache
def load(kernel: Kernel, macros: Macros, index: int) -> Any:
    """The kernel as the driver's function, loaded on card `index`, the current one.

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
    attributes = driver.CUfunction_attribute
    for attribute, value in (
        (
            attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            kernel.shared_bytes(macros),
        ),
        # In percent: as much as the card can give, for several blocks share a multiprocessor.
        (attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
    ):
        checked(driver.cuFuncSetAttribute(function, attribute, value), doing)
    return function


def _make_current(index: int) -> None:
    """Make torch's context of the card current in this thread, unless it has one."""
    from cuda.bindings import driver

    doing = f"opening card {index}"
    if int(checked(driver.cuCtxGetCurrent(), doing)) == 0:
        context = checked(driver.cuDevicePrimaryCtxRetain(driver.CUdevice(index)), doing)
        checked(driver.cuCtxSetCurrent(context), doing)
