"""Vocabularies in a tokenizer.json, through the package `tokenizers`, as byte tokenizers.

Two kinds of file say which bytes each id stands for: byte-level ones (GPT-2's way, the Pile's
20B_tokenizer.json) and those that fall back to bytes (SentencePiece's way). Others are refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .files import json_object
from .tokenizer import check_ids, runs_of_text

__all__ = ["FileTokenizer"]

# What files call the token between two documents, where tokenizer_config.json does not say it.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|endofdoc|>", "[EOS]")
_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # SentencePiece's sign for a space


class FileTokenizer:
    """The vocabulary of a `tokenizers` file.

    Special tokens are never made from text that merely spells them, and stand for no bytes.
    What the file's own normaliser changes (the Pile's composes letters and accents) stays changed;
    SentencePiece's way puts a space before a text. Bytes that are not UTF-8 become single bytes.

    Attributes:
        name: the path, which `get_tokenizer` finds it by.
        vocab_size: the highest id and one.
        end_of_document: the id of the end-of-text token, None where the file has none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads `path`, a file or a folder with tokenizer.json in it.

        Raises ValueError for a file that cannot be read or that does not tell the bytes of its ids,
        and where the package is not installed.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(
                f'tokenizer "{path}" needs the package tokenizers: '
                'run `pip install "rwkv7[tokenizers]"`'
            ) from error
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        self.name = str(path)
        try:
            content = json_object(file.read_bytes())
            self._encoder = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the package raises nothing narrower
            reason = " ".join(str(error).split())
            raise ValueError(f"tokenizer: {file} cannot be read ({reason})") from None
        self._encoder.encode_special_tokens = True
        self._table = self._bytes_of_ids(content, file)
        self.vocab_size = len(self._table)
        self.end_of_document = self._end(file)
        self._single = {token: i for i, token in enumerate(self._table) if len(token) == 1}

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of `text`; ValueError for a byte that is not UTF-8 and that no id stands for."""
        ids: list[int] = []
        for run in runs_of_text(text):
            if isinstance(run, str):
                ids.extend(self._encoder.encode(run, add_special_tokens=False).ids)
                continue
            for byte in run:
                if (token := self._single.get(bytes([byte]))) is None:
                    raise ValueError(
                        f"text: the tokenizer {self.name!r} has no token for the byte {byte:#04x}, "
                        "which is not UTF-8"
                    )
                ids.append(token)
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for; ValueError for an id outside the vocabulary."""
        ids = list(ids)
        check_ids(ids, self)
        return b"".join(self._table[i] for i in ids)

    def _bytes_of_ids(self, content: Mapping[str, Any], file: Path) -> list[bytes]:
        added = {token["content"]: token for token in content.get("added_tokens") or []}
        kinds = _kinds(content.get("decoder"))
        if "ByteLevel" in kinds:
            of = _byte_level
        elif "ByteFallback" in kinds:
            of = _byte_fallback
        else:
            found = ", ".join(kinds) or "none"
            raise ValueError(
                f"tokenizer: {file}: expected a decoder that is ByteLevel or has ByteFallback, "
                f"found {found}; the bytes of its ids cannot be told one by one"
            )
        vocabulary = self._encoder.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, i in vocabulary.items():
            if token not in added:
                table[i] = of(token)
            elif not added[token].get("special"):
                table[i] = token.encode()
        return table

    def _end(self, file: Path) -> int | None:
        said: list[str] = []
        about = file.parent / "tokenizer_config.json"
        if about.is_file():
            try:
                end = json_object(about.read_bytes()).get("eos_token")
            except ValueError as error:
                raise ValueError(f"tokenizer: {about} cannot be read ({error})") from None
            end = end.get("content") if isinstance(end, dict) else end
            said = [end] if isinstance(end, str) else []
        found = (self._encoder.token_to_id(token) for token in (*said, *_ENDS))
        return next((i for i in found if i is not None), None)


def _kinds(decoder: Any) -> list[str]:
    """The names of the steps of a decoder, which may be one or a sequence of them."""
    if not isinstance(decoder, dict):
        return []
    steps = decoder.get("decoders", [decoder])
    return [str(step.get("type")) for step in steps if isinstance(step, dict)]


def _byte_level(token: str) -> bytes:
    if any(letter not in _BYTES for letter in token):
        return token.encode()  # a token that stands for no bytes of a text, such as <unk>
    return bytes(_BYTES[letter] for letter in token)


def _byte_fallback(token: str) -> bytes:
    if match := _FALLBACK.fullmatch(token):
        return bytes.fromhex(match[1])
    return token.replace(_SPACE, " ").encode()


def _letters() -> dict[str, int]:
    """GPT-2's letter for each byte: printable Latin-1 as it is, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }


_BYTES = _letters()
