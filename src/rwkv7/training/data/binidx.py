"""Megatron's pair of files PREFIX.bin and PREFIX.idx, read mapped and written in one go.

PREFIX.bin is nothing but tokens. PREFIX.idx, little-endian: the magic, a version u64, the code of
the tokens' type u8, how many sequences and how many document offsets u64 each; then the sequences'
sizes in tokens i32, their places in bytes i64, and the number of the sequence with which each
document begins i64, a last one for the end. As in Megatron-LM, fairseq and RWKV-LM. No number in
the file is believed before it was compared with the files' sizes.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rwkv7.files import write_atomically

from .corpus import Corpus, Starts, Tokens

__all__ = [
    "CorpusSize",
    "corpus_fingerprint",
    "corpus_prefix",
    "open_corpus",
    "token_dtype",
    "write_corpus",
]

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are not integers
LONGEST = 2**31 - 1  # tokens of a sequence; a longer document is several
ENDS = 1 << 20  # bytes of each end of the tokens in a fingerprint
PIECE = 1 << 16  # numbers of the index looked at or written together


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusSize:
    """What `write_corpus` wrote: documents that are not empty, and all tokens."""

    documents: int
    tokens: int


def token_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """The smallest type of the format that holds ids below `vocab_size`, little-endian."""
    return np.dtype("<u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<i4")


def corpus_prefix(path: Path) -> Path | None:
    """The PREFIX of the pair that `path` names (PREFIX itself, .bin or .idx), or None."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    return prefix if _with(prefix, ".bin").is_file() and _with(prefix, ".idx").is_file() else None


def corpus_fingerprint(prefix: Path) -> str:
    """A SHA-256, hexadecimal, of PREFIX.idx and of the first and last MiB of PREFIX.bin.

    It tells corpora apart without reading all of one.
    """
    digest = hashlib.sha256()
    with _with(prefix, ".idx").open("rb") as file:
        while piece := file.read(ENDS):
            digest.update(piece)
    with _with(prefix, ".bin").open("rb") as file:
        digest.update(file.read(ENDS))
        file.seek(max(0, file.seek(0, os.SEEK_END) - ENDS))
        digest.update(file.read(ENDS))
    return digest.hexdigest()


def open_corpus(prefix: Path) -> Corpus:
    """The corpus PREFIX.bin and PREFIX.idx, mapped: its memory does not grow with it.

    Raises ValueError when the files are truncated, foreign or contradict each other, OSError when
    they cannot be read.
    """
    index, tokens = _with(prefix, ".idx"), _with(prefix, ".bin")
    size = index.stat().st_size
    with index.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise ValueError(f"{index}: expected a Megatron index (MMIDIDX), found something else")
    _, version, code, sequences, documents = HEADER.unpack(header)
    if version != 1 or code not in DTYPES:
        raise ValueError(
            f"{index}: expected version 1 and integer tokens, found version {version} "
            f"and type {code}"
        )
    expected = HEADER.size + 12 * sequences + 8 * documents
    if size != expected or documents < 1:
        raise ValueError(
            f"{index}: expected {expected} bytes for {sequences} sequences and {documents} "
            f"document offsets (1 at least), found {size}: it is truncated or damaged"
        )
    dtype = np.dtype(DTYPES[code])
    count, rest = divmod(tokens.stat().st_size, dtype.itemsize)
    sizes = _mapped(index, "<i4", HEADER.size, sequences)
    pointers = _mapped(index, "<i8", HEADER.size + 4 * sequences, sequences)
    firsts = _mapped(index, "<i8", HEADER.size + 12 * sequences, documents)
    told = _check_sequences(index, sizes, pointers, dtype.itemsize)
    if (told, 0) != (count, rest):
        raise ValueError(
            f"{tokens}: expected {told * dtype.itemsize} bytes, those of the {told} tokens that "
            f"{index.name} tells of, found {count * dtype.itemsize + rest}"
        )
    _check_documents(index, firsts, sequences)
    return Corpus(
        _mapped(tokens, dtype.str, 0, count), Starts(pointers, firsts, dtype.itemsize, count)
    )


def write_corpus(
    prefix: Path,
    pieces: Iterable[tuple[Tokens, bool]],
    dtype: np.dtype[np.integer],
    on_written: Callable[[CorpusSize], None] | None = None,
) -> CorpusSize:
    """Writes PREFIX.bin and PREFIX.idx from pieces of documents, whole or not at all.

    Args:
        prefix: its folder must exist.
        pieces: ids, and whether they end a document. Documents without tokens are left out; the
            last one need not be ended. Only one piece at a time is held in memory.
        dtype: one that `token_dtype` gives.
        on_written: called when all is written but not yet in its place; what it raises undoes it.

    A kill leaves the old pair, the new one, or PREFIX.bin without an index, never two files that
    do not belong together. Raises OSError when they cannot be written.
    """
    index, done = _with(prefix, ".idx"), []

    def write_index(index_file: Path) -> None:
        def write_tokens(tokens_file: Path) -> None:
            with tokens_file.open("wb") as out, index_file.open("wb+") as file:
                done.append(_write(out, file, pieces, dtype))
            if on_written:
                on_written(done[0])
            # From here to the end of `write_index` the old index would lie about the new tokens.
            index.unlink(missing_ok=True)

        write_atomically(_with(prefix, ".bin"), write_tokens)

    write_atomically(index, write_index)
    return done[0]


def _with(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _mapped(path: Path, dtype: str, offset: int, count: int) -> np.ndarray:
    if count == 0:  # cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=offset, shape=(count,))


def _check_sequences(index: Path, sizes: np.ndarray, pointers: np.ndarray, itemsize: int) -> int:
    """The tokens of all sequences; ValueError unless they lie one behind the other."""
    tokens = 0
    for start in range(0, len(sizes), PIECE):
        piece = sizes[start : start + PIECE].astype(np.int64)
        ends = tokens + np.cumsum(piece)
        begins = (ends - piece) * itemsize
        wrong = np.flatnonzero((piece < 0) | (pointers[start : start + PIECE] != begins))
        if len(wrong):
            n = int(wrong[0])
            raise ValueError(
                f"{index}: sequence {start + n}: expected it at byte {begins[n]}, right behind the "
                f"one before, found {piece[n]} tokens at byte {pointers[start + n]}"
            )
        tokens = int(ends[-1])
    return tokens


def _check_documents(index: Path, firsts: np.ndarray, sequences: int) -> None:
    before = 0
    for start in range(0, len(firsts), PIECE):
        piece = firsts[start : start + PIECE].astype(np.int64)
        wrong = np.diff(piece, prepend=before) < 0
        if wrong.any() or (start == 0 and piece[0] != 0):
            raise ValueError(
                f"{index}: expected document offsets that rise from 0 to {sequences}, found "
                f"others among numbers {start} to {start + len(piece) - 1}"
            )
        before = int(piece[-1])
    if before != sequences:
        raise ValueError(
            f"{index}: expected the last document to end with sequence {sequences}, found {before}"
        )


def _write(
    out: BinaryIO,
    index: BinaryIO,
    pieces: Iterable[tuple[Tokens, bool]],
    dtype: np.dtype[np.integer],
) -> CorpusSize:
    """Tokens and sizes as they come; places and documents after that, from the sizes written."""
    index.write(bytes(HEADER.size))
    tokens = sequences = held = 0
    inner: list[int] = []  # sequences that go on with a document; there is hardly ever one
    limits = np.iinfo(dtype)
    for ids, ends in pieces:
        if len(ids) and not limits.min <= ids.min() <= ids.max() <= limits.max:
            raise ValueError(f"ids: expected numbers that fit in {dtype}, found {ids.max()}")
        out.write(ids.astype(dtype).tobytes())
        tokens, held = tokens + len(ids), held + len(ids)
        while held > LONGEST or (ends and held):
            size = min(held, LONGEST)
            index.write(struct.pack("<i", size))
            sequences, held = sequences + 1, held - size
            if held:
                inner.append(sequences)
    if held:
        index.write(struct.pack("<i", held))
        sequences += 1
    for block in _pointers(index, sequences, dtype.itemsize):
        index.seek(0, os.SEEK_END)
        index.write(block)
    for start in range(0, sequences + 1, PIECE):
        numbers = np.arange(start, min(start + PIECE, sequences + 1), dtype="<i8")
        index.write(np.setdiff1d(numbers, inner).astype("<i8").tobytes())
    documents = sequences - len(inner)
    index.seek(0)
    code = next(code for code, name in DTYPES.items() if np.dtype(name) == dtype)
    index.write(HEADER.pack(MAGIC, 1, code, sequences, documents + 1))
    return CorpusSize(documents=documents, tokens=tokens)


def _pointers(index: BinaryIO, sequences: int, itemsize: int) -> Iterator[bytes]:
    end = 0
    for start in range(0, sequences, PIECE):
        index.seek(HEADER.size + 4 * start)
        sizes = np.frombuffer(index.read(4 * min(PIECE, sequences - start)), "<i4").astype("<i8")
        ends = end + np.cumsum(sizes) * itemsize
        yield (ends - sizes * itemsize).astype("<i8").tobytes()
        end = int(ends[-1])
