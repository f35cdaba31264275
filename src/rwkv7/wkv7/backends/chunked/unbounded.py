"""Pair weights for any log decay down to -inf: a chunk is halved again and again.

A pair (i, j) meets at the one level where i lies in the later half of a block and j in the
earlier; its weight is then a decay from the middle to i times one from j to the middle. Every
exponent is a sum of log decays (≤ 0) inside one half, never a difference of sums, so nothing
overflows, nothing cancels and -inf needs no care; the gradient of a log decay is likewise a sum
over just those pairs that it lies between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operands import Level, Operands


def make_operands(logd: Tensor, ra: Tensor, kb: Tensor) -> Operands:
    """From log decays [m, C, K] and inputs [m, 2C, K]."""
    m, C, K = logd.shape
    ra_weight = torch.cat([logd.cumsum(1), _exclusive(logd)], 1).exp_()
    kb_weight = _exclusive(logd.flip(1)).flip(1).exp_()
    scores = logd.new_zeros(m, 2 * C, 2 * C)
    levels = []
    half = C // 2
    while half:
        level = _make_level(logd, ra, kb, half)
        products = torch.matmul(level.rows.flatten(2, 3), level.columns.flatten(2, 3).mT)
        _blocks(scores, half).copy_(products.unflatten(3, (2, half)).unflatten(2, (2, half)))
        levels.append(level)
        half //= 2
    same = torch.linalg.vecdot(ra[:, :C].unsqueeze(1), kb.view(m, 2, C, K))  # r_i with k_i, b_i
    scores[:, :C].unflatten(2, (2, C)).diagonal(dim1=1, dim2=3).copy_(same)
    kb_end = (kb.view(m, 2, C, K) * kb_weight[:, None]).view(m, 2 * C, K)
    return Operands(
        ra * ra_weight,
        kb_end,
        ra_weight[:, C - 1],
        scores,
        ra_weight,
        kb_weight,
        levels=tuple(levels),
        raw=(ra, kb),
    )


def operand_gradients(
    operands: Operands, dscores: Tensor, dra: Tensor, dkb_end: Tensor, ddecay: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of r and a, of k and b, and of the log decay."""
    assert operands.raw is not None
    ra, kb = operands.raw
    m, C, K = operands.kb_weight.shape
    dlogd = _backward_sum((operands.ra * dra).view(m, 2, C, K))
    from_end = (operands.kb_end * dkb_end).view(m, 2, C, K).sum(1)
    dlogd += _exclusive(from_end) + (operands.decay * ddecay)[:, None]
    dra = dra * operands.ra_weight
    dkb = (dkb_end.view(m, 2, C, K) * operands.kb_weight[:, None]).view(m, 2 * C, K)
    for level in operands.levels:
        half = level.rows.shape[3]
        dproducts = _blocks(dscores, half).flatten(4, 5).flatten(2, 3)
        drows = torch.matmul(dproducts, level.columns.flatten(2, 3)).view(level.rows.shape)
        dcolumns = torch.matmul(dproducts.mT, level.rows.flatten(2, 3)).view(level.rows.shape)
        earlier, later = dlogd.view(m, -1, 2, half, K).unbind(2)
        later += _backward_sum(level.rows * drows)
        earlier += _exclusive((level.columns * dcolumns).sum(2), 2)
        _halves(dra, half)[..., 1, :, :] += drows * level.row_weight
        _halves(dkb, half)[..., 0, :, :] += dcolumns * level.column_weight[:, :, None]
    same = dscores[:, :C].unflatten(2, (2, C)).diagonal(dim1=1, dim2=3)[..., None]  # [m, 2, C, 1]
    dra[:, :C] += (same * kb.view(m, 2, C, K)).sum(1)
    dkb.view(m, 2, C, K).addcmul_(same, ra[:, None, :C])
    return dra, dkb, dlogd


def _make_level(logd: Tensor, ra: Tensor, kb: Tensor, half: int) -> Level:
    earlier, later = logd.unflatten(1, (-1, 2, half)).unbind(2)  # [m, blocks, half, K]
    row_weight = torch.stack([later.cumsum(2), _exclusive(later, 2)], 2).exp_()
    column_weight = _exclusive(earlier.flip(2), 2).flip(2).exp_()
    rows = _halves(ra, half)[..., 1, :, :] * row_weight
    columns = _halves(kb, half)[..., 0, :, :] * column_weight[:, :, None]
    return Level(rows, columns, row_weight, column_weight)


def _halves(x: Tensor, half: int) -> Tensor:
    """[m, 2C, K] as a view [m, blocks, 2 (stacked inputs), 2 (earlier, later), half, K]."""
    m, rows, K = x.shape
    return x.view(m, 2, rows // (4 * half), 2, half, K).transpose(1, 2)


def _blocks(scores: Tensor, half: int) -> Tensor:
    """The level's blocks of [m, 2C, 2C]: a view [m, blocks, 2, half, 2, half]."""
    m, size, _ = scores.shape
    blocks = size // (4 * half)
    split = scores.view(m, 2, blocks, 2, half, 2, blocks, 2, half)
    return split[:, :, :, 1, :, :, :, 0].diagonal(dim1=2, dim2=5).movedim(-1, 1)


def _exclusive(x: Tensor, dim: int = 1) -> Tensor:
    """Running sum along `dim` of what came before, without a subtraction."""
    shifted = torch.zeros_like(x)
    n = x.shape[dim]
    shifted.narrow(dim, 1, n - 1).copy_(x.narrow(dim, 0, n - 1))
    return shifted.cumsum(dim)


def _backward_sum(pairs: Tensor) -> Tensor:
    """[…, 2, n, K] of what arrives at inclusive and at exclusive sums, summed to each token."""
    inclusive, exclusive = pairs.unbind(-3)
    dim = inclusive.dim() - 2
    later = _exclusive(exclusive.flip(dim), dim).flip(dim)
    return inclusive.flip(dim).cumsum(dim).flip(dim) + later
