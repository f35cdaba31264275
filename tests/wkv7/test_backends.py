"""Every backend against the recurrence in fp64: y, the final state and all seven gradients."""

import itertools

import pytest
import torch
from wkv7.cases import LENGTHS, PACKED, STATES, THROUGH, Case, backends, failures, make_inputs

from rwkv7.wkv7 import wkv7
from rwkv7.wkv7.tolerance import relative_error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NARROW, WIDE = {"K": 16, "V": 24}, {"K": 64, "V": 64}
CASES = [
    *(
        Case(T=T, state=state, through=through, **NARROW)
        for T, state, through in itertools.product(LENGTHS[:-1], STATES, THROUGH)
    ),
    *(Case(T=1000, B=1, H=1, state=state, K=16) for state in STATES),
    *(
        Case(offsets=PACKED, decay=decay, state=state, through=through, **NARROW)
        for decay, state, through in itertools.product(("logit", "log"), STATES, THROUGH)
    ),
    *(
        Case(values=values, decay=decay, state=state, B=1, T=100, **WIDE)
        for values, decay, state in itertools.product(
            ("model", "same key", "decay floor", "decay one", "large v"),
            ("logit", "log_bounded", "log"),
            STATES,
        )
    ),
    *(
        Case(values="strong", decay="log", T=T, state=state, through=through)
        for T, state, through in itertools.product((1, 2, 17, 65, 130), STATES, THROUGH)
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", backends())
def test_matches_the_recurrence(backend: str, case: Case) -> None:
    for dtype in DTYPES:
        if dtype == torch.float16 and case.values == "decay floor":
            continue  # dw there is below fp16's normal range: rounding it alone costs 2.5e-3
        assert not failures(case, backend, dtype), dtype


@pytest.mark.parametrize("cut", [0, 1, 15, 16, 31, 32, 33, 69, 70])
@pytest.mark.parametrize("decay", ["logit", "log"])
@pytest.mark.parametrize("backend", backends())
def test_a_sequence_may_be_cut_anywhere(backend: str, decay: str, cut: int) -> None:
    inputs = make_inputs(Case(T=70, decay=decay), torch.float64)
    whole = [x.clone().requires_grad_() for x in inputs]
    parts = [x.clone().requires_grad_() for x in inputs]
    y, final = wkv7(*whole, decay=decay, backend=backend)
    first, middle = wkv7(*(x[:, :cut] for x in parts[:6]), parts[6], decay=decay, backend=backend)
    second, last = wkv7(*(x[:, cut:] for x in parts[:6]), middle, decay=decay, backend=backend)
    seeds = [torch.randn_like(y), torch.randn_like(final)]
    expected = torch.autograd.grad((y, final), whole, seeds)
    joined = torch.cat([first, second], 1)
    found = torch.autograd.grad((joined, last), parts, seeds)
    for x, reference in zip((joined, last, *found), (y, final, *expected), strict=True):
        assert relative_error(x, reference) < 1e-12


@pytest.mark.parametrize("decay", ["logit", "log"])
@pytest.mark.parametrize("backend", backends())
def test_packed_equals_separate(backend: str, decay: str) -> None:
    case = Case(offsets=PACKED, decay=decay)
    *inputs, state = make_inputs(case, torch.float64)
    y, final = wkv7(*inputs, state, decay=decay, cu_seqlens=torch.tensor(PACKED), backend=backend)
    for s, (start, end) in enumerate(itertools.pairwise(PACKED)):
        part = [x[:, start:end] for x in inputs]
        alone, last = wkv7(*part, state[s : s + 1], decay=decay, backend=backend)
        assert relative_error(y[:, start:end], alone) < 1e-12
        assert relative_error(final[s : s + 1], last) < 1e-12


@pytest.mark.parametrize("T", [1, 9, 40, 100])
@pytest.mark.parametrize("decay", ["logit", "log"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_bits_do_not_depend_on_the_batch(backend: str, decay: str, T: int) -> None:
    """The same sequence alone, in a batch of five, and packed among others: identical bits."""
    case = Case(T=T, B=5, H=3, K=64, V=64, decay=decay)
    inputs = [x.requires_grad_() for x in make_inputs(case, torch.float32)]
    seed = torch.randn(5, T, 3, 64)

    def results(tensors: list[torch.Tensor], dy: torch.Tensor, offsets: torch.Tensor | None):
        y, final = wkv7(*tensors, decay=decay, cu_seqlens=offsets, backend=backend)
        grads = torch.autograd.grad((y, final), tensors, (dy, torch.ones_like(final)))
        return [y, final, *grads]

    batch = results(inputs, seed, None)
    packed_inputs = [x.flatten(0, 1)[None] for x in inputs[:6]] + [inputs[6]]
    offsets = torch.arange(6) * T
    packed = results(packed_inputs, seed.flatten(0, 1)[None], offsets)
    for row in range(5):
        alone = results([x[row : row + 1] for x in inputs], seed[row : row + 1], None)
        for i, (one, many, flat) in enumerate(zip(alone, batch, packed, strict=True)):
            if i in (1, 8):  # states
                among = flat[row : row + 1]
            else:
                among = flat[:, row * T : (row + 1) * T]
            assert torch.equal(one, many[row : row + 1])
            assert torch.equal(one, among)


@pytest.mark.parametrize("backend", backends())
def test_a_neighbour_is_never_felt(backend: str) -> None:
    *inputs, state = make_inputs(Case(offsets=PACKED), torch.float32)
    offsets = torch.tensor(PACKED)
    y, final = wkv7(*inputs, state, cu_seqlens=offsets, backend=backend)
    for x in inputs:
        x[:, 35:100] = 1e3 * torch.randn_like(x[:, 35:100])
    other, last = wkv7(*inputs, state, cu_seqlens=offsets, backend=backend)
    apart = [s for s in range(len(PACKED) - 1) if s != 5]
    assert torch.equal(y[:, :35], other[:, :35]) and torch.equal(y[:, 100:], other[:, 100:])
    assert torch.equal(final[apart], last[apart])
    assert not torch.equal(y[:, 35:100], other[:, 35:100])


@pytest.mark.parametrize(("decay", "bound"), [("logit", 1e-5), ("one", 1e-4)])
def test_65536_tokens(decay: str, bound: float) -> None:
    values = "decay one" if decay == "one" else "model"
    case = Case(T=65536, B=1, H=1, values=values)
    inputs = make_inputs(case, torch.float32)
    with torch.no_grad():
        y, final = wkv7(*inputs)
        reference, last = wkv7(*(x.double() for x in inputs), backend="reference")
    assert relative_error(y, reference) < bound
    assert relative_error(final, last) < bound


@pytest.mark.parametrize("backend", backends())
def test_arguments_are_left_alone_and_strides_are_free(backend: str) -> None:
    inputs = make_inputs(Case(T=40, V=24), torch.float32)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:6]]
    strided.append(inputs[6].mT.contiguous().mT)
    copies = [x.clone() for x in inputs]
    y, final = wkv7(*inputs, backend=backend)
    other, last = wkv7(*strided, backend=backend)
    assert torch.equal(y, other) and torch.equal(final, last)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))
    empty, same = wkv7(*(x[:, :0] for x in inputs[:6]), inputs[6], backend=backend)
    assert empty.shape == (2, 0, 2, 24)
    assert torch.equal(same, inputs[6]) and same.data_ptr() != inputs[6].data_ptr()


@pytest.mark.parametrize("backend", backends())
def test_nothing_reads_unwritten_memory(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory full of NaN must not change a bit of any result."""
    case = Case(offsets=PACKED, K=16, V=24)
    inputs = make_inputs(case, torch.float32)

    def run() -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        y, final = wkv7(*leaves, cu_seqlens=torch.tensor(PACKED), backend=backend)
        return [y, final, *torch.autograd.grad((y.sum() + final.sum()), leaves)]

    clean = run()
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poisoned(make):
        def wrapper(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))
    assert all(torch.equal(x, y) for x, y in zip(run(), clean, strict=True))
