"""The fused neighbours and their twins side by side: inputs of each, and what both make of them."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv7.nn.fused import (
    gated_output,
    key_operands,
    loss_to_gradient_,
    mixed_value,
    shifted_mixes,
    squared_relu,
    use_fused,
)
from rwkv7.nn.token_shift import packing


class Problem(NamedTuple):
    """A neighbour's function of some tensors, all of which have gradients."""

    function: Any  # (*tensors) -> the outputs
    tensors: list[Tensor]  # float64, but their values are those of the dtype that is tested
    parameters: int  # how many of the last of them are parameters


def drawn(dtype: torch.dtype, device: str = "cpu", seed: int = 0):
    """A source of normal numbers, representable in `dtype`, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return x.to(dtype).double().to(device)

    return normal


def shift(normal, *, B=1, T=1, C=24, mixes=6, lengths=None, carried=False, added=True) -> Problem:
    """The residual sum, layer norm, token shift and mixes; packed where there are `lengths`."""
    x = normal(B, T, C)
    packed, sequences = None, B
    if lengths is not None:
        offsets = torch.tensor([0, *itertools.accumulate(lengths)], device=x.device)
        packed = packing(offsets, torch.empty(B, T, dtype=torch.long, device=x.device))
        sequences = len(lengths)

    def function(x, *rest):
        *rest, weight, bias = rest
        y = rest.pop(0) if added else None
        before = rest.pop(0) if carried else None
        norm = torch.nn.LayerNorm(C, dtype=x.dtype, device=x.device)
        del norm.weight, norm.bias  # to take those with gradients, as they are
        norm.weight, norm.bias = weight, bias
        found = shifted_mixes(x, y, norm, before, packed, tuple(rest))
        return (*found.mixed, found.last, *([found.x] if added else []))

    given = [normal(B, T, C)] if added else []
    given += [normal(sequences, C)] if carried else []
    return Problem(function, [x, *given, *(normal(C) for _ in range(mixes + 2))], mixes + 2)


def keys(normal, *, B=2, T=5, H=3, N=8) -> Problem:
    """The operator's k, a, b and w."""
    C = H * N
    tensors = [*(normal(B, T, C) for _ in range(3)), *(normal(C) for _ in range(4))]
    return Problem(lambda *x: key_operands(*x, H), tensors, 4)


def value(normal, *, B=2, T=5, H=3, N=8) -> Problem:
    """Layer 0's value in a later layer's."""
    C = H * N
    tensors = [*(normal(B, T, C) for _ in range(3)), normal(C)]
    return Problem(lambda *x: (mixed_value(*x, H),), tensors, 1)


def output(normal, *, B=2, T=5, H=3, N=8) -> Problem:
    """Group norm, bonus and gate."""
    C = H * N
    tensors = [normal(B, T, H, N) for _ in range(4)]
    tensors += [normal(B, T, C), normal(H, N), normal(C), normal(C)]
    return Problem(lambda *x: (gated_output(*x, 1e-5 * N),), tensors, 3)


def relu(normal, *, shape=(3, 700)) -> Problem:
    """The squared ReLU."""
    return Problem(lambda x: (squared_relu(x),), [normal(*shape)], 0)


def losses(
    logits: Tensor, targets: Tensor, dtype: torch.dtype, *, fused: bool, l2_wrap: float = 0.01
) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient that takes the place of the logits."""
    work = logits.to(dtype, copy=True)
    with use_fused(fused):
        return loss_to_gradient_(work, targets, l2_wrap), work


def outcome(problem: Problem, dtype: torch.dtype, *, fused: bool) -> list[Tensor]:
    """The outputs and the gradients of every tensor, computed in `dtype`."""
    leaves = [x.to(dtype).requires_grad_() for x in problem.tensors]
    with use_fused(fused):
        outputs = problem.function(*leaves)
        # Others than the inputs': a gradient that grows with the tokens would leave fp16's range.
        normal = drawn(torch.bfloat16, str(leaves[0].device), seed=1)
        seeds = [normal(*y.shape).to(y.dtype) for y in outputs]
        grads = torch.autograd.grad(outputs, leaves, seeds)
    return [*(y.detach() for y in outputs), *grads]


def errors(problem: Problem, dtype: torch.dtype, *, fused: bool) -> list[float]:
    """‖x - exact‖ / ‖exact‖ of outputs and gradients, against the twin in float64."""
    exact = outcome(problem, torch.float64, fused=False)
    found = outcome(problem, dtype, fused=fused)
    return [
        float((x.double() - e).norm() / e.norm().clamp(min=1e-30))
        for x, e in zip(found, exact, strict=True)
    ]
