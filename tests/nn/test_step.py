"""`RWKV7.step_`: a pool of states advanced in place gives what sequences of their own give."""

import pytest
import torch
from random_model import SMALL, error, random_model, random_state, random_tokens, rows
from torch._subclasses.fake_tensor import FakeTensorMode

from rwkv7 import ModelState
from rwkv7.wkv7 import unchecked

MODEL = random_model()


@pytest.mark.parametrize("slots", [[2, 0, 3], [1], [1, 2, 3], [0, -1, 3, -1]])
def test_rows_of_a_pool_advance_as_sequences_do(slots):
    pool = random_state(SMALL, 5)
    before, used = pool.clone(), [slot for slot in slots if slot >= 0]
    tokens = random_tokens(SMALL, len(slots))
    chosen = torch.tensor([i for i, slot in enumerate(slots) if slot >= 0])
    expected, after = MODEL(tokens[chosen][:, None], before.select(used))
    logits = MODEL.step_(tokens, pool, torch.tensor(slots))
    assert error(logits[chosen], expected[:, 0]) < 1e-12
    for x, y in zip(rows(pool.select(used)), rows(after), strict=True):
        assert error(x, y) < 1e-12
    others = sorted(set(range(4)) - set(used))
    for x, y in zip(rows(pool.select(others)), rows(before.select(others)), strict=True):
        assert torch.equal(x, y)


def test_a_broken_row_breaks_no_other():
    pool, slots = random_state(SMALL, 3), torch.tensor([0, 1])
    tokens = random_tokens(SMALL, 2)
    expected = MODEL.step_(tokens[1:], pool.clone(), slots[1:])
    pool.layers[1].wkv[0, 0, 0, 0] = torch.nan
    with unchecked():
        logits = MODEL.step_(tokens, pool, slots)
    assert bool(logits[0].isnan().all())
    assert error(logits[1], expected[0]) < 1e-12
    assert not any(bool(x.isnan().any()) for x in rows(pool.select([1, 2])))


def test_checks_of_values_come_back_after_unchecked():
    pool, slots = random_state(SMALL, 2), torch.tensor([0])
    pool.layers[0].wkv[0] = torch.nan
    with unchecked():
        MODEL.step_(random_tokens(SMALL, 1), pool, slots)
    with pytest.raises(ValueError, match="expected numbers"):
        MODEL.step_(random_tokens(SMALL, 1), pool, slots)


def test_a_step_never_asks_for_values():
    """What would make a GPU wait, and a CUDA graph impossible, fails on tensors without values."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        pool = ModelState.zeros(SMALL, 5, torch.float64)
        tokens, slots = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
        assert MODEL.step_(tokens, pool, slots).shape == (4, SMALL.vocab_size)


def test_a_compiled_step_gives_the_same_in_place():
    model, pool = random_model(), random_state(SMALL, 5)
    expected_pool = pool.clone()
    model.compile_step("aot_eager")
    for slots in ([2, 0], [1, -1, 3]):
        tokens, slots = random_tokens(SMALL, len(slots)), torch.tensor(slots)
        expected = MODEL.step_(tokens, expected_pool, slots)
        assert error(model.step_(tokens, pool, slots)[slots >= 0], expected[slots >= 0]) < 1e-12
    for x, y in zip(rows(pool.select(range(4))), rows(expected_pool.select(range(4))), strict=True):
        assert error(x, y) < 1e-12


def test_misfits_are_refused_before_anything_changes():
    pool = random_state(SMALL, 3)
    before = pool.clone()
    with pytest.raises(ValueError, match="tokens: expected ids from 0 to 28"):
        MODEL.step_(torch.tensor([3, 29]), pool, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"slots: expected the shape \[2\]"):
        MODEL.step_(torch.tensor([3, 4]), pool.clone(), torch.tensor([0]))
    with pytest.raises(TypeError, match="tokens: expected an int32 or int64"):
        MODEL.step_(torch.tensor([3.0]), pool, torch.tensor([0]))
    for x, y in zip(rows(pool), rows(before), strict=True):
        assert torch.equal(x, y)
