"""The official RWKV-7 operators, by their names: [B, T, C] tensors and RWKV-LM's form of w.

There w = -softplus(-logit) - 0.5 and the decay is exp(-exp(w)): BlinkDL/RWKV-LM,
RWKV-v7/train_temp/src/model.py and RWKV-v7/rwkv_v7_demo.py. States are [B, H, V, K], the layout
of this library, so nothing is transposed. Any T, dtype and device that `wkv7` takes will do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkv7.wkv7 import wkv7
from rwkv7.wkv7.contract import checks_wanted, state_dtype

__all__ = ["RWKV7_OP2", "RUN_CUDA_RWKV7g"]

# -softplus is never positive, so this is the largest w there is.
LARGEST_W = -0.5


def RUN_CUDA_RWKV7g(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, head_size: int = 64
) -> Tensor:
    """RWKV-7 from an empty state, with gradients to all six inputs.

    Args:
        r, k, v, a, b: [B, T, C] with C = H·head_size; bfloat16, float16, float32 or float64.
        w: [B, T, C], -softplus(-logit) - 0.5, thus at most -0.5; the same dtype or float32.
        head_size: the channels of one head.

    Returns:
        y [B, T, C] in the dtype of v.

    Raises:
        ValueError, TypeError: as `wkv7`; a C that head_size does not divide; w above -0.5 (on
            the CPU, elsewhere inside `rwkv7.checks()`).
    """
    return RWKV7_OP2(r, w, k, v, a, b, None, head_size)[0]


def RWKV7_OP2(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    head_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """`RUN_CUDA_RWKV7g` with the state: [B, H, V, K] in and out, never changed in place.

    Args:
        r, w, k, v, a, b, head_size: as in `RUN_CUDA_RWKV7g`.
        state: [B, H, V, K], float32 (float64 for float64 inputs); None means zeros.

    Returns:
        y [B, T, C] in the dtype of v, and the state after the last token.

    Raises:
        ValueError, TypeError: as `RUN_CUDA_RWKV7g`.
    """
    for name, x in {"r": r, "w": w, "k": k, "v": v, "a": a, "b": b}.items():
        if x.dim() != 3 or x.shape[-1] % head_size:
            raise ValueError(
                f"{name}: expected [B, T, C] with C a multiple of head_size = {head_size}, "
                f"found the shape {list(x.shape)}"
            )
    _check_form(w)
    # The exponential in float32 (float64) whatever the dtype of w: rounded to bf16 the log decay
    # would be wrong by up to 0.4 %, at every step.
    log_decay = -w.to(state_dtype(w.dtype)).exp()
    r, log_decay, k, v, a, b = (
        x.unflatten(-1, (-1, head_size)) for x in (r, log_decay, k, v, a, b)
    )
    y, final = wkv7(r, log_decay, k, v, a, b, state, decay="log_bounded")
    return y.flatten(-2), final


def _check_form(w: Tensor) -> None:
    # Reading a value waits for a GPU and stops torch.compile; wkv7 checks the range in either case.
    if not checks_wanted(w.device) or torch.compiler.is_compiling():
        return
    if w.numel() and (largest := float(w.detach().max())) > LARGEST_W + 1e-6:
        raise ValueError(
            f"w: expected -softplus(-logit) - 0.5, thus at most {LARGEST_W}, found {largest:.6g}; "
            'decay logits go to rwkv7.wkv7 with decay="logit", log decays with decay="log"'
        )
