"""The training loss: next-token cross entropy, and L2Wrap, which keeps the largest logit small.

Works from the features before the head, so that with a large vocabulary the logits of only some
rows exist at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

__all__ = ["L2_WRAP", "l2_wrap", "next_token_loss"]

L2_WRAP = 1e-4  # strength of the pull on the largest logit (RWKV-LM, RWKV-v7/train_temp)
LOGITS_AT_ONCE = 1 << 26  # numbers; 256 MiB in fp32


def next_token_loss(head: nn.Linear, features: Tensor, targets: Tensor) -> Tensor:
    """The mean cross entropy in nats, fp32, a scalar; its gradient has L2Wrap in it.

    Args:
        head: the model's, features [rows, C] -> logits [rows, vocabulary].
        features: what the head reads, [B, T, C].
        targets: the ids to predict, int64 [B, T].

    Where all logits at once would be large they are computed again in the backward pass, some rows
    at a time.
    """
    features, targets = features.flatten(0, 1), targets.flatten()
    total = targets.numel()
    rows = max(1, LOGITS_AT_ONCE // head.out_features)

    def part(features: Tensor, targets: Tensor) -> Tensor:
        logits = head(features).float()
        loss = functional.cross_entropy(logits, targets, reduction="sum") / total
        return l2_wrap(loss, logits, L2_WRAP / total)

    if total <= rows:
        return part(features, targets)
    parts = [
        checkpoint(part, some, wanted, use_reentrant=False)
        for some, wanted in zip(features.split(rows), targets.split(rows), strict=True)
    ]
    return torch.stack(parts).sum()


def l2_wrap(loss: Tensor, logits: Tensor, factor: float) -> Tensor:
    """`loss` unchanged; going back, adds factor · max_logit at each row's largest logit.

    The first of equal logits counts. The addition is scaled with the gradient that arrives at the
    loss, as every other part of it is.
    """
    return _L2Wrap.apply(loss, logits, factor)


class _L2Wrap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: Tensor, factor: float) -> Tensor:
        largest, where = logits.max(-1, keepdim=True)
        ctx.save_for_backward(largest * factor, where)
        ctx.shape = logits.shape
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        pull, where = ctx.saved_tensors
        return grad, pull.new_zeros(ctx.shape).scatter_(-1, where, pull * grad), None
