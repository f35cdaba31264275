"""Decoding many sequences: what a layer does for one token of each, beside its large products.

The low-rank products are two launches instead of eight, and what was added to the stream, the norm
and the mixes one instead of three. The large products are the matrix library's. For one sequence
there is `single`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .activation import squared_relu
from .launch import on_device_of, power_of_two
from .single import ChannelMixWeights, Norm, TimeMixWeights, norm_mix
from .step import Projections, time_mix_step_

# Sizes of a program, measured on an H200: columns of a product, bytes along it at once, and for how
# many iterations ahead they are asked for.
_COLUMNS, _ALONG, _AHEAD = {"low": 32, "high": 128}, {"low": 256, "high": 128}, 4
# Rows and columns where rows are few, and in float32, whose products of large tiles compile long.
_FEW, _NARROW = 16, 32


class Stream(NamedTuple):
    """What goes from layer to layer, each [B, 1, C]: x + added, `added` None for nothing."""

    x: Tensor
    added: Tensor | None = None

    def total(self) -> Tensor:
        """The sum."""
        return self.x if self.added is None else self.x + self.added


def time_mix_of_rows_(
    stream: Stream,
    v_first: Tensor | None,  # [B, 1, C]
    norm: Norm,
    weights: TimeMixWeights,
    shift: Tensor,  # [P, C]
    state: Tensor,  # [P, H, N, N]
    slots: Tensor,  # [B]
) -> tuple[Stream, Tensor]:
    """(stream + TimeMix(norm(stream)), layer 0's value); rows of both pools change."""
    x, mixed = norm_mix(stream.x, stream.added, norm, weights.mixes, shift, slots)
    r, k, v = (F.linear(mixed[i], w) for i, w in zip((0, 2, 3), weights.rkv, strict=True))
    w, rate, g, *share = _low_rank(mixed, weights)
    projections = Projections(r, w, k, v, rate, share[0] if share else None, g)
    y = time_mix_step_(projections, v_first, weights.vectors, weights.eps, state, slots)
    return Stream(x, F.linear(y, weights.output)), v if v_first is None else v_first


def channel_mix_of_rows_(
    stream: Stream,
    norm: Norm,
    weights: ChannelMixWeights,
    shift: Tensor,  # [P, C]
    slots: Tensor,  # [B]
) -> Stream:
    """stream + ChannelMix(norm(stream)); rows of the pool `shift` change."""
    x, mixed = norm_mix(stream.x, stream.added, norm, (weights.mix,), shift, slots)
    return Stream(x, F.linear(squared_relu(F.linear(mixed[0], weights.key)), weights.value))


def _low_rank(mixed: Tensor, weights: TimeMixWeights) -> tuple[Tensor, ...]:
    """w, rate, g and, after layer 0, the value's share, each [B, 1, C], from [6, B, 1, C]."""
    from .kernels.rows import high_products, low_products

    _, B, _, C = mixed.shape
    ranks = tuple(low.shape[1] for low in weights.lows)
    hidden = mixed.new_empty(B, sum(ranks))
    out = mixed.new_empty(len(ranks), B, 1, C)
    whole = mixed.element_size() < 4
    rows = 64 if whole and B > _FEW else _FEW
    along = {stage: size // mixed.element_size() for stage, size in _ALONG.items()}
    sizes = {"RANKS": ranks, "WIDTH": sum(ranks), "C": C, "BM": rows, "STAGES": _AHEAD}
    programs = sum(-(-rank // _COLUMNS["low"]) for rank in ranks)
    with on_device_of(mixed):
        low_products[(programs, -(-B // rows))](
            mixed, weights.lows, hidden, B, BD=_COLUMNS["low"], BK=along["low"], **sizes
        )
        columns = min(_COLUMNS["high"] if whole else _NARROW, power_of_two(C))
        high_products[(-(-C // columns), -(-B // rows), len(ranks))](
            hidden, weights.highs, out, B, BC=columns, BK=along["high"], **sizes
        )
    return torch.unbind(out)
