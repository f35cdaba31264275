"""The hand-made GPU backend: CUDA kernels on tensor cores, N = K = V = 64, bf16 and fp16.

One block a (sequence, head) walks the chunks with the state in registers; backward walks them in
reverse from the saved states. `plan` decides, `compiler` makes and keeps compiled kernels, `launch`
starts them. Importing this module loads neither a compiler nor the driver.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rwkv7.wkv7.contract import Call

from . import compiler, launch, plan

# The first cards with cp.async, bf16 products and enough shared memory.
_FIRST_CAPABILITY = (8, 0)


class CudaBackend:
    """CUDA kernels, compiled for the card at their first use."""

    name = "cuda"

    def refuses(self, call: Call) -> str | None:
        """Needs an NVIDIA GPU from 8.0 on, NVRTC, 16-bit inputs, K = V = 64, a bounded decay."""
        device = call.r.device
        if device.type != "cuda" or torch.version.hip is not None:
            return f"needs an NVIDIA GPU, the inputs are on {device}"
        return plan.refuses(call) or _card_refuses(device.index or 0)

    def route(self, call: Call) -> str:
        """The one walk there is."""
        return f"cuda, one walk a sequence and head over chunks of {plan.CHUNK} tokens"

    def saved_shape(self, call: Call) -> tuple[int, ...]:
        """One flat tensor: the states before the chunks in fp16, with a scale a row."""
        return (0,) if _is_empty(call) else (plan.saved_words(call),)

    def forward(self, call: Call, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        """y [B, T, H, V], the final state [S, H, V, K] in fp32, and what `backward` needs."""
        _, T, H, K, V = call.sizes
        saved = call.v.new_empty(self.saved_shape(call) if save else (0,), dtype=torch.float32)
        if _is_empty(call):
            return torch.empty_like(call.v), call.initial_state().clone(), saved
        y = torch.empty_like(call.v, memory_format=torch.contiguous_format)
        final = call.v.new_empty((call.sequences, H, V, K), dtype=torch.float32)
        inputs, offsets = _ready(*_inputs(call), call.state), _offsets(call)
        states = _saved_addresses(saved, call) if save else (0, 0)
        arguments = (*_addresses(*inputs), *_addresses(y, final), *states, *_addresses(offsets))
        _launch(plan.FORWARD, plan.forward_macros(call, save), call, (*arguments, T, H))
        return y, final, saved

    def backward(
        self, call: Call, saved: Tensor, dy: Tensor | None, dstate: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Gradients of r, w, k, v, a, b in their dtypes and of the initial state in fp32."""
        _, T, H, K, V = call.sizes
        if _is_empty(call):
            initial = call.initial_state()
            last = torch.zeros_like(initial) if dstate is None else dstate.clone()
            return (*(torch.zeros_like(x) for x in _inputs(call)), last)
        given, offsets = _ready(*_inputs(call), dy, dstate), _offsets(call)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in _inputs(call)]
        dinitial = call.v.new_empty((call.sequences, H, V, K), dtype=torch.float32)
        arguments = (
            *_addresses(*given),
            *_saved_addresses(saved, call),
            *_addresses(*grads, dinitial, offsets),
        )
        _launch(plan.BACKWARD, plan.backward_macros(call), call, (*arguments, T, H))
        return (*grads, dinitial)

    def kernels(self) -> dict[str, str]:
        """The compiler, where it keeps kernels, and which ones there are for which card."""
        return compiler.report()


@functools.cache
def _card_refuses(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < _FIRST_CAPABILITY:
        return "needs compute capability 8.0 or later, found {}.{}".format(*capability)
    card: Any = torch.cuda.get_device_properties(index)  # torch's stubs lack the attribute
    shared = card.shared_memory_per_block_optin
    if shared < plan.LARGEST_SHARED:
        kib = plan.LARGEST_SHARED / 1024
        return f"needs {kib:.0f} KiB of shared memory a block, this card has {shared / 1024:.0f}"
    return compiler.why_not(compiler.architecture(capability))


def _launch(
    kernel: plan.Kernel, macros: plan.Macros, call: Call, arguments: tuple[int, ...]
) -> None:
    blocks = call.sequences * call.r.shape[2]
    launch.launch(kernel, macros, call.r.device, blocks, arguments)


def _inputs(call: Call) -> tuple[Tensor, ...]:
    return call.r, call.w, call.k, call.v, call.a, call.b


def _ready(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As the kernels read them: contiguous, and rows on 16 bytes."""
    return tuple(x if x is None else _aligned(x.contiguous()) for x in tensors)


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _offsets(call: Call) -> Tensor | None:
    return None if call.cu_seqlens is None else call.cu_seqlens.to(torch.int64).contiguous()


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if x is None else x.data_ptr() for x in tensors)


def _saved_addresses(saved: Tensor, call: Call) -> tuple[int, int]:
    """Of the states and of their scales in the flat tensor."""
    _, _, H, K, V = call.sizes
    states = plan.chunk_count(call) * H * V * K // 2  # words
    return saved.data_ptr(), saved.data_ptr() + 4 * states


def _is_empty(call: Call) -> bool:
    B, T, *_ = call.sizes
    return B * T == 0 or call.sequences == 0
