"""What is measured: a shape, inputs as a model feeds them, and the results that are right for them.

Who is measured is the affair of `subjects`, how long it takes that of `clock`.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv7.wkv7 import wkv7
from rwkv7.wkv7.contract import log_decay, state_dtype
from rwkv7.wkv7.tolerance import GRADIENTS, compare

# The token loop in float64 takes about a millisecond a token with its gradients, and keeps them.
JUDGED_TOKENS = 4096
_JUDGED_HEADS = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """B sequences of T tokens, H heads of N key and N value channels; S > 0: so many, packed."""

    B: int
    T: int
    H: int
    N: int
    S: int = 0

    @staticmethod
    def parse(text: str) -> Shape:
        """The shape that "2x1024x4x64" names, or "1x4096x4x64/9", 9 ragged sequences packed in it.

        ValueError for anything else.
        """
        if re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", text):
            return Shape(*map(int, text.split("x")))
        if re.fullmatch(r"1(x[1-9]\d*){3}/[1-9]\d*", text):
            B, T, H, N, S = map(int, text.replace("/", "x").split("x"))
            shape = Shape(B, T, H, N, S)
            if shape.S <= shape.T:
                return shape
        raise ValueError(
            "shape: expected BxTxHxN such as 2x1024x4x64, or 1xTxHxN/S for S packed sequences of "
            f"a token or more, found {text!r}"
        )

    def __str__(self) -> str:
        return f"{self.B}x{self.T}x{self.H}x{self.N}" + (f"/{self.S}" if self.S else "")


class Sample:
    """Seeded inputs of one shape on a device, and the gradients that come back.

    Decay logits lie in [-6, 0], keys are unit vectors, learning rates lie in (0, 1); the state is
    float32 (float64 for float64) and not zero; gradients come through y and the final state.
    `repeated_key`: nearly one key at every step, learning rate 0.98, decay near 1, what a
    repeated token does and where an inverse loses its digits.

    Attributes:
        inputs: r, w (logits), k, v, a, b, each [B, T, H, N].
        state, dfinal: [B, H, N, N], [S, H, N, N] when packed.
        dy: [B, T, H, N].
        cu_seqlens: [S + 1] int64 or None.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        *,
        repeated_key: bool = False,
        seed: int = 0,
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        generator = torch.Generator(device).manual_seed(seed)
        wide = state_dtype(dtype)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, device=device, dtype=wide)

        unit = functools.partial(torch.nn.functional.normalize, dim=-1)
        B, T, H, N = shape.B, shape.T, shape.H, shape.N
        key, rate, w = unit(normal(B, T, H, N)), normal(B, T, H, N).sigmoid(), None
        if repeated_key:
            key = unit(unit(normal(B, 1, H, N)) + 0.01 / math.sqrt(N) * key)
            rate, w = torch.full_like(rate, 0.98), torch.full_like(rate, -8.0, dtype=dtype)
        else:
            uniform = torch.rand(B, T, H, N, generator=generator, device=device, dtype=wide)
            w = (6 * uniform - 6).to(dtype)
            del uniform
        a, b = (-key).to(dtype), (key * rate).to(dtype)
        k = key.to(dtype) if repeated_key else normal(B, T, H, N).to(dtype)
        del key, rate
        r, v = normal(B, T, H, N).to(dtype), normal(B, T, H, N).to(dtype)
        self.inputs = [r, w, k, v, a, b]
        self.dy = normal(B, T, H, N).to(dtype)
        sequences = shape.S or B
        self.state, self.dfinal = normal(sequences, H, N, N), normal(sequences, H, N, N)
        self.cu_seqlens = _ragged(T, shape.S, seed).to(device) if shape.S else None

    def decays(self, form: str) -> Tensor:
        """The decay in the form that `wkv7` calls "logit" or "log_bounded", [B, T, H, N]."""
        w = self.inputs[1]
        return w if form == "logit" else log_decay(w, "logit", self.state.dtype).to(w.dtype)

    def beginning(self) -> Sample:
        """The same with the first JUDGED_TOKENS of every sequence alone; itself where packed."""
        shape = self.shape
        if shape.S or shape.T <= JUDGED_TOKENS:
            return self
        short = copy.copy(self)
        short.shape = Shape(shape.B, JUDGED_TOKENS, shape.H, shape.N)
        short.inputs = [x[:, :JUDGED_TOKENS].contiguous() for x in self.inputs]
        short.dy = self.dy[:, :JUDGED_TOKENS].contiguous()
        return short


class Judge:
    """Holds results on a sample to the recurrence in float64: first sequence, two heads.

    Heads and sequences do not feel each other, so that this judges the whole call, while the loop
    over all of it would take minutes and more memory than there is. Of a packed batch it sees the
    first sequences, up to about JUDGED_TOKENS.
    """

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        offsets = [0, sample.shape.T] if sample.cu_seqlens is None else sample.cu_seqlens.tolist()
        self._sequences = max(1, sum(end <= JUDGED_TOKENS for end in offsets[1:]))
        self._tokens = offsets[self._sequences]

    def errors(self, found: Mapping[str, Tensor], form: str) -> tuple[dict[str, float], bool]:
        """The errors by name, and whether all are within their bounds.

        `found` has the names and layouts of RESULTS. `form` is that of the decays that the
        subject got: the recurrence gets the same, so that rounding them is nobody's error.
        """
        part = {name: self._part(name, x) for name, x in found.items()}
        reference = self._reference(form)
        measures = compare(part, {name: reference[name] for name in part}, self._sample.dtype)
        errors = {name: measure.error for name, measure in measures.items()}
        return errors, all(measure.ok for measure in measures.values())

    def _part(self, name: str, x: Tensor) -> Tensor:
        if name in ("state", "dstate"):
            return x[: self._sequences, :_JUDGED_HEADS]
        return x[:1, : self._tokens, :_JUDGED_HEADS]

    @functools.cache  # noqa: B019 - a judge lives as long as the measurements of one sample
    def _reference(self, form: str) -> dict[str, Tensor]:
        sample = self._sample
        # Apple's MPS has no float64.
        place = torch.device("cpu") if sample.device.type == "mps" else sample.device

        def exact(name: str, x: Tensor) -> Tensor:
            return self._part(name, x).to(place, torch.float64).detach()

        r, _, k, v, a, b = sample.inputs
        leaves = [exact("y", x).requires_grad_() for x in (r, sample.decays(form), k, v, a, b)]
        leaves.append(exact("state", sample.state).requires_grad_())
        cu = sample.cu_seqlens
        cu = None if cu is None else cu[: self._sequences + 1].to(place)
        seeds = exact("y", sample.dy), exact("state", sample.dfinal)
        with torch.enable_grad():
            y, final = wkv7(*leaves, decay=form, cu_seqlens=cu, backend="reference")
            gradients = torch.autograd.grad((y, final), leaves, seeds)
        found = {"y": y, "state": final, **dict(zip(GRADIENTS, gradients, strict=True))}
        return {name: x.detach().cpu() for name, x in found.items()}


def _ragged(tokens: int, sequences: int, seed: int) -> Tensor:
    """Offsets [S + 1] of sequences of a token or more, cut at random places."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(tokens - 1, generator=generator)[: sequences - 1].sort().values + 1
    return torch.cat((torch.tensor([0]), cuts, torch.tensor([tokens])))
