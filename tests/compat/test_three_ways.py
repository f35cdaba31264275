"""The same call in three dialects: the official operator, flash-linear-attention's, and wkv7.

A square state hides a missing transpose from every shape check, so sizes here are square.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from loops import fla_loop, official_loop

from rwkv7.compat.fla import chunk_rwkv7
from rwkv7.compat.official import RWKV7_OP2, RUN_CUDA_RWKV7g
from rwkv7.wkv7 import wkv7
from rwkv7.wkv7.contract import DECAY_SCALE
from rwkv7.wkv7.tolerance import relative_error

STATES = ("none", "zero", "random")


def three_ways(x, state, transpose=True):
    """{dialect: (y [B, T, H, V], state [B, H, V, K], gradients)} of one loss on both outputs."""
    results = {}
    for dialect in ("official", "fla", "wkv7"):
        leaves = [t.detach().requires_grad_() for t in (x.r, x.logit, x.k, x.v, x.a, x.b)]
        r, logit, k, v, a, b = leaves
        initial = None if state is None else state.detach().requires_grad_()
        if dialect == "wkv7":
            y, final = wkv7(r, logit, k, v, a, b, initial)
        elif dialect == "fla":
            given = initial
            if given is not None and transpose:
                given = given.transpose(-1, -2)
            w = -DECAY_SCALE * logit.sigmoid()
            y, final = chunk_rwkv7(r, w, k, v, a, b, initial_state=given, output_final_state=True)
            final = final.transpose(-1, -2) if transpose else final
        else:
            w = -F.softplus(-logit) - 0.5
            flat = [t.flatten(-2) for t in (r, w, k, v, a, b)]
            y, final = RWKV7_OP2(*flat, initial)
            y = y.view_as(v)
        weight = torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()
        inputs = leaves if initial is None else [*leaves, initial]
        loss = (weight * y).sum() + final.square().sum()
        results[dialect] = y, final, torch.autograd.grad(loss, inputs)
    return results


def worst(found, expected) -> float:
    pairs = [(found[0], expected[0]), (found[1], expected[1])]
    pairs += zip(found[2], expected[2], strict=True)
    return max(relative_error(x, ref) for x, ref in pairs)


def initial_state(x, kind):
    return {"none": None, "zero": torch.zeros_like(x.state), "random": x.state}[kind]


@pytest.mark.parametrize("kind", STATES)
def test_outputs_states_and_gradients_agree(model_inputs, kind):
    x = model_inputs()
    results = three_ways(x, initial_state(x, kind))
    assert worst(results["official"], results["wkv7"]) < 1e-12
    assert worst(results["fla"], results["wkv7"]) < 1e-12


@pytest.mark.parametrize("kind", STATES)
def test_each_dialect_agrees_with_its_own_loop(model_inputs, kind):
    x = model_inputs()
    state = initial_state(x, kind)
    results = three_ways(x, state)
    log_decay = -DECAY_SCALE * x.logit.sigmoid()
    transposed = None if state is None else state.transpose(-1, -2)
    y, final = fla_loop(x.r, log_decay, x.k, x.v, x.a, x.b, transposed)
    assert relative_error(results["fla"][0], y) < 1e-12
    assert relative_error(results["fla"][1], final.transpose(-1, -2)) < 1e-12
    w = -F.softplus(-x.logit) - 0.5
    y, final = official_loop(*(t.flatten(-2) for t in (x.r, w, x.k, x.v, x.a, x.b)), state)
    assert relative_error(results["official"][0].flatten(-2), y) < 1e-12
    assert relative_error(results["official"][1], final) < 1e-12


def test_a_forgotten_transpose_is_caught(model_inputs):
    x = model_inputs()
    results = three_ways(x, x.state, transpose=False)
    y, final, _ = results["fla"]
    assert relative_error(y, results["wkv7"][0]) > 0.1
    assert relative_error(final, results["wkv7"][1]) > 0.1


def test_an_empty_state_hides_the_forgotten_transpose_in_y(model_inputs):
    x = model_inputs()
    results = three_ways(x, None, transpose=False)
    y, final, _ = results["fla"]
    assert relative_error(y, results["wkv7"][0]) < 1e-12
    assert relative_error(final, results["wkv7"][1]) > 0.1


def test_official_without_a_state_is_the_same_operator(model_inputs):
    x = model_inputs()
    w = -F.softplus(-x.logit) - 0.5
    flat = [t.flatten(-2) for t in (x.r, w, x.k, x.v, x.a, x.b)]
    assert torch.equal(RUN_CUDA_RWKV7g(*flat), RWKV7_OP2(*flat, None)[0])
