"""Each family's recurrence as a plain fp64 loop, in that family's own words and state layout."""

from __future__ import annotations

import torch
from torch import Tensor


def fla_loop(r, w, k, v, a, b, state=None, scale=1.0) -> tuple[Tensor, Tensor]:
    """[B, T, H, K] with the log decay w; the state is [B, H, K, V]: rows are keys."""
    r, w, k, v, a, b = (x.double() for x in (r, w, k, v, a, b))
    B, T, H, K = r.shape
    S = torch.zeros(B, H, K, v.shape[-1], dtype=torch.float64)
    S = S if state is None else state.double()
    ys = []
    for t in range(T):
        aS = (a[:, t, :, :, None] * S).sum(-2, keepdim=True)
        S = w[:, t].exp()[..., None] * S + b[:, t, :, :, None] * aS
        S = S + k[:, t, :, :, None] * v[:, t, :, None, :]
        ys.append((S * r[:, t, :, :, None]).sum(-2) * scale)
    return torch.stack(ys, 1), S


def official_loop(r, w, k, v, a, b, state=None, head_size=64) -> tuple[Tensor, Tensor]:
    """[B, T, C] with w = -softplus(-logit) - 0.5; the state is [B, H, V, K]: rows are values."""
    B, T, C = r.shape
    shape = B, T, C // head_size, head_size
    r, w, k, v, a, b = (x.double().view(shape) for x in (r, w, k, v, a, b))
    S = torch.zeros(B, C // head_size, head_size, head_size, dtype=torch.float64)
    S = S if state is None else state.double()
    ys = []
    for t in range(T):
        Sa = (S * a[:, t, :, None, :]).sum(-1, keepdim=True)
        S = S * torch.exp(-torch.exp(w[:, t]))[..., None, :] + Sa * b[:, t, :, None, :]
        S = S + v[:, t, :, :, None] * k[:, t, :, None, :]
        ys.append((S * r[:, t, :, None, :]).sum(-1))
    return torch.stack(ys, 1).reshape(B, T, C), S
