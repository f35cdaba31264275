"""The official initialisation, which decides whether a model from scratch trains well.

Source: RWKV-LM, RWKV-v7/train_temp/src/model.py: the modules' constructors and then
`generate_init_weight`, which replaces some of it. (The table in that folder's README differs.)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .channel_mix import ChannelMix
    from .model import RWKV7, Block
    from .time_mix import TimeMix


@torch.no_grad()
def initialise_(model: RWKV7, generator: torch.Generator | None = None) -> None:
    """Set every parameter of `model` in place to its official start.

    Args:
        model: in any dtype, on any device; numbers are made in float32 or better, then rounded.
        generator: for the random ones; they are drawn on its device. None means torch's default
            generator of the model's device.
    """
    config = model.config
    V, C, L = config.vocab_size, config.width, config.layers
    draw = _Draw(model.emb.weight.device, generator)
    draw.uniform_(model.emb.weight, 1e-4)
    draw.orthogonal_(model.head.weight, 0.5 * math.sqrt(max(V / C, 1)))
    _identity_(model.ln_out)
    for layer, block in enumerate(cast("list[Block]", list(model.blocks))):
        for norm in (block.ln0, block.ln1, block.ln2):
            if norm is not None:
                _identity_(norm)
        _time_mix_(block.att, layer, L, draw)
        _channel_mix_(block.ffn, layer, L, draw)


class _Draw:
    """Random matrices, made on one device in float32 and copied into parameters."""

    def __init__(self, device: torch.device, generator: torch.Generator | None) -> None:
        # Only CUDA has the factorisations that orthogonal matrices need; others go by the CPU.
        default = device if device.type == "cuda" else torch.device("cpu")
        self.device = default if generator is None else generator.device
        self.generator = generator

    def uniform_(self, weight: Tensor, bound: float) -> None:
        x = self._scratch(weight)
        weight.copy_(x.uniform_(-bound, bound, generator=self.generator))

    def orthogonal_(self, weight: Tensor, gain: float) -> None:
        """Orthonormal columns, or rows when there are fewer of them, times `gain`."""
        rows, columns = weight.shape
        tall = rows >= columns
        x = self._scratch(weight if tall else weight.T)
        q = _orthonormal(x.normal_(generator=self.generator), gain)
        if q is not weight:
            weight.copy_(q if tall else q.T)

    def _scratch(self, weight: Tensor) -> Tensor:
        # The parameter's own memory where it will do: a head may be most of a small model. Only
        # contiguous, for numbers are drawn in the order of the memory.
        if (
            weight.dtype == torch.float32
            and weight.device == self.device
            and weight.is_contiguous()
        ):
            return weight
        return torch.empty(weight.shape, dtype=torch.float32, device=self.device)


def _orthonormal(x: Tensor, gain: float) -> Tensor:
    # The factor Q of x = QR with a positive diagonal in R is uniform over such matrices. For
    # tall Gaussian matrices, whose condition is below 6, R may come from Cholesky and Q from its
    # inverse with the same digits.
    if x.shape[0] >= 2 * x.shape[1]:
        return _tall_orthonormal_(x, gain)
    q, r = torch.linalg.qr(x)
    return q.mul_(gain * r.diagonal().sign())


def _tall_orthonormal_(x: Tensor, gain: float) -> Tensor:
    # Matrix products alone, by pieces and in place, for a head may be most of a small model. What
    # lies below a diagonal is skipped.
    columns = x.shape[1]
    blocks = [slice(start, min(start + 256, columns)) for start in range(0, columns, 256)]
    gram = x.new_zeros(columns, columns)
    for block in blocks:
        torch.mm(x[:, : block.stop].T, x[:, block], out=gram[: block.stop, block])
    r = torch.linalg.cholesky(gram, upper=True)
    identity = gain * torch.eye(columns, dtype=x.dtype, device=x.device)
    inverse = torch.linalg.solve_triangular(r, identity, upper=True)
    for rows in x.split(4096):
        for block in reversed(blocks):
            rows[:, block] = rows[:, : block.stop] @ inverse[: block.stop, block]
    return x


def _identity_(norm: nn.LayerNorm) -> None:
    norm.weight.fill_(1)
    norm.bias.zero_()


def _time_mix_(att: TimeMix, layer: int, L: int, draw: _Draw) -> None:
    C, N = att.x_r.shape[0], att.head_size
    ahead = 1 - layer / L
    depth = layer / max(L - 1, 1)
    i = torch.arange(C, dtype=torch.float64)
    for weight, power in (
        (att.x_r, 0.2),
        (att.x_g, 0.2),
        (att.x_w, 0.9),
        (att.x_a, 0.9),
        (att.x_k, 0.7),
        (att.x_v, 0.7),
    ):
        weight.copy_(1 - (i / C) ** (power * ahead))
    position = i / max(C - 1, 1)
    line = position - 0.5
    zigzag = ((i % N) - (N - 1) / 2) / max((N - 1) / 2, 0.5)
    zigzag = zigzag * zigzag.abs()
    # The 0.5 makes up for the official kernels' own -0.5 beside the softplus.
    att.w0.copy_(-6 + 6 * position ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag)
    att.a0.copy_(-0.19 + 0.3 * zigzag + 0.4 * line)
    att.k_k.copy_(0.71 - 0.1 * line)
    att.k_a.fill_(1.02)
    att.r_k.fill_(-0.04)
    pairs = [(att.w1, att.w2), (att.a1, att.a2), (att.g1, att.g2)]
    if att.mixes_value:
        att.v0.copy_(0.73 - 0.4 * line)
        pairs.append((att.v1, att.v2))
    for first, second in pairs:
        first.zero_()
        draw.orthogonal_(second, _low_rank_gain(second))
    draw.orthogonal_(att.receptance.weight, 1.0)
    draw.orthogonal_(att.key.weight, 0.1)
    draw.orthogonal_(att.value.weight, 1.0)
    att.output.weight.zero_()
    att.ln_x.weight.fill_(((1 + layer) / L) ** 0.7)
    att.ln_x.bias.zero_()


def _low_rank_gain(weight: Tensor) -> float:
    rows, columns = weight.shape
    return 0.1 * math.sqrt(max(rows / columns, 1))


def _channel_mix_(ffn: ChannelMix, layer: int, L: int, draw: _Draw) -> None:
    C = ffn.x_k.shape[0]
    i = torch.arange(C, dtype=torch.float64)
    ffn.x_k.copy_(1 - (i / C) ** ((1 - layer / L) ** 4))
    draw.orthogonal_(ffn.key.weight, 1.0)
    ffn.value.weight.zero_()
