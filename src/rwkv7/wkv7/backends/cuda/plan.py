"""What a call asks of the kernels: which of them, compiled how, launched with what.

Decisions look at sizes, dtypes and the decay's form, never at values. Enough sequences and heads
fill a card with one walk each. Few are walked by relay, from what other blocks prepare, and few
long ones cut into segments that are walked at once; but not inside `batch_invariant()`: there a
sequence's bits are the same alone, batched and packed.
"""

from __future__ import annotations

import functools
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


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """A kernel in `kernels/`, and how it is launched. Those of `KERNELS` alone, told apart as
    objects: every launch looks one up.

    Attributes:
        name: the file is `name`.cu, the function wkv7_`name`.
        head: K = V.
        threads: of a block.
        shared: bytes of dynamic shared memory a block; with w in 16 bits, with w in 32.
        constant: the source's own name for `shared`; that they agree is checked when it compiles.
        blocks: for a (sequence, head).
        image: bytes of memory that a prepared step of 16 tokens takes (`relay`).
    """

    name: str
    head: int
    threads: int
    shared: tuple[int, int]
    constant: str
    blocks: int = 1
    image: int = 0

    @property
    def entry(self) -> str:
        """The function's name in the compiled file."""
        return f"wkv7_{self.name}"

    def shared_bytes(self, macros: Macros) -> int:
        """Of a block, compiled with these macros."""
        return self.shared[dict(macros)["W_FP32"]]

    def program(self, macros: Macros) -> str:
        """What is compiled: the file, and a check that this table knows its shared memory."""
        image = f" && IMAGE_BYTES == {self.image}" if self.image else ""
        return (
            f"#define HEAD {self.head}\n"
            f'#include "{self.name}.cu"\n'
            f"static_assert({self.constant} == {self.shared_bytes(macros)}{image}, "
            f'"plan.py has other sizes for the memory of {self.name}.cu");\n'
        )


KERNELS = (
    Kernel("forward", 64, 128, (56384, 56384), "FORWARD_BYTES"),
    Kernel("forward", 128, 128, (111680, 111680), "FORWARD_BYTES", blocks=2),
    Kernel("backward", 64, 128, (114752, 122944), "SHARED_BYTES"),
    Kernel("backward", 128, 256, (208960, 225344), "SHARED_BYTES"),
    Kernel("relay", 64, 256, (112768, 112768), "RELAY_BYTES", image=14464),
    Kernel("relay", 128, 256, (223552, 223552), "RELAY_BYTES", blocks=2, image=23168),
    Kernel("relay_back", 64, 256, (96384, 96384), "RELAY_BYTES", image=7296),
    Kernel("relay_back", 128, 256, (190784, 190784), "RELAY_BYTES", blocks=2, image=13952),
    Kernel("segment", 64, 128, (56384, 56384), "SEGMENT_BYTES"),
    Kernel("segment", 128, 128, (111680, 111680), "SEGMENT_BYTES", blocks=2),
    Kernel("segment_back", 64, 128, (56384, 56384), "SEGMENT_BYTES"),
    Kernel("segment_back", 128, 128, (111680, 111680), "SEGMENT_BYTES", blocks=2),
    Kernel("chain", 64, 128, (33280, 33280), "CHAIN_BYTES"),
    Kernel("chain", 128, 256, (132096, 132096), "CHAIN_BYTES"),
)
_BY_NAME = {(kernel.name, kernel.head): kernel for kernel in KERNELS}
STEPS = 4  # of a chunk: what a warp prepares
# A relay is worth its launches from so many chunks on, and up to so many sequences and heads a
# multiprocessor (H200, ms forward and both at 128 sequences and heads of 4096 tokens: 0.45 and 1.65
# by relay, 0.51 and 1.80 with one walk each).
FEWEST_CHUNKS, MOST_PAIRS = 8, 1.0
# It takes so many slabs, if none has more chunks (50 kB each) of all sequences and heads than this.
# Walking a chunk takes this much of the time in which a multiprocessor prepares one.
SLABS, MOST_UNITS, WALKING = 4, 1408, 0.45
# Sequences and heads whose `forward` shares a multiprocessor, by the head's size.
SHARING = {64: 4, 128: 1}
# Segments cost another walk each way; below these bounds that is too much.
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
    return max(max(k.shared) for k in KERNELS if k.head == head and not k.image)


def macros(call: Call, own: Mapping[str, bool]) -> Macros:
    """How a kernel is compiled for the call; `own`: the kernel's own macros."""
    common = _common_macros(call.v.dtype, call.w.dtype, call.decay, call.cu_seqlens is not None)
    return common + tuple([(name, int(value)) for name, value in own.items()])


@functools.cache
def _common_macros(v: torch.dtype, w: torch.dtype, decay: str, packed: bool) -> Macros:
    return (
        ("INPUT_FP16", int(v == torch.float16)),
        ("W_FP32", int(w == torch.float32)),
        ("LOGIT", int(decay == "logit")),
        ("PACKED", int(packed)),
    )


@dataclass(frozen=True, slots=True)
class Card:
    """What plans depend on: how many multiprocessors, and bytes of shared memory for a block."""

    multiprocessors: int
    shared: int


def kernel(name: str, call: Call) -> Kernel:
    """The kernel of that name for the call."""
    return _BY_NAME[name, int(call.sizes[3])]


def segment(call: Call, card: Card) -> int | None:
    """Tokens of the segments that every sequence is cut into, or None: sequences stay whole."""
    B, T, H, K, _ = call.sizes
    if call.invariant or call.cu_seqlens is not None or card.multiprocessors < 2 * B * H:
        return None
    tokens = max(SHORTEST_SEGMENT, -(-T * B * H // (SHARING[int(K)] * card.multiprocessors)))
    tokens = -(-tokens // CHUNK) * CHUNK
    return tokens if -(-T // tokens) >= FEWEST_SEGMENTS else None


def slabs(call: Call, card: Card) -> tuple[int, ...]:
    """Chunks of every sequence that each launch of a relay prepares, in order; none: no relay."""
    B, T, H, *_ = call.sizes
    chunks, pairs = -(-T // CHUNK), B * H
    if call.invariant or call.cu_seqlens is not None or chunks < FEWEST_CHUNKS:
        return ()
    if segment(call, card):
        return ()
    few = pairs <= MOST_PAIRS * card.multiprocessors
    return slab_sizes(chunks, pairs, card.multiprocessors) if few else ()


@functools.lru_cache(64)
def slab_sizes(chunks: int, pairs: int, multiprocessors: int) -> tuple[int, ...]:
    """With few sequences and heads the walk takes longest, and slabs grow, so that it begins early:

    each is prepared in the time in which the one before it is walked.
    """
    ratio = min(2.0, max(1.0, WALKING * multiprocessors / pairs))
    size, most = chunks / sum(ratio**i for i in range(SLABS)), max(1, MOST_UNITS // pairs)
    found: list[int] = []
    while (left := chunks - sum(found)) > 0:
        n = min(left, most, max(2, round(size)))
        found.append(n if left - n > 1 else min(left, most))
        size *= ratio
    return tuple(found)


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
