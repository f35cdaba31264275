"""The windows of an epoch are a permutation, and follow from seed and step alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv7.training.sources import Windows
from rwkv7.training.sources.order import OfficialOrder


@given(
    count=st.integers(2, 400),
    window=st.integers(1, 60),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_reads_every_window_once(count: int, window: int, seed: int, epoch: int) -> None:
    tokens = np.arange(count, dtype=np.uint16)
    if count < window + 1:
        with pytest.raises(ValueError, match=f"at least {window + 1} tokens"):
            Windows(tokens, window=window, batch=1, seed=seed)
        return
    windows = Windows(tokens, window=window, batch=1, seed=seed)
    n = windows.order.per_epoch
    starts = sorted(windows.order.start(sample) for sample in range(epoch * n, (epoch + 1) * n))
    assert starts == list(range(starts[0], starts[0] + n * window, window))
    assert starts[-1] + window + 1 <= count
    # No more than a window is left out at the two ends together.
    assert n * window + 2 * window >= count - 1


def test_targets_follow_inputs_and_nothing_but_the_step_counts() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    one, other = (Windows(tokens, window=16, batch=4, seed=3) for _ in range(2))
    batch = one.batch(7)
    assert batch.inputs.shape == batch.targets.shape == (4, 16)
    assert batch.inputs.dtype == torch.int64 and batch.cu_seqlens is None and batch.fresh
    assert torch.equal(batch.targets, batch.inputs + 1) and one.tokens_per_step == 64
    for step in (0, 100, 3):
        other.batch(step)
    assert torch.equal(other.batch(7).inputs, batch.inputs)
    another = Windows(tokens, window=16, batch=4, seed=4)
    assert not torch.equal(another.batch(7).inputs, batch.inputs)


def test_order_and_borders_change_from_epoch_to_epoch() -> None:
    windows = Windows(np.zeros(5000, np.uint8), window=16, batch=1, seed=0)
    epochs = [
        [
            windows.order.start(epoch * windows.order.per_epoch + i)
            for i in range(windows.order.per_epoch)
        ]
        for epoch in range(4)
    ]
    assert len({start % 16 for epoch in epochs for start in epoch}) > 1
    assert epochs[0] != sorted(epochs[0]) and len({tuple(e) for e in epochs}) == 4


def official_starts(tokens: int, window: int, samples: int) -> list[int] | None:
    """RWKV-LM's order, written down from make_data.py and dataset.py; None where it refuses."""
    chunks = tokens // window - 1
    for prime in range(chunks, 1, -1):
        if prime % 3 == 2 and all(prime % factor for factor in range(2, prime)):
            if prime / (tokens // window) <= 0.9:
                return None
            factor = int(prime * (math.sqrt(5) - 1) / 2)
            return [factor * (1 + n) ** 3 % prime * window for n in range(samples)]
    return None


def test_the_official_order_is_theirs_and_visits_each_window_once() -> None:
    accepted = 0
    for window in (1, 2, 7):
        for count in range(window + 1, 250 * window, window + 2):
            tokens = np.zeros(count, np.uint8)
            theirs = official_starts(count, window, 200)
            if theirs is None:
                with pytest.raises(ValueError, match="more than a tenth"):
                    Windows(tokens, window=window, batch=1, seed=0, order="official")
                continue
            order = Windows(tokens, window=window, batch=1, seed=0, order="official").order
            assert [order.start(sample) for sample in range(200)] == theirs
            epoch = sorted(order.start(sample) for sample in range(order.per_epoch))
            assert epoch == list(range(0, order.per_epoch * window, window))
            assert epoch[-1] + window + 1 <= count
            accepted += 1
    assert accepted > 100


def test_the_official_order_needs_more_than_64_bits() -> None:
    # The prime that RWKV-LM names for the Pile: 332,115,325,534 tokens in windows of 1,024.
    order = OfficialOrder(332_115_325_534, 1024)
    assert order.per_epoch == 324_331_313
    sample = 200_000_000
    factor = int(order.per_epoch * (math.sqrt(5) - 1) / 2)
    assert order.start(sample) == factor * (sample + 1) ** 3 % order.per_epoch * 1024
    assert factor * (sample + 1) ** 3 > 1 << 64


def test_another_order_is_refused() -> None:
    with pytest.raises(ValueError, match="order: expected one of shuffled, official, found 'up'"):
        Windows(np.zeros(99, np.uint8), window=4, batch=1, seed=0, order="up")
