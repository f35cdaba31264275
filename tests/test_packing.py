"""Padding comes off, goes back on, and never reaches a state."""

import pytest
import torch
from random_model import SMALL, random_model, random_state, random_tokens, rows

from rwkv7.packing import pack, run_padded, unpack

MASK = torch.tensor(
    [
        [0, 0, 1, 1, 1],
        [1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1],
        [0, 1, 1, 0, 0],
    ]
)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_there_and_back(dtype):
    mask = MASK.to(dtype)
    tokens = torch.arange(1, 26).view(5, 5)
    packed, offsets = pack(tokens, mask)
    assert packed.tolist() == [[3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 22, 23]]
    assert offsets.tolist() == [0, 3, 5, 5, 10, 12]
    assert torch.equal(unpack(packed, mask), tokens * MASK)
    assert torch.equal(unpack(packed, mask, fill=-1), torch.where(MASK.bool(), tokens, -1))


def test_carries_further_axes_and_gradients():
    x = torch.randn(5, 5, 3, requires_grad=True)
    packed, _ = pack(x, MASK)
    assert packed.shape == (1, 12, 3)
    back = unpack(packed, MASK)
    assert torch.equal(back, x * MASK[..., None])
    back.sum().backward()
    assert torch.equal(x.grad, MASK[..., None].expand(5, 5, 3).float())


def test_padding_never_reaches_logits_or_states():
    model = random_model()
    tokens = random_tokens(SMALL, 5, 5)
    packed, offsets = pack(tokens, MASK)
    logits, state = model(packed, cu_seqlens=offsets)
    logits = unpack(logits, MASK)
    for row in range(5):
        kept = MASK[row].bool()
        alone, after = model(tokens[row][kept][None])
        torch.testing.assert_close(logits[row][kept], alone[0], rtol=1e-12, atol=1e-12)
        for x, y in zip(state.select([row]).layers, after.layers, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


LENGTHS = [4, 0, 7, 1]  # the second row is padding alone


def padded(side, lengths=LENGTHS, size=7):
    """Random rows of these lengths, padded with what is no id: (tokens, mask, the rows)."""
    texts = [random_tokens(SMALL, length, seed=3 + i) for i, length in enumerate(lengths)]
    tokens = torch.full((len(lengths), size), -100)
    mask = torch.zeros(len(lengths), size, dtype=torch.long)
    for row, text in enumerate(texts):
        first = {"left": size - len(text), "right": 0, "both": (size - len(text)) // 2}[side]
        tokens[row, first : first + len(text)] = text
        mask[row, first : first + len(text)] = 1
    return tokens, mask, texts


@pytest.mark.parametrize("given", [False, True], ids=["empty", "state"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_padded_batch_is_its_rows_alone(side, given):
    model = random_model()
    tokens, mask, texts = padded(side)
    state = random_state(SMALL, len(texts)) if given else None
    logits, after = run_padded(model, tokens, mask, state)
    last, after_last = run_padded(model, tokens, mask, state, last_only=True)
    assert (logits.shape[:2], last.shape[:2]) == ((4, 7), (4, 1))
    assert not logits[mask == 0].any()
    assert last[1].isnan().all()
    for row, text in enumerate(texts):
        before = state.select([row]) if given else None
        expected, end = model(text[None], before)
        found = logits[row][mask[row].bool()]
        torch.testing.assert_close(found, expected[0], rtol=1e-12, atol=1e-12)
        for now in (after, after_last):
            for x, y in zip(rows(now.select([row])), rows(end), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
        if len(text):
            torch.testing.assert_close(last[row, 0], expected[0, -1], rtol=1e-12, atol=1e-12)


def test_where_the_padding_stands_changes_no_bit():
    model = random_model(dtype=torch.float32)
    first, *others = (run_padded(model, *padded(side)[:2]) for side in ("left", "right", "both"))
    left, _ = first
    for (logits, state), side in zip(others, ("right", "both"), strict=True):
        assert torch.equal(logits[padded(side)[1] == 1], left[padded("left")[1] == 1])
        assert all(map(torch.equal, rows(state), rows(first[1])))


def test_gradients_of_a_padded_batch_are_those_of_its_rows():
    model = random_model()
    tokens, mask, texts = padded("left")
    run_padded(model, tokens, mask)[0].square().sum().backward()
    found = [x.grad.clone() for x in model.parameters() if x.grad is not None]
    model.zero_grad()
    sum(model(text[None])[0].square().sum() for text in texts if len(text)).backward()
    expected = [x.grad for x in model.parameters() if x.grad is not None]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(0, 0), (2, 0), (2, 3)])
def test_nothing_but_padding(shape):
    model = random_model()
    logits, state = run_padded(model, torch.full(shape, -1), torch.zeros(shape, dtype=torch.bool))
    assert logits.shape == (*shape, SMALL.vocab_size)
    assert state.batch == shape[0]
    assert not any(x.any() for x in rows(state))


def test_a_padded_batch_with_a_hole_is_refused():
    with pytest.raises(ValueError, match="found a hole in row 1"):
        mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
        run_padded(random_model(), torch.zeros(2, 3, dtype=torch.long), mask)


@pytest.mark.parametrize(
    ("mask", "error", "says"),
    [
        (torch.tensor([[1, 1, 0], [1, 0, 1]]), ValueError, "hole in row 1"),
        (torch.tensor([[1, 2, 0], [1, 0, 0]]), ValueError, "0 and 1"),
        (torch.ones(2, 3), TypeError, "float32"),
        (torch.ones(2, 2, dtype=torch.bool), ValueError, r"tokens: expected .* \[2, 2\]"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"mask: expected \[B, T\]"),
    ],
)
def test_refuses(mask, error, says):
    with pytest.raises(error, match=says):
        pack(torch.zeros(2, 3, dtype=torch.long), mask)


def test_unpack_refuses_another_mask():
    with pytest.raises(ValueError, match=r"packed: expected \[1, 12, \.\.\.\]"):
        unpack(torch.zeros(1, 11), MASK)
