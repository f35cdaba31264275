"""Text files and folders -> token files, memory-mapped, split into training and held-out text.

The text is one stream of bytes: the files in the order given, folders recursively and sorted. Its
end is held out and never trained on. Nothing here holds more than a piece of the text in memory.
Which windows a step reads is decided in windows.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from rwkv7.files import write_atomically
from rwkv7.tokenizer import Tokenizer

__all__ = ["DataInfo", "Text", "TokenData", "find_text", "open_data", "prepare_data", "text_digest"]

PIECE = 1 << 20  # bytes read, and tokenized, at a time
PROBE = 8192  # a file in a folder with a NUL in its first bytes is taken for binary, as git does
HELD_OUT_SHARE, HELD_OUT_MOST = 10, 256 * 1024  # a tenth of the text, at most 256 KiB

Tokens = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """Text on disk: its files in reading order, their bytes, and how many files were left out."""

    files: tuple[Path, ...]
    size: int
    skipped: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DataInfo:
    """What `data.json` says about the token files beside it. Sizes of the text are in bytes."""

    tokenizer: str
    vocab_size: int
    train_tokens: int
    train_bytes: int
    held_out_tokens: int
    held_out_bytes: int
    sha256: str  # of the whole text, held-out part included
    files: int


@dataclass(frozen=True, slots=True)
class TokenData:
    """The tokens of a run, [train_tokens] and [held_out_tokens], mapped from disk."""

    train: Tokens
    held_out: Tokens
    info: DataInfo


def find_text(paths: Sequence[Path], exclude: Path | None = None) -> Text:
    """The text that `paths` name: files as they are, folders recursively and sorted by path.

    In a folder, files and folders whose names begin with a dot, everything below `exclude` and
    files that are not text (a NUL in the first 8 KiB) are left out. A file named outright is always
    taken, UTF-8 or not. Nothing is written.

    Raises ValueError for a path that does not exist or cannot be read, and for text of no bytes.
    """
    if not paths:
        raise ValueError("text: expected at least one file or folder, found none")
    files: list[Path] = []
    size = skipped = 0
    for path in paths:
        inside = path.is_dir()
        for file in sorted(_files_below(path, exclude)) if inside else [path]:
            start = _first_bytes(file)
            if inside and b"\0" in start:
                skipped += 1
                continue
            files.append(file)
            size += file.stat().st_size
    if size == 0:
        names = ", ".join(map(str, paths))
        what = f"{skipped} binary files only" if skipped else "no text, 0 bytes"
        raise ValueError(f"text: expected text to train on, found {what} in {names}")
    return Text(files=tuple(files), size=size, skipped=skipped)


def prepare_data(
    text: Text,
    folder: Path,
    tokenizer: Tokenizer,
    held_out: int | None = None,
    held_out_text: Text | None = None,
) -> TokenData:
    """Tokenizes `text` into `folder`: train.bin, held_out.bin and, last of all, data.json.

    The last `held_out` bytes (None: a tenth of the text, at most 256 KiB) are held out; with
    `held_out_text`, that text is, and all of `text` is trained on. A tokenizer with an
    end-of-document token gets one after each file. Where text is cut (each MiB at a line's end,
    and between the two parts) a token never reaches across.

    Raises ValueError when nothing would be left to train on, OSError when the disk is full.
    """
    if held_out_text is not None:
        held_out = 0
    elif held_out is None:
        held_out = min(text.size // HELD_OUT_SHARE, HELD_OUT_MOST)
    split = text.size - held_out
    if split <= 0:
        raise ValueError(
            f"held_out: expected fewer bytes than the text has ({text.size}), found {held_out}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    counts = {}
    for part, pieces in (
        ("train", _pieces(text, 0, split)),
        ("held_out", _pieces(held_out_text or text, 0 if held_out_text else split, None)),
    ):
        with (folder / f"{part}.bin").open("wb") as file:
            counts[part] = _write_tokens(file, pieces, tokenizer, digest)
            file.flush()
            os.fsync(file.fileno())
    info = DataInfo(
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        train_tokens=counts["train"],
        train_bytes=split,
        held_out_tokens=counts["held_out"],
        held_out_bytes=held_out_text.size if held_out_text else held_out,
        sha256=digest.hexdigest(),
        files=len(text.files),
    )
    write_atomically(folder / "data.json", lambda path: _write_text(path, asdict(info)))
    return open_data(folder)


def open_data(folder: Path) -> TokenData:
    """The tokens that `prepare_data` left in `folder`. ValueError when they are not whole."""
    try:
        info = DataInfo(**json.loads((folder / "data.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder}: expected the tokens of a run, found none ({error})") from error
    dtype = _dtype(info.vocab_size)
    parts = []
    for name, count in (("train", info.train_tokens), ("held_out", info.held_out_tokens)):
        path = folder / f"{name}.bin"
        found = path.stat().st_size if path.exists() else 0
        if found != count * dtype.itemsize:
            raise ValueError(f"{path}: expected {count * dtype.itemsize} bytes, found {found}")
        # An empty file cannot be mapped.
        parts.append(np.memmap(path, dtype, mode="r") if count else np.empty(0, dtype))
    return TokenData(parts[0], parts[1], info)


def text_digest(text: Text, held_out_text: Text | None = None) -> str:
    """The SHA-256 of the text, hexadecimal, as `DataInfo.sha256` keeps it."""
    digest = hashlib.sha256()
    for part in (text, held_out_text):
        for file in part.files if part else ():
            with file.open("rb") as stream:
                while piece := stream.read(PIECE):
                    digest.update(piece)
    return digest.hexdigest()


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


def _pieces(text: Text, start: int, stop: int | None) -> Iterator[tuple[bytes, bool]]:
    """The bytes start..stop of the text in pieces, each with whether it ends a file."""
    position = 0
    for path in text.files:
        end = position + path.stat().st_size
        first, last = max(start, position), end if stop is None else min(stop, end)
        if first < last:
            with path.open("rb") as file:
                file.seek(first - position)
                left = last - first
                while left:
                    piece = _up_to_a_line_end(file, left)
                    left -= len(piece)
                    yield piece, left == 0 and last == end
        position = end


def _up_to_a_line_end(file: BinaryIO, left: int) -> bytes:
    piece = file.read(min(PIECE, left))
    if not piece:
        raise ValueError(f"text: {file.name} became shorter while it was read")
    line_end = piece.rfind(b"\n") + 1
    if len(piece) < left and line_end:
        file.seek(line_end - len(piece), os.SEEK_CUR)
        piece = piece[:line_end]
    return piece


def _write_tokens(
    file: BinaryIO,
    pieces: Iterable[tuple[bytes, bool]],
    tokenizer: Tokenizer,
    digest: hashlib._Hash,
) -> int:
    dtype, count = _dtype(tokenizer.vocab_size), 0
    for piece, ends_file in pieces:
        digest.update(piece)
        ids = tokenizer.encode(piece)
        if ends_file and tokenizer.end_of_document is not None:
            ids.append(tokenizer.end_of_document)
        file.write(np.asarray(ids, dtype).tobytes())
        count += len(ids)
    return count


def _write_text(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smallest unsigned type for the ids, little-endian on every machine."""
    return np.dtype("<u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")
