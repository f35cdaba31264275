"""Text files, files of records and folders of both -> one stream of bytes, read in pieces.

The documents stand in the order given, folders recursively and sorted. A plain text file is one
document; records.py knows what is not plain text. Nothing here holds more than one record, or a
piece of a text file, in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .binidx import corpus_fingerprint, corpus_prefix
from .records import BadRecords, record_reader

__all__ = ["Piece", "Text", "find_text", "text_bytes", "text_digest", "text_pieces"]

PIECE = 1 << 20  # bytes read, and tokenized, at a time
PROBE = 8192  # a file in a folder with a NUL in its first bytes is taken for binary, as git does


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """Text on disk: its files in reading order, their bytes, and how many files were left out.

    `corpus` is the PREFIX of a tokenized corpus instead; then there are no files.
    """

    files: tuple[Path, ...]
    size: int
    skipped: int = 0
    corpus: Path | None = None


class Piece(NamedTuple):
    """A piece of a document, whether it ends it, and the bytes of the files read so far."""

    text: bytes
    ends: bool
    read: int


def find_text(paths: Sequence[Path], exclude: Path | None = None) -> Text:
    """The text that `paths` name: files as they are, folders recursively and sorted by path.

    Files whose names end in .jsonl, .ndjson, .parquet or .arrow hold records, all others plain
    text. In a folder, files and folders whose names begin with a dot, everything below `exclude`
    and files that are neither (a NUL in the first 8 KiB, a tokenized corpus) are left out. A file
    named outright is taken, UTF-8 or not, unless it is half a corpus. The PREFIX of one pair
    PREFIX.bin and PREFIX.idx may be named instead. Nothing is written.

    Raises ValueError for a path that does not exist or cannot be read, for text of no bytes, and
    for a .bin without its .idx or the other way round.
    """
    if not paths:
        raise ValueError("text: expected at least one file or folder, found none")
    if prefixes := [prefix for prefix in map(_corpus, paths) if prefix]:
        if len(paths) > 1:
            raise ValueError(
                f"text: {prefixes[0]} is a tokenized corpus, which is read alone, found "
                f"{len(paths)} names"
            )
        size = prefixes[0].with_name(prefixes[0].name + ".bin").stat().st_size
        return Text(files=(), size=size, corpus=prefixes[0])
    files: list[Path] = []
    size = skipped = 0
    for path in paths:
        inside = path.is_dir()
        for file in sorted(_files_below(path, exclude)) if inside else [path]:
            start = _first_bytes(file)
            if not inside and file.suffix in (".bin", ".idx"):
                lost = file.with_suffix(".idx" if file.suffix == ".bin" else ".bin")
                raise ValueError(
                    f"text: {file} is half of a tokenized corpus, found no {lost} beside it; text "
                    "needs a name with another ending"
                )
            foreign = b"\0" in start and not record_reader(file)
            if inside and (foreign or _corpus(file)):
                skipped += 1
                continue
            files.append(file)
            size += file.stat().st_size
    if size == 0:
        names = ", ".join(map(str, paths))
        what = f"{skipped} binary files only" if skipped else "no text, 0 bytes"
        raise ValueError(f"text: expected text to train on, found {what} in {names}")
    return Text(files=tuple(files), size=size, skipped=skipped)


def text_pieces(
    text: Text,
    start: int = 0,
    stop: int | None = None,
    *,
    key: str = "text",
    bad: BadRecords | None = None,
) -> Iterator[Piece]:
    """The bytes start..stop of the text in pieces of at most a MiB, cut at line ends.

    Args:
        text: files; not a tokenized corpus.
        start, stop: in bytes of the documents one behind the other; None is the end.
        key: of the text in a record.
        bad: what happens to records that cannot be read; None stops at the first.

    Raises ValueError for a file that became shorter, or a record that stops the reading.
    """
    position = read = 0
    for path in text.files:
        size = path.stat().st_size
        with path.open("rb") as file:
            for stream, length in _documents(file, path, size, key, bad or BadRecords()):
                end = position + length
                first, last = max(start, position), end if stop is None else min(stop, end)
                if first < last:
                    stream.seek(first - position)
                left = last - first
                while left > 0:
                    piece = _up_to_a_line_end(stream, left)
                    left -= len(piece)
                    yield Piece(piece, left == 0 and last == end, read + min(size, file.tell()))
                position = end
        read += size


def text_bytes(text: Text, *, key: str = "text", bad: BadRecords | None = None) -> int:
    """The bytes of all documents, for which files of records are read through.

    `key` and `bad` as for `text_pieces`.

    Raises ValueError when there are none, or for a record that stops the reading.
    """
    if not any(map(record_reader, text.files)):
        return text.size
    bad = bad or BadRecords()
    size = sum(len(piece.text) for piece in text_pieces(text, key=key, bad=bad))
    if size == 0:
        names = ", ".join(map(str, text.files[:3]))
        raise ValueError(
            f"text: expected at least one document with text, found none in {names}{bad.first()}"
        )
    return size


def text_digest(
    text: Text, held_out_text: Text | None = None, *, key: str = "text", on_bad: str = "stop"
) -> str:
    """The SHA-256 of the text, hexadecimal, as `DataInfo.sha256` keeps it.

    Of a tokenized corpus that of its index and of the ends of its tokens. `key` is that of the text
    in a record, `on_bad` what happens to records that cannot be read, "stop" or "skip".
    """
    if text.corpus:
        return corpus_fingerprint(text.corpus)
    digest = hashlib.sha256()
    for part in (text, held_out_text):
        for piece in text_pieces(part, key=key, bad=BadRecords(on_bad)) if part else ():
            digest.update(piece.text)
    return digest.hexdigest()


def _corpus(path: Path) -> Path | None:
    """The prefix of the corpus that `path` names, unless it is a folder or a text file itself."""
    named = path.suffix in (".bin", ".idx") or not path.exists()
    return corpus_prefix(path) if named else None


def _documents(
    file: BinaryIO, path: Path, size: int, key: str, bad: BadRecords
) -> Iterable[tuple[BinaryIO, int]]:
    reader = record_reader(path)
    return reader(file, path, key, bad) if reader else [(file, size)]


def _files_below(folder: Path, exclude: Path | None) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        raise ValueError(f"text: cannot read the folder {error.filename}: {error.strerror}")

    kept_out = exclude.resolve() if exclude else None
    for parent, folders, names in os.walk(folder, onerror=unreadable):
        here = Path(parent)
        folders[:] = [
            f for f in folders if not f.startswith(".") and (here / f).resolve() != kept_out
        ]
        if here.resolve() != kept_out:
            yield from (here / n for n in names if not n.startswith(".") and (here / n).is_file())


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(PROBE)
    except FileNotFoundError:
        raise ValueError(f"text: there is no file or folder {path}") from None
    except OSError as error:
        raise ValueError(f"text: cannot read {path}: {error.strerror}") from error


def _up_to_a_line_end(file: BinaryIO, left: int) -> bytes:
    piece = file.read(min(PIECE, left))
    if not piece:
        raise ValueError(f"text: {file.name} became shorter while it was read")
    line_end = piece.rfind(b"\n") + 1
    if len(piece) < left and line_end:
        file.seek(line_end - len(piece), os.SEEK_CUR)
        piece = piece[:line_end]
    return piece
