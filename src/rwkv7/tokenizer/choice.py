"""A tokenizer by its name, by the path of a file, or by the number of its tokens."""

from __future__ import annotations

from pathlib import Path

from .builtin import ByteTokenizer, Tokenizer, WorldTokenizer

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


def tokenizer_of(vocab_size: int) -> Tokenizer:
    """The tokenizer that a model with so many tokens was trained with, going by the number alone.

    Raises ValueError for a number that belongs to none, or where its package is not installed.
    """
    for name, kind in _TOKENIZERS.items():
        if kind.vocab_size == vocab_size:
            return get_tokenizer(name)
    known = ", ".join(f"{kind.vocab_size} ({name})" for name, kind in _TOKENIZERS.items())
    raise ValueError(f"model: no tokenizer for its {vocab_size} tokens; known sizes: {known}")
