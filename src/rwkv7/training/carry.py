"""Gradients of sequences longer than memory: window by window, the state handed on between them.

`exact` is the true gradient of the whole sequence at the memory of one window: the windows are read
once without a graph, and only the states between them kept; then they are run backwards from the
last, each computed again with a graph, and the gradient of the state it began with goes to the one
before. `truncated` hands on the state alone, `off` nothing. All of them add to `.grad`; clipping
and the optimizer's step are the caller's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv7.nn import RWKV7
from rwkv7.state import LayerState, ModelState

from .batch import Batch
from .loss import next_token_loss, predicted

__all__ = ["CARRY_MODES", "CarriedLoss", "batch_gradients", "sequence_gradients"]

CARRY_MODES = ("off", "truncated", "exact")


@dataclass(frozen=True, slots=True, kw_only=True)
class CarriedLoss:
    """What `sequence_gradients` gives: the loss, a scalar without a graph, and the final state."""

    loss: Tensor
    state: ModelState


def batch_gradients(
    model: RWKV7,
    batch: Batch,
    *,
    mode: str = "off",
    window: int | None = None,
    parts: int = 1,
    state: ModelState | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Adds the gradients of the batch's mean loss to `.grad` and returns that loss, a scalar.

    Args:
        model: on the batch's device.
        batch: rows of tokens, or one of packed documents.
        mode: "off" reads each row in one piece; "truncated" and "exact" in windows, as
            `sequence_gradients` does.
        window: tokens of a row at a time, for the modes that have windows.
        parts: in how many parts the batch is worked through, one after the other: some of its rows
            at a time, or some of a packed row's tokens. The gradient is that of the whole batch;
            only the memory is a part's.
        state, denominator: as for `sequence_gradients`.

    Under torch.autocast the forward passes run in its dtype.

    Raises:
        ValueError: parts, a mode or a window that do not fit the batch, or a batch that goes on
            with the one before while the state that one ended with is not given.
    """
    mode, window = _in_parts(batch, mode, window, parts)
    if not batch.fresh and state is None:
        raise ValueError(
            "state: expected the one that the batch before ended with, since this batch goes on "
            "there (fresh is False), found None"
        )
    if denominator is None:
        denominator = predicted(batch.targets).clamp(min=1)
    given = None if state is None else _leaf(state)
    losses, rows, packed = [], len(batch.inputs), batch.cu_seqlens is not None
    count = 1 if packed else parts
    for first, last in itertools.pairwise(rows * i // count for i in range(count + 1)):
        result = sequence_gradients(
            model,
            batch.inputs[first:last],
            batch.targets[first:last],
            window=window,
            mode=mode,
            state=given if given is None or packed else given.select(range(first, last)),
            cu_seqlens=batch.cu_seqlens,
            denominator=denominator,
        )
        losses.append(result.loss)
    if state is not None and given is not None:
        _backward(_tensors(state), [x.grad for x in _tensors(given)])
    return torch.stack(losses).sum()


def sequence_gradients(
    model: RWKV7,
    inputs: Tensor,
    targets: Tensor,
    *,
    window: int,
    mode: str = "exact",
    state: ModelState | None = None,
    cu_seqlens: Tensor | None = None,
    denominator: Tensor | float | None = None,
    offload: bool = False,
) -> CarriedLoss:
    """Adds the gradients of the sequences' mean loss to `.grad`, a window of tokens at a time.

    Args:
        model: in training or not; nothing in it is random.
        inputs: ids, [B, T], of any T.
        targets: the ids to predict, int64 [B, T]; IGNORED where nothing is predicted.
        window: tokens of a row whose graph is in memory at a time; the last window may be shorter.
        mode: "exact": the gradient of the whole sequence, as one backward pass over all of it would
            give. "truncated": each window begins with the state of the one before, and no gradient
            goes through it. "off": each window begins anew, with `state`.
        state: before the first token, of B sequences (S packed ones); None means zeros. Its tensors
            may require gradients, which then flow on into what made them.
        cu_seqlens: offsets [S + 1] of packed documents (B = 1). Windows cut the row wherever they
            end; the state of the document that is cut there, and of no other, is handed on.
        denominator: what the sum over predicted tokens is divided by; None means their number.
        offload: keep the states between the windows on the CPU ("exact" alone keeps any).

    Returns:
        The loss in fp32 (fp64 for an fp64 model) and the state after the last token, neither with
        a graph. In the mode "off" the state is that of the last window alone.

    Call it inside torch.autocast for mixed precision; backward passes leave it by themselves.

    Raises:
        ValueError, TypeError: an unknown mode, a window below 1, or what the model refuses.
    """
    if mode not in CARRY_MODES:
        raise ValueError(f"mode: expected one of {', '.join(CARRY_MODES)}, found {mode!r}")
    if window < 1:
        raise ValueError(f"window: expected at least 1 token, found {window}")
    if inputs.dim() != 2 or targets.shape != inputs.shape:
        raise ValueError(
            f"targets: expected the shape of inputs, [B, T] = {list(inputs.shape)}, "
            f"found {list(targets.shape)}"
        )
    if denominator is None:
        denominator = predicted(targets).clamp(min=1)
    given = None if state is None else _leaf(state)
    work = _Windows(model, inputs, targets, given, denominator, cu_seqlens)
    spans = _spans(inputs.shape[1], window, None if cu_seqlens is None else cu_seqlens.tolist())
    if mode == "exact":
        loss = _exact(work, spans, offload)
    else:
        loss = _forwards(work, spans, handed_on=mode == "truncated")
    if state is not None:
        assert given is not None
        _backward(_tensors(state), [x.grad for x in _tensors(given)])
    return CarriedLoss(loss=loss, state=work.final)


def _in_parts(batch: Batch, mode: str, window: int | None, parts: int) -> tuple[str, int]:
    """The mode and the window with which `sequence_gradients` works through a batch's parts."""
    rows, tokens = batch.inputs.shape
    packed = batch.cu_seqlens is not None
    if not 1 <= parts <= (tokens if packed else rows):
        limit = f"{tokens} tokens of the packed row" if packed else f"{rows} rows of the batch"
        raise ValueError(f"parts: expected 1 to the {limit}, found {parts}")
    if mode == "off":
        window = max(tokens, 1)
    elif window is None:
        raise ValueError(f"window: expected a number of tokens for the mode {mode!r}, found None")
    if not packed or parts == 1:
        return mode, window
    if mode == "truncated":
        raise ValueError(
            "parts: expected 1 for packed documents in the mode 'truncated', whose gradient "
            f"depends on where they are cut, found {parts}; use a smaller window"
        )
    # Whichever document a part's end cuts, the exact gradient goes through the cut.
    return "exact", -(-min(window, tokens) // parts)


@dataclass(frozen=True, slots=True)
class _Span:
    """A window: tokens start to stop, and of packed documents the numbers first to last - 1, with
    their offsets in the window, and whether the last of them goes on in the next."""

    start: int
    stop: int
    first: int = 0
    last: int = 0
    offsets: tuple[int, ...] | None = None
    open: bool = True


def _spans(tokens: int, window: int, offsets: list[int] | None) -> list[_Span]:
    if offsets is not None and (not offsets or offsets[0] != 0 or offsets[-1] != tokens):
        raise ValueError(f"cu_seqlens: expected offsets from 0 to T = {tokens}, found {offsets}")
    edges = [*range(0, max(tokens, 1), window), tokens]
    spans = []
    for start, stop in itertools.pairwise(edges):
        if offsets is None:
            spans.append(_Span(start, stop))
            continue
        # Documents with a token in the window, and empty ones between them.
        count = len(offsets) - 1
        inside = [i for i in range(count) if offsets[i + 1] > start and offsets[i] < stop]
        first, last = (0, count) if not inside else (inside[0], inside[-1] + 1)
        local = tuple(min(max(x, start), stop) - start for x in offsets[first : last + 1])
        spans.append(_Span(start, stop, first, last, local, offsets[last] > stop))
    return spans


class _Windows:
    """The windows of a call: what each begins with, computes, and hands on."""

    def __init__(
        self,
        model: RWKV7,
        inputs: Tensor,
        targets: Tensor,
        given: ModelState | None,
        denominator: Tensor | float,
        cu_seqlens: Tensor | None,
    ) -> None:
        self.model, self._inputs, self._targets = model, inputs, targets
        self._given, self._denominator, self._cu_seqlens = given, denominator, cu_seqlens
        self._rows = inputs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.final = self._zeros(self._rows) if given is None else given.detach().clone()

    def read(self, span: _Span, carried: ModelState | None) -> ModelState | None:
        """The state that the window hands on; no graph."""
        with torch.no_grad():
            _, after = self._hidden(span, carried)
        # Autocast keeps the weights it has cast, in older torch without a graph for the next pass.
        torch.clear_autocast_cache()
        return self._handed_on(span, after)

    def differentiate(
        self, span: _Span, carried: ModelState | None, gradients: Sequence[Tensor | None] | None
    ) -> tuple[Tensor, ModelState | None]:
        """One window forwards and backwards: its share of the loss, and the state it hands on.

        `gradients` are those of the state handed on, in the order of `_tensors`.
        """
        features, after = self._hidden(span, carried)
        targets = self._targets[:, span.start : span.stop]
        loss = next_token_loss(self.model.head, features, targets, denominator=self._denominator)
        handed_on = self._handed_on(span, after)
        if gradients is None or handed_on is None:
            _backward([loss], [torch.ones_like(loss)])
        else:
            _backward([loss, *_tensors(handed_on)], [torch.ones_like(loss), *gradients])
        self._keep(span, after.detach())
        return loss.detach(), None if handed_on is None else handed_on.detach()

    def _hidden(self, span: _Span, carried: ModelState | None) -> tuple[Tensor, ModelState]:
        inputs = self._inputs[:, span.start : span.stop]
        offsets = None
        if span.offsets is not None:
            assert self._cu_seqlens is not None
            offsets = self._cu_seqlens.new_tensor(span.offsets)
        return self.model.hidden(inputs, self._before(span, carried), offsets)

    def _before(self, span: _Span, carried: ModelState | None) -> ModelState | None:
        if span.offsets is None:
            return self._given if carried is None else carried
        if carried is None and self._given is None:
            return None
        own = range(span.first + (carried is not None), span.last)
        begun = self._zeros(len(own)) if self._given is None else self._given.select(own)
        return begun if carried is None else ModelState.cat([carried, begun])

    def _handed_on(self, span: _Span, after: ModelState) -> ModelState | None:
        if span.offsets is None:
            return after
        return after.select([span.last - span.first - 1]) if span.open else None

    def _keep(self, span: _Span, after: ModelState) -> None:
        if span.offsets is None:
            if span.stop == self._inputs.shape[1]:
                self.final = after
            return
        # A document that goes on ends in a later window, which may have been run before this one.
        ended = slice(span.first, span.last - span.open)
        for mine, found in zip(_tensors(self.final), _tensors(after), strict=True):
            mine[ended] = found[: ended.stop - ended.start]

    def _zeros(self, rows: int) -> ModelState:
        return ModelState.zeros(self.model.config, rows, self.model.dtype, self.model.device)


def _exact(work: _Windows, spans: list[_Span], offload: bool) -> Tensor:
    carried: list[ModelState | None] = [None]
    for span in spans[:-1]:
        if not span.open:
            carried.append(None)
            continue
        begin = None if carried[-1] is None else carried[-1].to(work.model.device)
        after = work.read(span, begin)
        carried.append(after.to("cpu") if after is not None and offload else after)
    losses, gradients = [], None
    for span in reversed(spans):
        before = carried.pop()
        leaf = None if before is None else _leaf(before.to(work.model.device), True)
        loss, _ = work.differentiate(span, leaf, gradients)
        losses.append(loss)
        gradients = None if leaf is None else [x.grad for x in _tensors(leaf)]
    return torch.stack(losses).sum()


def _forwards(work: _Windows, spans: list[_Span], handed_on: bool) -> Tensor:
    losses, carried = [], None
    for span in spans:
        loss, after = work.differentiate(span, carried, None)
        losses.append(loss)
        carried = after if handed_on else None
    return torch.stack(losses).sum()


def _backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Backward from the outputs that have a graph and a gradient, outside the caller's autocast."""
    pairs = [
        (x, g) for x, g in zip(outputs, gradients, strict=True) if x.requires_grad and g is not None
    ]
    if pairs:
        with torch.autocast(outputs[0].device.type, enabled=False):
            torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])


def _leaf(state: ModelState, always: bool = False) -> ModelState:
    """The same numbers as leaves that require gradients where the state's tensors do, or always."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().requires_grad_(always or x.requires_grad)

    return ModelState(tuple(LayerState(*map(leaf, layer)) for layer in state.layers))


def _tensors(state: ModelState) -> list[Tensor]:
    return [x for layer in state.layers for x in layer]
