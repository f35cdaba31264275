"""Every GPU kernel of the operator on a call as small as shows its branches.

The numbers are tested elsewhere; these calls are few and short so that `make sanitize` can run them
under compute-sanitizer, which looks at every access to memory.
"""

import pytest
import torch
from wkv7.cases import Case, Place, failures

from rwkv7.wkv7 import wkv7_step_
from rwkv7.wkv7.backends.cuda import plan

pytestmark = pytest.mark.gpu

SIZES = ({"K": 64, "V": 64}, {"K": 128, "V": 128})
FULL = {"B": 1, "H": 260, "K": 64, "V": 64}  # more heads than fill a card, in every backend's plan
CASES = [
    *(Case(T=150, H=1, state=state, **N) for N in SIZES for state in ("none", "random")),
    *(Case(offsets=(0, 0, 1, 70, 70, 199), H=1, through=through, **N)
      for N in SIZES for through in ("y", "state")),
    Case(T=65, decay="log_bounded", wide_w=True, **FULL),
    Case(T=5, H=1, decay="log", values="strong"),
    Case(T=33, H=1, K=16, V=24),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_call(backend: str, case: Case, dtype: torch.dtype) -> None:
    place = Place(backend, "cuda")
    if dtype not in place.dtypes(case):
        pytest.skip("not taken")
    assert not failures(case, place, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_relay_of_cuda(
    size: dict[str, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "FEWEST_CHUNKS", 2)
    assert not failures(Case(T=200, B=1, H=1, **size), Place("cuda", "cuda"), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_segments_of_cuda(
    size: dict[str, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "SHORTEST_SEGMENT", 64)
    monkeypatch.setattr(plan, "FEWEST_SEGMENTS", 4)
    assert not failures(Case(T=200, B=1, H=1, **size), Place("cuda", "cuda"), dtype)


@pytest.mark.parametrize("N", [64, 128])
def test_a_step(N: int) -> None:
    token = [torch.randn(3, 2, N, device="cuda", dtype=torch.bfloat16) for _ in range(6)]
    pool = torch.zeros(4, 2, N, N, device="cuda")
    slots = torch.tensor([2, -1, 0], device="cuda")
    y = wkv7_step_(*token, pool, slots=slots)
    assert y[0].any() and not y[1].any() and not pool[1].any() and not pool[3].any()
