"""The backend `cuda` on a CPU: its kernels compiled by g++, a block's threads as fibers.

`emulated/` makes the kernels' source ordinary C++; here it is built and launched. Around it the
backend's own host code runs, so that arguments, layouts and launches are tested with it.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rwkv7.wkv7.backends.cuda import CudaBackend, compiler, launch, plan

DRIVER = Path(__file__).with_name("emulated") / "kernel.cpp"
BAND = 64  # elements before and after an output that must stay as they are
SENTINEL = 7.0
# Cards on which every call is one walk a sequence and head, and on which ours may be relays or
# segments.
SMALL, LARGE = plan.Card(0, 2**18), plan.Card(132, 2**18)


def why_not() -> str | None:
    """Why kernels cannot be emulated here, or None."""
    if not sys.platform.startswith("linux"):
        return "needs ucontext and GCC's _Float16, as on Linux"
    return None if shutil.which("g++") else "g++ is not installed"


class Emulator:
    """Launches as `launch.launch` does, on the CPU."""

    def __init__(self, folder: Path) -> None:
        """`folder` receives what is built, once a kernel and macros."""
        self.folder = folder
        self.launches: list[str] = []

    def launch(
        self,
        kernel: plan.Kernel,
        macros: plan.Macros,
        device: torch.device,
        grids: Sequence[tuple[int, tuple[int, ...]]],
    ) -> None:
        """What the driver does with grids: every block, and every thread of it."""
        built = self.built(kernel, macros)
        for blocks, arguments in grids:
            assert device.type == "cpu" and built.arguments() == len(arguments)
            # The kernels read 16 bytes at a time, on 16 bytes. Sizes are small numbers.
            assert not any(x % 16 for x in arguments if x > 2**31)
            built.run((ctypes.c_uint64 * len(arguments))(*arguments), blocks)
            self.launches.append(kernel.name)

    @functools.cache  # noqa: B019
    def built(self, kernel: plan.Kernel, macros: plan.Macros) -> ctypes.CDLL:
        """The kernel, built with these macros."""
        values = (str(value) for _, value in macros)
        build = self.folder / "-".join([kernel.name, str(kernel.head), *values])
        build.mkdir()
        (build / "program.inc").write_text(kernel.program(macros))
        command = ["g++", "-O1", "-march=native", "-std=c++17", "-fPIC", "-shared", "-w"]
        command += [f"-I{folder}" for folder in (build, compiler.SOURCES, DRIVER.parent)]
        command += [f"-D{name}={value}" for name, value in macros]
        command += [f"-DKERNEL={kernel.entry}", f"-DTHREADS={kernel.threads}"]
        command += [f"-DSHARED={kernel.shared_bytes(macros)}", str(DRIVER)]
        subprocess.run([*command, "-o", str(build / "kernel.so")], check=True)
        return ctypes.CDLL(str(build / "kernel.so"))


class Guard:
    """Outputs that are NaN until written, between bands that must not be."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def around(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`make`, such as torch.empty_like, with its result guarded."""
        full = torch.full

        def guarded(*args: object, **kwargs: object) -> Tensor:
            x = make(*args, **kwargs)
            if not (x.is_floating_point() and x.is_contiguous()):
                return x
            buffer = full((x.numel() + 2 * BAND,), SENTINEL, dtype=x.dtype)
            self.buffers.append(buffer)
            return buffer[BAND : BAND + x.numel()].fill_(float("nan")).view(x.shape)

        return guarded

    def intact(self) -> bool:
        """Whether no band was written to."""
        bands = [part for b in self.buffers for part in (b[:BAND], b[-BAND:])]
        return all(bool((band == SENTINEL).all()) for band in bands)


def emulate(patch: pytest.MonkeyPatch, emulator: Emulator) -> Guard:
    """Have the backend `cuda` accept calls on the CPU and run them in `emulator`, guarded."""
    guard = Guard()
    patch.setattr(launch, "launch", emulator.launch)
    patch.setattr(CudaBackend, "refuses", lambda self, call: plan.refuses(call))
    patch.setattr(launch, "card", lambda device: SMALL)
    for owner, name in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
        patch.setattr(owner, name, guard.around(getattr(owner, name)))
    return guard
