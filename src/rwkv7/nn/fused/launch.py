"""Where the fused kernels run, and how each is cut: static, chosen by sizes, nothing tuned.

Triton itself is imported by the first call that runs a kernel.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_INSTALLED = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_wanted: bool | None = None

# Numbers of one tile, for 4 warps: each thread has 16 bytes of a 16-bit tensor.
TILE = 1024
TILE_WARPS = 4


@contextlib.contextmanager
def use_fused(wanted: bool) -> Iterator[None]:
    """Inside, the kernels run for every tensor they take (True) or for none (False), to compare.

    Outside they run on a GPU when triton is installed. It holds for all threads, since backward
    passes have their own.
    """
    global _wanted
    before, _wanted = _wanted, wanted
    try:
        yield
    finally:
        _wanted = before


def runs_fused(*tensors: Tensor) -> bool:
    """Whether a call on these tensors is the kernels' or plain torch's."""
    # On a CPU this is asked some thirty times a layer, so that the quickest answer comes first.
    if not (_INSTALLED and tensors[0].is_cuda if _wanted is None else _wanted):
        return False
    fit = all(x.dtype in _DTYPES for x in tensors)
    return fit and (_wanted is True or _is_recent(tensors[0]))


def _is_recent(x: Tensor) -> bool:
    # A trace cannot ask the card; older ones are then refused by the compiler of the kernels.
    if torch.compiler.is_compiling() or torch.version.hip is not None:
        return True
    return _capability(x.device) >= (8, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the current device, which need not be the tensors'."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def power_of_two(size: int) -> int:
    """The least one that is not below `size`."""
    return 1 << (size - 1).bit_length()


def head_tile(head_size: int) -> dict[str, int]:
    """The sizes of a tile of tokens x one head's channels, as the kernels take them."""
    channels = power_of_two(head_size)
    return {"N": head_size, "BT": max(1, TILE // channels), "BN": channels}


def channel_block(channels: int) -> int:
    """Channels a program takes of a vector [C]: a power of two, 256 at most."""
    return min(256, power_of_two(channels))


def rows_apiece(rows: int, few: int, many: int) -> int:
    """Rows that a backward program sums a parameter's gradient over: `many` once they are plenty.

    Each program's sum is written and read once more, which many rows make cheap; with few rows in
    all, shorter spans keep the card busy.
    """
    return many if rows >= 256 * many else few


def rows_of(x: Tensor) -> int:
    """How many vectors [C] there are in x [..., C]."""
    return math.prod(x.shape[:-1])


def of_parameters(sums: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of parameters from their sums [count, C] in fp32, in one tensor."""
    pairs = zip(sums.unbind(0), parameters, strict=True)
    return [x.view(p.shape).to(p.dtype) for x, p in pairs]
