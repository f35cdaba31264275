"""The data of a run, in its folder: tokens to train on, and held-out ones never trained on.

Text is tokenized there (train.bin and train.idx, held_out.bin and held_out.idx); a corpus that is
tokenized already stays where it is, and data.json says where. What a step reads of them is decided
in sources/.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rwkv7.files import json_object, write_atomically
from rwkv7.tokenizer import Tokenizer

from .binidx import corpus_fingerprint, open_corpus, token_dtype, write_corpus
from .build import tokenized
from .corpus import Corpus, Tokens
from .records import BadRecords
from .text import Piece, Text, text_bytes, text_pieces

__all__ = ["DataInfo", "TokenData", "count_tokens", "open_data", "prepare_data"]

HELD_OUT_SHARE, HELD_OUT_MOST = 10, 256 * 1024  # a tenth of the text, at most 256 KiB
SAMPLES, SAMPLE = 16, 4096  # places, and tokens at each, that tell the bytes of a token


@dataclass(frozen=True, kw_only=True, slots=True)
class DataInfo:
    """What `data.json` says about the tokens of a run. Sizes of the text are in bytes.

    `corpus` is the prefix of the tokenized corpus that the tokens lie in, or None when they lie
    beside data.json; then `train_bytes` is an estimate.
    """

    tokenizer: str
    vocab_size: int
    train_tokens: int
    train_bytes: int
    held_out_tokens: int
    held_out_bytes: int
    sha256: str  # of the whole text, held-out part included; `text_digest` makes it
    files: int
    corpus: str | None = None
    bad_records: int = 0  # left out, since they could not be read


@dataclass(frozen=True, slots=True)
class TokenData:
    """The tokens of a run, mapped from disk: [train_tokens], with their documents, and
    [held_out_tokens]."""

    documents: Corpus
    held_out: Tokens
    info: DataInfo

    @property
    def train(self) -> Tokens:
        """All tokens to train on, one document behind the other."""
        return self.documents.tokens


def prepare_data(
    text: Text,
    folder: Path,
    tokenizer: Tokenizer,
    held_out: int | None = None,
    held_out_text: Text | None = None,
    *,
    key: str = "text",
    bad: BadRecords | None = None,
) -> TokenData:
    """Tokenizes `text` into `folder`, which is made; data.json comes last of all.

    The last `held_out` bytes (None: a tenth of the text, at most 256 KiB) are held out; with
    `held_out_text`, that text is, and all of `text` is trained on. A tokenizer with an
    end-of-document token gets one after each document. Where text is cut (each MiB at a line's end,
    and between the two parts) a token never reaches across. Of a tokenized corpus the held-out
    bytes are counted in whole tokens. `key` is that of the text in a record, and `bad` says what
    happens to records that cannot be read; None stops at the first.

    Raises ValueError when nothing would be left to train on or a record stops the reading, OSError
    when the disk is full.
    """
    bad = bad or BadRecords()
    if held_out_text is not None and held_out_text.corpus:
        raise ValueError(f"held_out_file: expected text, found the corpus {held_out_text.corpus}")
    if text.corpus:
        return _prepare_corpus(text.corpus, folder, tokenizer, held_out, held_out_text, key, bad)
    size = text_bytes(text, key=key, bad=bad)
    apart_bytes = text_bytes(held_out_text, key=key, bad=bad) if held_out_text else None
    held_out = _held_out_bytes(size, held_out, held_out_text)
    split = size - held_out
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    pieces = text_pieces(text, 0, split, key=key, bad=bad.again())
    train = _tokenize(pieces, folder / "train", tokenizer, digest)
    begin = 0 if held_out_text else split
    kept = text_pieces(held_out_text or text, begin, key=key, bad=bad.again())
    apart = _tokenize(kept, folder / "held_out", tokenizer, digest)
    info = DataInfo(
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        train_tokens=train,
        train_bytes=split,
        held_out_tokens=apart,
        held_out_bytes=held_out if apart_bytes is None else apart_bytes,
        sha256=digest.hexdigest(),
        files=len(text.files),
        bad_records=bad.count,
    )
    return _written(info, folder)


def open_data(folder: Path) -> TokenData:
    """The tokens that `prepare_data` left in `folder`. ValueError when they are not whole."""
    try:
        info = DataInfo(**json_object((folder / "data.json").read_bytes()))
        if info.corpus is None:
            documents, apart = (
                open_corpus(folder / "train"),
                open_corpus(folder / "held_out").tokens,
            )
        else:
            documents, apart = _open_parts(info, folder)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{folder}: the tokens of the run are missing or damaged: {error}"
        ) from error
    found = len(documents.tokens), len(apart)
    if found != (info.train_tokens, info.held_out_tokens):
        raise ValueError(
            f"{folder}: expected {info.train_tokens} and {info.held_out_tokens} tokens, found "
            f"{found[0]} and {found[1]}"
        )
    return TokenData(documents, apart, info)


def count_tokens(
    text: Text,
    tokenizer: Tokenizer,
    held_out: int | None = None,
    held_out_text: Text | None = None,
    *,
    key: str = "text",
    bad: BadRecords | None = None,
) -> int:
    """About how many tokens there are to train on, going by the first MiB; a corpus's are counted.

    Takes and raises what `prepare_data` does; writes nothing.
    """
    bad = bad or BadRecords()
    if text.corpus:
        split = _split(_checked(text.corpus, tokenizer), tokenizer, held_out, held_out_text)[0]
    else:
        size = text_bytes(text, key=key, bad=bad)
        piece = next(text_pieces(text, key=key, bad=bad.again())).text
        apart = _held_out_bytes(size, held_out, held_out_text)
        split = round((size - apart) * len(tokenizer.encode(piece)) / len(piece))
    if held_out_text:
        text_bytes(held_out_text, key=key, bad=bad)
    return split


def _held_out_bytes(size: int, held_out: int | None, held_out_text: Text | None) -> int:
    if held_out_text is not None:
        held_out = 0
    elif held_out is None:
        held_out = min(size // HELD_OUT_SHARE, HELD_OUT_MOST)
    if held_out >= size:
        raise ValueError(
            f"held_out: expected fewer bytes than the text has ({size}), found {held_out}"
        )
    return held_out


def _tokenize(
    pieces: Iterable[Piece], prefix: Path, tokenizer: Tokenizer, digest: hashlib._Hash
) -> int:
    def seen() -> Iterator[Piece]:
        for piece in pieces:
            digest.update(piece.text)
            yield piece

    dtype = token_dtype(tokenizer.vocab_size)
    return write_corpus(prefix, tokenized(seen(), tokenizer), dtype).tokens


def _prepare_corpus(
    prefix: Path,
    folder: Path,
    tokenizer: Tokenizer,
    held_out: int | None,
    held_out_text: Text | None,
    key: str,
    bad: BadRecords,
) -> TokenData:
    corpus = _checked(prefix, tokenizer)
    split, of_a_token = _split(corpus, tokenizer, held_out, held_out_text)
    folder.mkdir(parents=True, exist_ok=True)
    if held_out_text:
        held_out = text_bytes(held_out_text, key=key, bad=bad)
        kept = text_pieces(held_out_text, key=key, bad=bad.again())
        apart = _tokenize(kept, folder / "held_out", tokenizer, hashlib.sha256())
    else:
        apart = len(corpus.tokens) - split
        held_out = _decoded_bytes(corpus.tokens[split:], tokenizer)
    info = DataInfo(
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        train_tokens=split,
        train_bytes=max(1, round(split * of_a_token)),
        held_out_tokens=apart,
        held_out_bytes=held_out,
        sha256=corpus_fingerprint(prefix),
        files=1,
        corpus=str(prefix.resolve()),
        bad_records=bad.count,
    )
    return _written(info, folder)


def _checked(prefix: Path, tokenizer: Tokenizer) -> Corpus:
    corpus = open_corpus(prefix)
    if len(corpus.tokens) == 0:
        raise ValueError(f"text: expected tokens to train on, found none in {prefix}")
    corpus.check_ids(tokenizer.vocab_size, str(prefix))
    return corpus


def _split(
    corpus: Corpus, tokenizer: Tokenizer, held_out: int | None, held_out_text: Text | None
) -> tuple[int, float]:
    """How many tokens are trained on, those before the held-out ones, and the bytes of a token."""
    of_a_token = _bytes_of_a_token(corpus.tokens, tokenizer)
    size = max(1, round(len(corpus.tokens) * of_a_token))
    held_out = _held_out_bytes(size, held_out, held_out_text)
    return len(corpus.tokens) - round(held_out / of_a_token), of_a_token


def _open_parts(info: DataInfo, folder: Path) -> tuple[Corpus, Tokens]:
    """The parts of a corpus elsewhere: held-out tokens are its end, or lie in `folder`."""
    prefix = Path(info.corpus or "")
    if corpus_fingerprint(prefix) != info.sha256:
        raise ValueError(f"{prefix} is no longer the corpus that the run was begun with")
    whole = open_corpus(prefix)
    if len(whole.tokens) == info.train_tokens and info.held_out_tokens:
        return whole, open_corpus(folder / "held_out").tokens
    return whole.first(info.train_tokens), whole.tokens[info.train_tokens :]


def _bytes_of_a_token(tokens: Tokens, tokenizer: Tokenizer) -> float:
    """The mean, from samples all over the corpus."""
    places = np.linspace(0, max(0, len(tokens) - SAMPLE), SAMPLES).astype(int)
    samples = [tokens[place : place + SAMPLE] for place in sorted(set(places.tolist()))]
    total = sum(_decoded_bytes(sample, tokenizer) for sample in samples)
    return max(1, total) / sum(map(len, samples))


def _decoded_bytes(tokens: Tokens, tokenizer: Tokenizer) -> int:
    pieces = range(0, len(tokens), SAMPLE)
    return sum(len(tokenizer.decode_bytes(tokens[i : i + SAMPLE].tolist())) for i in pieces)


def _written(info: DataInfo, folder: Path) -> TokenData:
    text = json.dumps(asdict(info), indent=1) + "\n"
    write_atomically(folder / "data.json", lambda path: _write_text(path, text))
    return open_data(folder)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
