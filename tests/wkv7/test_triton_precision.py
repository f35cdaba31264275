"""What the triton backend's 16-bit products cost, on the CPU: Triton's interpreter made to round.

As it comes it multiplies bf16 as integers and truncates where a GPU rounds to nearest.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton_interpreter import load
from wkv7.cases import FEW_CHANNELS, Case, Place, evaluate, failures, make_inputs

from rwkv7.wkv7 import batch_invariant

load("rwkv7.wkv7.backends.triton.kernels", "tokens", "maps", "walks", "gradients")
BF16 = torch.bfloat16
ORDINARY = Case(H=1, K=64, V=64)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """The bits of fp32 numbers rounded to bf16, as the interpreter keeps them."""
    return torch.from_numpy(np.array(x)).bfloat16().view(torch.uint16).numpy()


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture
def rounding(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 as on a GPU, and the kernels' 16-bit products chosen on the CPU too."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from rwkv7.wkv7.backends.triton import chunk_route, plan

    plain = InterpreterBuilder.cast_impl

    def cast(self, x, to):
        kinds = x.dtype.scalar, to.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(to_bf16(x.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(from_bf16(x.data), tl.float32)
        return plain(self, x, to)

    def dot(self, x, y, acc, precision, imprecise):
        x, y = (from_bf16(z.data) if z.dtype.scalar == tl.bfloat16 else z.data for z in (x, y))
        return TensorHandle(np.matmul(x, y, dtype=np.float32) + acc.data, acc.dtype.scalar)

    for name in ("cast_impl", "create_fp_ext", "create_fp_trunc"):
        monkeypatch.setattr(InterpreterBuilder, name, cast)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    for module in (chunk_route, plan):
        monkeypatch.setattr(module, "products", lambda v: "pair")


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [*FEW_CHANNELS, ORDINARY], ids=str)
@pytest.mark.usefixtures("rounding")
def test_within_the_bounds(case: Case, dtype: torch.dtype) -> None:
    assert not failures(case, Place("triton"), dtype)


@pytest.mark.usefixtures("rounding")
def test_calls_of_many_tokens_round_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from rwkv7.wkv7.backends.triton import plan

    exactly = evaluate(ORDINARY, make_inputs(ORDINARY, BF16), Place("triton"), BF16)
    monkeypatch.setattr(plan, "MANY_TOKENS", 130)  # as many as this call has
    assert not failures(ORDINARY, Place("triton"), BF16)
    roughly = evaluate(ORDINARY, make_inputs(ORDINARY, BF16), Place("triton"), BF16)
    with batch_invariant():  # whatever the call is part of
        alone = evaluate(ORDINARY, make_inputs(ORDINARY, BF16), Place("triton"), BF16)
    assert not torch.equal(roughly["dw"], exactly["dw"])
    assert torch.equal(alone["dw"], exactly["dw"])
