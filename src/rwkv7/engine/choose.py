"""The next id of every running sample from one batch of logits; the only caller of samplers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from rwkv7.sampling import Sampler, sample_batch

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
        logits: on any device; where they are drawn from there, the ids alone are copied from it.
        samplers: of each row, all different; each takes note of its draw.
        logprobs: how many log-probabilities each row wants, see `Request`.
    """
    choices = []
    drawn = sample_batch(logits, samplers)
    for row, (token, wanted) in enumerate(zip(drawn, logprobs, strict=True)):
        if token is None:
            error = f"the model gave logits whose largest is {float(logits[row].amax())}"
            choices.append(Choice(-1, None, error))
        elif wanted is None:
            choices.append(Choice(token, None, None))
        else:
            choices.append(Choice(token, _logprob(logits[row], token, wanted), None))
    return choices


def _logprob(row: Tensor, token: int, count: int) -> Logprob:
    # On the CPU, in float64: the bits depend on nothing but the row.
    log_p = row.cpu().double().log_softmax(0)
    values, ids = log_p.topk(min(count, len(log_p)))
    likeliest = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Logprob(token, float(log_p[token]), likeliest)
