"""The training loss: head, next-token cross entropy and L2Wrap in one, some rows at a time.

The gradients of a row's logits are known as soon as the logits are, so features and head get theirs
in the forward pass and nothing of size rows x vocabulary outlives its piece. What the features are
is the model's affair, how many tokens a mean is over the caller's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv7.nn.fused import loss_to_gradient_
from rwkv7.state import wide_dtype

from .batch import IGNORED

__all__ = ["L2_WRAP", "next_token_loss", "predicted"]

L2_WRAP = 1e-4  # strength of the pull on the largest logit (RWKV-LM, RWKV-v7/train_temp)
LOGITS_AT_ONCE = 1 << 29  # bytes of logits as the head's product gives them


def next_token_loss(
    head: nn.Linear,
    features: Tensor,
    targets: Tensor,
    *,
    denominator: Tensor | float | None = None,
    l2_wrap: float = L2_WRAP,
) -> Tensor:
    """The mean cross entropy in nats, a scalar; its gradient has L2Wrap in it.

    L2Wrap leaves the value alone and adds l2_wrap · max_logit to the gradient of each predicted
    row's largest logit (the first of equal ones), scaled like every other part of the gradient.

    Args:
        head: the model's, without a bias: features [rows, C] -> logits [rows, V]. Its weight may be
            frozen, or tied to the embedding.
        features: what the head reads, [B, T, C].
        targets: the ids to predict, int64 [B, T]; where IGNORED, neither loss nor gradient.
        denominator: what the sum over predicted tokens is divided by; None means their number (1 if
            there is none). The number in the whole batch makes the losses, and the gradients, of
            its parts add up to those of the whole.
        l2_wrap: strength of the pull on the largest logit; 0 is cross entropy alone.

    Products run in autocast's dtype where it is on, the loss in fp32; fp64 stays fp64. The result
    is differentiable once.

    Raises:
        TypeError: a head that is no plain torch.nn.Linear without bias.
        ValueError: shapes that do not fit, or, on the CPU, targets outside the vocabulary.
    """
    _check(head, features, targets)
    features, targets = features.flatten(0, 1), targets.flatten()
    count = predicted(targets).clamp(min=1) if denominator is None else denominator
    gradients = torch.is_grad_enabled()
    loss = _HeadLoss.apply(features, head.weight, targets, l2_wrap, count, gradients)
    assert isinstance(loss, Tensor)
    return loss


def predicted(targets: Tensor) -> Tensor:
    """How many of the targets are to be predicted, int64, a scalar on their device."""
    return (targets != IGNORED).sum()


class _HeadLoss(torch.autograd.Function):
    """features [R, C], weight [V, C], targets [R] -> the loss. Gradients are kept undivided."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        targets: Tensor,
        l2_wrap: float,
        denominator: Tensor | float,
        gradients: bool,
    ) -> Tensor:
        wide, dtype = wide_dtype(features.dtype), _product_dtype(features)
        wanted = [needed and gradients for needed in ctx.needs_input_grad[:2]]
        dfeatures = torch.empty_like(features) if wanted[0] else None
        # A piece of the sum over rows may be rounded to 16 bits, the sum is not.
        dweight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        loss = features.new_zeros((), dtype=wide)
        rows = max(1, LOGITS_AT_ONCE // (weight.shape[0] * dtype.itemsize))
        with torch.autocast(features.device.type, enabled=False):
            matrix = weight.to(dtype)
            for start in range(0, targets.shape[0], rows):
                some = slice(start, start + rows)
                x = features[some].to(dtype)
                logits = x @ matrix.T
                loss += loss_to_gradient_(logits, targets[some], l2_wrap)
                if dfeatures is not None:
                    dfeatures[some] = logits @ matrix
                if dweight is not None:
                    _add_product_(dweight, logits, x)
        ctx.gradients = dfeatures, None if dweight is None else dweight.to(weight.dtype)
        ctx.denominator = denominator
        return loss / denominator

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "next_token_loss: expected retain_graph=True in the first backward pass, found a "
                "second one without it"
            )
        # Divided here, not in each row: a gradient in fp16 keeps its digits until it is scaled.
        scale, gradients = grads[0] / ctx.denominator, ctx.gradients
        if _graph_is_kept():
            dfeatures, dweight = (None if x is None else x * scale for x in gradients)
        else:
            # The head's gradient is large: nobody will ask for it again, so it is not copied.
            ctx.gradients = None
            dfeatures, dweight = (None if x is None else x.mul_(scale) for x in gradients)
        return dfeatures, dweight, None, None, None, None


def _graph_is_kept() -> bool:
    """Whether the backward pass under way may be followed by another (retain_graph=True)."""
    # torch tells it to its own compiler alone; where it does not tell, the answer is the safe one.
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return bool(tell())


def _add_product_(total: Tensor, x: Tensor, y: Tensor) -> None:
    """total [V, C] += x [R, V] transposed times y [R, C]."""
    # Newer torch adds products of 16 bits up in fp32, in one launch and without rounding them.
    if total.is_cuda and x.dtype != total.dtype and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.ops.aten.addmm.dtype_out(total, x.T, y, total.dtype, out=total)
    else:
        total += x.T @ y


def _product_dtype(features: Tensor) -> torch.dtype:
    device = features.device.type
    if features.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return features.dtype
    return torch.get_autocast_dtype(device)


def _check(head: nn.Linear, features: Tensor, targets: Tensor) -> None:
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise TypeError(
            f"head: expected a torch.nn.Linear without bias, found {head}; adapters belong on "
            "other layers"
        )
    C, V = head.in_features, head.out_features
    if features.shape != (*targets.shape, C):
        raise ValueError(
            f"features: expected [B, T, C] = {[*targets.shape, C]} for targets "
            f"{list(targets.shape)} and this head, found {list(features.shape)}"
        )
    if targets.device.type == "cpu" and targets.numel():
        wrong = (targets != IGNORED) & ((targets < 0) | (targets >= V))
        if bool(wrong.any()):
            raise ValueError(
                f"targets: expected ids from 0 to {V - 1}, or {IGNORED} where nothing is "
                f"predicted, found {int(targets[wrong][0])}"
            )
