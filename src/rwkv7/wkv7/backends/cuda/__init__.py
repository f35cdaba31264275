"""The hand-made GPU backend: CUDA kernels on tensor cores, K = V = 64 or 128, bf16 and fp16.

Blocks walk the chunks of a (sequence, head) with the state in registers; backward walks them in
reverse from the saved states. Where sequences and heads are few, other blocks prepare for those
who walk; few long ones are cut into segments. `plan` decides, `compiler` makes and keeps compiled
kernels, `walks` starts them. Importing this module loads neither a compiler nor the driver.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from rwkv7.wkv7.contract import Call

from . import compiler, launch, plan
from .segments import Segments
from .walks import chain, relay, relay_back, segment, segment_back, walk, walk_back

# The first cards with cp.async, bf16 products and enough shared memory.
_FIRST_CAPABILITY = (8, 0)


class CudaBackend:
    """CUDA kernels, compiled for the card at their first use."""

    name = "cuda"

    def refuses(self, call: Call) -> str | None:
        """Needs an NVIDIA GPU from 8.0 on, NVRTC, 16 bits, a bounded decay, K = V = 64 or 128.

        A card must have the shared memory of the backward pass, for inference too.
        """
        device = call.r.device
        if device.type != "cuda" or torch.version.hip is not None:
            return f"needs an NVIDIA GPU, the inputs are on {device}"
        # Under torch.compile sizes may be symbols; a kernel is made for one head size.
        return plan.refuses(call) or _card_refuses(device.index or 0, int(call.sizes[3]))

    def route(self, call: Call) -> str:
        """A walk a sequence and head, which other blocks may prepare, or many at once."""
        how = "one walk a sequence and head"
        if tokens := _segment(call):
            how = f"segments of {tokens} tokens at once"
        elif slabs := _slabs(call):
            how += f", prepared by other blocks in {len(slabs) + 1} launches"
        return f"cuda, {how}, in chunks of {plan.CHUNK} tokens"

    def saved_shape(self, call: Call) -> tuple[int, ...]:
        """One flat tensor: the segments' maps, if any; the states before the chunks in fp16."""
        return (0,) if _is_empty(call) else (_saved_words(call, _cut(call)),)

    def forward(self, call: Call, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        """y [B, T, H, V], the final state [S, H, V, K] in fp32, and what `backward` needs."""
        if _is_empty(call):
            saved = call.v.new_empty((0,), dtype=torch.float32)
            return torch.empty_like(call.v), call.initial_state().clone(), saved
        cut = _cut(call)
        words = _saved_words(call, cut) if save else 0
        saved = call.v.new_empty((words,), dtype=torch.float32)
        y = torch.empty_like(call.v, memory_format=torch.contiguous_format)
        if cut is not None:
            return y, _forward_by_segments(cut, y, saved, save), saved
        final, kept = _states(call, call.sequences), saved if save else None
        if slabs := _slabs(call):
            relay(call, final, y, kept, slabs)
        else:
            walk(call, call.state, final, y, kept)
        return y, final, saved

    def backward(
        self, call: Call, saved: Tensor, dy: Tensor | None, dstate: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Gradients of r, w, k, v, a, b in their dtypes and of the initial state in fp32."""
        inputs = (call.r, call.w, call.k, call.v, call.a, call.b)
        if _is_empty(call):
            initial = call.initial_state()
            last = torch.zeros_like(initial) if dstate is None else dstate.clone()
            return (*(torch.zeros_like(x) for x in inputs), last)
        contiguous = torch.contiguous_format
        gradients = tuple(torch.empty_like(x, memory_format=contiguous) for x in inputs)
        if (cut := _cut(call)) is not None:
            return (*gradients, _backward_by_segments(cut, saved, dy, dstate, gradients))
        dinitial = _states(call, call.sequences)
        if slabs := _slabs(call):
            after = _states(call, plan.chunk_count(call))
            relay_back(call, dy, dstate, dinitial, after, slabs)
            walk_back(call, dy, after, None, saved, gradients)
        else:
            walk_back(call, dy, dstate, dinitial, saved, gradients)
        return (*gradients, dinitial)

    def kernels(self) -> dict[str, str]:
        """The compiler, where it keeps kernels, and which ones there are for which card."""
        return compiler.report()


def _forward_by_segments(cut: Segments, y: Tensor, saved: Tensor, save: bool) -> Tensor:
    """Fills y and, if `save`, `saved`; gives the final state."""
    call = cut.whole
    added, before, after = (_states(cut.call, cut.call.sequences) for _ in range(3))
    maps = cut.maps(saved) if save else torch.empty_like(added)
    segment(cut.call, maps, added)
    chain(call, maps, added, call.state, before, back=False)
    walk(cut.call, before, after, y, saved[cut.map_words :] if save else None)
    return after[cut.each - 1 :: cut.each].contiguous()


def _backward_by_segments(
    cut: Segments,
    saved: Tensor,
    dy: Tensor | None,
    dstate: Tensor | None,
    gradients: tuple[Tensor, ...],
) -> Tensor:
    """Fills `gradients`; gives that of the initial state."""
    added, after, before = (_states(cut.call, cut.call.sequences) for _ in range(3))
    segment_back(cut.call, dy, added)
    chain(cut.whole, cut.maps(saved), added, dstate, after, back=True)
    walk_back(cut.call, dy, after, before, saved[cut.map_words :], gradients)
    return before[:: cut.each].contiguous()


@functools.cache
def _card_refuses(index: int, head: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < _FIRST_CAPABILITY:
        return "needs compute capability 8.0 or later, found {}.{}".format(*capability)
    shared, least = launch.card(torch.device("cuda", index)).shared, plan.least_shared(head)
    if shared < least:
        needs = f"needs {math.ceil(least / 1024)} KiB of shared memory a block at K = V = {head}"
        return f"{needs}, this card has {shared // 1024}"
    return compiler.why_not(compiler.architecture(capability))


def _segment(call: Call) -> int | None:
    return plan.segment(call, launch.card(call.r.device))


def _cut(call: Call) -> Segments | None:
    tokens = _segment(call)
    return Segments.of(call, tokens) if tokens else None


def _slabs(call: Call) -> tuple[int, ...]:
    return plan.slabs(call, launch.card(call.r.device))


def _saved_words(call: Call, cut: Segments | None) -> int:
    if cut is None:
        return plan.saved_words(call)
    return cut.map_words + plan.saved_words(cut.call)


def _states(call: Call, count: int) -> Tensor:
    """Room for that many states of all heads, fp32 [count, H, V, K]."""
    _, _, H, K, V = call.sizes
    return call.v.new_empty((count, H, V, K), dtype=torch.float32)


def _is_empty(call: Call) -> bool:
    B, T, *_ = call.sizes
    return B * T == 0 or call.sequences == 0
