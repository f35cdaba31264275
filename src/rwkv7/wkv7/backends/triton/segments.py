"""Sequences cut into segments, forward and back: what each does to any state, then the states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rwkv7.wkv7.contract import Call

from .kernels.walks import chain_segments
from .launch import start
from .plan import CHAIN, WALK_ROWS
from .saved import carve


def states_before(
    call: Call,
    count: int,
    begin: tuple[Tensor, int],
    sizes: dict[str, Any],
    find_maps: Callable[[Tensor], None],
) -> Tensor:
    """The state before each of `count` segments as they are walked, fp32 [pairs, count, V, K].

    Args:
        begin: the state before the first, fp32 [pairs, V, K], and whether it is given or zeros.
        sizes: K, V, BK and HOW, as kernels take them.
        find_maps: fills [pairs, count, BK + V, BK]: M, then B, of all segments but the last.
    """
    K, V, BK, pairs = sizes["K"], sizes["V"], sizes["BK"], call.sequences * call.sizes[2]
    maps, states = carve(
        call.v, torch.float32, pairs * count * (BK + V) * BK, pairs * count * V * K
    )
    find_maps(maps)
    start(
        chain_segments, (pairs, -(-V // WALK_ROWS)), (maps, *begin, states, count),
        {**sizes, "BV": WALK_ROWS, **CHAIN.options()},
    )  # fmt: skip
    return states
