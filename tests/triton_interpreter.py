"""Triton's interpreter on the CPU, for tests of kernels where there is no GPU.

A test module calls `load` when it is imported, and its tests use the fixture `interpreter`.
"""

from __future__ import annotations

import importlib

import pytest
import torch


def load(package: str, *kernels: str) -> None:
    """Import kernel modules to be interpreted; skip the test module where that cannot be."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are tested on the GPU itself", allow_module_level=True)
    # Triton decides when it is imported, and again for each kernel, whether to interpret.
    with pytest.MonkeyPatch.context() as early:
        early.setenv("TRITON_INTERPRET", "1")
        triton = pytest.importorskip("triton")
        for name in kernels:
            importlib.import_module(f"{package}.{name}")
    if type(triton.language.sum).__name__ != "InterpretedFunction":
        pytest.skip("triton was imported before, to compile", allow_module_level=True)
