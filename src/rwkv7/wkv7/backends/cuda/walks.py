"""The kernels as functions of tensors: a walk over a call's chunks and back, by relay, by segments.

They fill what they are given; what is run for a call, and in which order, is in `__init__`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from rwkv7.wkv7.contract import Call

from . import launch, plan

__all__ = ["chain", "relay", "relay_back", "segment", "segment_back", "walk", "walk_back"]

Arguments = tuple[int, ...]


def walk(
    call: Call, initial: Tensor | None, final: Tensor, y: Tensor, saved: Tensor | None
) -> None:
    """Forward to `final` [S, H, V, K] in fp32, one block (K = V = 128: two) a sequence and head.

    Args:
        initial: fp32 [S, H, V, K]; None: empty.
        y: [B, T, H, V].
        saved: receives the states before the chunks (`plan.saved_words`).
    """
    inputs, offsets = ready(*_inputs(call), initial), _offsets(call)
    arguments = (
        *_addresses(*inputs, y, final),
        *_saved_addresses(saved, call),
        *_addresses(offsets),
    )
    kernel, (_, T, H, *_) = plan.kernel("forward", call), call.sizes
    blocks = kernel.blocks * call.sequences * H
    _launch(kernel, call, {"SAVE": saved is not None}, [(blocks, (*arguments, T, H))])


def walk_back(
    call: Call,
    dy: Tensor | None,
    dfinal: Tensor | None,
    dinitial: Tensor | None,
    saved: Tensor,
    gradients: tuple[Tensor, ...],
) -> None:
    """From the gradients of y and of the final state to those of the inputs and initial state.

    Args:
        dfinal: [S, H, V, K], or where `dinitial` is None that of the state after every chunk,
            [B · chunks, H, V, K]: each chunk is then walked by itself.
        saved: what `walk` left there.
        gradients: of r, w, k, v, a, b.
    """
    given, offsets = ready(*_inputs(call), dy, dfinal), _offsets(call)
    arguments = (
        *_addresses(*given),
        *_saved_addresses(saved, call),
        *_addresses(*gradients, dinitial, offsets),
    )
    kernel, (_, T, H, *_) = plan.kernel("backward", call), call.sizes
    apart = dinitial is None
    blocks = H * (plan.chunk_count(call) if apart else call.sequences)
    _launch(kernel, call, {"APART": apart}, [(blocks, (*arguments, T, H))])


def relay(
    call: Call, final: Tensor, y: Tensor, saved: Tensor | None, slabs: tuple[int, ...]
) -> None:
    """As `walk`, by all multiprocessors: `slabs` are the chunks that each launch prepares."""
    *inputs, state = ready(*_inputs(call), call.state)
    tensors, states = _addresses(*inputs), _saved_addresses(saved, call)
    (y_at,) = _addresses(y)

    def arguments(given: int, images: Arguments) -> Arguments:
        return (*tensors, given, y_at, final.data_ptr(), *states, *images)

    kernel, own = plan.kernel("relay", call), {"SAVE": saved is not None}
    _relay(kernel, call, own, slabs, (state, final), arguments, back=False)


def relay_back(
    call: Call,
    dy: Tensor | None,
    dfinal: Tensor | None,
    dinitial: Tensor,
    after: Tensor,
    slabs: tuple[int, ...],
) -> None:
    """The gradients of the initial state and, into `after`, of the state after every chunk.

    Args:
        after: fp32 [B · chunks, H, V, K].
    """
    r, w, a, b, dy, dfinal = ready(call.r, call.w, call.a, call.b, dy, dfinal)
    tensors, after_at = _addresses(r, w, a, b, dy), after.data_ptr()

    def arguments(given: int, images: Arguments) -> Arguments:
        return (*tensors, given, dinitial.data_ptr(), after_at, *images)

    kernel = plan.kernel("relay_back", call)
    _relay(kernel, call, {}, slabs, (dfinal, dinitial), arguments, back=True)


def _relay(
    kernel: plan.Kernel,
    call: Call,
    own: dict[str, bool],
    slabs: tuple[int, ...],
    states: tuple[Tensor | None, Tensor],
    arguments: Callable[[int, Arguments], Arguments],
    *,
    back: bool,
) -> None:
    """All launches of a relay.

    Args:
        states: what the first walk begins from, and where each leaves what the next goes on with.
        arguments: of a launch, from the state's address and the images' that it reads and writes.
        back: from the last slab to the first.
    """
    B, T, H, *_ = call.sizes
    pairs, ends = B * H, list(itertools.accumulate(slabs))
    spans = list(zip([0, *ends], ends, strict=False))
    if back:
        last = ends[-1]
        spans = [(last - end, last - start) for start, end in spans]
    size = pairs * max(slabs) * plan.STEPS * kernel.image
    images = call.v.new_empty(2 * size // 4, dtype=torch.float32)
    (given, left_off), even = _addresses(*states), images.data_ptr()
    odd = even + size
    grids, none = [], (0, 0)
    for n, (walked, prepared) in enumerate(zip([none, *spans], [*spans, none], strict=True)):
        steps = pairs * plan.STEPS * (prepared[1] - prepared[0])
        blocks = -(-steps // (kernel.threads // 32)) + (pairs * kernel.blocks if n else 0)
        memory = (odd, even) if n % 2 == 0 else (even, odd)
        numbers = (*walked, *prepared, T, H, pairs)
        grids.append((blocks, (*arguments(left_off if n > 1 else given, memory), *numbers)))
    _launch(kernel, call, own, grids)


def segment(call: Call, maps: Tensor, added: Tensor) -> None:
    """What each sequence of a packed call does to any state, S → S·M + B.

    Args:
        maps, added: receive M and B, fp32 [S, H, V, K].
    """
    inputs = ready(call.w, call.k, call.v, call.a, call.b)
    arguments = (*_addresses(*inputs, maps, added, _offsets(call)), call.sizes[2])
    kernel = plan.kernel("segment", call)
    _launch(kernel, call, {}, [(kernel.blocks * call.sequences * call.sizes[2], arguments)])


def segment_back(call: Call, dy: Tensor | None, before: Tensor) -> None:
    """Into `before`: the gradients of the initial states, fp32 [S, H, V, K], through y alone."""
    inputs = ready(call.r, call.w, call.a, call.b, dy)
    arguments = (*_addresses(*inputs, before, _offsets(call)), call.sizes[2])
    kernel = plan.kernel("segment_back", call)
    _launch(kernel, call, {}, [(kernel.blocks * call.sequences * call.sizes[2], arguments)])


def chain(
    call: Call, maps: Tensor, added: Tensor, given: Tensor | None, handed: Tensor, *, back: bool
) -> None:
    """States before (gradients of the states after, if `back`) every segment, into `handed`.

    Args:
        call: the whole one, before it was cut.
        maps, added, handed: [B · segments, H, V, K], fp32.
        given: [B, H, V, K]: the initial state, or the gradient of the final one; None: zeros.
    """
    B, _, H, *_ = call.sizes
    (given,) = ready(given)
    arguments = (*_addresses(maps, added, given, handed), len(maps) // B, H)
    _launch(plan.kernel("chain", call), call, {"BACK": back}, [(B * H, arguments)])


def ready(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As the kernels read them: contiguous, and rows on 16 bytes."""
    return tuple([x if x is None else _aligned(x.contiguous()) for x in tensors])


def _launch(
    kernel: plan.Kernel,
    call: Call,
    own: dict[str, bool],
    grids: list[tuple[int, Arguments]],
) -> None:
    launch.launch(kernel, plan.macros(call, own), call.r.device, grids)


def _inputs(call: Call) -> tuple[Tensor, ...]:
    return call.r, call.w, call.k, call.v, call.a, call.b


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _offsets(call: Call) -> Tensor | None:
    return None if call.cu_seqlens is None else call.cu_seqlens.to(torch.int64).contiguous()


def _addresses(*tensors: Tensor | None) -> Arguments:
    return tuple([0 if x is None else x.data_ptr() for x in tensors])


def _saved_addresses(saved: Tensor | None, call: Call) -> Arguments:
    """Of the states and of their scales in the flat tensor."""
    if saved is None:
        return 0, 0
    _, _, H, K, V = call.sizes
    states = plan.chunk_count(call) * H * V * K // 2  # words
    return saved.data_ptr(), saved.data_ptr() + 4 * states
