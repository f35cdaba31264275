"""From text to token ids and back: single bytes (built in), RWKV's World vocabulary, or a file's.

A tokenizer here never loses a byte: text that is not UTF-8 goes in and comes out unchanged.
`StreamDecoder` turns ids that arrive one by one into whole characters. Models and generation know
ids alone, and nothing of this file.
"""

from __future__ import annotations

import ast
import codecs
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

__all__ = ["ByteTokenizer", "StreamDecoder", "Tokenizer", "WorldTokenizer", "get_tokenizer"]

# Bytes that are not UTF-8, as Python's "surrogateescape" stands for them in a str.
_ESCAPED = re.compile("([\udc80-\udcff]+)")


class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer.

    `name` finds it again through `get_tokenizer`; ids are in [0, vocab_size);
    `end_of_document` is the id between two documents, or None where there is none.
    """

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_of_document(self) -> int | None: ...

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of `text`; bytes need not be UTF-8."""
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for; ValueError for an id outside the vocabulary."""
        ...


class ByteTokenizer:
    """Every byte is a token: ids 0..255, no file, no training, nothing it cannot express."""

    name = "byte"
    vocab_size = 256
    end_of_document: int | None = None

    def encode(self, text: str | bytes) -> list[int]:
        """The bytes of `text` (UTF-8 when it is a str) as ids."""
        return list(_as_bytes(text))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` are. Raises ValueError for an id outside 0..255."""
        ids = list(ids)
        check_ids(ids, self)
        return bytes(ids)


class WorldTokenizer:
    """RWKV's World vocabulary of 2023-04-24: 65,529 byte strings, greedy longest match.

    Id 0 ends a document and stands for no bytes, as do the unused ids 65,530 to 65,535. Encoding is
    done by the package pyrwkv-tokenizer, which `pip install "rwkv7[world]"` brings; bytes that are
    not UTF-8 become the vocabulary's single-byte tokens. Source: the file
    rwkv_vocab_v20230424.txt that comes with that package.
    """

    name = "world"
    vocab_size = 65536
    end_of_document: int | None = 0

    def __init__(self) -> None:
        try:
            from pyrwkv_tokenizer import RWKVTokenizer
        except ImportError as error:
            raise ValueError(
                'tokenizer "world" needs the package pyrwkv-tokenizer: '
                'run `pip install "rwkv7[world]"`, or use the tokenizer "byte"'
            ) from error
        self._encoder: Any = RWKVTokenizer()

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of `text`, longest match first within every run of valid UTF-8."""
        ids: list[int] = []
        for run in runs_of_text(text):
            if isinstance(run, str):
                ids.extend(self._encoder.encode(run))
            else:
                ids.extend(byte + 1 for byte in run)  # byte x is token x + 1
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for. Raises ValueError for an id outside 0..65535."""
        ids = list(ids)
        check_ids(ids, self)
        return b"".join(self._table[i] for i in ids)

    @cached_property
    def _table(self) -> list[bytes]:
        """The bytes of every id. A line of the file reads: id, a Python literal, its length."""
        table = [b""] * self.vocab_size
        lines = Path(self._encoder.vocab_filepath).read_text(encoding="utf-8").splitlines()
        for line in lines:
            # The literal may hold spaces itself, so it lies between the first and the last one.
            first, last = line.index(" "), line.rindex(" ")
            token = ast.literal_eval(line[first + 1 : last])
            table[int(line[:first])] = token if isinstance(token, bytes) else token.encode()
        return table


_TOKENIZERS: dict[str, type[ByteTokenizer] | type[WorldTokenizer]] = {
    "byte": ByteTokenizer,
    "world": WorldTokenizer,
}


def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: "byte", "world", or the path of a file that `tokenizers` reads.

    A path is one that exists: a tokenizer.json, or a folder with one in it.

    Raises ValueError for another name, for a file that cannot be read, or where the package that it
    needs is not installed.
    """
    if name in _TOKENIZERS:
        return _TOKENIZERS[name]()
    path = Path(name)
    if path.is_file() or (path / "tokenizer.json").is_file():
        from .tokenizer_file import FileTokenizer

        return FileTokenizer(name)
    known = ", ".join(f'"{known}"' for known in _TOKENIZERS)
    raise ValueError(
        f"tokenizer: expected one of {known}, or the path of a tokenizer.json, found {name!r}"
    )


class StreamDecoder:
    """Ids in, one at a time; whole characters out. Stray bytes come out as U+FFFD.

    `pending` holds the bytes of a character that is not yet whole; give it to a new decoder to go
    on where this one stopped.
    """

    def __init__(self, tokenizer: Tokenizer, pending: bytes = b"") -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.setstate((pending, 0))

    @property
    def pending(self) -> bytes:
        """The bytes received that do not make a whole character yet (at most three)."""
        return self._decoder.getstate()[0]

    def feed(self, token: int) -> str:
        """The characters that `token` completes, often one, sometimes none."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """What is left at the end of a text: U+FFFD for a character that stayed incomplete."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def _as_bytes(text: str | bytes) -> bytes:
    # A str from the command line may carry bytes that were not UTF-8: they come back as they were.
    return text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text)


def runs_of_text(text: str | bytes) -> Iterator[str | bytes]:
    """The text in runs: str where it is UTF-8, bytes where it is not; none of them empty."""
    runs = _ESCAPED.split(_as_bytes(text).decode("utf-8", "surrogateescape"))
    for number, run in enumerate(runs):
        if run:
            yield run.encode("utf-8", "surrogateescape") if number % 2 else run


def check_ids(ids: list[int], tokenizer: Tokenizer) -> None:
    """Raise ValueError for an id that is not in the tokenizer's vocabulary."""
    wrong = [i for i in ids if not 0 <= i < tokenizer.vocab_size]
    if wrong:
        raise ValueError(
            f"ids: the tokenizer {tokenizer.name!r} has ids 0 to {tokenizer.vocab_size - 1}, "
            f"found {wrong[0]}"
        )
