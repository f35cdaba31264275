"""Padding comes off, goes back on, and never reaches a state."""

import pytest
import torch
from random_model import SMALL, random_model, random_tokens

from rwkv7.packing import pack, unpack

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
