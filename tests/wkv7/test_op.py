"""The face of the operator: choice of backend, torch.library, autocast, modes, one-token steps."""

import pytest
import torch
from wkv7.cases import PACKED, Case, Place, devices, make_inputs, places

import rwkv7
from rwkv7 import explain, wkv7, wkv7_step_
from rwkv7.wkv7 import unchecked
from rwkv7.wkv7.registry import get_backend


def leaves() -> list[torch.Tensor]:
    return [x.requires_grad_() for x in make_inputs(Case(T=20), torch.float32)]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend: str) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(Case(T=3, K=3, V=2, B=1), torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: wkv7(*x, backend=backend), inputs)


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("place", places())
def test_opcheck(place: Place, packed: bool, save: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is saved for the backward pass may have gaps that nobody reads; opcheck compares them.
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    case = place.fit(Case(T=20, offsets=PACKED if packed else None))
    drawn = make_inputs(case, place.dtype(case))
    inputs = [x.to(place.device).requires_grad_(save) for x in drawn]
    offsets = torch.tensor(PACKED, device=place.device) if packed else None
    torch.library.opcheck(
        torch.ops.rwkv7.wkv7.default, (*inputs, "logit", offsets, place.backend, save, False)
    )


@pytest.mark.parametrize("device", devices())
def test_opcheck_of_a_step(device: str) -> None:
    inputs = [x[:, 0].to(device) for x in make_inputs(Case(T=1), torch.float32)[:6]]
    pool = torch.randn(5, 2, 16, 16, device=device)
    slots = torch.tensor([3, -1], device=device)
    torch.library.opcheck(torch.ops.rwkv7.wkv7_step_.default, (*inputs, pool, "logit", slots))


@pytest.mark.parametrize("place", places())
def test_compiles_into_one_graph(place: Place) -> None:
    case = place.fit(Case(T=20))
    drawn = make_inputs(case, place.dtype(case))
    inputs = [x.to(place.device).requires_grad_() for x in drawn]

    def loss(*x: torch.Tensor) -> torch.Tensor:
        with rwkv7.batch_invariant():
            y, state = wkv7(*x, backend=place.backend)
        return (y**2).sum() + state.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*inputs), inputs)
    found = torch.autograd.grad(compiled(*inputs), inputs)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_activation_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    inputs = leaves()
    expected = torch.autograd.grad(wkv7(*inputs)[0].sum(), inputs)
    y, _ = checkpoint(wkv7, *inputs, use_reentrant=False)
    assert all(
        torch.equal(x, z)
        for x, z in zip(torch.autograd.grad(y.sum(), inputs), expected, strict=True)
    )


def test_autocast_casts_all_but_w_and_leaves_the_arithmetic_alone() -> None:
    inputs = leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = wkv7(*inputs)
    low = [x if i in (1, 6) else x.bfloat16() for i, x in enumerate(inputs)]
    expected, last = wkv7(*low)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(y, expected) and torch.equal(state, last)
    grads = torch.autograd.grad(y.sum(), inputs)
    assert all(x.dtype == torch.float32 for x in grads)


def test_explain_names_the_choice_and_every_refusal() -> None:
    inputs = make_inputs(Case(), torch.float32)
    told = explain(*inputs)
    assert told.backend == "torch" and "reference" in told.refusals
    assert "torch" in str(told) and "preferred" in str(told)
    named = explain(*inputs, backend="reference")
    assert named.backend == "reference" and named.refusals["torch"] == "another was named"


def test_a_named_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_backend("torch")), "refuses", lambda self, call: "no today")
    inputs = make_inputs(Case(), torch.float32)
    with pytest.raises(ValueError, match="'torch' cannot run this call: no today"):
        wkv7(*inputs, backend="torch")
    assert explain(*inputs).backend == "reference"
    assert explain(*inputs).refusals["torch"] == "no today"
    with pytest.raises(ValueError, match="expected one of .*reference.*found 'cudnn'"):
        wkv7(*inputs, backend="cudnn")


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_steps_equal_the_sequence(dtype: torch.dtype, device: str) -> None:
    *inputs, state = (x.to(device) for x in make_inputs(Case(T=9, V=24), dtype))
    y, final = wkv7(*inputs, state)
    pool = torch.randn(5, 2, 24, 16, dtype=state.dtype, device=device)
    slots = torch.tensor([4, 1], device=device)
    pool[slots] = state
    others = pool[[0, 2, 3]].clone()
    for t in range(9):
        step = wkv7_step_(*(x[:, t] for x in inputs), pool, slots=slots)
        torch.testing.assert_close(step, y[:, t])
    torch.testing.assert_close(pool[slots], final)
    assert torch.equal(pool[[0, 2, 3]], others)


@pytest.mark.parametrize("device", devices())
def test_a_skipped_slot_changes_nothing(device: str) -> None:
    inputs = [x[:, 0].to(device) for x in make_inputs(Case(T=1), torch.float32)[:6]]
    pool = torch.randn(3, 2, 16, 16, device=device)
    before = pool.clone()
    y = wkv7_step_(*inputs, pool, slots=torch.tensor([-1, 2], device=device))
    assert torch.equal(pool[:2], before[:2]) and not torch.equal(pool[2], before[2])
    assert not y[0].any() and y[1].any()


def test_rows_that_follow_each_other_are_neither_copied_nor_other_in_any_bit() -> None:
    inputs = [x[:, 0] for x in make_inputs(Case(T=1), torch.float32)[:6]]
    pool = torch.randn(4, 2, 16, 16)
    turned = pool.flip(0)
    with unchecked(), torch.profiler.profile() as seen:
        y = wkv7_step_(*inputs, pool, slots=torch.tensor([1, 2]))
    names = [event.name for event in seen.events()]
    assert "aten::addcmul_" in names
    assert not [name for name in names if "index" in name]
    assert torch.equal(wkv7_step_(*inputs, turned, slots=torch.tensor([2, 1])), y)
    assert torch.equal(turned.flip(0), pool)
    with unchecked(), pytest.raises((IndexError, RuntimeError)):
        wkv7_step_(*inputs, pool, slots=torch.tensor([3, 4]))


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 16, 4096])
def test_steps_in_a_cuda_graph(B: int) -> None:
    """A captured step, replayed with other inputs, states and slots, is the step itself."""
    first, second = (
        [x[:, 0].cuda() for x in make_inputs(Case(T=1, B=B, K=64, V=64), torch.bfloat16, seed)[:6]]
        for seed in (0, 1)
    )
    pool = torch.randn(B + 1, 2, 64, 64, device="cuda")
    before, slots = pool.clone(), torch.arange(B, device="cuda")
    wkv7_step_(*first, pool, slots=slots)  # compiled outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = wkv7_step_(*first, pool, slots=slots)
    for static, new in zip(first, second, strict=True):
        static.copy_(new)
    pool.copy_(before)
    slots.copy_(torch.arange(B, 0, -1))
    graph.replay()
    expected = before.clone()
    step = wkv7_step_(*second, expected, slots=slots)
    assert torch.equal(y, step) and torch.equal(pool, expected)
