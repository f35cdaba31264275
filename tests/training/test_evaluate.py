"""Bits per byte count each byte once, whatever the windows, with the state carried and dropped."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from rwkv7.config import ModelConfig
from rwkv7.evaluation import carried_bits
from rwkv7.nn import RWKV7
from rwkv7.tokenizer import get_tokenizer
from rwkv7.training.evaluate import dropped_bits, evaluate

BYTE = get_tokenizer("byte")


@pytest.fixture(scope="module")
def model() -> RWKV7:
    """Every parameter random: at the official start each layer is the identity."""
    torch.manual_seed(0)
    model = RWKV7(ModelConfig.from_sizes(vocab_size=256, width=16, layers=2, head_size=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, 53, dtype=np.uint8)


def by_hand(model: RWKV7, tokens: np.ndarray) -> float:
    """The bits of tokens[1:], each predicted from all before it."""
    row = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        logits, _ = model(row[None])
    nats = functional.cross_entropy(logits[0, :-1].double(), row[1:], reduction="sum")
    return nats.item() / math.log(2)


@pytest.mark.parametrize("window", [1, 7, 13, 26, 52, 100])
def test_carried_is_one_pass_whatever_the_window(
    model: RWKV7, tokens: np.ndarray, window: int
) -> None:
    assert carried_bits(model, tokens, window) == pytest.approx(by_hand(model, tokens), rel=1e-5)


@pytest.mark.parametrize("window", [1, 7, 13, 52, 100])
def test_dropped_begins_afresh_in_every_window(
    model: RWKV7, tokens: np.ndarray, window: int
) -> None:
    last = len(tokens) - 1
    starts = range(0, last, window)
    expected = sum(by_hand(model, tokens[i : min(i + window, last) + 1]) for i in starts)
    assert dropped_bits(model, tokens, window) == pytest.approx(expected, rel=1e-5)
    if window < last:
        assert abs(expected - by_hand(model, tokens)) > 1  # the two ways differ


def test_every_byte_counts_once(model: RWKV7, tokens: np.ndarray) -> None:
    ignorant = RWKV7(ModelConfig.from_sizes(vocab_size=256, width=16, layers=1, head_size=8))
    torch.nn.init.zeros_(ignorant.head.weight)
    for count in (1, 2, 53):
        result = evaluate(ignorant, tokens[:count], BYTE, window=5)
        assert (result.carried, result.dropped) == pytest.approx((8, 8))
        assert result.bytes == count
    model.train()
    result = evaluate(model, tokens, BYTE, window=5)
    assert result.carried == pytest.approx((8 + by_hand(model, tokens)) / 53, rel=1e-5)
    assert model.training
    with pytest.raises(ValueError, match="at least one held-out token"):
        evaluate(model, tokens[:0], BYTE, window=5)


def test_bytes_not_tokens_are_what_bits_are_divided_by() -> None:
    pytest.importorskip("pyrwkv_tokenizer")
    world = get_tokenizer("world")
    text = "In the beginning God created the heaven and the earth.\n" * 3
    ids = np.array([*world.encode(text), 0], np.uint16)
    ignorant = RWKV7(ModelConfig.from_sizes(vocab_size=65536, width=8, layers=1, head_size=8))
    torch.nn.init.zeros_(ignorant.head.weight)
    result = evaluate(ignorant, ids, world, window=5)
    assert result.bytes == len(text)
    assert result.carried == pytest.approx(16 * len(ids) / len(text), rel=1e-5)
