"""Pair weights where decays have RWKV-7's floor: one product of factors exp(g) and exp(-g).

With -e^(-1/2) ≤ log d and at most 32 tokens a chunk, exp(-g) stays below 3e8, so the factors lose
no range and every score is one sum of products, each as exact as its factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operands import Operands, causal_mask, sum_matrix


def make_operands(logd: Tensor, ra: Tensor, kb: Tensor) -> Operands:
    """From log decays [m, C, K] and inputs [m, 2C, K]; `ra` and `kb` are overwritten."""
    m, C, K = logd.shape
    sums = sum_matrix(C, logd.dtype, logd.device).expand(m, C, C)
    weight = logd.new_empty(m, 2 * C, K)
    torch.bmm(sums, logd, out=weight[:, :C])
    weight[:, :C].exp_()
    weight[:, C] = 1
    weight[:, C + 1 :] = weight[:, : C - 1]
    inverse = weight[:, :C].reciprocal()
    ra *= weight
    kb.view(m, 2, C, K).mul_(inverse[:, None])
    decay = weight[:, C - 1]
    scores = torch.bmm(ra, kb.mT).mul_(causal_mask(C, logd.dtype, logd.device))
    return Operands(ra, kb * decay[:, None], decay, scores, weight, inverse, kb)


def operand_gradients(
    operands: Operands, dscores: Tensor, dra: Tensor, dkb_end: Tensor, ddecay: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of r and a, of k and b, and of the log decay; overwrites its arguments.

    A log decay acts on every sum g from its token on. What arrives at g_t and e_t is kept as
    unrounded products of the very factors used, so that pairs on one side of a token cancel.
    """
    ra, kb = operands.ra, operands.kb
    assert kb is not None
    m, C, K = operands.kb_weight.shape
    dscores *= causal_mask(C, ra.dtype, ra.device)
    dra.baddbmm_(dscores, kb)
    at_end = torch.linalg.vecdot(operands.kb_end, dkb_end, dim=1)
    at_end += operands.decay * ddecay
    dkb = dkb_end.mul_(operands.decay[:, None]).baddbmm_(dscores.mT, ra)
    arriving = (ra[:, :C] * dra[:, :C]).addcmul_(kb[:, :C], dkb[:, :C], value=-1)
    arriving.addcmul_(kb[:, C:], dkb[:, C:], value=-1)
    arriving[:, :-1].addcmul_(ra[:, C + 1 :], dra[:, C + 1 :])  # e_{t+1} = g_t
    sums = sum_matrix(C, ra.dtype, ra.device).expand(m, C, C)
    dlogd = torch.baddbmm(at_end[:, None], sums.mT, arriving)
    dra *= operands.ra_weight
    dkb.view(m, 2, C, K).mul_(operands.kb_weight[:, None])
    return dra, dkb, dlogd
