"""Packed documents: every token once an epoch, nothing across a border, gradients as if alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import SMALL, random_model, random_tokens
from torch.nn import functional

from rwkv7.training.batch import IGNORED, Batch
from rwkv7.training.data import Corpus
from rwkv7.training.sources import DocumentWindows, PackedWindows


def corpus_of(lengths: list[int]) -> Corpus:
    """Documents of these lengths whose tokens are their own places: 0, 1, 2, …"""
    starts = [0, *itertools.accumulate(lengths)][:-1]
    return Corpus.of(np.arange(sum(lengths), dtype=np.uint16), starts)


def sequences(batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets of each packed sequence."""
    assert batch.cu_seqlens is not None and batch.cu_seqlens.dtype == torch.int32
    lengths = batch.cu_seqlens.diff().tolist()
    inputs, targets = batch.inputs[0].split(lengths), batch.targets[0].split(lengths)
    return list(zip(inputs, targets, strict=True))


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    window=st.integers(1, 12),
    rows=st.integers(1, 3),
    order=st.sampled_from(["shuffled", "official"]),
)
@settings(max_examples=150, deadline=None)
def test_an_epoch_packs_every_token_once_and_nothing_crosses_a_border(
    lengths: list[int], window: int, rows: int, order: str
) -> None:
    corpus = corpus_of(lengths)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    try:
        source = PackedWindows(corpus, window=window, batch=rows, seed=1, order=order)
    except ValueError as error:
        assert "tenth" in str(error) or "at least" in str(error)
        return
    read = []
    for step in range(source.order.per_epoch):  # `rows` epochs
        batch = source.batch(step)
        assert batch.inputs.shape == batch.targets.shape == (1, source.tokens_per_step)
        for inputs, targets in sequences(batch):
            places, wanted = inputs.tolist(), targets.tolist()
            read += places
            assert places == list(range(places[0], places[-1] + 1)) and len(places) <= window
            assert len({document_of[place] for place in places}) == 1
            assert wanted[:-1] == places[1:]
            # The last one is the next token where the window cut the document, else nothing.
            following = places[-1] + 1
            goes_on = document_of[following] == document_of[places[-1]]
            assert wanted[-1] == (following if goes_on else IGNORED)
    counts = np.bincount(read, minlength=len(document_of))
    assert counts.max() <= rows and counts.sum() == source.order.per_epoch * rows * window
    # At the same step, the same batch, whatever was asked for before.
    assert torch.equal(source.batch(0).targets, source.batch(0).targets)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    window=st.integers(1, 12),
    seed=st.integers(0, 5),
)
@settings(max_examples=100, deadline=None)
def test_documents_in_turn_are_read_whole_once_an_epoch(
    lengths: list[int], window: int, seed: int
) -> None:
    corpus = corpus_of(lengths)
    if max(lengths) < 2:
        with pytest.raises(ValueError, match="at least two tokens"):
            DocumentWindows(corpus, window=window, seed=seed)
        return
    source = DocumentWindows(corpus, window=window, seed=seed)
    for epoch in range(2):
        steps = range(epoch * source.per_epoch, (epoch + 1) * source.per_epoch)
        targets = []
        for step in reversed(steps):  # in any order, they are the same
            batch = source.batch(step)
            assert torch.equal(batch.targets, batch.inputs + 1) and len(batch.inputs) == 1
            assert 1 <= batch.inputs.shape[1] <= window == source.tokens_per_step
            first = int(batch.inputs[0, 0])
            assert batch.fresh == (first in np.cumsum([0, *lengths]))
            if not batch.fresh:  # goes on exactly where the step before ended
                assert first == source.batch(step - 1).targets[0, -1]
            targets += batch.targets[0].tolist()
        starts = set(np.cumsum([0, *lengths]).tolist())
        assert sorted(targets) == [n for n in range(sum(lengths)) if n not in starts]


def test_documents_come_in_another_order_each_epoch() -> None:
    source = DocumentWindows(corpus_of([5] * 30), window=2, seed=0)
    epochs = [[source.place(e * 60 + n)[0] for n in range(0, 60, 2)] for e in range(3)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and list(range(30)) not in epochs


def test_a_packed_batch_has_the_loss_and_gradients_of_its_documents_alone() -> None:
    lengths = [7, 1, 0, 12, 2, 30, 5, 1, 1, 9]
    tokens = random_tokens(SMALL, sum(lengths)).numpy()
    starts = [0, *itertools.accumulate(lengths)][:-1]
    source = PackedWindows(Corpus.of(tokens, starts), window=16, batch=3, seed=2)
    batch = source.batch(1)
    assert batch.cu_seqlens is not None and len(batch.cu_seqlens) > 6
    together, alone = random_model(), random_model()
    logits, _ = together(batch.inputs, cu_seqlens=batch.cu_seqlens)
    loss = functional.cross_entropy(logits[0], batch.targets[0], ignore_index=IGNORED)
    loss.backward()
    predicted = int((batch.targets != IGNORED).sum())
    total = torch.zeros((), dtype=torch.float64)
    for inputs, targets in sequences(batch):
        logits, _ = alone(inputs[None])
        part = functional.cross_entropy(logits[0], targets, ignore_index=IGNORED, reduction="sum")
        total = total + part / predicted
    total.backward()
    assert abs((loss - total).item()) < 1e-12 * total.item()
    for (name, one), other in zip(together.named_parameters(), alone.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            assert (one.grad - other.grad).norm() <= 1e-12 * other.grad.norm(), name
