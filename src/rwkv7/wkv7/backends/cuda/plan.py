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
SIZES = (64, 128)  # N = K = V
DTYPES = (torch.bfloat16, torch.float16)
DECAYS = ("logit", "log_bounded")

# Names and values of the macros that a kernel is compiled with.
Macros = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel in `kernels/`, and how it is launched.

    Attributes:
        name: the file is `name`.cu, the function wkv7_`name`.
        head: K = V.
        threads: of a block.
        shared: bytes of dynamic shared memory a block; with w in 16 bits, with w in 32.
        constant: the source's own name for `shared`; that they agree is checked when it compiles.
        blocks: for a (sequence, head).
        pipelined: the kernel's form for few sequences and heads, with more warps a block.
    """

    name: str
    head: int
    threads: int
    shared: tuple[int, int]
    constant: str
    blocks: int = 1
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
            f"#define HEAD {self.head}\n"
            f"#define PIPELINED {int(self.pipelined)}\n"
            f'#include "{self.name}.cu"\n'
            f"static_assert({self.constant} == {self.shared_bytes(macros)}, "
            f'"plan.py has another size for the shared memory of {self.name}.cu");\n'
        )


KERNELS = (
    Kernel("forward", 64, 128, (56384, 64576), "FORWARD_BYTES"),
    Kernel("forward", 64, 256, (112768, 129152), "FORWARD_BYTES", pipelined=True),
    Kernel("forward", 128, 128, (111680, 128064), "FORWARD_BYTES", blocks=2),
    Kernel("backward", 64, 128, (114752, 122944), "SHARED_BYTES"),
    Kernel("backward", 64, 384, (213136, 229520), "SHARED_BYTES", pipelined=True),
    Kernel("backward", 128, 256, (208960, 225344), "SHARED_BYTES"),
    Kernel("chain", 64, 128, (33280, 33280), "CHAIN_BYTES"),
    Kernel("chain", 128, 256, (132096, 132096), "CHAIN_BYTES"),
)
# Sequences and heads whose `forward` shares a multiprocessor, by the head's size.
SHARING = {64: 4, 128: 1}
# Segments cost two more walks forward and one more backward; below these bounds that is too much
# (H100, forward and both, ms: 1x8192x32 takes 0.96 and 3.30 whole, 1.16 and 3.35 in 16 segments;
# 1x65536x32 takes 5.99 and 23.1 whole, 3.43 and 7.91 in 17).
SHORTEST_SEGMENT, FEWEST_SEGMENTS = 1024, 12


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


def least_shared(head: int) -> int:
    """Bytes of shared memory for a block that a card must have for heads of this size."""
    return max(max(k.shared) for k in KERNELS if k.head == head and not k.pipelined)


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


def kernel(name: str, call: Call, card: Card) -> Kernel:
    """The kernel of that name for the call, in the form that fills the card.

    The pipelined one, if there is one, where a multiprocessor has but one sequence and head to
    walk. H100, forward and both: 96 sequences and heads take 10 % and 6 % less time with it, 256
    take 8 % and 18 % more. It computes the same, but a compiler may round one source in two ways.
    """
    _, _, H, K, _ = call.sizes
    forms = [kernel for kernel in KERNELS if (kernel.name, kernel.head) == (name, K)]
    alone = not call.invariant and call.sequences * H <= card.multiprocessors
    fits = alone and max(forms[-1].shared) <= card.shared
    return forms[-1] if fits else forms[0]


def segment(call: Call, card: Card) -> int | None:
    """Tokens of the segments that every sequence is cut into, or None: one walk a sequence."""
    B, T, H, K, _ = call.sizes
    if call.invariant or call.cu_seqlens is not None or card.multiprocessors < 2 * B * H:
        return None
    tokens = max(SHORTEST_SEGMENT, -(-T * B * H // (SHARING[int(K)] * card.multiprocessors)))
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
