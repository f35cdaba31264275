"""What the triton backend's 16-bit products cost, on the CPU: Triton's interpreter made to round.

As it comes it multiplies bf16 as integers and truncates where a GPU rounds to nearest.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton_interpreter import load
from wkv7.cases import FEW_CHANNELS, STATES, Case, Place, failures

from rwkv7.benchmark.sample import Judge, Sample, Shape
from rwkv7.wkv7 import wkv7
from rwkv7.wkv7.tolerance import RESULTS

load(
    "rwkv7.wkv7.backends.triton.kernels",
    *("tokens", "images", "walks", "prepare", "back_walks", "gradients"),
)
BF16 = torch.bfloat16
ONE = {"B": 1, "H": 1}
# Tokens whose decays span all that a chunk can: what fp16 operands hold only with a power each.
FLOOR = Case(T=130, K=64, V=64, values="decay floor", **ONE)
HARD = (
    Case(H=1, K=64, V=64),
    Case(T=200, K=64, V=64, values="same key", **ONE),
    Case(T=70, K=64, V=64, values="large v", **ONE),
    Case(T=70, K=96, V=72, **ONE),  # channels by two blocks
)
# What inputs and gradients are multiplied by: products with large keys leave the range of fp16,
# small keys its normal range. The other factors keep results inside it.
SIZES = {
    "bf16-large": (BF16, {"r": 1e4, "k": 1e4}),
    "fp16-large": (torch.float16, {"r": 100, "k": 1e4, "v": 3e-4, "dy": 5e-4, "dfinal": 0.05}),
    "fp16-small": (torch.float16, {"k": 1e-5, "dy": 8}),
}


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

    from rwkv7.wkv7.backends.triton import back_route, plan, saved, step_route

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
    for module in (back_route, plan, saved, step_route):
        monkeypatch.setattr(
            module, "products", lambda v: "halves" if v.dtype == torch.float16 else "half"
        )


def cut_into_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    from rwkv7.wkv7.backends.triton import back_route, step_route

    for module in (back_route, step_route):
        monkeypatch.setattr(module, "segment", lambda *call: 64)


def assert_within_bounds(sample: Sample, with_state: bool = True) -> None:
    """Hold triton to the recurrence; `with_state` or, where it is zero, without."""
    leaves = [x.requires_grad_() for x in (*sample.inputs, sample.state)][: 7 if with_state else 6]
    y, final = wkv7(*leaves, backend="triton")
    gradients = torch.autograd.grad((y, final), leaves, (sample.dy, sample.dfinal))
    found = dict(zip(RESULTS, (y, final, *gradients), strict=with_state))
    errors, ok = Judge(sample).errors({n: x.detach() for n, x in found.items()}, "logit")
    assert ok, " ".join(f"{n} {e:.1e}" for n, e in errors.items())


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [*FEW_CHANNELS, *HARD], ids=str)
@pytest.mark.usefixtures("rounding")
def test_within_the_bounds(case: Case, dtype: torch.dtype) -> None:
    assert not failures(case, Place("triton"), dtype)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.usefixtures("rounding")
def test_a_key_repeated_for_long(dtype: torch.dtype) -> None:
    """With hardly any decay the state and its gradient grow, and little of either moves."""
    sample = Sample(Shape(1, 1000, 1, 64), dtype, torch.device("cpu"), repeated_key=True)
    assert_within_bounds(sample)


@pytest.mark.usefixtures("rounding")
def test_decays_at_the_floor() -> None:
    assert not failures(FLOOR, Place("triton"), BF16)  # in fp16 dw is below the normal range


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.usefixtures("rounding")
def test_sizes_that_fp16_does_not_hold(
    name: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two segments, so that every kernel has a part in it."""
    cut_into_segments(monkeypatch)
    dtype, sizes = SIZES[name]
    sample = Sample(Shape(1, 70, 1, 64), torch.float32, torch.device("cpu"))
    inputs = zip("rwkvab", sample.inputs, strict=True)
    sample.inputs = [(x * sizes.get(n, 1)).to(dtype) for n, x in inputs]
    sample.dtype, sample.dy = dtype, (sample.dy * sizes.get("dy", 1)).to(dtype)
    sample.dfinal *= sizes.get("dfinal", 1)
    sample.state *= state == "random"
    assert_within_bounds(sample, with_state=state != "none")


@pytest.mark.usefixtures("rounding")
def test_a_large_key_beside_small_ones() -> None:
    """Forward, fp16: the powers of a step are the large one's."""
    sample = Sample(Shape(1, 40, 1, 64), torch.float32, torch.device("cpu"))
    _, _, k, v, _, _ = sample.inputs
    k *= 1e-2
    k[:, 20] *= 3e4
    v[:, :20] *= 10
    v[:, 20] *= 1e-3
    v[:, 21:] *= 10
    sample.inputs, sample.dtype = [x.half() for x in sample.inputs], torch.float16
    y, final = wkv7(*sample.inputs, sample.state, backend="triton")
    errors, ok = Judge(sample).errors({"y": y, "state": final}, "logit")
    assert ok, " ".join(f"{n} {e:.1e}" for n, e in errors.items())


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("values", ["model", "same key", "large v"])
@pytest.mark.usefixtures("rounding")
def test_segments_within_the_bounds(
    values: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_into_segments(monkeypatch)
    case = Case(T=130, K=64, V=64, values=values, **ONE)
    assert not failures(case, Place("triton"), dtype)


@pytest.mark.usefixtures("rounding")
def test_true_fp32_products_of_bf16_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    from rwkv7.wkv7.backends.triton import back_route, plan, saved, step_route

    for module in (back_route, plan, saved, step_route):
        monkeypatch.setattr(module, "products", lambda v: "ieee")
    assert not failures(Case(T=34, K=16, V=16, **ONE), Place("triton"), BF16)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.usefixtures("rounding")
def test_small_gradients_of_few_tokens(dtype: torch.dtype) -> None:
    """Where a loss counts few tokens, the others' dy is zero and the state's gradient small."""
    sample = Sample(Shape(1, 70, 1, 64), dtype, torch.device("cpu"))
    size = 2.0**-20 if dtype == BF16 else 2.0**-10  # fp16 holds no smaller gradients
    sample.dy *= size
    sample.dy[:, :60] = 0
    sample.dfinal *= size
    assert_within_bounds(sample)
