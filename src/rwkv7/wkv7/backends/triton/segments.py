"""Sequences cut into segments, forward and back: what each does to any state, then the states."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from rwkv7.wkv7.contract import Call

from .kernels.walks import chain_segments
from .launch import Memory, Part, Variant, start
from .plan import CHAIN, WALK_ROWS
from .saved import carve


def states_before(
    call: Call,
    count: int,
    begin: tuple[Memory, int],
    BK: int,
    how: str,
    find_maps: Callable[[Part], None],
) -> Part:
    """The state before each of `count` segments as they are walked, fp32 [pairs, count, V, K].

    Args:
        begin: the state before the first, fp32 [pairs, V, K], and whether it is given or zeros.
        BK, how: as kernels take them.
        find_maps: fills [pairs, count, BK + V, BK]: M, then B, of all segments but the last.
    """
    _, _, H, K, V = call.sizes
    pairs = call.sequences * H
    maps, states = carve(
        call.v,
        (torch.float32, pairs * count * (BK + V) * BK),
        (torch.float32, pairs * count * V * K),
    )
    find_maps(maps)
    grid = pairs, -(-V // WALK_ROWS)
    start(_chain(K, V, BK, how), grid, (maps, *begin, states, count))
    return states


@functools.cache
def _chain(K: int, V: int, BK: int, how: str) -> Variant:
    return Variant(chain_segments, K=K, V=V, BK=BK, HOW=how, BV=WALK_ROWS, **CHAIN.options())
