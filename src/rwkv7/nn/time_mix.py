"""Time mix: from a normalised input to the operator's six arguments, and from its output back.

The recurrence itself is `rwkv7.wkv7`; the order and the activations here follow RWKV-LM,
RWKV-v7/train_temp/src/model.py, and differ from branch to branch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv7.config import ModelConfig
from rwkv7.state import wide_dtype
from rwkv7.wkv7 import wkv7, wkv7_step_

from .before import Before
from .linear import Linear
from .token_shift import Packing, token_shift

# Group norm's eps is 64e-5 for heads of 64: one 1e-5 for each channel of a head.
GROUP_NORM_EPS = 1e-5
KEY_NORM_EPS = 1e-12


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
        x: Tensor,
        v_first: Tensor | None,
        shift: Tensor | None,
        state: Tensor | None,
        packed: Packing | None = None,
        backend: str | None = None,
        before: Before | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One layer over T ≥ 1 tokens.

        Args:
            x: the layer's normalised input, [B, T, C].
            v_first: layer 0's value, [B, T, C]; None in layer 0.
            shift: each sequence's last x of the call before, [S, C]; None means zeros.
            state: the WKV state [S, H, V, K]; None means zeros. S = B unless packed.
            packed: the ends of packed sequences.
            backend: the operator's backend, None for its default.
            before: what another process holds of the sequence, None when it is all here.

        Returns:
            (output [B, T, C], layer 0's value, the shift and the state to carry on).
        """
        if before is not None:
            shift = before.shift(x, shift)
        previous, shift = token_shift(x, shift, packed)
        delta = previous - x
        r = self.receptance(torch.addcmul(x, delta, self.x_r))
        k = self.key(torch.addcmul(x, delta, self.x_k))
        xv = torch.addcmul(x, delta, self.x_v)
        v = self.value(xv)
        w = self.w0 + torch.tanh(torch.addcmul(x, delta, self.x_w) @ self.w1) @ self.w2
        a = torch.sigmoid(self.a0 + torch.addcmul(x, delta, self.x_a) @ self.a1 @ self.a2)
        g = torch.sigmoid(torch.addcmul(x, delta, self.x_g) @ self.g1) @ self.g2
        if v_first is None:
            v_first = v
        else:
            mix = torch.sigmoid(self.v0 + xv @ self.v1 @ self.v2)
            v = torch.addcmul(v, v_first - v, mix.to(v.dtype))
        k, removal, replacement = self._keys(k, a)
        shape = (*x.shape[:2], self.heads, self.head_size)
        r, k, v = r.view(shape), k.view(shape), v.view(shape)
        inputs = (r, w.view(shape), k, v, removal, replacement)
        if before is None and self._may_step(x, packed, backend):
            state = _zeros(v, k) if state is None else state.clone()
            r_1, w_1, k_1, v_1, a_1, b_1 = (z.squeeze(1) for z in inputs)
            y = wkv7_step_(r_1, w_1, k_1, v_1, a_1, b_1, state).unsqueeze(1)
        else:
            offsets = None if packed is None else packed.offsets
            operator = wkv7 if before is None else before.wkv7
            y, state = operator(*inputs, state, cu_seqlens=offsets, backend=backend)
        return self.output(self._gated(y, r, k, v, g)), v_first, shift, state

    def _may_step(self, x: Tensor, packed: Packing | None, backend: str | None) -> bool:
        # One token a sequence on the CPU, no gradient wanted and no backend named: the step is
        # several times as fast as a sequence of one.
        one = x.shape[1] == 1 and packed is None and backend is None
        return one and x.device.type == "cpu" and not torch.is_grad_enabled()

    def _keys(self, k: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The unit key is made of k as it was before the learning rate changes it. All of it in
        # float32 at least, and rounded once.
        dtype, wide = k.dtype, wide_dtype(k.dtype)
        shape = (*k.shape[:2], self.heads, self.head_size)
        k, a = k.to(wide), a.to(wide)
        unit = F.normalize((k * self.k_k).view(shape), dim=-1, eps=KEY_NORM_EPS)
        k = torch.addcmul(k, k * (a - 1), self.k_a)
        return k.to(dtype), (-unit).to(dtype), (unit * a.view(shape)).to(dtype)

    def _gated(self, y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        # Group norm, then the bonus, then the gate; in float32 at least, and rounded once.
        B, T, H, N = y.shape
        dtype, wide = y.dtype, wide_dtype(y.dtype)
        r, k, v = r.to(wide), k.to(wide), v.to(wide)
        weight, bias = self.ln_x.weight.to(wide), self.ln_x.bias.to(wide)
        y = F.group_norm(y.to(wide).view(B * T, H * N), H, weight, bias, self.ln_x.eps)
        y = y.view(B, T, H, N) + (r * k * self.r_k).sum(-1, keepdim=True) * v
        return (y.view(B, T, H * N) * g).to(dtype)


def _zeros(v: Tensor, k: Tensor) -> Tensor:
    B, _, H, V = v.shape
    return v.new_zeros((B, H, V, k.shape[-1]), dtype=wide_dtype(v.dtype))
