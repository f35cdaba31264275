"""Cross entropy of logits with L2Wrap, and its gradient in their place, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv7.state import wide_dtype
from rwkv7.wkv7 import Operation

from .launch import on_device_of, runs_fused

IGNORED = -100  # a target of no token; torch's own number for it
_BLOCK = 4096
_WARPS = 8


def loss_to_gradient_(logits: Tensor, targets: Tensor, l2_wrap: float) -> Tensor:
    """The sum of the rows' losses, in nats; `logits` [R, V] become its gradient.

    Targets are int64 [R]; a row of the target IGNORED has neither loss nor gradient. L2Wrap adds
    l2_wrap · max to the gradient of each row's largest logit, the first of equal ones. All in
    float32 at least; the gradient is rounded once to the dtype of the logits.
    """
    if logits.is_contiguous() and runs_fused(logits):
        loss: Tensor = _loss_to_gradient(logits, targets.contiguous(), l2_wrap)
        return loss
    work = logits.to(wide_dtype(logits.dtype))
    loss = _in_wide_(work, targets, l2_wrap)
    if work is not logits:
        logits.copy_(work)
    return loss


def _in_wide_(logits: Tensor, targets: Tensor, l2_wrap: float) -> Tensor:
    counted = (targets != IGNORED)[:, None]
    target = targets[:, None].masked_fill(~counted, 0)
    wanted = logits.gather(-1, target)
    largest, where = logits.max(-1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    losses = total.log() + (largest - wanted)
    logits.div_(total)
    logits.scatter_add_(-1, target, logits.new_full((), -1).expand_as(target))
    logits.scatter_add_(-1, where, largest * l2_wrap)
    logits.masked_fill_(~counted, 0)
    return losses.masked_fill(~counted, 0).sum()


def _run(logits: Tensor, targets: Tensor, l2_wrap: float) -> Tensor:
    from .kernels.logits import loss_to_gradient

    rows, V = logits.shape
    losses = logits.new_zeros(rows, dtype=torch.float32)
    if rows:
        with on_device_of(logits):
            block = min(_BLOCK, 1 << (V - 1).bit_length())
            loss_to_gradient[(rows,)](
                logits, targets, losses, l2_wrap, IGNORED=IGNORED, V=V, BLOCK=block,
                num_warps=_WARPS,
            )  # fmt: skip
    return losses.sum()


def _fake(logits: Tensor, targets: Tensor, l2_wrap: float) -> Tensor:
    return logits.new_empty((), dtype=torch.float32)


_loss_to_gradient = Operation("rwkv7::loss_to_gradient", _run, _fake, changes=("logits",))
