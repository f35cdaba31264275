"""Time mix: from six mixed inputs to the operator's six arguments, and from its output back.

The recurrence itself is `rwkv7.wkv7`; the order and the activations here follow RWKV-LM,
RWKV-v7/train_temp/src/model.py, and differ from branch to branch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rwkv7.config import ModelConfig
from rwkv7.state import wide_dtype
from rwkv7.wkv7 import wkv7, wkv7_step_

from .again import again
from .before import Before
from .fused import (
    Projections,
    StepParameters,
    TimeMixWeights,
    gated_output,
    key_operands,
    mixed_in_pool_,
    mixed_value,
    runs_fused_step,
    time_mix_step_,
)
from .linear import Linear, plain_weights
from .token_shift import Packing, Slots

# Group norm's eps is 64e-5 for heads of 64: one 1e-5 for each channel of a head.
GROUP_NORM_EPS = 1e-5

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # the operator's r, w, k, v, a, b


class TimeMix(nn.Module):
    """RWKV-7's attention-like half. Parameters are named as in checkpoints, vectors are [C].

    The low-rank matrices are stored input first, w1 [C, D] and w2 [D, C], unlike nn.Linear.
    Layer 0 sets the value that later layers mix in, and so has no v0, v1, v2.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        C, H, N = config.width, config.heads, config.head_size

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        self.heads, self.head_size = H, N
        self.x_r, self.x_w, self.x_k = empty(C), empty(C), empty(C)
        self.x_v, self.x_a, self.x_g = empty(C), empty(C), empty(C)
        D = config.decay_rank
        self.w0, self.w1, self.w2 = empty(C), empty(C, D), empty(D, C)
        D = config.iclr_rank
        self.a0, self.a1, self.a2 = empty(C), empty(C, D), empty(D, C)
        self.mixes_value = layer > 0
        if self.mixes_value:
            D = config.value_rank
            self.v0, self.v1, self.v2 = empty(C), empty(C, D), empty(D, C)
        D = config.gate_rank
        self.g1, self.g2 = empty(C, D), empty(D, C)
        self.k_k, self.k_a, self.r_k = empty(C), empty(C), empty(H, N)
        self.receptance, self.key, self.value, self.output = (
            Linear(C, C, dtype, device) for _ in range(4)
        )
        self.ln_x = nn.GroupNorm(H, C, eps=GROUP_NORM_EPS * N, dtype=dtype, device=device)

    def forward(
        self,
        mixed: tuple[Tensor, ...],
        v_first: Tensor | None,
        state: Tensor | None,
        packed: Packing | None = None,
        backend: str | None = None,
        before: Before | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer over T ≥ 1 tokens.

        Args:
            mixed: the normalised input, shifted and mixed by each of `mixes`: six [B, T, C].
            v_first: layer 0's value, [B, T, C]; None in layer 0.
            state: the WKV state [S, H, V, K]; None means zeros. S = B unless packed.
            packed: the ends of packed sequences.
            backend: the operator's backend, None for its default.
            before: what another process holds of the sequence, None when it is all here.

        Returns:
            (output [B, T, C], layer 0's value, the state to carry on).
        """
        projections = self._projections(mixed)
        inputs, v_first = self._operands(projections, v_first)
        if before is None and self._may_step(mixed[0], packed, backend):
            state = _zeros(inputs) if state is None else state.clone()
            r, w, k, v, a, b = (z.squeeze(1) for z in inputs)
            y = wkv7_step_(r, w, k, v, a, b, state).unsqueeze(1)
        else:
            offsets = None if packed is None else packed.offsets
            operator = wkv7 if before is None else before.wkv7
            y, state = operator(*inputs, state, cu_seqlens=offsets, backend=backend)
        return self._gated(y, inputs, projections.g), v_first, state

    def step_(
        self,
        x: Tensor,
        v_first: Tensor | None,
        shift: Tensor,
        state: Tensor,
        slots: Slots,
    ) -> tuple[Tensor, Tensor]:
        """One token a sequence, x [B, C], rows of the pools changed in place.

        `shift` [P, C] and `state` [P, H, V, K] are the pools. Returns (output [B, C], layer 0's
        value [B, 1, C]).
        """
        projections = self._projections(mixed_in_pool_(x, shift, slots, self.mixes()))
        known = projections.v.unsqueeze(1) if v_first is None else v_first
        if runs_fused_step(state, projections):
            y = time_mix_step_(
                projections, v_first, self._vectors(), self.ln_x.eps, state, slots.wkv
            )
            return self.output(y), known
        inputs, _ = self._operands(projections, known.squeeze(1))
        y = wkv7_step_(*inputs, state, slots=slots.wkv)
        return self._gated(y, inputs, projections.g), known

    def weights_of_step(self) -> TimeMixWeights | None:
        """All of it for `time_mix_of_one_`; None where a module is more than its weights."""
        if (found := plain_weights(self.receptance, self.key, self.value, self.output)) is None:
            return None
        r, k, v, output = found
        lows: tuple[Tensor, ...] = (self.w1, self.a1, self.g1)
        highs: tuple[Tensor, ...] = (self.w2, self.a2, self.g2)
        if self.mixes_value:
            lows, highs = (*lows, self.v1), (*highs, self.v2)
        return TimeMixWeights(
            self.mixes(), (r, k, v), lows, highs, self._vectors(), self.ln_x.eps, output
        )

    def _vectors(self) -> StepParameters:
        return StepParameters(
            self.w0,
            self.a0,
            self.v0 if self.mixes_value else None,
            self.k_k,
            self.k_a,
            self.r_k,
            self.ln_x.weight,
            self.ln_x.bias,
        )

    def mixes(self) -> tuple[Tensor, ...]:
        """What each of the six inputs takes of the token before, [C] each."""
        return self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g

    def _projections(self, mixed: tuple[Tensor, ...]) -> Projections:
        xr, xw, xk, xv, xa, xg = mixed
        return Projections(
            r=self.receptance(xr),
            w=torch.tanh(xw @ self.w1) @ self.w2,
            k=self.key(xk),
            v=self.value(xv),
            rate=xa @ self.a1 @ self.a2,
            share=xv @ self.v1 @ self.v2 if self.mixes_value else None,
            g=torch.sigmoid(xg @ self.g1) @ self.g2,
        )

    def _operands(self, p: Projections, v_first: Tensor | None) -> tuple[Inputs, Tensor]:
        """The operator's r, w, k, v, a, b [B, T, H, N], and layer 0's value [B, T, C]."""
        v = p.v
        if v_first is None or p.share is None:
            v_first = v
        else:
            (v,) = again(self._mixed_value, v, v_first, p.share)
        k, removal, replacement, w = again(self._key_operands, p.k, p.rate, p.w)
        r, v = (z.view(k.shape) for z in (p.r, v))
        return (r, w, k, v, removal, replacement), v_first

    def _mixed_value(self, v: Tensor, first: Tensor, share: Tensor) -> tuple[Tensor]:
        return (mixed_value(v, first, share, self.v0, self.heads),)

    def _key_operands(self, k: Tensor, rate: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return key_operands(k, rate, w, self.a0, self.k_k, self.k_a, self.w0, self.heads)

    def _may_step(self, x: Tensor, packed: Packing | None, backend: str | None) -> bool:
        # One token a sequence on the CPU, no gradient wanted and no backend named: the step is
        # several times as fast as a sequence of one.
        one = x.shape[1] == 1 and packed is None and backend is None
        return one and x.device.type == "cpu" and not torch.is_grad_enabled()

    def _gated(self, y: Tensor, inputs: Inputs, g: Tensor) -> Tensor:
        r, _, k, v, _, _ = inputs
        (gated,) = again(self._gated_output, y, r, k, v, g)
        return self.output(gated)

    def _gated_output(self, y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor]:
        norm = self.ln_x
        return (gated_output(y, r, k, v, g, self.r_k, norm.weight, norm.bias, norm.eps),)


def _zeros(inputs: Inputs) -> Tensor:
    _, _, k, v, _, _ = inputs
    B, _, H, V = v.shape
    return v.new_zeros((B, H, V, k.shape[-1]), dtype=wide_dtype(v.dtype))
