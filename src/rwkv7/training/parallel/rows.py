"""Which part of a step's batch a rank works on.

Every rank makes the whole batch, which is a pure function of the step, and keeps its share: so runs
on one and on many cards see the same tokens, and each rank knows the whole number of predictions.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from rwkv7.training.batch import IGNORED, Batch

__all__ = ["share"]


def share(batch: Batch, rank: int, size: int) -> Batch:
    """The rows of rank `rank` of `size`, contiguous; packed documents are never cut.

    Rows are spread as evenly as their number allows, packed documents by their tokens. Where there
    are fewer of them than ranks, a rank without any gets the first one with nothing to predict in
    it: it joins in what all ranks do, and adds nothing.
    """
    if batch.cu_seqlens is None:
        rows = batch.inputs.shape[0]
        mine = slice(rows * rank // size, rows * (rank + 1) // size)
        if mine.start == mine.stop:
            return _idle(batch, slice(0, 1), slice(None))
        return Batch(inputs=batch.inputs[mine], targets=batch.targets[mine], fresh=batch.fresh)
    offsets = [int(x) for x in batch.cu_seqlens.tolist()]
    places = sorted(set(offsets))
    documents = len(places) - 1
    if rank >= documents:
        one = _idle(batch, slice(None), slice(0, places[1]))
        return replace(one, cu_seqlens=batch.cu_seqlens.new_tensor(places[:2]))
    edges = _edges(places, min(size, documents))
    start, stop = edges[rank], edges[rank + 1]
    own = [x - start for x in offsets if start <= x <= stop]
    return Batch(
        inputs=batch.inputs[:, start:stop],
        targets=batch.targets[:, start:stop],
        cu_seqlens=batch.cu_seqlens.new_tensor(own),
        fresh=batch.fresh,
    )


def _idle(batch: Batch, rows: slice, tokens: slice) -> Batch:
    inputs = batch.inputs[rows, tokens]
    return Batch(inputs=inputs, targets=torch.full_like(inputs, IGNORED), fresh=batch.fresh)


def _edges(places: list[int], size: int) -> list[int]:
    """size + 1 of the `places`, strictly rising, from the first to the last, as even as may be."""
    documents = len(places) - 1
    edges = [0]
    for rank in range(1, size):
        wanted = places[-1] * rank / size
        # Room is left for a document on each rank after this one.
        free = range(edges[-1] + 1, documents - (size - rank) + 1)
        edges.append(min(free, key=lambda i: abs(places[i] - wanted)))
    return [places[i] for i in (*edges, documents)]
