"""What both ways of weighing pairs of tokens hand to the algebra."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Operands:
    """Decayed inputs and masked scores of m chunks of C tokens."""

    ra: Tensor  # [m, 2C, K]: ρ = r exp(g), then α = a exp(e)
    kb_end: Tensor  # [m, 2C, K]: κ̄, then β̄, decayed to the end of the chunk
    decay: Tensor  # [m, K]: exp(g_C)
    scores: Tensor  # [m, 2C, 2C]: rows r, a; columns k, b
    ra_weight: Tensor  # [m, 2C, K]: exp(g), then exp(e)
    kb_weight: Tensor  # [m, C, K]: what turned k, b into the factors kept in `kb` or `kb_end`
    kb: Tensor | None = None  # [m, 2C, K], bounded only: k exp(-g), then b exp(-g)
    levels: tuple[Level, ...] = ()  # unbounded only
    raw: tuple[Tensor, Tensor] | None = None  # unbounded only: r, a and k, b as given


@dataclass(frozen=True, slots=True)
class Level:
    """One halving: later halves of blocks (rows) against earlier halves (columns)."""

    rows: Tensor  # [m, blocks, 2, half, K]: r, a decayed from the middle of their block
    columns: Tensor  # [m, blocks, 2, half, K]: k, b decayed to the middle
    row_weight: Tensor  # [m, blocks, 2, half, K]
    column_weight: Tensor  # [m, blocks, half, K]


@functools.lru_cache(maxsize=16)
def causal_mask(C: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[2C, 2C] of ones and zeros: rows r see tokens up to their own, rows a only earlier ones."""
    ones = torch.ones(C, C, dtype=dtype, device=device)
    upper, lower = ones.tril(), ones.tril(-1)
    return torch.cat([torch.cat([upper, upper], 1), torch.cat([lower, lower], 1)])


@functools.lru_cache(maxsize=16)
def sum_matrix(C: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, C, C] lower triangle of ones: a product with it is an inclusive running sum."""
    return torch.ones(C, C, dtype=dtype, device=device).tril()[None]
