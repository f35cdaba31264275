"""What a mistaken call gets: an error that names the argument, what was expected, what found."""

import pytest
import torch
from wkv7.cases import Case, make_inputs

from rwkv7 import explain, wkv7, wkv7_step_

ARGUMENTS = ("r", "w", "k", "v", "a", "b", "state")


def call(**changes: object) -> None:
    options = {n: changes.pop(n) for n in ("decay", "cu_seqlens", "backend") if n in changes}
    given = dict(zip(ARGUMENTS, make_inputs(Case(T=6, V=24), torch.float32), strict=True))
    given.update(changes)
    wkv7(**given, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ARGUMENTS[:6])
def test_shape_dtype_and_type_of_each_input(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{'w' if name == 'r' else name}: expected .*found"):
        call(**{name: torch.zeros(2, 5, 2, 16)})
    with pytest.raises(ValueError, match=rf"^{name}: expected \[B, T, H, [KV]\], found"):
        call(**{name: torch.zeros(2, 6, 32)})
    with pytest.raises(TypeError, match=r"expected (bfloat16|torch\.float32).*found torch\.int64"):
        call(**{name: torch.zeros(2, 6, 2, 24 if name == "v" else 16, dtype=torch.int64)})
    with pytest.raises(TypeError, match=rf"^{name}: expected a torch.Tensor, found list"):
        call(**{name: [1.0]})


def test_mixed_dtypes() -> None:
    with pytest.raises(TypeError, match=r"k: expected torch.float32 .*found torch.bfloat16"):
        call(k=torch.zeros(2, 6, 2, 16, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="a: expected the device of r, cpu, found meta"):
        call(a=torch.zeros(2, 6, 2, 16, device="meta"))


def test_a_state_of_the_other_layout_names_both_and_the_converter() -> None:
    with pytest.raises(ValueError, match=r"\[2, 2, 24, 16\].*\[2, 2, 16, 24\].*state_from_fla"):
        call(state=torch.zeros(2, 2, 16, 24))
    with pytest.raises(TypeError, match=r"state: expected torch.float32 .*found torch.bfloat16"):
        call(state=torch.zeros(2, 2, 24, 16, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="state: expected the device cpu, found meta"):
        call(state=torch.zeros(2, 2, 24, 16, device="meta"))
    with pytest.raises(TypeError, match="state: expected a torch.Tensor or None"):
        call(state=0)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_nan_is_named(name: str) -> None:
    values = dict(zip(ARGUMENTS, make_inputs(Case(T=6, V=24), torch.float32), strict=True))
    values[name].view(-1)[5] = float("nan")
    with pytest.raises(ValueError, match=f"{name}: expected numbers, found 1 NaN"):
        call(**{name: values[name]})


def test_infinities_of_both_signs_are_not_nan() -> None:
    v = torch.zeros(2, 6, 2, 24)
    v.view(-1)[:2] = torch.tensor([float("inf"), -float("inf")])
    call(v=v)


def test_decays_outside_their_form() -> None:
    w = torch.full((2, 6, 2, 16), -0.3)
    call(w=w, decay="log_bounded")
    call(w=torch.full_like(w, -0.60653067), decay="log_bounded")  # the floor, rounded
    w[0, 0, 0, 0] = 0.1
    with pytest.raises(ValueError, match='decay="log" needs log decays ≤ 0, found 0.1'):
        call(w=w, decay="log")
    w[0, 0, 0, 0] = -0.7
    with pytest.raises(ValueError, match='at least -e.*found -0.7; decay="log"'):
        call(w=w, decay="log_bounded")
    with pytest.raises(ValueError, match="decay: expected one of 'logit'.*found 'exp'"):
        call(decay="exp")


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 6], "expected to start at 0, found 1"),
        ([0, 4, 3, 6], "never fall, found 4 then 3 at position 2"),
        ([0, 5], "expected to end at T = 6, found 5"),
        ([0, 7], "expected to end at T = 6, found 7"),
    ],
)
def test_offsets(offsets: list[int], message: str) -> None:
    inputs = [x[:1] for x in make_inputs(Case(T=6), torch.float32)[:6]]
    with pytest.raises(ValueError, match=f"cu_seqlens: .*{message}"):
        wkv7(*inputs, cu_seqlens=torch.tensor(offsets))


def test_packed_calls_have_one_row_and_integer_offsets() -> None:
    with pytest.raises(ValueError, match="packed inputs have B = 1, found B = 2"):
        call(cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(TypeError, match="cu_seqlens: expected int32 or int64, found torch.float32"):
        call(cu_seqlens=torch.tensor([0.0, 6.0]))
    with pytest.raises(
        TypeError, match="cu_seqlens: expected an int32 or int64 tensor, found list"
    ):
        call(cu_seqlens=[0, 6])


def test_forward_mode_is_refused_rather_than_dropped() -> None:
    inputs = make_inputs(Case(T=6), torch.float32)
    r, *rest = inputs
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: wkv7(x, *rest)[0], (r,), (r,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError):
        wkv7(torch.autograd.forward_ad.make_dual(r, r), *rest)


def test_backend_names_layouts_and_shape_inference() -> None:
    inputs = make_inputs(Case(T=6), torch.float32)
    with pytest.raises(TypeError, match="backend: expected a name or None, found int"):
        wkv7(*inputs, backend=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend: expected one of .* found 'nope'"):
        explain(*inputs, backend="nope")
    with pytest.raises(TypeError, match="v: expected a dense tensor"):
        wkv7(*inputs[:3], inputs[3].to_sparse(), *inputs[4:])
    with pytest.raises(TypeError, match=r"w: expected torch.float32 \(the dtype"):
        wkv7(inputs[0], inputs[1].bfloat16(), *inputs[2:])
    y, state = wkv7(*(x.to("meta") for x in inputs))
    assert y.shape == inputs[3].shape and state.shape == inputs[6].shape


def test_steps() -> None:
    inputs = [x[:, 0] for x in make_inputs(Case(T=1), torch.float32)[:6]]
    pool = torch.zeros(4, 2, 16, 16)
    with pytest.raises(ValueError, match="state: expected 2 rows, one a sequence, found 4"):
        wkv7_step_(*inputs, pool)
    with pytest.raises(ValueError, match="a row may be named once only"):
        wkv7_step_(*inputs, pool, slots=torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="rows 0 to 3 of the pool, found 1 to 4"):
        wkv7_step_(*inputs, pool, slots=torch.tensor([1, 4]))
    with pytest.raises(TypeError, match="slots: expected a torch.Tensor or None, found list"):
        wkv7_step_(*inputs, pool, slots=[0, 1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="found an expanded tensor"):
        wkv7_step_(*inputs, pool[:1].expand(2, -1, -1, -1))
    skipped = wkv7_step_(*inputs, pool[:0], slots=torch.tensor([-1, -1]))
    assert skipped.shape == inputs[3].shape and not skipped.any()
    with pytest.raises(RuntimeError, match="k: requires grad, and wkv7_step_ changes"):
        inputs[2].requires_grad_()
        wkv7_step_(*inputs, pool, slots=torch.tensor([0, 1]))
    with torch.no_grad():
        wkv7_step_(*inputs, pool, slots=torch.tensor([0, 1]))
    assert pool[:2].any() and not pool[2:].any()
