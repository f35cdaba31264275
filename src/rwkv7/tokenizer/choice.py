"""A tokenizer by its name, by the path of a file, or by the number of its tokens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .builtin import ByteTokenizer, Tokenizer, WorldTokenizer, check_ids

__all__ = ["get_tokenizer", "tokenizer_of"]

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
        from .file import FileTokenizer

        return FileTokenizer(name)
    known = ", ".join(f'"{known}"' for known in _TOKENIZERS)
    raise ValueError(
        f"tokenizer: expected one of {known}, or the path of a tokenizer.json, found {name!r}"
    )


def tokenizer_of(vocab_size: int, name: str | None = None) -> Tokenizer:
    """The tokenizer of a model with so many tokens.

    Args:
        vocab_size: the model's. It may be larger than the tokenizer's, as where it was rounded up:
            the ids beyond stand for no bytes.
        name: as `get_tokenizer` takes it; None goes by `vocab_size` alone.

    Raises ValueError for a tokenizer with more ids than the model has, for a number that belongs
    to none, and where `get_tokenizer` does.
    """
    if name is not None:
        tokenizer = get_tokenizer(name)
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"tokenizer: expected at most the model's {vocab_size} tokens, "
                f"found {tokenizer.vocab_size} in {name!r}"
            )
        return tokenizer if tokenizer.vocab_size == vocab_size else _Widened(tokenizer, vocab_size)
    for known, kind in _TOKENIZERS.items():
        if kind.vocab_size == vocab_size:
            return get_tokenizer(known)
    sizes = ", ".join(f"{kind.vocab_size} ({known})" for known, kind in _TOKENIZERS.items())
    raise ValueError(
        f"model: no tokenizer for its {vocab_size} tokens; known sizes: {sizes}; "
        "name one, or a tokenizer.json"
    )


class _Widened:
    """A tokenizer with more ids, which stand for nothing."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self.vocab_size = tokenizer, vocab_size
        self.name, self.end_of_document = tokenizer.name, tokenizer.end_of_document
        self.encode = tokenizer.encode

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        ids = list(ids)
        check_ids(ids, self)
        return self._tokenizer.decode_bytes(i for i in ids if i < self._tokenizer.vocab_size)
