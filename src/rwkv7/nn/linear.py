"""The matrix product of every projection, and the shape in which one row of it is fast.

Decoding one sequence is one row after another; everything else is torch.nn.Linear as it is.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from rwkv7.machine import device_name


class Linear(nn.Linear):
    """x Wᵀ with W [out, in] and no bias."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(inputs, outputs, bias=False, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if self._is_one_row(x):
            # A batch of two half matrices times one vector takes half to a third of the time of the
            # whole matrix, when it is not in a cache. The halves are views.
            # (The column's strides, 1 and `in`, choose the kernel: 1 and 1 would get a slow one.)
            halves = self.weight.view(2, -1, self.in_features)
            column = x.as_strided((2, self.in_features, 1), (0, 1, self.in_features))
            return torch.bmm(halves, column).view(*x.shape[:-1], self.out_features)
        return super().forward(x)

    def _is_one_row(self, x: Tensor) -> bool:
        # What is false most often comes first: a step asks for each of its products.
        if x.numel() != self.in_features or torch.compiler.is_compiling():
            return False
        weight = self.weight
        return (
            _halves_are_fast()
            and weight.dtype == x.dtype == torch.float32
            and weight.device.type == "cpu"
            and self.out_features % 2 == 0
            and weight.is_contiguous()
            and x.is_contiguous()
            and not torch.is_autocast_enabled("cpu")
            and not (torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad))
        )


@functools.cache
def _halves_are_fast() -> bool:
    """On AMD's processors, whose products of one vector MKL does slowly.

    On Intel's they take twice the time of the whole: a Xeon reads [65536, 768] at 12 GB/s in halves
    and at 28 GB/s in one, with two threads.
    """
    return "AMD" in device_name(torch.device("cpu"))


def plain_weights(*modules: nn.Module) -> list[Tensor] | None:
    """The matrices of modules that only multiply by them; None where one does more.

    An adapter or a hook is more.
    """
    if not all(type(m) is Linear and not m._forward_hooks for m in modules):
        return None
    weights: list[Tensor] = [m.weight for m in modules if isinstance(m, Linear)]
    return weights if all(weight.is_contiguous() for weight in weights) else None
