"""Context parallelism: a model on one sequence, or packed sequences, held in pieces by many ranks.

Everything but the recurrence and the token shift works on each token by itself, so a rank runs the
model on its own tokens and asks the others at these two places. How they answer is in operator.py
and exchange.py; summing the parameters' gradients is the caller's step (`sum_gradients`).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rwkv7.nn import RWKV7
from rwkv7.state import LayerState, ModelState

from .exchange import gather, hand_on_shift, sum_over_ranks
from .operator import wkv7_in_pieces
from .piece import Piece, cut

__all__ = ["ContextParallel"]


class ContextParallel(nn.Module):
    """An RWKV-7 model whose calls take this rank's piece of the tokens.

    Every call is a collective: all ranks of `group` make it, in the order of the tokens they hold,
    and all or none of them go backward through its results. The loss is the sum of the ranks'
    losses; what all of them share (parameters, a state that was given) gets a part of its gradient
    on each, and `sum_gradients` adds them up.

    Args:
        model: the same weights on every rank; kept as `.model`, neither copied nor changed.
        group: the ranks that hold the sequence, all of the default group when None.
    """

    def __init__(self, model: RWKV7, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.model, self.group = model, group

    @property
    def head(self) -> nn.Linear:
        """The model's head, for a loss over `hidden`."""
        return self.model.head

    def forward(
        self,
        tokens: Tensor,  # [B, T of this rank]
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,  # [S + 1]
        backend: str | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Logits for this rank's tokens, and the state after all of them on every rank.

        Args:
            tokens: this rank's piece, [B, T], at least one token; the ranks' T may differ.
            state: of the whole call, the same on every rank; None at the start.
            cu_seqlens: offsets [S + 1] of packed sequences over the tokens of all ranks, the same
                on every rank; a sequence may lie across any number of ranks.
            backend: the operator's backend, None for the first that accepts the call.

        Raises, on every rank: ValueError for pieces that do not fit together; and what
            `RWKV7.forward` raises.
        """
        features, state = self.hidden(tokens, state, cu_seqlens, backend)
        return self.model.head(features), state

    def hidden(
        self,
        tokens: Tensor,  # [B, T of this rank]
        state: ModelState | None = None,
        cu_seqlens: Tensor | None = None,  # [S + 1]
        backend: str | None = None,
    ) -> tuple[Tensor, ModelState]:
        """What the head reads, [B, T of this rank, C], and the state: `forward` less the head."""
        piece = self._piece(tokens, state, cu_seqlens)
        before, mine, offsets = _Neighbours(piece, self.group), state, None
        if piece.packed:
            offsets = torch.tensor(piece.offsets, dtype=torch.int32, device=tokens.device)
            mine = None if state is None else state.select(piece.numbers)
        features, after = self.model.hidden(tokens, mine, offsets, backend, before)
        return features, self._assembled(after, state, piece, cu_seqlens)

    def _piece(self, tokens: Tensor, state: ModelState | None, cu_seqlens: Tensor | None) -> Piece:
        if tokens.dim() != 2:
            raise ValueError(f"tokens: expected [B, T], found the shape {list(tokens.shape)}")
        B, T = tokens.shape
        offsets = None if cu_seqlens is None else [int(x) for x in cu_seqlens.tolist()]
        ends = (-1, -1) if offsets is None else (len(offsets), offsets[-1])
        mine = torch.tensor([T, B, int(state is not None), *ends], device=tokens.device)
        found = [x.tolist() for x in gather(mine, self.group)]
        lengths = [one[0] for one in found]
        # Seen by all ranks alike, so that none is left waiting for one that gave up.
        if min(lengths) < 1:
            raise ValueError(f"tokens: expected at least one on every rank, found {lengths}")
        for column, name in enumerate(("batches", "states", "offsets", "ends of offsets"), 1):
            if len(values := {one[column] for one in found}) > 1:
                raise ValueError(f"expected the same {name} on every rank, found {sorted(values)}")
        if offsets is not None and (B, offsets[-1]) != (1, sum(lengths)):
            raise ValueError(
                f"cu_seqlens: expected offsets of the whole, to T = {sum(lengths)}, over packed "
                f"tokens [1, T], found an end of {offsets[-1]} over {B} rows"
            )
        return cut(lengths, dist.get_rank(self.group), offsets)

    def _assembled(
        self,
        after: ModelState,
        given: ModelState | None,
        piece: Piece,
        cu_seqlens: Tensor | None,
    ) -> ModelState:
        """The state after each sequence's end, on every rank, from the ranks where they end."""
        rows = after.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        device = after.layers[0].wkv.device
        numbers = torch.tensor(piece.numbers or range(rows), device=device)
        owned = piece.owned or [piece.rank == piece.size - 1] * rows

        def whole(x: Tensor) -> Tensor:
            # [layers, R, ...] -> [layers, S, ...]. What ends elsewhere is masked, not left out: all
            # ranks then go backward through the sum, or none does.
            mask = torch.tensor(owned, device=device).view(-1, *(1,) * (x.dim() - 2))
            placed = x.new_zeros(x.shape[0], rows, *x.shape[2:])
            return sum_over_ranks(placed.index_copy(1, numbers, x.where(mask, 0)), self.group)

        wkv, time, channel = (whole(torch.stack(x)) for x in zip(*after.layers, strict=True))
        state = ModelState(tuple(map(LayerState, wkv, time, channel)))
        return state if given is None else _with_idle(state, given, cu_seqlens)


def _with_idle(state: ModelState, given: ModelState, cu_seqlens: Tensor | None) -> ModelState:
    """Packed sequences without a token, which are on no rank, keep the state they had."""
    if cu_seqlens is None:
        return state
    idle = cu_seqlens[1:] == cu_seqlens[:-1]
    return ModelState(
        tuple(
            LayerState(*(y.where(idle.view(-1, *(1,) * (y.dim() - 1)), x) for x, y in pair))
            for pair in (
                zip(after, before, strict=True)
                for after, before in zip(state.layers, given.layers, strict=True)
            )
        )
    )


class _Neighbours:
    """`rwkv7.nn.before.Before` for one call: this rank's piece, and the ranks it asks."""

    def __init__(self, piece: Piece, group: dist.ProcessGroup | None) -> None:
        self._piece, self._group = piece, group

    def shift(self, last: Tensor, carried: Tensor | None) -> Tensor:
        if carried is None:
            rows = len(self._piece.numbers) if self._piece.packed else last.shape[0]
            carried = last.new_zeros(rows, last.shape[1])
        return hand_on_shift(carried, last, self._piece, self._group)

    def wkv7(
        self,
        r: Tensor,
        w: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        state: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        return wkv7_in_pieces(
            (r, w, k, v, a, b),
            state,
            self._piece,
            group=self._group,
            cu_seqlens=cu_seqlens,
            backend=backend,
        )
