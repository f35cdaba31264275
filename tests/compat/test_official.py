"""The official operators: their w in every dtype, their head size, and their errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from loops import official_loop

from rwkv7.compat.official import RWKV7_OP2, RUN_CUDA_RWKV7g
from rwkv7.wkv7.tolerance import BOUNDS, relative_error


def official_arguments(x):
    w = (-F.softplus(-x.logit.double()) - 0.5).to(x.r.dtype)
    return [t.flatten(-2) for t in (x.r, w, x.k, x.v, x.a, x.b)]


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
def test_every_dtype_is_within_its_bounds(model_inputs, dtype):
    x = model_inputs(T=40, dtype=dtype)
    state = x.state.to(torch.float64 if dtype == torch.float64 else torch.float32)
    arguments = official_arguments(x)
    y, final = RWKV7_OP2(*arguments, state)
    y_loop, final_loop = official_loop(*arguments, state)
    assert y.dtype == dtype
    assert relative_error(y, y_loop) <= BOUNDS[dtype].y
    assert relative_error(final, final_loop) <= BOUNDS[dtype].state


def test_other_head_sizes(model_inputs):
    x = model_inputs(H=3, K=16, V=16)
    arguments = official_arguments(x)
    y, final = RWKV7_OP2(*arguments, x.state, head_size=16)
    y_loop, final_loop = official_loop(*arguments, x.state, head_size=16)
    assert relative_error(y, y_loop) < 1e-12
    assert relative_error(final, final_loop) < 1e-12
    assert torch.equal(RUN_CUDA_RWKV7g(*arguments, head_size=16), RUN_CUDA_RWKV7g(*arguments, 16))


def test_the_state_given_is_not_changed(model_inputs):
    x = model_inputs(T=5)
    before = x.state.clone()
    RWKV7_OP2(*official_arguments(x), x.state)
    assert torch.equal(x.state, before)


def test_decay_logits_instead_of_w_are_refused(model_inputs):
    x = model_inputs(T=5)
    arguments = official_arguments(x)
    arguments[1] = x.logit.flatten(-2)
    with pytest.raises(ValueError, match=r"w: expected -softplus.*at most -0.5, found"):
        RUN_CUDA_RWKV7g(*arguments)


def test_the_largest_w_there_is_is_taken():
    x = torch.zeros(1, 3, 64)
    y = RUN_CUDA_RWKV7g(x, x - 0.5, x, x + 1, x, x)
    assert torch.equal(y, torch.zeros_like(y))


def test_channels_that_are_not_whole_heads_are_refused():
    x = torch.zeros(1, 3, 96)
    with pytest.raises(ValueError, match=r"r: .*multiple of head_size = 64.*\[1, 3, 96\]"):
        RUN_CUDA_RWKV7g(x, x - 1, x, x, x, x)
