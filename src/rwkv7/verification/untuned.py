"""Another package's Triton kernels without its search for the fastest configuration."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["untuned"]


@contextlib.contextmanager
def untuned(package: str) -> Iterator[None]:
    """Inside, the package's autotuned kernels take the first of their configurations.

    For work that asks what a kernel computes, not how fast: configurations differ in warps, stages
    and tiles, and to try them all takes minutes a shape. Kernels of modules not yet imported keep
    their search.
    """
    whole = [(tuner, tuner.configs) for tuner in _autotuners(package)]
    try:
        for tuner, configs in whole:
            tuner.configs = configs[:1]
        yield
    finally:
        for tuner, configs in whole:
            tuner.configs = configs


def _autotuners(package: str) -> list[Any]:
    """The autotuners among the modules' names, inside triton.heuristics or not, each once."""
    found: dict[int, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != package or module is None:
            continue
        for kernel in list(vars(module).values()):
            while hasattr(kernel, "fn") and not isinstance(kernel, type):
                if isinstance(getattr(kernel, "configs", None), list):
                    found[id(kernel)] = kernel
                kernel = kernel.fn
    return list(found.values())
