"""One set of inputs, what the recurrence in float64 makes of it, and how an operator is run on it.

The head is square on purpose: K = V hides a transposed state from every check of shapes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv7.wkv7 import wkv7
from rwkv7.wkv7.contract import state_dtype

STATES = ("none", "zero", "random")

# (r, w, k, v, a, b, state) -> (y, final state): shapes and layouts of wkv7, decay="logit".
Operator = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """B sequences of T tokens, H heads, K key and V value channels a head."""

    B: int = 2
    T: int = 150
    H: int = 2
    K: int = 64
    V: int = 64


class Problem:
    """Inputs as a model feeds them, rounded to `dtype`, and the results that are right for them.

    Keys are unit vectors, learning rates lie in (0, 1), decays reach both ends of their range.
    Gradients are those of a loss on y and the final state together. All of it is on the CPU.
    """

    def __init__(self, sizes: Sizes, dtype: torch.dtype, seed: int = 0) -> None:
        self.sizes, self.dtype = sizes, dtype
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        B, T, H, K, V = sizes.B, sizes.T, sizes.H, sizes.K, sizes.V
        key = torch.nn.functional.normalize(normal(B, T, H, K), dim=-1)
        rate = normal(B, T, H, K).sigmoid()
        r, k, v = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V)
        # Mostly slow decays, so that the initial state is still felt at the last token.
        w = 2.5 * normal(B, T, H, K) - 5
        self.inputs = [x.to(dtype) for x in (r, w, k, v, -key, key * rate)]
        self.dy = normal(B, T, H, V).to(dtype)
        wide = state_dtype(dtype)
        self.dfinal = normal(B, H, V, K).to(wide)
        self.random = normal(B, H, V, K).to(wide)

    def to(self, device: torch.device) -> Problem:
        """The same problem with its tensors there, so that running it moves none."""
        moved = copy.copy(self)
        moved.inputs = [x.to(device) for x in self.inputs]
        moved.dy, moved.dfinal = self.dy.to(device), self.dfinal.to(device)
        moved.random = self.random.to(device)
        return moved

    def state(self, kind: str) -> Tensor | None:
        """The initial state of that kind, one of STATES: [B, H, V, K] or None."""
        states = {"none": None, "zero": torch.zeros_like(self.random), "random": self.random}
        return states[kind]

    def reference(self, kind: str) -> dict[str, Tensor]:
        """y, state and the gradients dr … dstate by the token loop in float64."""
        if kind == "none":
            # None means zeros; only the gradient of the state has no place to go.
            return {name: x for name, x in self._reference("zero").items() if name != "dstate"}
        return self._reference(kind)

    @functools.cache  # noqa: B019 - a problem lives as long as one verification
    def _reference(self, kind: str) -> dict[str, Tensor]:
        exact = functools.partial(wkv7, backend="reference")
        return self.run(exact, kind, torch.device("cpu"), dtype=torch.float64)

    def run(
        self,
        operator: Operator,
        kind: str,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        gradients: bool = True,
    ) -> dict[str, Tensor]:
        """What `operator` makes of it on `device`: y and state, and the gradients if wanted.

        `dtype` replaces that of every tensor, for the reference.
        """

        def place(x: Tensor) -> Tensor:
            return x.to(device, dtype or x.dtype).detach()

        leaves = [place(x).requires_grad_(gradients) for x in self.inputs]
        state = self.state(kind)
        if state is not None:
            state = place(state).requires_grad_(gradients)
        y, final = operator(*leaves, state)
        found = {"y": y.detach(), "state": final.detach()}
        if not gradients:
            return found
        names = ["dr", "dw", "dk", "dv", "da", "db"]
        if state is not None:
            leaves, names = [*leaves, state], [*names, "dstate"]
        seeds = place(self.dy), place(self.dfinal)
        return found | dict(zip(names, torch.autograd.grad((y, final), leaves, seeds), strict=True))
