"""The fused neighbours under Triton's interpreter: the formulas, the tails, packing, the contract.

Its 16-bit numbers are truncated, so precision is judged in float32 here and on a GPU elsewhere.
"""

import pytest
import torch
from nn.fused.neighbours import drawn, errors, keys, losses, outcome, output, relu, shift, value
from random_model import SMALL, error, random_model, random_state, random_tokens, rows
from triton_interpreter import load

from rwkv7.nn import RECOMPUTE
from rwkv7.nn.fused import use_fused

load("rwkv7.nn.fused.kernels", "elements", "heads", "logits", "shift")
pytestmark = pytest.mark.usefixtures("interpreter")

NORMAL = drawn(torch.float32)
PACKED = [0, 3, 1, 0, 70, 5, 0]


def check(problem, bound=1e-6):
    assert max(errors(problem, torch.float32, fused=True)) < bound


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 1), (2, 16), (3, 17), (1, 40)])
def test_shift(B, T, carried):
    check(shift(NORMAL, B=B, T=T, carried=carried))


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("mixes", [1, 6])
def test_shift_of_packed_sequences(mixes, carried):
    check(shift(NORMAL, T=sum(PACKED), lengths=PACKED, carried=carried, mixes=mixes))


def test_shift_of_many_channels():
    check(shift(NORMAL, B=2, T=3, C=300, carried=True))


@pytest.mark.parametrize("mixes", [1, 6])
def test_shift_without_a_sum(mixes):
    check(shift(NORMAL, B=3, T=17, carried=True, added=False, mixes=mixes))


def test_terms_of_two_dtypes():
    """As under autocast: the residual is wide, what is added to it and what is mixed is not."""
    problem = shift(drawn(torch.bfloat16), B=2, T=9)
    found = []
    for fused in (True, False):
        dtypes = [torch.float32, torch.bfloat16] + [torch.float32] * (len(problem.tensors) - 2)
        leaves = [x.to(d).requires_grad_() for x, d in zip(problem.tensors, dtypes, strict=True)]
        with use_fused(fused), torch.autocast("cpu", torch.bfloat16):
            outputs = problem.function(*leaves)
        assert outputs[-1].dtype == torch.float32
        outputs = [y.bfloat16().float() for y in outputs[:6]] + list(outputs[6:])
        found.append(
            [*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves)]
        )
    for x, y, leaf in zip(found[0][8:], found[1][8:], leaves, strict=True):
        assert x.dtype == y.dtype == leaf.dtype
    assert all(error(x, y) < 1e-2 for x, y in zip(*found, strict=True))


def test_a_norm_with_hooks_is_called(monkeypatch):
    model, tokens = random_model(dtype=torch.float32), random_tokens(SMALL, 1, 9)
    with use_fused(True), torch.no_grad():
        expected = model(tokens, backend="torch")[0]
        seen = []
        hook = model.blocks[1].ln2.register_forward_hook(lambda *given: seen.append(given))
        found = model(tokens, backend="torch")[0]
        hook.remove()
    assert len(seen) == 1 and error(found, expected) < 1e-5


def test_long_spans_give_the_same_gradients(monkeypatch):
    monkeypatch.setattr("rwkv7.nn.fused.shift.rows_apiece", lambda rows, few, many: many)
    check(shift(NORMAL, T=150, lengths=[100, 0, 50], carried=True))


def test_a_sequence_never_feels_its_neighbours():
    problem = shift(NORMAL, T=sum(PACKED), lengths=PACKED, carried=True)
    problem.tensors[0][0, 3:4] = torch.nan
    problem.tensors[2][2] = torch.nan
    mixed, last, others = _parted(outcome(problem, torch.float32, fused=True))
    for x in (*mixed, *others):  # the sum, and the gradients of its two terms
        assert x[0].isnan().any(1).nonzero().flatten().tolist() == [3]
    assert last[[0, 1, 3, 4, 5, 6]].isfinite().all()


def _parted(found):
    return found[:6], found[6], (found[8], found[9])


def test_gradients_of_outputs_that_are_not_used():
    problem = shift(NORMAL, B=2, T=5, carried=True)
    for chosen in (0, 6, 7):
        found = []
        for fused, dtype in ((True, torch.float32), (False, torch.float64)):
            leaves = [x.to(dtype).requires_grad_() for x in problem.tensors]
            with use_fused(fused):
                y = problem.function(*leaves)[chosen]
                found.append(torch.autograd.grad(y.sum(), leaves, materialize_grads=True))
        for x, e in zip(*found, strict=True):
            torch.testing.assert_close(x.double(), e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [{}, {"N": 64, "B": 1, "T": 40}, {"N": 20}, {"H": 1, "T": 1}])
@pytest.mark.parametrize("neighbour", [keys, output, value])
def test_what_is_done_to_a_head(neighbour, size):
    check(neighbour(NORMAL, **size))


@pytest.mark.parametrize("neighbour", [keys, output, value])
def test_long_sums_give_the_same_gradients(neighbour, monkeypatch):
    monkeypatch.setattr(f"rwkv7.nn.fused.{neighbour.__name__}.rows_apiece", lambda *_, **__: 2)
    check(neighbour(NORMAL, B=1, T=150, H=1, N=16))


def test_keys_that_vanish():
    problem = keys(NORMAL)
    problem.tensors[0][0, 2] = 0
    problem.tensors[0][1, 1] *= 1e-14
    check(problem)


@pytest.mark.parametrize("value", [-60.0, 12.0])
def test_learning_rates_that_saturate(value):
    problem = keys(NORMAL)
    problem.tensors[1].fill_(value)
    found = outcome(problem, torch.float32, fused=True)
    expected = outcome(problem, torch.float64, fused=False)
    for x, e in zip(found, expected, strict=True):
        assert float((x.double() - e).detach().norm()) <= 1e-6 * float(e.detach().norm()) + 1e-20


@pytest.mark.parametrize("shape", [(1,), (3, 700), (0, 4)])
def test_squared_relu(shape):
    check(relu(NORMAL, shape=shape))
    special = torch.tensor([-torch.inf, torch.inf, torch.nan, -0.0])
    with use_fused(True):
        found = relu(NORMAL).function(special)[0]
    assert found[:2].tolist() == [0, torch.inf] and found[2].isnan() and found[3] == 0


@pytest.mark.parametrize("V", [1, 5, 4096, 9001])
def test_loss_and_gradient_of_logits(V):
    logits = NORMAL(4, V, scale=5.0)
    logits[1, V // 2] = 300.0  # the rest vanishes beside it
    targets = torch.tensor([0, V // 2, V - 1, -100])
    exact, gradient = losses(logits, targets, torch.float64, fused=False)
    loss, found = losses(logits, targets, torch.float32, fused=True)
    assert loss == pytest.approx(float(exact), rel=1e-6) and not found[3].any()
    assert all(error(x, e) < 1e-6 for x, e in zip(found[:3], gradient[:3], strict=True) if e.any())


def test_of_equal_logits_the_first_is_pulled():
    logits = torch.zeros(3, 6000)
    logits[0, [17, 4113, 5000]] = 2.0
    logits[1, [4500, 5000]] = 2.0
    for fused in (True, False):
        targets = torch.tensor([3, 3, 3])
        pulled, plain = (
            losses(logits, targets, torch.float32, fused=fused, l2_wrap=pull)[1]
            for pull in (0.5, 0.0)
        )
        assert (pulled - plain)[:2].nonzero().tolist() == [[0, 17], [1, 4500]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_no_number_is_seen_and_an_ignored_row_is_not(value):
    logits = NORMAL(2, 5000)
    logits[0, 4500] = value
    for fused in (True, False):
        loss, gradient = losses(logits, torch.tensor([7, 2]), torch.float32, fused=fused)
        assert loss.isnan() and gradient[0].isnan().any() and gradient[1].isfinite().all()
        loss, gradient = losses(logits, torch.tensor([-100, 2]), torch.float32, fused=fused)
        assert loss.isfinite() and not gradient[0].any()


def test_a_logit_of_minus_infinity_is_a_token_that_never_comes():
    logits = NORMAL(1, 4200)
    logits[0, :4100] = -torch.inf
    found, expected = (
        losses(logits, torch.tensor([4150]), dtype, fused=dtype == torch.float32)
        for dtype in (torch.float32, torch.float64)
    )
    assert error(found[0], expected[0]) < 1e-6 and error(found[1], expected[1]) < 1e-6
    assert not found[1][0, :4100].any()


def test_no_tokens():
    for problem in (
        shift(NORMAL, B=0, T=3),
        keys(NORMAL, B=0),
        output(NORMAL, T=0),
        value(NORMAL, T=0),
    ):
        found = outcome(problem, torch.float32, fused=True)
        expected = outcome(problem, torch.float64, fused=False)
        assert [x.shape for x in found] == [x.shape for x in expected]
        assert not any(x.any() for x in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    normal = drawn(dtype)
    for problem in (
        shift(normal, B=2, T=9, carried=True), *(f(normal) for f in (keys, output, relu, value))
    ):  # fmt: skip
        fused, plain = (errors(problem, dtype, fused=side) for side in (True, False))
        assert max(fused) < torch.finfo(dtype).eps
        if dtype == torch.float16:
            assert all(x < 1.1 * y + 1e-7 for x, y in zip(fused, plain, strict=True))
        leaves = [x.to(dtype) for x in problem.tensors]
        with use_fused(True):
            assert all(y.dtype == dtype for y in problem.function(*leaves))


def test_strides_of_any_kind():
    for problem in (
        shift(NORMAL, B=2, T=9, carried=True), *(f(NORMAL) for f in (keys, output, relu, value))
    ):  # fmt: skip
        tensors = [
            torch.stack((x, x), -1)[..., 0] if i < len(problem.tensors) - problem.parameters else x
            for i, x in enumerate(problem.tensors)
        ]
        check(problem._replace(tensors=tensors))


@pytest.mark.parametrize("carried", [False, True])
def test_opcheck(carried, monkeypatch):
    def checked(name):
        operator = getattr(torch.ops.rwkv7, name).default

        def call(*arguments):
            torch.library.opcheck(operator, arguments)
            return operator(*arguments)

        return call

    for module, name in (
        ("shift", "norm_mix"),
        ("keys", "key_operands"),
        ("output", "gated_output"),
        ("activation", "squared_relu"),
        ("value", "mixed_value"),
    ):
        monkeypatch.setattr(f"rwkv7.nn.fused.{module}._{name}", checked(name))
    for problem in (
        shift(NORMAL, T=9, lengths=[4, 0, 5], carried=carried, mixes=1),
        shift(NORMAL, B=2, T=3, carried=carried, added=carried),
        keys(NORMAL),
        output(NORMAL),
        relu(NORMAL),
        value(NORMAL),
    ):
        outcome(problem, torch.float32, fused=True)


def model_outcome(dtype, *, fused, compiled=False, recompute="nothing"):
    """Logits, state and gradients of a packed call with a state."""
    model = random_model(dtype=dtype)
    model.recompute = recompute
    tokens = random_tokens(SMALL, 1, 12)
    offsets = torch.tensor([0, 5, 5, 6, 12])
    state = random_state(SMALL, 4, dtype)
    leaves = [*model.parameters(), *(x.requires_grad_() for x in rows(state))]
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with use_fused(fused):
        logits, after = run(tokens, state, cu_seqlens=offsets, backend="torch")
        loss = logits.square().sum() + sum(x.square().sum() for x in rows(after))
        return [logits, *rows(after), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model(compiled):
    exact = model_outcome(torch.float64, fused=False)
    for x, e in zip(
        model_outcome(torch.float32, fused=True, compiled=compiled), exact, strict=True
    ):
        assert error(x, e) < 1e-4


def test_a_model_that_computes_again_gives_the_same_bits():
    plain, *others = (
        model_outcome(torch.float32, fused=True, recompute=kind) for kind in RECOMPUTE
    )
    for other in others:
        assert all(map(torch.equal, plain, other))


def test_autocast():
    model = random_model(dtype=torch.float32)
    tokens = random_tokens(SMALL, 2, 9)
    with use_fused(True), torch.autocast("cpu", torch.bfloat16):
        logits, state = model(tokens[:, :8], backend="torch")
        model(tokens[:, 8:], state, backend="torch")
    assert logits.dtype == torch.bfloat16 and state.layers[0].time_shift.dtype == torch.float32
    assert error(logits, random_model()(tokens[:, :8])[0]) < 5e-2
    logits.float().square().mean().backward()
    assert all(x.grad is not None for x in model.parameters())
