"""How a call is cut: sequences into groups, groups into pieces of a few chunks each.

A chunk is C tokens of one sequence. Chunks of a group lie in time-major order (all first chunks,
then all second ones, …), longest sequence first, so that at each step of time the sequences that
still run are a prefix. C depends on a sequence's own length alone, which keeps its numbers the
same whatever it is batched or packed with.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv7.wkv7.contract import Call

CHUNK = 32  # the best of 16, 32 and 64 on two CPU cores at K = V = 64
SHORT = 16
# A piece holds at most this many heads x chunks, this many bytes of states, and a quarter of the
# call, whichever is least (but one step of one sequence at least): its temporaries take about
# three times the memory of its inputs, twice that where pairs are weighed by halving.
PIECE_MATRICES = 64
PIECE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive chunks of one group."""

    chunk: int  # C, tokens a chunk
    start: int  # the first token of the piece within its sequences
    counts: list[int]  # sequences still running at each step of time
    chunks: slice  # rows of the saved states
    rows: slice | Tensor  # the group's sequences
    tokens: Tensor | None  # [chunks, C] row of each token, -1 for padding; None when dense


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that walk through time together."""

    rows: slice | Tensor
    pieces: list[Piece]


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole call in groups, with the way in and out of the chunked layout."""

    groups: list[Group]
    heads: int
    length: int  # T of a dense call

    def gather(
        self, x: Tensor, piece: Piece, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """x [B, T, H, X] as [chunks * H, C, X] in `dtype`, padded with zeros."""
        n, H, C, X = sum(piece.counts), self.heads, piece.chunk, x.shape[-1]
        if out is None:
            out = x.new_empty((n * H, C, X), dtype=dtype)
        if piece.tokens is not None:
            chosen = x[0].index_select(0, piece.tokens.clamp(min=0).flatten())
            out.copy_(chosen.view(n, C, H, X).transpose(1, 2).reshape(n * H, C, X))
            self.zero_padding(out, piece)
            return out
        steps = len(piece.counts)
        whole = min(steps, (self.length - piece.start) // C)
        target = out.view(steps, piece.counts[0], H, C, X)
        if whole:
            target[:whole] = self._dense(x, piece, whole)
        if whole < steps:
            tail = x[piece.rows, piece.start + whole * C :].transpose(1, 2)
            target[whole, ..., : tail.shape[-2], :] = tail
            target[whole, ..., tail.shape[-2] :, :] = 0
        return out

    def scatter(self, x: Tensor, chunks: Tensor, piece: Piece) -> None:
        """Write [chunks * H, C, X] into x [B, T, H, X], leaving the padding out."""
        n, H, C, X = sum(piece.counts), self.heads, piece.chunk, x.shape[-1]
        if piece.tokens is not None:
            rows = chunks.view(n, H, C, X).transpose(1, 2).reshape(n * C, H, X)
            flat = piece.tokens.flatten()
            used = flat >= 0
            x[0].index_copy_(0, flat[used], rows[used].to(x.dtype))
            return
        steps = len(piece.counts)
        whole = min(steps, (self.length - piece.start) // C)
        source = chunks.view(steps, piece.counts[0], H, C, X)
        if whole:
            self._dense(x, piece, whole).copy_(source[:whole])
        if whole < steps:
            tail = x[piece.rows, piece.start + whole * C :].transpose(1, 2)
            tail.copy_(source[whole, ..., : tail.shape[-2], :])

    def zero_padding(self, chunks: Tensor, piece: Piece) -> None:
        """Zero the padded rows of [chunks * H, C, X] in place."""
        H, C, X = self.heads, piece.chunk, chunks.shape[-1]
        if piece.tokens is not None:
            padding = (piece.tokens < 0)[:, None, :, None]
            chunks.view(-1, H, C, X).masked_fill_(padding, 0)
        elif (beyond := piece.start + len(piece.counts) * C - self.length) > 0:
            last = piece.counts[-1] * H
            chunks[-last:, C - beyond :] = 0

    def _dense(self, x: Tensor, piece: Piece, steps: int) -> Tensor:
        """The whole chunks of a piece as a view [steps, sequences, H, C, X] of x."""
        C = piece.chunk
        part = x[piece.rows, piece.start : piece.start + steps * C]
        return part.unflatten(1, (steps, C)).permute(1, 0, 3, 2, 4)


def make_plan(call: Call) -> Plan:
    """Groups and pieces of a call; for a packed call this reads `cu_seqlens`."""
    B, T, H, K, V = call.sizes
    size = call.r.new_empty((), dtype=call.state_dtype).element_size()
    quarter = B * H * T // (4 * CHUNK)
    matrices = max(1, min(PIECE_MATRICES, PIECE_BYTES // (K * V * size), quarter))
    if call.decay == "log":
        matrices = max(1, matrices // 2)
    groups: list[Group] = []
    if call.cu_seqlens is None:
        if T:
            taken, width = 0, max(1, matrices // H)
            for first in range(0, B, width):
                rows = slice(first, min(B, first + width))
                lengths = [T] * (rows.stop - rows.start)
                groups.append(_make_group(rows, lengths, None, taken, matrices // H))
                taken += sum(sum(piece.counts) for piece in groups[-1].pieces)
        return Plan(groups, H, T)
    offsets = call.cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(offsets)]
    taken = 0
    for chosen in _batches(lengths, max(1, matrices // H)):
        index = torch.tensor(chosen, device=call.r.device)
        starts = [offsets[s] for s in chosen]
        group = _make_group(index, [lengths[s] for s in chosen], starts, taken, matrices // H)
        groups.append(group)
        taken += sum(sum(piece.counts) for piece in group.pieces)
    return Plan(groups, H, T)


def _chunk_of(length: int) -> int:
    return 1 if length == 1 else SHORT if length <= SHORT else CHUNK


def _batches(lengths: list[int], width: int) -> list[list[int]]:
    """Non-empty sequences by chunk size, longest first, at most `width` together."""
    batches = []
    for chunk in (CHUNK, SHORT, 1):
        same = [s for s, n in enumerate(lengths) if n and _chunk_of(n) == chunk]
        same.sort(key=lambda s: -lengths[s])
        batches += [same[i : i + width] for i in range(0, len(same), width)]
    return batches


def _make_group(
    rows: slice | Tensor, lengths: list[int], starts: list[int] | None, taken: int, limit: int
) -> Group:
    """Cut the sequences of a group into pieces of at most `limit` chunks, but one step at least."""
    C = _chunk_of(lengths[0])
    steps = -(-lengths[0] // C)
    counts = [sum(n > step * C for n in lengths) for step in range(steps)]
    pieces: list[Piece] = []
    step = 0
    while step < steps:
        many = max(1, limit // counts[step])
        part = counts[step : step + many]
        tokens = None
        if starts is not None:
            device = rows.device if isinstance(rows, Tensor) else None
            tokens = _token_rows(starts, lengths, C, step, part, device)
        chunks = slice(taken, taken + sum(part))
        pieces.append(Piece(C, step * C, part, chunks, rows, tokens))
        taken, step = chunks.stop, step + many
    return Group(rows, pieces)


def _token_rows(
    starts: list[int],
    lengths: list[int],
    C: int,
    step: int,
    counts: list[int],
    device: torch.device | None,
) -> Tensor:
    """[chunks, C]: the packed row of each token of a piece, -1 where its sequence has ended."""
    first = torch.tensor(
        [
            [starts[s] + (step + i) * C, starts[s] + lengths[s]]
            for i, n in enumerate(counts)
            for s in range(n)
        ]
    )
    rows = first[:, :1] + torch.arange(C)
    return torch.where(rows < first[:, 1:], rows, -1).to(device)
