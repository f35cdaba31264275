"""What the ranks of one sequence tell each other, with its gradient.

Every function is a collective: all ranks call it, in one order, and in backward too. Which tokens a
rank holds is in piece.py, what a state is made of in operator.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .piece import Piece

__all__ = ["gather", "hand_on_shift", "sum_gradients", "sum_over_ranks"]


def gather(x: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """The `x` of every rank, in their order; all have one shape and dtype. Has no gradient."""
    x = x.detach().contiguous()
    found = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, x, group=group)
    return found


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of every rank's `x`, on every rank.

    Backward sums what arrives on the ranks: the loss is the sum of the ranks' losses.
    """
    total = _Sum.apply(x, group)
    assert isinstance(total, Tensor)
    return total


def hand_on_shift(
    carried: Tensor, last: Tensor, piece: Piece, group: dist.ProcessGroup | None
) -> Tensor:
    """The vectors before each sequence's first token here, [R, C].

    Args:
        carried: [R, C], for sequences that begin here.
        last: the input of the piece's last token, [B, C], for the next rank.
    """
    vectors = _HandOn.apply(carried, last, piece, group)
    assert isinstance(vectors, Tensor)
    return vectors


def sum_gradients(parameters: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Give every rank the sum of the ranks' gradients, in place; a missing one counts as zero.

    For the parameters of a model whose ranks each worked on a part, and for a state that all of
    them were given.
    """
    for x in parameters:
        if x.requires_grad:
            if x.grad is None:
                x.grad = torch.zeros_like(x)
            dist.all_reduce(x.grad, group=group)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _HandOn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, carried: Tensor, last: Tensor, piece: Piece, group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.piece, ctx.group = piece, group
        ctx.dtypes = carried.dtype, last.dtype
        everyone = gather(last, group)
        # In the layer's own dtype, which autocast may have made wider than the state's.
        vectors = carried.to(last.dtype, copy=True)
        if piece.head:
            vectors[piece.arriving] = everyone[piece.rank - 1]
        return vectors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        piece, grad = ctx.piece, grads[0]
        arrived = grad[piece.arriving]
        everyone = gather(arrived if piece.head else torch.zeros_like(arrived), ctx.group)
        dlast = everyone[piece.rank + 1] if piece.tail else torch.zeros_like(arrived)
        dcarried = grad.clone()
        if piece.head:
            dcarried[piece.arriving] = 0
        return dcarried.to(ctx.dtypes[0]), dlast.to(ctx.dtypes[1]), None, None
