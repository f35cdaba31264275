"""flash-linear-attention's signatures: defaults, scales, packing, reversal and refusals."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from loops import fla_loop

from rwkv7.compat import fla
from rwkv7.compat.fla import chunk_rwkv7, fused_mul_recurrent_rwkv7, fused_recurrent_rwkv7
from rwkv7.wkv7.contract import DECAY_SCALE
from rwkv7.wkv7.tolerance import BOUNDS, relative_error


def arguments(x):
    """(r, w, k, v, a, b), w the log decay in the dtype of r."""
    w = (-DECAY_SCALE * x.logit.double().sigmoid()).to(x.r.dtype)
    return x.r, w, x.k, x.v, x.a, x.b


def flipped(x):
    return x.transpose(-1, -2)


@pytest.mark.parametrize(
    ("function", "scale", "returns_state"),
    [
        (chunk_rwkv7, 1.0, False),
        (fused_recurrent_rwkv7, 32**-0.5, True),
        (fused_mul_recurrent_rwkv7, 1.0, False),
    ],
)
def test_defaults_do_what_theirs_do(model_inputs, function, scale, returns_state):
    x = model_inputs(K=32, V=48)
    inputs = r, w, k, v, a, b = arguments(x)
    if function is fused_mul_recurrent_rwkv7:
        inputs = r, w, k, v, x.kk, x.rate
    y, final = function(*inputs)
    y_loop, final_loop = fla_loop(r, w, k, v, a, b, scale=scale)
    assert relative_error(y, y_loop) < 1e-12
    assert (final is not None) == returns_state
    if final is not None:
        assert relative_error(final, final_loop) < 1e-12


@pytest.mark.parametrize("scale", [None, 1.0, 0.3, -2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_scale_and_a_state_that_is_not_square(model_inputs, scale, dtype):
    x = model_inputs(K=32, V=48, dtype=dtype)
    inputs = arguments(x)
    state = flipped(x.state).to(torch.float64 if dtype == torch.float64 else torch.float32)
    y, final = chunk_rwkv7(*inputs, scale, state, output_final_state=True)
    y_loop, final_loop = fla_loop(*inputs, state, 32**-0.5 if scale is None else scale)
    assert y.dtype == dtype
    assert final.shape == state.shape
    assert final.is_contiguous()
    assert relative_error(y, y_loop) <= BOUNDS[dtype].y
    assert relative_error(final, final_loop) <= BOUNDS[dtype].state


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_fused_mul_forms_the_product_without_rounding_it(model_inputs, dtype):
    x = model_inputs(T=40, dtype=dtype)
    r, w, k, v, *_ = arguments(x)
    y, final = fused_mul_recurrent_rwkv7(r, w, k, v, x.kk, x.rate, output_final_state=True)
    kk, rate = x.kk.double(), x.rate.double()
    y_loop, final_loop = fla_loop(r, w, k, v, -kk, kk * rate)
    assert y.dtype == dtype
    assert relative_error(y, y_loop) <= BOUNDS[dtype].y
    assert relative_error(final, final_loop) <= min(1e-5, BOUNDS[dtype].state)


@pytest.mark.parametrize("offsets", [None, [0, 7, 7, 8, 20]])
def test_reverse_runs_each_sequence_backwards(model_inputs, offsets):
    x = model_inputs(B=1, T=20, K=16, V=8)
    r, w, k, v, a, b = arguments(x)
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    state = flipped(x.state.expand(1 if offsets is None else len(offsets) - 1, -1, -1, -1))
    y, final = fused_mul_recurrent_rwkv7(
        r, w, k, v, x.kk, x.rate, 1.0, state, True, reverse=True, cu_seqlens=cu_seqlens
    )
    bounds = offsets or [0, 20]
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            assert torch.equal(final[i], state[i])
            continue
        backwards = [t[:, start:end].flip(1) for t in (r, w, k, v, a, b)]
        y_loop, final_loop = fla_loop(*backwards, state[i : i + 1])
        assert relative_error(y[:, start:end], y_loop.flip(1)) < 1e-12
        assert relative_error(final[i : i + 1], final_loop) < 1e-12


def test_packed_sequences_with_states(model_inputs):
    x = model_inputs(B=1, T=20, K=16, V=8)
    inputs = arguments(x)
    state = torch.randn(3, 2, 16, 8, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 5, 5, 20], dtype=torch.int32)
    for function in (chunk_rwkv7, fused_recurrent_rwkv7):
        y, final = function(
            *inputs, scale=1.0, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens
        )
        y_loop, final_loop = fla_loop(*(t[:, 5:] for t in inputs), state[2:])
        assert relative_error(y[:, 5:], y_loop) < 1e-12
        assert relative_error(final[2:], final_loop) < 1e-12
        assert torch.equal(final[1], state[1])


def test_gradients_reach_the_initial_state_in_its_own_layout(model_inputs):
    x = model_inputs(T=6, K=8, V=4)
    state = flipped(x.state).contiguous().requires_grad_()
    y, _ = chunk_rwkv7(*arguments(x), initial_state=state)
    y_loop, _ = fla_loop(*arguments(x), state)
    (found,) = torch.autograd.grad(y.sum(), state)
    (expected,) = torch.autograd.grad(y_loop.sum(), state)
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize(
    ("lower_bound", "form"),
    [(None, "log"), (-0.6065306597126334, "log_bounded"), (-0.1, "log_bounded"), (-5.0, "log")],
)
def test_lower_bound_selects_the_form(model_inputs, monkeypatch, lower_bound, form):
    x = model_inputs(T=3, K=8, V=8)
    seen = []
    plain = fla.wkv7

    def spy(*inputs, decay, **rest):
        seen.append(decay)
        return plain(*inputs, decay=decay, **rest)

    monkeypatch.setattr(fla, "wkv7", spy)
    r, w, *rest = arguments(x)
    chunk_rwkv7(r, w.clamp(min=-0.1), *rest, lower_bound=lower_bound)
    assert seen == [form]


def test_choices_of_kernel_change_nothing(model_inputs):
    x = model_inputs(T=5, K=8, V=8)
    plain, _ = chunk_rwkv7(*arguments(x))
    tuned, _ = chunk_rwkv7(*arguments(x), safe_gate=True, chunk_size=64, disable_recompute=True)
    assert torch.equal(plain, tuned)


def test_what_is_refused(model_inputs):
    x = model_inputs(T=5, K=8, V=4)
    inputs = arguments(x)
    with pytest.raises(TypeError, match="head_first"):
        chunk_rwkv7(*inputs, head_first=False)
    with pytest.raises(ValueError, match="cp_context: expected None"):
        chunk_rwkv7(*inputs, cp_context=object())
    with pytest.raises(ValueError, match="lower_bound: expected a negative"):
        chunk_rwkv7(*inputs, lower_bound=0.0)
    with pytest.raises(ValueError, match=r"\[N, H, K, V\] = \[2, 2, 8, 4\], found \[2, 2, 4, 8\]"):
        chunk_rwkv7(*inputs, initial_state=x.state)


def test_signatures_keep_their_order():
    for function, order in {
        chunk_rwkv7: "r w k v a b scale initial_state output_final_state cu_seqlens",
        fused_recurrent_rwkv7: "r w k v a b scale initial_state output_final_state cu_seqlens",
        fused_mul_recurrent_rwkv7: "r w k v kk a scale initial_state output_final_state reverse",
    }.items():
        assert " ".join(inspect.signature(function).parameters).startswith(order)
