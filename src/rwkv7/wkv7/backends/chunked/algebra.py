"""The mathematics of a piece: chunks to affine maps, the scan over them, outputs and gradients.

Letters: m chunks x heads, C tokens a chunk, K key size, V value size. With g the inclusive sum of
log decays inside a chunk and e the exclusive one,

    ρ = r exp(g)   α = a exp(e)   κ̄ = k exp(g_C - g)   β̄ = b exp(g_C - g)   D = diag exp(g_C)
    scores A[x, y][i, j] = Σ_c x_i y_j exp(decay between them), i ≥ j (rows r) or i > j (rows a)
    W = X α   U₀ = X A[a,k] V   with X = (I - A[a,b])⁻¹
    S₁ = S₀ M + B,  M = D + Wᵀβ̄,  B = Vᵀκ̄ + U₀ᵀβ̄
    y = (ρ + A[r,b] W) S₀ᵀ + A[r,k] V + A[r,b] U₀

r and a are stacked in one tensor, k and b in another, v and u in a third, so that four products
become one. The inverse comes from forward substitution: powers of A[a,b] grow without bound on a
repeated key, the inverse does not. Sums stand outside the products, because torch's CPU baddbmm
falls back to one product at a time where its summand is a slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import bounded, unbounded
from .operands import Operands


@dataclass(frozen=True, slots=True)
class Chunks:
    """One piece of the call, padded with tokens that do nothing."""

    w: Tensor  # [m, C, K], as given
    logd: Tensor  # [m, C, K], log decay
    ra: Tensor  # [m, 2C, K]: r, then a
    kb: Tensor  # [m, 2C, K]: k, then b
    vu: Tensor  # [m, 2C, V]: v, then room for u


@dataclass(frozen=True, slots=True)
class Prepared:
    """What of a piece does not depend on the state."""

    operands: Operands
    X: Tensor  # [m, C, C], (I - A[a,b])⁻¹
    WU: Tensor  # [m, C, K + V]: W, then U₀
    PY: Tensor  # [m, C, K + V]: ρ + A[r,b] W, then the output from an empty state
    MB: Tensor  # [m, K + V, K]: M, then B
    vu: Tensor  # [m, 2C, V]: v, then room for u

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return self.WU.dtype

    def new_states(self) -> Tensor:
        """Room for one state a chunk, [m, V, K]."""
        m, _, K = self.MB.shape
        return self.MB.new_empty(m, self.vu.shape[-1], K)


def prepare(chunks: Chunks, any_decay: bool) -> Prepared:
    """Every chunk's scores, solved system, affine map and output from an empty state."""
    route = unbounded if any_decay else bounded
    operands = route.make_operands(chunks.logd, chunks.ra, chunks.kb)
    scores, vu = operands.scores, chunks.vu
    m, C = scores.shape[0], scores.shape[1] // 2
    K = operands.ra.shape[-1]
    seen = torch.bmm(scores[..., :C], vu[:, :C])  # A[r,k] V, then A[a,k] V
    identity = torch.eye(C, dtype=scores.dtype, device=scores.device).expand(m, C, C)
    X = torch.linalg.solve_triangular(-scores[:, C:, C:], identity, upper=False, unitriangular=True)
    WU = torch.bmm(X, torch.cat([operands.ra[:, C:], seen[:, C:]], 2))
    PY = torch.bmm(scores[:, :C, C:], WU)
    PY[..., :K] += operands.ra[:, :C]
    PY[..., K:] += seen[:, :C]
    MB = torch.bmm(WU.mT, operands.kb_end[:, C:])
    MB[:, K:] += torch.bmm(vu[:, :C].mT, operands.kb_end[:, :C])
    MB[:, :K].diagonal(dim1=1, dim2=2).add_(operands.decay)
    return Prepared(operands, X, WU, PY, MB, vu)


def scan_states(prepared: Prepared, state: Tensor, starts: Tensor, counts: list[int]) -> Tensor:
    """Fill `starts` with each chunk's state before it; return the state [S, H, V, K] after."""
    _, H, V, K = state.shape
    starts = starts.view(-1, V, K)
    S, ended, done = state.reshape(-1, V, K), [], 0
    for count in counts:
        n = count * H
        if n < S.shape[0]:
            ended.append(S[n:])
            S = S[:n]
        rows = slice(done, done + n)
        starts[rows] = S
        S = torch.bmm(S, prepared.MB[rows, :K]).add_(prepared.MB[rows, K:])
        done += n
    return torch.cat([S, *reversed(ended)]).view(state.shape)


def outputs(prepared: Prepared, starts: Tensor) -> Tensor:
    """y of every chunk, [m, C, V]."""
    K = prepared.MB.shape[-1]
    S = starts.reshape(-1, *starts.shape[-2:])
    return torch.bmm(prepared.PY[..., :K], S.mT).add_(prepared.PY[..., K:])


def scan_gradients(
    prepared: Prepared, E: Tensor, dY: Tensor | None, ends: Tensor, counts: list[int]
) -> Tensor:
    """Fill `ends` with the gradient of each chunk's last state; return that of the first.

    E_before = E_after Mᵀ + dYᵀ (ρ + A[r,b] W), from the last chunk to the first; E [S, H, V, K].
    """
    _, H, V, K = E.shape
    through = None if dY is None else torch.bmm(dY.mT, prepared.PY[..., :K])
    flat = E.reshape(-1, V, K).clone()
    stop = ends.shape[0]
    for count in reversed(counts):
        n = count * H
        rows = slice(stop - n, stop)
        ends[rows] = flat[:n]
        M = prepared.MB[rows, :K].mT
        flat[:n] = torch.bmm(ends[rows], M)
        if through is not None:
            flat[:n] += through[rows]
        stop -= n
    return flat.view(E.shape)


def gradients(
    prepared: Prepared, starts: Tensor, ends: Tensor, dY: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of r, the log decay, k, v, a, b of every chunk, [m, C, K or V].

    `starts` are the states before each chunk, `ends` the gradients of the states after it.
    """
    operands, vu = prepared.operands, prepared.vu
    S, E = starts.reshape(-1, *starts.shape[-2:]), ends
    scores, kb_end = operands.scores, operands.kb_end
    C, K = scores.shape[1] // 2, prepared.MB.shape[-1]
    vu[:, C:] = torch.bmm(prepared.WU[..., :K], S.mT).add_(prepared.WU[..., K:])  # u
    dvu = torch.bmm(kb_end, E.mT)  # κ̄ Eᵀ, then β̄ Eᵀ
    du = dvu[:, C:]
    if dY is not None:
        du = torch.bmm(scores[:, :C, C:].mT, dY).add_(du)
    yz = vu.new_empty(vu.shape)  # dY, then the gradient of the solved system's right-hand side
    yz[:, :C] = 0 if dY is None else dY
    yz[:, C:] = torch.bmm(prepared.X.mT, du)
    dv = torch.bmm(scores[..., :C].mT, yz).add_(dvu[:, :C])
    dscores = torch.bmm(yz, vu.mT)
    dra = torch.bmm(yz, S)
    dkb_end = torch.bmm(vu, E)
    ddecay = torch.linalg.vecdot(S, E, dim=1)
    route = unbounded if operands.raw is not None else bounded
    dra, dkb, dlogd = route.operand_gradients(operands, dscores, dra, dkb_end, ddecay)
    return dra[:, :C], dlogd, dkb[:, :C], dv, dra[:, C:], dkb[:, C:]
