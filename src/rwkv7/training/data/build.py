"""Text into a tokenized corpus on disk: what `rwkv7 data build` and every new run do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from rwkv7.tokenizer import Tokenizer

from .binidx import CorpusSize, token_dtype, write_corpus
from .corpus import Tokens
from .records import BadRecords
from .text import Piece, Text, text_pieces

__all__ = ["build_corpus", "tokenized"]


def build_corpus(
    text: Text,
    prefix: Path,
    tokenizer: Tokenizer,
    *,
    key: str = "text",
    bad: BadRecords | None = None,
    on_read: Callable[[int], None] | None = None,
) -> CorpusSize:
    """Tokenizes `text` into PREFIX.bin and PREFIX.idx, whole or not at all.

    Args:
        text: what `find_text` found; its memory does not grow with it.
        prefix: in a folder that exists.
        tokenizer: one with an end-of-document token gets one after each document.
        key: of the text in JSON lines, or the column of tables.
        bad: what happens to records that cannot be read; None stops at the first.
        on_read: told how many of the `text.size` bytes are read, now and then.

    Raises ValueError for text without a document or a record that stops the reading, OSError for
    files that cannot be written.
    """
    if text.corpus:
        raise ValueError(f"text: expected text to tokenize, found the corpus {text.corpus}")
    bad = bad or BadRecords()

    def pieces() -> Iterator[Piece]:
        for piece in text_pieces(text, key=key, bad=bad):
            if on_read:
                on_read(piece.read)
            yield piece

    def check(size: CorpusSize) -> None:
        if size.documents == 0:
            raise ValueError(
                f"text: expected at least one document with text, found none{bad.first()}"
            )

    dtype = token_dtype(tokenizer.vocab_size)
    return write_corpus(prefix, tokenized(pieces(), tokenizer), dtype, check)


def tokenized(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[tuple[Tokens, bool]]:
    """The ids of each piece, with the end-of-document token, if there is one, where one ends."""
    for piece in pieces:
        ids = tokenizer.encode(piece.text)
        if piece.ends and tokenizer.end_of_document is not None:
            ids.append(tokenizer.end_of_document)
        yield np.asarray(ids, np.int64), piece.ends
