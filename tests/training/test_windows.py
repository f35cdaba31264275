"""The windows of an epoch are a permutation, and follow from seed and step alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv7.training.windows import Windows


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
    n = windows.per_epoch
    starts = sorted(windows.start(sample) for sample in range(epoch * n, (epoch + 1) * n))
    assert starts == list(range(starts[0], starts[0] + n * window, window))
    assert starts[-1] + window + 1 <= count
    # No more than a window is left out at the two ends together.
    assert n * window + 2 * window >= count - 1


def test_targets_follow_inputs_and_nothing_but_the_step_counts() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    one, other = (Windows(tokens, window=16, batch=4, seed=3) for _ in range(2))
    inputs, targets = one.batch(7)
    assert inputs.shape == targets.shape == (4, 16) and inputs.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    for step in (0, 100, 3):
        other.batch(step)
    assert torch.equal(other.batch(7)[0], inputs)
    assert not torch.equal(Windows(tokens, window=16, batch=4, seed=4).batch(7)[0], inputs)


def test_order_and_borders_change_from_epoch_to_epoch() -> None:
    windows = Windows(np.zeros(5000, np.uint8), window=16, batch=1, seed=0)
    epochs = [
        [windows.start(epoch * windows.per_epoch + i) for i in range(windows.per_epoch)]
        for epoch in range(4)
    ]
    assert len({start % 16 for epoch in epochs for start in epoch}) > 1
    assert epochs[0] != sorted(epochs[0]) and len({tuple(e) for e in epochs}) == 4
