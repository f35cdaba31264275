"""Token shift: what the token before each token was, across calls and in packed sequences.

The first token of a sequence sees the sequence's own carried vector (zeros when there is none),
never its neighbour in the packing.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv7.wkv7 import first_of_run


class Packing(NamedTuple):
    """Where S packed sequences begin and end in T tokens; made once a call for all layers."""

    offsets: Tensor  # [S + 1], int32 or int64, as the operator takes them
    first: Tensor  # [S], the first token of each sequence, T when it is empty
    last: Tensor  # [S], the last token of each sequence, 0 when it is empty
    occupied: Tensor  # [S, 1], false where a sequence is empty
    sequence: Tensor  # [T], int32, which sequence each token is of

    @property
    def sequences(self) -> int:
        """S."""
        return self.first.shape[0]


class Slots(NamedTuple):
    """Which rows of a pool of states B sequences use; made once a step for all layers."""

    wkv: Tensor  # [B], -1 where nothing is to happen: what `wkv7_step_` takes
    shift: Tensor  # [B], int64, the pool's last row where nothing is to happen
    first: int | None  # of rows that follow each other, on the CPU: a view instead of copies


def slots_of(slots: Tensor, tokens: Tensor, pool: int) -> Slots:
    """From rows [B] of a pool of `pool` rows, -1 to skip one, to what each mix takes.

    ValueError, TypeError: slots that do not go with tokens [B]; the operator looks at the values.
    """
    if not isinstance(slots, Tensor) or slots.dtype not in (torch.int32, torch.int64):
        found = slots.dtype if isinstance(slots, Tensor) else type(slots).__name__
        raise TypeError(f"slots: expected an int32 or int64 tensor, found {found}")
    if slots.shape != tokens.shape or slots.device != tokens.device:
        raise ValueError(
            f"slots: expected the shape {list(tokens.shape)} on {tokens.device}, as tokens, "
            f"found {list(slots.shape)} on {slots.device}"
        )
    first = first_of_run(slots)
    if first is not None and first + len(slots) > pool:
        first = None  # the operator says so
    return Slots(slots, torch.where(slots < 0, pool - 1, slots).long(), first)


def packing(cu_seqlens: Tensor, tokens: Tensor) -> Packing:
    """Check the offsets of a packed call and find each sequence's ends.

    Args:
        cu_seqlens: [S + 1], int32 or int64, from 0 to T, never falling.
        tokens: [1, T], what is packed.

    Raises:
        ValueError, TypeError: offsets that do not fit; their values are seen on the CPU alone.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        found = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens: expected an int32 or int64 tensor, found {found}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected [S + 1] offsets, found {list(cu_seqlens.shape)}")
    B, T = tokens.shape
    if B != 1:
        raise ValueError(f"cu_seqlens: packed tokens are [1, T], found {list(tokens.shape)}")
    if cu_seqlens.device != tokens.device:
        raise ValueError(
            f"cu_seqlens: expected the device of tokens, {tokens.device}, found {cu_seqlens.device}"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(cu_seqlens.tolist(), T)
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    occupied = ends > starts
    first = torch.where(occupied, starts, T)
    last = torch.where(occupied, ends - 1, 0)
    positions = torch.arange(T, device=ends.device)
    sequence = torch.searchsorted(ends, positions, right=True, out_int32=True)
    return Packing(cu_seqlens, first, last, occupied[:, None], sequence)


def token_shift(
    x: Tensor,  # [B, T, C]
    carried: Tensor | None,  # [S, C]
    packed: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """(the vector before each token [B, T, C], the vectors to carry on [S, C]), for T ≥ 1.

    `carried` holds each sequence's last vector so far; None means zeros. S = B unless packed. An
    empty sequence carries on what it had.
    """
    if packed is not None:
        return _packed_shift(x, carried, packed)
    if x.shape[1] == 1:
        return (torch.zeros_like(x) if carried is None else carried[:, None]), x[:, 0]
    # A copy of the last vectors: a view would keep all T of them in memory with the state.
    last = x[:, -1].clone()
    if carried is None:
        return F.pad(x, (0, 0, 1, -1)), last
    return torch.cat((carried[:, None], x[:, :-1]), 1), last


def shift_in_pool_(x: Tensor, pool: Tensor, slots: Slots) -> Tensor:
    """The vectors before x [B, C] less x; x takes their place, rows of `pool` [P, C]."""
    if slots.first is not None:
        rows = pool.narrow(0, slots.first, x.shape[0])
        delta = rows - x
        rows.copy_(x)
        return delta
    delta = pool.index_select(0, slots.shift) - x
    pool.index_copy_(0, slots.shift, x)
    return delta


def _packed_shift(x: Tensor, carried: Tensor | None, packed: Packing) -> tuple[Tensor, Tensor]:
    if carried is None:
        carried = x.new_zeros(packed.sequences, x.shape[2])
    # Row t of the padded tensor is token t - 1; its row T, no token's neighbour, takes what the
    # empty sequences write, so that no shape depends on their number.
    before = F.pad(x, (0, 0, 1, 0)).index_copy(1, packed.first, carried[None].to(x.dtype))
    last = torch.where(packed.occupied, x[0].index_select(0, packed.last), carried)
    return before[:, :-1], last


def _check_values(offsets: list[int], T: int) -> None:
    if offsets[0] != 0:
        raise ValueError(f"cu_seqlens: expected to start at 0, found {offsets[0]}")
    for i, (start, end) in enumerate(itertools.pairwise(offsets)):
        if end < start:
            raise ValueError(
                f"cu_seqlens: expected offsets that never fall, found {start} then {end} "
                f"at position {i + 1}"
            )
    if offsets[-1] != T:
        raise ValueError(f"cu_seqlens: expected to end at T = {T}, found {offsets[-1]}")
