"""The next id of every running sample from one batch of logits; the only caller of samplers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from rwkv7.sampling import Sampler

from .request import Logprob


class Choice(NamedTuple):
    """A drawn id; or, in its place, why none could be drawn."""

    token: int
    logprob: Logprob | None
    error: str | None


def choose(
    logits: Tensor, samplers: Sequence[Sampler], logprobs: Sequence[int | None]
) -> list[Choice]:
    """One choice for each row of logits [B, V]; a row that is no distribution spoils no other.

    Args:
        logits: on any device; copied from it once.
        samplers: of each row; their draws advance.
        logprobs: how many log-probabilities each row wants, see `Request`.
    """
    rows = logits.cpu()
    sound = rows.amax(-1).isfinite().tolist()
    choices = []
    for row, sampler, wanted, fine in zip(rows, samplers, logprobs, sound, strict=True):
        if not fine:
            error = f"the model gave logits whose largest is {float(row.amax())}"
            choices.append(Choice(-1, None, error))
            continue
        token = sampler.sample(row)
        logprob = None if wanted is None else _logprob(row, token, wanted)
        choices.append(Choice(token, logprob, None))
    return choices


def _logprob(row: Tensor, token: int, count: int) -> Logprob:
    log_p = row.double().log_softmax(0)
    values, ids = log_p.topk(min(count, len(log_p)))
    likeliest = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Logprob(token, float(log_p[token]), likeliest)
