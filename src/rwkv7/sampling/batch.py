"""From logits to tokens for many texts at once, each with its own sampler.

Probabilities are kept as whole numbers, so that their sums are exact and no text's token depends
on its neighbours, on how a device adds up, or on the company it is sampled in. Nothing waits for
the device but one transfer of the ids.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .sampler import Sampler

# Cuts are looked for among so many of the most probable tokens first: sorting a whole vocabulary
# costs several times as much, and hardly any text needs it.
_FEW = 1024
_BLOCK, _WARPS = 8192, 16  # of the kernel: logits looked at together, and by how many warps
_NONE, _UNSURE = -1, -2  # instead of an id: no token is possible; the cut lies beyond the few


def sample_batch(logits: Tensor, samplers: Sequence[Sampler]) -> list[int | None]:
    """The next token of each text, as its own sampler draws it from its row.

    Args:
        logits: [B, V] of any floating dtype, on any device; -inf rules a token out. Unchanged.
        samplers: B of them, all different; each takes note of its token.

    Returns:
        B ids. None for a row that has no token to give (NaN, +inf, or -inf throughout): its
        sampler is as it was. Each row is, bit for bit, what it would be alone.

    Raises:
        ValueError: shapes or numbers of samplers that do not fit, or one that is there twice.
    """
    _check(logits, samplers)
    tokens = _draw(logits, samplers, _FEW).tolist()
    if unsure := [row for row, token in enumerate(tokens) if token == _UNSURE]:
        again = _draw(logits[unsure], [samplers[row] for row in unsure], logits.shape[1])
        for row, token in zip(unsure, again.tolist(), strict=True):
            tokens[row] = token
    for sampler, token in zip(samplers, tokens, strict=True):
        if token != _NONE:
            sampler.accept(token)
    return [None if token == _NONE else token for token in tokens]


def probabilities(logits: Tensor, sampler: Sampler) -> Tensor:
    """What `sampler` would draw its next token from: [V], float64, 0 for tokens cut off.

    Args:
        logits: [V]. The sampler is not changed. A row that has no token to give is NaN.
    """
    _check(logits[None], [sampler])
    rows = _Rows.from_columns(_upload(_settings([sampler]), _device(logits)))
    z = _penalised(logits[None], [sampler], rows.temperature.device).float()
    if sampler.temperature == 0:
        greedy = torch.zeros_like(z[0], dtype=torch.float64)
        greedy[z[0].argmax()] = 1
        return torch.where(_possible(z)[0], greedy, math.nan)
    weights, _ = _kept_weights(z, [sampler], rows, z.shape[1])
    return torch.where(_possible(z)[0], weights[0].double() / weights[0].sum(), math.nan)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """The settings of R samplers, [R, 1] float64 each, on the device."""

    temperature: Tensor  # 1 for greedy ones, which do not look at it
    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor
    hf: Tensor  # 1 for the order "hf", 0 for "rwkv"
    greedy: Tensor
    uniform: Tensor

    @staticmethod
    def from_columns(table: Tensor) -> _Rows:
        return _Rows(**dict(zip(_Rows.__slots__, table.split(1, dim=1), strict=True)))

    def select(self, index: Tensor) -> _Rows:
        columns = [getattr(self, name) for name in self.__slots__]
        return _Rows.from_columns(torch.cat(columns, dim=1)[index])


@torch.no_grad()
def _draw(logits: Tensor, samplers: Sequence[Sampler], few: int) -> Tensor:
    """Ids [B] on the device, some of them _NONE or _UNSURE (not if `few` is V)."""
    device = _device(logits)
    z = _penalised(logits, samplers, device)
    if few < z.shape[1] and _has_kernel(device):
        return _draw_in_one_launch(z, _upload(_settings(samplers), device))
    z = z.float()
    likeliest = z.argmax(1, keepdim=True)
    if all(s.temperature == 0 for s in samplers):
        return likeliest.masked_fill(~_possible(z), _NONE).squeeze(1)
    rows = _Rows.from_columns(_upload(_settings(samplers), device))
    weights, unsure = _kept_weights(z, samplers, rows, few)
    below = weights.cumsum(1)
    total = below[:, -1:]
    place = (rows.uniform * total.double()).long().minimum(total - 1)
    drawn = torch.searchsorted(below, place, right=True).clamp(max=z.shape[1] - 1)
    greedy = rows.greedy > 0
    ids = drawn.masked_fill(unsure, _UNSURE)
    ids = torch.where(greedy, likeliest, ids)
    return ids.masked_fill(~_possible(z), _NONE).squeeze(1)


def _draw_in_one_launch(z: Tensor, table: Tensor) -> Tensor:
    from .kernels.draw import draw

    B, V = z.shape
    block = min(_BLOCK, 1 << (V - 1).bit_length())
    blocks = 1 << (-(-V // block) - 1).bit_length()
    near = z.new_empty(B, _FEW, dtype=torch.float32)
    ids = z.new_empty(B, _FEW, dtype=torch.int32)
    sums = z.new_empty(B, blocks, dtype=torch.int64)
    drawn = torch.empty(B, dtype=torch.int64, device=z.device)
    z = z.contiguous()
    with torch.cuda.device(z.device) if z.is_cuda else contextlib.nullcontext():
        draw[(B,)](
            z, z.stride(0), table, near, ids, sums, drawn, SCALE=_scale(V), FEW=_FEW, V=V,
            BV=block, BLOCKS=blocks, NONE=_NONE, UNSURE=_UNSURE, num_warps=_WARPS,
        )  # fmt: skip
    return drawn


def _kept_weights(
    z: Tensor, samplers: Sequence[Sampler], rows: _Rows, few: int
) -> tuple[Tensor, Tensor]:
    """What each token is drawn in proportion to, [B, V] int64, and where `few` were too few."""
    top = z.amax(1, keepdim=True)
    weights = _weights(z, top, rows.temperature)
    unsure = torch.zeros_like(top, dtype=torch.bool)
    cut = [i for i, s in enumerate(samplers) if s.temperature and _cuts(s)]
    if not cut:
        return weights, unsure
    few = min(z.shape[1], max(few, *(samplers[i].top_k for i in cut)))
    if len(cut) == len(samplers):
        least, unsure = _least(z, top, weights, rows, few)
        return weights.masked_fill(z < least, 0), unsure
    index = _upload(np.array(cut), z.device)
    found, unsure_some = _least(z[index], top[index], weights[index], rows.select(index), few)
    least = torch.full_like(top, -math.inf, dtype=torch.float64).index_copy(0, index, found)
    unsure = unsure.index_copy(0, index, unsure_some)
    return weights.masked_fill(z < least, 0), unsure


def _least(z: Tensor, top: Tensor, weights: Tensor, rows: _Rows, few: int) -> tuple[Tensor, Tensor]:
    """The least logit that stays, [R, 1] float64, and where it is not among the `few` largest."""
    V = z.shape[1]
    # What top-p and min-p go by: the model's own probabilities, or those at the temperature.
    hf = rows.hf > 0
    temperature = rows.temperature.where(hf, 1.0)
    weights = weights.where(hf, _weights(z, top, temperature))
    largest = z.topk(few, dim=1).values
    k = rows.top_k.long()
    by_k = largest.gather(1, (k - 1).clamp(0, few - 1)).where((k > 0) & (k < V), -math.inf)
    pool = by_k.where(hf, -math.inf)
    total = weights.masked_fill(z < pool, 0).sum(1, keepdim=True)
    shares = _weights(largest, top, temperature, V)
    reached = shares.cumsum(1)
    wanted = rows.top_p * total.double()
    count = ((reached - shares).double() < wanted).sum(1, keepdim=True).clamp(min=1)
    some = rows.top_p < 1
    by_p = largest.gather(1, count - 1).where(some, -math.inf)
    by_min = top.double() + rows.log_min_p * temperature
    unsure = some & (reached[:, -1:].double() < wanted) if few < V else torch.zeros_like(some)
    return torch.maximum(torch.maximum(by_k, by_p).double(), by_min), unsure


def _weights(z: Tensor, top: Tensor, temperature: Tensor, vocabulary: int | None = None) -> Tensor:
    """exp((z - top) / temperature) as whole numbers, of which `vocabulary` sum up to below 2^62.

    A token less than 2^-46 times as probable as the most probable (V = 65,536) counts as 0.
    """
    # Divided before the exponential: a low temperature then underflows to greedy, not to 0/0.
    shares = ((z.double() - top.double()) / temperature).exp_()
    return shares.mul_(_scale(vocabulary or z.shape[1])).add_(0.5).nan_to_num_(0.0).long()


def _scale(vocabulary: int) -> float:
    return 2.0 ** (61 - math.ceil(math.log2(vocabulary)))


def _settings(samplers: Sequence[Sampler]) -> np.ndarray:
    """What `_Rows` holds, [R, 7] float64."""
    return np.array(
        [
            (
                s.temperature or 1.0,
                min(s.top_k, 2**31),
                s.top_p,
                math.log(s.min_p) if s.min_p else -math.inf,
                s.order == "hf",
                s.temperature == 0,
                s.uniform() if s.temperature else 0.0,
            )
            for s in samplers
        ],
        np.float64,
    )


def _penalised(logits: Tensor, samplers: Sequence[Sampler], device: torch.device) -> Tensor:
    """Logits on the device, less what their tokens' pasts take off: then in float32."""
    z = logits.detach().to(device)
    pasts = [(row, s) for row, s in enumerate(samplers) if s.seen and (s.presence or s.frequency)]
    if not pasts:
        return z
    V = logits.shape[1]
    numbers = [(row * V, s.presence, s.frequency) for row, s in pasts]
    sizes = [s.seen for _, s in pasts]
    first, presence, frequency = np.repeat(np.array(numbers).T, sizes, axis=1)
    # A float64 holds every place exactly, so that places and what is taken travel as one array.
    both = torch.empty(2, sum(sizes), dtype=torch.float64, pin_memory=device.type == "cuda")
    places, taken = both.numpy()
    start = 0
    for size, (_, sampler) in zip(sizes, pasts, strict=True):
        sampler.past(places[start : start + size], taken[start : start + size])
        start += size
    places += first
    taken *= frequency
    taken += presence
    both = both.to(device, non_blocking=True)
    # Every place is there once, so that the order of the additions does not matter.
    flat = z.float().flatten().index_add(0, both[0].long(), both[1].float(), alpha=-1)
    return flat.view_as(z)


def _possible(z: Tensor) -> Tensor:
    """[B, 1]: rows without NaN or +inf that rule not every token out."""
    return z.amax(1, keepdim=True).isfinite()


def _cuts(sampler: Sampler) -> bool:
    return sampler.top_k > 0 or sampler.top_p < 1 or sampler.min_p > 0


def _device(logits: Tensor) -> torch.device:
    # Elsewhere (MPS) float64 is missing.
    return logits.device if logits.device.type == "cuda" else torch.device("cpu")


def _has_kernel(device: torch.device) -> bool:
    recent = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return recent and importlib.util.find_spec("triton") is not None


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    x = torch.from_numpy(array)
    # From pinned memory the host need not wait until what runs on the device is done.
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def _check(logits: Tensor, samplers: Sequence[Sampler]) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(
            f"logits: expected [B, V] in floating point, found {list(logits.shape)} "
            f"in {logits.dtype}"
        )
    if len(samplers) != logits.shape[0]:
        raise ValueError(
            f"samplers: expected one for each of {logits.shape[0]} rows, found {len(samplers)}"
        )
    if len({id(sampler) for sampler in samplers}) < len(samplers):
        raise ValueError("samplers: expected a different one for every row, found one twice")
    for sampler in samplers:
        sampler.check(logits.shape[1])
