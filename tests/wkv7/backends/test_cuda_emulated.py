"""The backend `cuda` on a CPU, kernels and host code, against the recurrence in fp64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from wkv7.backends.emulation import LARGE, Emulator, Guard, emulate, why_not
from wkv7.cases import Case, Place, arguments, exact, failures, make_inputs

from rwkv7.benchmark import backend
from rwkv7.benchmark.sample import Judge, Sample, Shape
from rwkv7.wkv7 import wkv7
from rwkv7.wkv7.backends.cuda import CudaBackend, launch, plan
from rwkv7.wkv7.contract import Call
from rwkv7.wkv7.tolerance import BOUNDS, compare, relative_error

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
CPU = Place("cuda")
ONE = {"B": 1, "H": 1, "K": 64, "V": 64}
PACKED = (0, 0, 1, 65, 65, 66, 100)
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 130)
VALUES = ("same key", "decay floor", "decay one", "large v")
CASES = [
    *(
        Case(T=T, state=state, **ONE)
        for T, state in zip(LENGTHS, itertools.cycle(("random", "none", "zero")))
    ),
    *(Case(T=80, values=values, **ONE) for values in VALUES),
    Case(T=70, **{**ONE, "B": 2, "H": 2}),
    Case(T=70, decay="log_bounded", **ONE),
    Case(T=70, decay="log_bounded", wide_w=True, **ONE),
    Case(offsets=PACKED, **{**ONE, "H": 2}),
    Case(offsets=PACKED, state="none", **ONE),
]
BIG = {"B": 1, "H": 1, "K": 128, "V": 128}
BIG_HEADS = [
    Case(T=70, **BIG),
    Case(T=130, values="same key", state="none", **BIG),
    Case(T=80, values="decay floor", state="zero", **BIG),
    Case(T=17, decay="log_bounded", wide_w=True, **BIG),
    Case(offsets=(0, 0, 1, 66), **{**BIG, "H": 2}),
    Case(T=70, through="y", **BIG),
    Case(T=1, state="none", through="state", **BIG),
]
RELAYED = [
    *(
        Case(T=T, values=values, state=state, **{**ONE, "B": B, "H": H})
        for T, B, H, values, state in (
            (65, 1, 1, "model", "none"),
            (230, 2, 2, "model", "random"),
            (200, 1, 1, "same key", "none"),
            (300, 1, 3, "decay floor", "zero"),
            (180, 1, 1, "large v", "random"),
        )
    ),
    *(Case(T=150, through=through, **ONE) for through in ("y", "state")),
    Case(T=130, decay="log_bounded", wide_w=True, **ONE),
    Case(T=200, values="same key", **BIG),
]
SEGMENTED = [
    *(
        Case(T=230, values=values, state=state, **{**ONE, "B": 2})
        for values, state in itertools.product(
            ("model", "same key", "decay floor"), ("none", "random")
        )
    ),
    *(Case(T=250, through=through, **{**ONE, "H": 2}) for through in ("y", "state")),
    Case(T=200, decay="log_bounded", wide_w=True, **ONE),
    Case(T=200, values="same key", **BIG),
]
# Gradients through one output alone; the other one's is absent.
ONE_SIDED = [Case(T=70, through=through, **ONE) for through in ("y", "state")]
HALF = [Case(T=T, values=values, **ONE) for T, values in ((70, "model"), (130, "same key"))]
# Few tokens and an empty state: dw is zero, or what a and b receive a few products that cancel.
# Or the last chunk ends with steps of 16 that have no tokens.
THREE = {"B": 1, "H": 3}
FEW_TOKENS = [
    (Case(T=1, values=values, decay=decay, state=state, through=through, **size), dtype)
    for values, decay, state, through, size, dtype in (
        ("model", "log_bounded", "none", "both", {**ONE, "B": 2}, torch.bfloat16),
        ("large v", "log_bounded", "zero", "both", {**ONE, "B": 2, "H": 3}, torch.bfloat16),
        ("large v", "log_bounded", "none", "state", {**ONE, "B": 3, "H": 2}, torch.float16),
    )
] + [
    (Case(T=48, state="zero", through="state", **{**ONE, "B": 3, "H": 3}), torch.float16),
    (
        Case(T=1, values="decay one", decay="log_bounded", state="zero", **{**ONE, "B": 2}),
        torch.bfloat16,
    ),
    (Case(T=112, values="model", state="random", through="state", **ONE), torch.float16),
    (Case(T=2, state="none", through="y", **ONE), torch.float16),
    (Case(T=2, state="none", through="y", **{**BIG, **THREE}), torch.float16),
    (Case(T=2, values="same key", state="none", through="y", **{**BIG, **THREE}), torch.bfloat16),
    (
        Case(T=2, values="same key", state="none", through="y", wide_w=True, **{**BIG, **THREE}),
        torch.float16,
    ),
]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """Kernels are built once for the whole file."""
    return Emulator(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(autouse=True)
def guard(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guard]:
    """Every test runs with guarded outputs, and none may write beyond them."""
    guard = emulate(monkeypatch, emulator)
    yield guard
    assert guard.buffers and guard.intact()


def forward_failures(case: Case, dtype: torch.dtype) -> dict[str, str]:
    """What of y and the final state is out of bounds, in inference and where states are kept."""
    wrong = {}
    for save in (False, True):
        given, options = arguments(case, make_inputs(case, dtype), CPU, dtype)
        y, state = wkv7(*(x.requires_grad_(save) for x in given), **options)
        measures = compare({"y": y, "state": state}, exact(case, dtype), dtype)
        wrong |= {f"{n}, save {save}": f"{m.error:.1e}" for n, m in measures.items() if not m.ok}
    return wrong


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: Case) -> None:
    assert not forward_failures(case, torch.bfloat16)


@pytest.mark.parametrize("case", HALF, ids=str)
def test_forward_in_fp16(case: Case) -> None:
    assert not forward_failures(case, torch.float16)


@pytest.mark.parametrize("N", [64, 128])
@pytest.mark.parametrize(("T", "seed"), [(2, 45), (2, 52), (3, 48)])
def test_products_that_cancel_in_fp16(T: int, seed: int, N: int) -> None:
    """A few tokens whose r·k are small sums of large terms: y and dv keep their digits."""
    case = Case(T=T, state="none", through="y", **{**ONE, "K": N, "V": N})
    given, options = arguments(case, make_inputs(case, torch.float16, seed), CPU, torch.float16)

    def y_and_dv(given: list[Tensor | None], **options: object) -> tuple[Tensor, ...]:
        leaves = [x if x is None else x.detach().requires_grad_() for x in given]
        y, _ = wkv7(*leaves, **options)
        return y, *torch.autograd.grad(y.sum(), leaves[3])

    found = y_and_dv(given, **options)
    wide = [x if x is None else x.double() for x in given]
    expected = y_and_dv(wide, **{**options, "backend": "reference"})
    bounds = BOUNDS[torch.float16]
    for x, right, bound in zip(found, expected, (bounds.y, bounds.gradient), strict=True):
        assert relative_error(x, right) < bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_thousand_tokens_of_one_key(dtype: torch.dtype) -> None:
    """Every step's errors across the key stay in the state: what operands lose must be kept."""
    sample = Sample(Shape.parse("1x1000x1x64"), dtype, torch.device("cpu"), repeated_key=True)
    found = backend("cuda").prepare(sample).training()
    errors, ok = Judge(sample).errors(found, "logit")
    assert ok and errors["state"] < 0.5 * BOUNDS[dtype].state, errors


@pytest.mark.parametrize("case", [*CASES, *ONE_SIDED], ids=str)
def test_gradients(case: Case) -> None:
    assert not failures(case, CPU, torch.bfloat16)


@pytest.mark.parametrize("through", ["state", "both"])
@pytest.mark.parametrize("state", ["none", "zero"])
def test_dw_vanishes_where_there_is_nothing_to_decay(state: str, through: str) -> None:
    assert not failures(Case(T=1, state=state, through=through, **ONE), CPU, torch.bfloat16)


@pytest.mark.parametrize("case", HALF, ids=str)
def test_gradients_in_fp16(case: Case) -> None:
    assert not failures(case, CPU, torch.float16)


@pytest.mark.parametrize(("case", "dtype"), FEW_TOKENS, ids=str)
def test_few_tokens(case: Case, dtype: torch.dtype) -> None:
    assert not failures(case, CPU, dtype)


@pytest.mark.parametrize("case", BIG_HEADS, ids=str)
def test_big_heads(case: Case) -> None:
    assert not failures(case, CPU, torch.bfloat16)


def test_big_heads_without_gradients() -> None:
    assert not forward_failures(Case(T=70, **BIG), torch.bfloat16)


def test_big_heads_in_fp16() -> None:
    assert not failures(Case(T=130, values="same key", **BIG), CPU, torch.float16)


@pytest.mark.parametrize(
    "case",
    [Case(T=130, **{**ONE, "B": 2}), Case(offsets=PACKED, **ONE), Case(T=70, **BIG)],
    ids=str,
)
def test_the_state_before_every_chunk_is_saved(case: Case) -> None:
    """As fp16 with a power of two a row, where plan.chunk_count says; an empty chunk saves none.

    A thread's elements of 16 rows and 16 columns lie side by side.
    """
    given, options = arguments(case, make_inputs(case, torch.bfloat16), CPU, torch.bfloat16)
    offsets = options["cu_seqlens"]
    call = Call(*given, case.decay, offsets)
    _, _, saved = CudaBackend().forward(call, True)
    N = case.K
    words = plan.chunk_count(call) * N * N // 2
    # 16 rows, 16 columns, row of 8, two columns of 8, which 8 columns, which 8 rows, which column.
    threads = saved[:words].view(torch.float16).view(-1, 1, N // 16, N // 16, 8, 4, 2, 2, 2)
    states = threads.permute(0, 1, 2, 7, 4, 3, 6, 5, 8).reshape(-1, 1, N, N)
    scales = saved[words:].view(-1, 1, N)
    wide = [x.double() for x in given]
    spans = itertools.pairwise(case.offsets) if case.offsets else [(0, case.T)] * case.B
    for s, (start, end) in enumerate(spans):
        first, row = (start // 64 + s, 0) if case.offsets else (s * -(-case.T // 64), s)
        for i, done in enumerate(range(0, end - start, 64)):
            before = [x[row : row + 1, start : start + done] for x in wide[:6]]
            _, state = wkv7(*before, wide[6][s : s + 1], decay=case.decay, backend="reference")
            found = states[first + i].double() * scales[first + i, ..., None]
            assert relative_error(found, state[0]) < BOUNDS[torch.bfloat16].state


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.bfloat16) for case in SEGMENTED),
        (Case(T=200, values="same key", **ONE), torch.float16),
        (Case(T=200, **BIG), torch.float16),
    ],
    ids=str,
)
def test_segments_at_once(
    case: Case, dtype: torch.dtype, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of four segments, the last ones ragged, joined by their maps."""
    monkeypatch.setattr(launch, "card", lambda device: LARGE)
    monkeypatch.setattr(plan, "SHORTEST_SEGMENT", 64)
    monkeypatch.setattr(plan, "FEWEST_SEGMENTS", 4)
    emulator.launches.clear()
    assert not failures(case, CPU, dtype)
    forward, backward = ["segment", "chain", "forward"], ["segment_back", "chain", "backward"]
    assert emulator.launches == forward + backward


def small_slabs(chunks: int, *_: int) -> tuple[int, ...]:
    """Of one chunk, then of four, which is more than a ring has places for."""
    return 1, *[4] * ((chunks - 1) // 4), *[(chunks - 1) % 4] * ((chunks - 1) % 4 > 0)


@pytest.fixture
def relayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of more than a chunk is a relay, in small slabs."""
    monkeypatch.setattr(launch, "card", lambda device: LARGE)
    monkeypatch.setattr(plan, "FEWEST_CHUNKS", 2)
    monkeypatch.setattr(plan, "slab_sizes", small_slabs)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.bfloat16) for case in RELAYED),
        (Case(T=200, values="same key", **ONE), torch.float16),
        (Case(T=130, decay="log_bounded", wide_w=True, **ONE), torch.float16),
        (Case(T=140, **BIG), torch.float16),
    ],
    ids=str,
)
@pytest.mark.usefixtures("relayed")
def test_relay(case: Case, dtype: torch.dtype, emulator: Emulator) -> None:
    """A launch more than slabs, both ways; a sequence's last chunk is ragged."""
    emulator.launches.clear()
    assert not failures(case, CPU, dtype)
    launches = 1 + len(small_slabs(-(-case.T // 64)))
    expected = ["relay"] * launches + ["relay_back"] * launches + ["backward"]
    assert emulator.launches == expected


@pytest.mark.parametrize("case", [Case(T=300, **{**ONE, "B": 2}), Case(T=140, **BIG)], ids=str)
def test_a_relay_computes_what_a_walk_does(case: Case, request: pytest.FixtureRequest) -> None:
    """The state is handed from launch to launch, and what is saved of it: the same bits."""
    given, _ = arguments(case, make_inputs(case, torch.bfloat16), CPU, torch.bfloat16)
    call = Call(*given, case.decay, None)
    walked = CudaBackend().forward(call, True)
    request.getfixturevalue("relayed")
    assert all(map(torch.equal, CudaBackend().forward(call, True), walked))


def test_strides_and_addresses_are_free() -> None:
    """A view that begins between two 16-byte boundaries, and one with its axes swapped."""
    case = Case(T=20, **{**ONE, "B": 2, "H": 2})
    given, options = arguments(case, make_inputs(case, torch.bfloat16), CPU, torch.bfloat16)
    expected = wkv7(*given, **options)
    odd = [torch.cat([x.new_ones(1), x.flatten()])[1:].view(x.shape) for x in given]
    swapped = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in given]
    for others in (odd, swapped):
        assert all(map(torch.equal, wkv7(*others, **options), expected))


def test_an_empty_call_launches_nothing(emulator: Emulator) -> None:
    before = len(emulator.launches)
    given, options = arguments(
        Case(T=0, **ONE), make_inputs(Case(T=0, **ONE), torch.bfloat16), CPU, torch.bfloat16
    )
    y, state = wkv7(*given, **options)
    assert y.shape == (1, 0, 1, 64) and torch.equal(state, given[6])
    assert state.data_ptr() != given[6].data_ptr()
    assert len(emulator.launches) == before
