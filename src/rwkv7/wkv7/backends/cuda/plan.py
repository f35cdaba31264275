"""What a call asks of the kernels: which of them, compiled how, launched with what.

Decisions look at sizes, dtypes and the decay's form, never at values. Enough sequences and heads
fill a card with one walk each. Few long ones are cut into segments that are walked at once, but not
inside `batch_invariant()`: there a sequence's bits are the same alone, batched and packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rwkv7.wkv7.contract import Call

CHUNK = 64  # tokens between two states that are saved
SIZES = (64,)  # N = K = V
DTYPES = (torch.bfloat16, torch.float16)
DECAYS = ("logit", "log_bounded")

# Names and values of the macros that a kernel is compiled with.
Macros = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel in `kernels/`, and how it is launched: a block a (sequence, head).

    Attributes:
        name: the file is `name`.cu, the function wkv7_`name`.
        threads: of a block.
        shared: bytes of dynamic shared memory a block; with w in 16 bits, with w in 32.
        constant: the source's own name for `shared`; that they agree is checked when it compiles.
        pipelined: the kernel's form for few sequences and heads, with more warps a block.
    """

    name: str
    threads: int
    shared: tuple[int, int]
    constant: str
    pipelined: bool = False

    @property
    def entry(self) -> str:
        """The function's name in the compiled file."""
        return f"wkv7_{self.name}"

    def shared_bytes(self, macros: Macros) -> int:
        """Of a block, compiled with these macros."""
        return self.shared[dict(macros)["W_FP32"]]

    def program(self, macros: Macros) -> str:
        """What is compiled: the file, and a check that this table knows its shared memory."""
        return (
            f"#define PIPELINED {int(self.pipelined)}\n"
            f'#include "{self.name}.cu"\n'
            f"static_assert({self.constant} == {self.shared_bytes(macros)}, "
            f'"plan.py has another size for the shared memory of {self.name}.cu");\n'
        )


FORWARD = Kernel("forward", threads=128, shared=(56384, 64576), constant="FORWARD_BYTES")
FORWARD_PIPELINED = Kernel("forward", 256, (112768, 129152), "FORWARD_BYTES", pipelined=True)
BACKWARD = Kernel("backward", threads=128, shared=(114752, 122944), constant="SHARED_BYTES")
BACKWARD_PIPELINED = Kernel("backward", 384, (213136, 229520), "SHARED_BYTES", pipelined=True)
CHAIN = Kernel("chain", threads=128, shared=(33280, 33280), constant="CHAIN_BYTES")
KERNELS = (FORWARD, FORWARD_PIPELINED, BACKWARD, BACKWARD_PIPELINED, CHAIN)
# Blocks of `forward` that share a multiprocessor.
BLOCKS = 4
# Segments cost two more walks forward and one more backward; below these bounds that is too much
# (H100, forward and both, ms: 1x8192x32 takes 0.96 and 3.30 whole, 1.16 and 3.35 in 16 segments;
# 1x65536x32 takes 5.99 and 23.1 whole, 3.43 and 7.91 in 17).
SHORTEST_SEGMENT, FEWEST_SEGMENTS = 1024, 12
# A card must have this much shared memory for a block.
LEAST_SHARED = max(max(kernel.shared) for kernel in KERNELS if not kernel.pipelined)


def refuses(call: Call) -> str | None:
    """Why no kernel here takes the call's sizes, dtype or decay, or None."""
    _, _, _, K, V = call.sizes
    if call.v.dtype not in DTYPES:
        return f"takes bfloat16 and float16, found {str(call.v.dtype).removeprefix('torch.')}"
    if K != V or K not in SIZES:
        return f"takes K = V = {' or '.join(map(str, SIZES))}, found K = {K}, V = {V}"
    if call.decay not in DECAYS:
        return 'decay="log" has no floor: its operands do not fit in fp16; "log_bounded" does'
    return None


def macros(call: Call, own: Mapping[str, bool]) -> Macros:
    """How a kernel is compiled for the call; `own`: the kernel's own macros."""
    return (
        ("INPUT_FP16", int(call.v.dtype == torch.float16)),
        ("W_FP32", int(call.w.dtype == torch.float32)),
        ("LOGIT", int(call.decay == "logit")),
        ("PACKED", int(call.cu_seqlens is not None)),
        *((name, int(value)) for name, value in own.items()),
    )


@dataclass(frozen=True, slots=True)
class Card:
    """What plans depend on: how many multiprocessors, and bytes of shared memory for a block."""

    multiprocessors: int
    shared: int


def forward(call: Call, card: Card) -> Kernel:
    """The form of the kernel that fills the card."""
    return _fuller(call, card, FORWARD_PIPELINED) or FORWARD


def backward(call: Call, card: Card) -> Kernel:
    """The form of the kernel that fills the card."""
    return _fuller(call, card, BACKWARD_PIPELINED) or BACKWARD


def _fuller(call: Call, card: Card, kernel: Kernel) -> Kernel | None:
    """The pipelined kernel, where a multiprocessor has but one sequence and head to walk.

    H100, forward and both: 96 sequences and heads take 10 % and 6 % less time with it, 256 take
    8 % and 18 % more. It computes the same, but a compiler may round one source in two ways.
    """
    _, _, H, *_ = call.sizes
    alone = not call.invariant and call.sequences * H <= card.multiprocessors
    return kernel if alone and max(kernel.shared) <= card.shared else None


def segment(call: Call, card: Card) -> int | None:
    """Tokens of the segments that every sequence is cut into, or None: one walk a sequence."""
    B, T, H, *_ = call.sizes
    if call.invariant or call.cu_seqlens is not None or card.multiprocessors < 2 * B * H:
        return None
    tokens = max(SHORTEST_SEGMENT, -(-T * B * H // (BLOCKS * card.multiprocessors)))
    tokens = -(-tokens // CHUNK) * CHUNK
    return tokens if -(-T // tokens) >= FEWEST_SEGMENTS else None


def chunk_count(call: Call) -> int:
    """How many chunk numbers the call uses (packed: at most; some may have no tokens).

    Sequence s of a packed call begins at number start // CHUNK + s.
    """
    B, T, *_ = call.sizes
    if call.cu_seqlens is None:
        return B * -(-T // CHUNK)
    return T // CHUNK + call.sequences


def saved_words(call: Call) -> int:
    """fp32 words of the states before every chunk: fp16 [n, H, V, K], then a scale a row."""
    _, _, H, K, V = call.sizes
    return chunk_count(call) * H * V * (K // 2 + 1)
