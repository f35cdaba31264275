"""The triton backend under Triton's interpreter, on small shapes: the algebra, the tails, packing.

The interpreter multiplies in fp32 and truncates bf16, so precision is judged with fp32 inputs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton_interpreter import load

from rwkv7.wkv7 import batch_invariant, explain, wkv7, wkv7_step_
from rwkv7.wkv7.backends import triton
from rwkv7.wkv7.backends.triton import plan
from rwkv7.wkv7.contract import Call, log_decay
from rwkv7.wkv7.registry import get_backend

load(
    "rwkv7.wkv7.backends.triton.kernels",
    *("tokens", "images", "walks", "prepare", "back_walks", "gradients"),
)
pytestmark = pytest.mark.usefixtures("interpreter")

NAMES = ("y", "state", "dr", "dw", "dk", "dv", "da", "db", "dstate")


def inputs(B, T, H, K, V, decay="logit", kind="random"):
    g = torch.Generator().manual_seed(0)
    r, k, key, rate, w = (torch.randn(B, T, H, K, generator=g) for _ in range(5))
    v = torch.randn(B, T, H, V, generator=g)
    key, rate, w = torch.nn.functional.normalize(key, dim=-1), rate.sigmoid(), 6 * w.sigmoid() - 6
    if kind == "same key":
        key = k = key[:, :1].expand_as(key)
        rate, w = torch.full_like(rate, 0.999), torch.full_like(w, -12.0)
    if kind == "floor":
        w = torch.full_like(w, 12.0)
    if decay != "logit":
        w = log_decay(w, "logit", torch.float32)
    if kind == "forget":
        w[:, ::3, :, ::2], w[:, 1::3, :, 1::2] = -torch.inf, -50.0
    return [r, w, k, v, -key, key * rate]


def everything(call, backend, dtype, through="both", state=None, **options):
    """(y, final state, the gradients) through y, the state or both."""
    leaves = [x.detach().to(dtype).clone().requires_grad_() for x in call]
    if state is not None:
        leaves.append(state.detach().to(dtype).clone().requires_grad_())
    initial = leaves[6] if state is not None else None
    y, final = wkv7(*leaves[:6], initial, backend=backend, **options)
    g = torch.Generator().manual_seed(1)
    seeds = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(dtype) for x in (y, final)]
    chosen = {"y": [0], "state": [1], "both": [0, 1]}[through]
    roots = [(y, final)[i] for i in chosen]
    grads = torch.autograd.grad(roots, leaves, [seeds[i] for i in chosen], materialize_grads=True)
    return (y, final, *grads)


def compare(call, tolerance=1e-5, **options):
    found = everything(call, "triton", torch.float32, **options)
    exact = everything(call, "reference", torch.float64, **options)
    for name, x, e in zip(NAMES, found, exact, strict=False):
        scale = max(float(e.norm()), 1e-7 * float(max(g.norm() for g in exact[2:])))
        assert float((x - e).norm()) <= tolerance * scale, name


@pytest.mark.parametrize("T", [1, 17, 63, 64, 65, 130])
@pytest.mark.parametrize("state", ["none", "random"])
def test_lengths(T, state):
    initial = None if state == "none" else torch.randn(2, 1, 8, 16)
    compare(inputs(2, T, 1, 16, 8), state=initial)


def test_bf16_as_the_interpreter_has_it():
    """It multiplies bf16 as integers: no product may read inputs as they are."""
    call = [x.bfloat16() for x in inputs(1, 40, 1, 16, 16)]
    found = everything(call, "triton", torch.bfloat16)
    exact = everything(call, "reference", torch.float64)
    for name, x, e in zip(NAMES, found, exact, strict=False):
        assert float((x - e).norm()) <= 5e-3 * float(e.norm()), name


@pytest.mark.parametrize("through", ["y", "state"])
@pytest.mark.parametrize("T", [9, 70])
def test_gradient_through_one_output(T, through):
    compare(inputs(1, T, 1, 16, 16), through=through, state=torch.zeros(1, 1, 16, 16))


@pytest.mark.parametrize("kind", ["same key", "floor"])
@pytest.mark.parametrize("decay", ["logit", "log_bounded"])
def test_hard_inputs(kind, decay):
    compare(inputs(1, 100, 1, 16, 16, decay, kind), decay=decay)


def test_forgetting_everything():
    call = inputs(1, 37, 1, 16, 16, "log", "forget")
    compare(call, decay="log", state=torch.randn(1, 1, 16, 16))
    assert "token by token" in str(explain(*call, decay="log", backend="triton"))


@pytest.mark.parametrize("decay", ["log", "log_bounded"])
def test_packed(decay):
    offsets = torch.tensor([0, 0, 1, 66, 130, 135, 135])
    compare(
        inputs(1, 135, 2, 16, 8, decay), decay=decay, cu_seqlens=offsets,
        state=torch.randn(6, 2, 8, 16),
    )  # fmt: skip


@pytest.mark.parametrize(("K", "V", "T"), [(16, 24, 200), (96, 72, 129)])
@pytest.mark.parametrize("state", ["none", "random"])
def test_segments(K, V, T, state, monkeypatch):
    from rwkv7.wkv7.backends.triton import back_route, step_route

    for module in (back_route, step_route):
        monkeypatch.setattr(module, "segment", lambda *call: 80)
    initial = None if state == "none" else torch.randn(1, 2, V, K)
    compare(inputs(1, T, 2, K, V), state=initial)


@pytest.mark.parametrize("through", ["y", "state", "both"])
def test_segments_of_slabs(through, monkeypatch):
    """Backward, slabs of three chunks, the last shorter, in segments of two."""
    from rwkv7.wkv7.backends.triton import back_route

    monkeypatch.setattr(back_route, "segment", lambda *call: 256)
    monkeypatch.setattr(back_route, "slab_chunks", lambda *sizes: 3)
    call = inputs(2, 450, 1, 16, 8)
    compare(call, through=through, state=torch.randn(2, 1, 8, 16))


def test_only_few_long_sequences_are_cut():
    def call(B, T, offsets=None):
        x = torch.empty(B, T, 2, 16, device="meta")
        return Call(x, x, x, x, x, x, None, "logit", offsets)

    few, more, packed = call(1, 10000), call(40, 10000), call(1, 10000, torch.tensor([0, 10000]))
    for uncut in (call(1, 900), call(100, 10000), packed, replace(few, invariant=True)):
        assert plan.segment(uncut, uncut.sizes[1], plan.SEGMENTS) >= uncut.sizes[1]
    assert plan.segment(few, 10000, plan.SEGMENTS) < 10000
    assert plan.segment(few, 10000, plan.SEGMENTS) % plan.STEP == 0
    assert plan.segment(more, 10000, plan.SEGMENTS) >= 10000
    assert plan.segment(more, 10000, plan.SEGMENTS_BACK) < 10000


@pytest.mark.parametrize("through", ["y", "state", "both"])
@pytest.mark.parametrize("offsets", [None, [0, 0, 1, 66, 130, 260, 260]])
def test_backward_by_slabs_of_one_chunk(offsets, through, monkeypatch):
    monkeypatch.setattr(plan, "SLAB", 1)
    B, S = (2, 2) if offsets is None else (1, 6)
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    call = inputs(B, 150 if offsets is None else 260, 1, 16, 24)
    compare(call, through=through, cu_seqlens=cu_seqlens, state=torch.randn(S, 1, 24, 16))


def test_slabs_change_no_bits_where_batches_must_not(monkeypatch):
    call = inputs(1, 150, 1, 16, 16)

    def gradients():
        leaves = [x.clone().requires_grad_() for x in call]
        with batch_invariant():
            return torch.autograd.grad(wkv7(*leaves, backend="triton")[0].sum(), leaves)

    whole = gradients()
    monkeypatch.setattr(plan, "SLAB", 1)
    assert all(map(torch.equal, whole, gradients()))


@pytest.mark.parametrize(("K", "V"), [(5, 3), (48, 20), (80, 128)])
def test_odd_sizes(K, V):
    compare(inputs(1, 40, 1, K, V))


@pytest.mark.parametrize("chunks", [True, False], ids=["chunks", "tokens"])
@pytest.mark.parametrize("offsets", [None, [0, 0, 1, 66, 140, 140]])
def test_run_again_a_call_gives_the_same_and_changes_nothing_given(offsets, chunks):
    """A first call runs in part, compiles what it lacks, and then runs from its start."""
    backend, packed = get_backend("triton"), None if offsets is None else torch.tensor(offsets)
    given = inputs(1, 140, 1, 16, 8, "logit" if chunks else "log")
    state = torch.randn(1 if packed is None else len(offsets) - 1, 1, 8, 16)
    call = Call(*given, state, "logit" if chunks else "log", packed)
    y, final, saved = backend.forward(call, save=True)
    given += [state, saved, y, final]
    copies = [x.clone() for x in given]
    again = triton._forward(call, saved, save=True)
    grads, grads_again = (backend.backward(call, saved, y, final) for _ in range(2))
    # As bytes, for numbers of chunks that no sequence has are not written, and may be NaN.
    given, copies = ([x.contiguous().view(torch.uint8) for x in xs] for xs in (given, copies))
    assert all(map(torch.equal, given, copies))
    assert all(map(torch.equal, (y, final, *grads), (*again, *grads_again)))


def test_empty():
    state = torch.randn(1, 1, 16, 16)
    y, final = wkv7(*inputs(1, 0, 1, 16, 16), state, backend="triton")
    assert y.shape == (1, 0, 1, 16)
    assert torch.equal(final, state)
    assert final.data_ptr() != state.data_ptr()


def test_refuses_what_it_cannot_run(monkeypatch):
    call = inputs(1, 4, 1, 16, 16)
    with pytest.raises(ValueError, match="float64"):
        wkv7(*(x.double() for x in call), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs a GPU"):
        wkv7(*call, backend="triton")


def test_step_in_a_pool():
    call = inputs(4, 1, 2, 16, 8)
    pool = torch.randn(6, 2, 8, 16)
    slots = torch.tensor([5, -1, 0, 2])
    before = pool.clone()
    y = wkv7_step_(*(x[:, 0] for x in call), pool, slots=slots)
    used = slots >= 0
    expected, states = wkv7(*(x[used] for x in call), before[slots[used]], backend="reference")
    torch.testing.assert_close(y[used], expected[:, 0])
    torch.testing.assert_close(pool[slots[used]], states)
    assert not y[1].any()
    assert torch.equal(pool[[1, 3, 4]], before[[1, 3, 4]])
