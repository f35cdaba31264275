"""Conversations out of JSON lines, tokenized, with what is to be learnt of them marked.

A line is {"messages": [{"role": "user", "content": "…"}, …]}. The text is RWKV's own template; only
what the assistant says, up to the blank line that ends it, is learnt. How conversations are put
together into steps is decided in sources/.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rwkv7.files import json_object, write_atomically
from rwkv7.tokenizer import Tokenizer
from rwkv7.turns import END, ROLES, turn

from .binidx import open_corpus, token_dtype, write_corpus
from .corpus import Corpus
from .prepared import HELD_OUT_MOST, HELD_OUT_SHARE, DataInfo
from .records import TABLES, BadRecords, json_records
from .text import Text

__all__ = [
    "ChatData",
    "Conversations",
    "chat_digest",
    "chat_parts",
    "count_chat_tokens",
    "open_chat",
    "prepare_chat",
]

INFO = "chat.json"


@dataclass(frozen=True, slots=True)
class Conversations:
    """Conversations as documents, and for each of their tokens whether it is learnt (1) or not."""

    tokens: Corpus
    learnt: Corpus

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class ChatData:
    """The conversations of a run. In `info` tokens and bytes are those that are learnt."""

    documents: Conversations
    held_out: Conversations
    info: DataInfo


def chat_parts(messages: Sequence[Any]) -> list[tuple[str, bool]]:
    """The text of a conversation in parts, each with whether it is learnt.

    "User: …\\n\\nAssistant: …\\n\\n", as RWKV's chat models are trained; blank lines within a
    message, which would end it, become line breaks. A part is tokenized by itself, as a prompt that
    ends with "Assistant:" is.

    Raises ValueError for what is not a conversation in which the assistant speaks.
    """
    parts: list[tuple[str, bool]] = []
    for message in messages:
        name, content = turn(message)
        if name == ROLES["assistant"]:
            parts += [(f"{name}:", False), (f" {content}{END}", True)]
        else:
            parts.append((f"{name}: {content}{END}", False))
    if not any(learnt for _, learnt in parts):
        raise ValueError("messages: expected one of the assistant's at least, found none")
    return parts


def prepare_chat(
    text: Text,
    folder: Path,
    tokenizer: Tokenizer,
    held_out: int | None = None,
    held_out_text: Text | None = None,
    *,
    bad: BadRecords | None = None,
) -> ChatData:
    """Tokenizes the conversations of JSON-lines files into `folder`, which is made.

    The last ones, with at least `held_out` bytes of what the assistant says (None: a tenth, at most
    256 KiB), are held out; with `held_out_text` those in it are. The tokens are held in memory
    meanwhile. A tokenizer with an end-of-document token gets one after each, which is learnt too.
    `bad` says what happens to lines that are no conversations; None stops at the first.

    Raises ValueError, naming file and line, for one that stops the reading.
    """
    bad = bad or BadRecords()
    found = list(_read(text, tokenizer, bad))
    if held_out_text is None:
        number = _held_out(found, held_out)
        found, apart = found[: len(found) - number], found[len(found) - number :]
    else:
        apart = list(_read(held_out_text, tokenizer, bad))
    folder.mkdir(parents=True, exist_ok=True)
    for name, conversations in (("train", found), ("held_out", apart)):
        ids = ((ids, True) for ids, _, _ in conversations)
        write_corpus(folder / name, ids, token_dtype(tokenizer.vocab_size))
        learnt = ((learnt, True) for _, learnt, _ in conversations)
        write_corpus(folder / f"{name}.learnt", learnt, token_dtype(2))
    info = DataInfo(
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        train_tokens=sum(int(learnt.sum()) for _, learnt, _ in found),
        train_bytes=sum(size for _, _, size in found),
        held_out_tokens=sum(int(learnt.sum()) for _, learnt, _ in apart),
        held_out_bytes=sum(size for _, _, size in apart),
        sha256=chat_digest(text, held_out_text),
        files=len(text.files),
        bad_records=bad.count,
    )
    line = json.dumps(asdict(info), indent=1) + "\n"
    write_atomically(folder / INFO, lambda path: _write_text(path, line))
    return open_chat(folder)


def open_chat(folder: Path) -> ChatData:
    """What `prepare_chat` left in `folder`. ValueError when it is not whole."""
    try:
        info = DataInfo(**json_object((folder / INFO).read_bytes()))
        parts = [
            Conversations(open_corpus(folder / name), open_corpus(folder / f"{name}.learnt"))
            for name in ("train", "held_out")
        ]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder}: the conversations are missing or damaged: {error}") from error
    for part in parts:
        if list(part.tokens.starts) != list(part.learnt.starts):
            raise ValueError(f"{folder}: the conversations and their marks do not go together")
    return ChatData(parts[0], parts[1], info)


def count_chat_tokens(text: Text, tokenizer: Tokenizer, bad: BadRecords | None = None) -> int:
    """How many tokens the conversations have; they are read through.

    `bad` and what is raised as for `prepare_chat`.
    """
    return sum(len(ids) for ids, _, _ in _read(text, tokenizer, bad or BadRecords()))


def chat_digest(text: Text, held_out_text: Text | None = None) -> str:
    """The SHA-256 of the files of conversations, hexadecimal, as `DataInfo.sha256` keeps it."""
    digest = hashlib.sha256()
    for part in (text, held_out_text):
        for path in part.files if part else ():
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
    return digest.hexdigest()


_Encoded = tuple[np.ndarray, np.ndarray, int]  # ids, learnt, and the bytes of what is learnt


def _read(text: Text, tokenizer: Tokenizer, bad: BadRecords) -> Iterator[_Encoded]:
    tables = (path for path in text.files if path.suffix.lower() in TABLES)
    if foreign := text.corpus or next(tables, None):
        raise ValueError(f"text: expected JSON lines of conversations, found {foreign}")
    empty = True
    for path in text.files:
        with path.open("rb") as file:
            for found in json_records(file, path, lambda record: _encoded(record, tokenizer), bad):
                empty = False
                yield found
    if empty:
        names = ", ".join(map(str, text.files[:3]))
        raise ValueError(
            f"text: expected at least one conversation, found none in {names}{bad.first()}"
        )


def _encoded(record: dict[str, Any], tokenizer: Tokenizer) -> _Encoded:
    messages = record.get("messages")
    if not isinstance(messages, list):
        found = type(messages).__name__ if "messages" in record else "none"
        raise ValueError(f'messages: expected a list of {{"role": …, "content": …}}, found {found}')
    ids: list[int] = []
    marks: list[int] = []
    size = 0
    for part, learnt in chat_parts(messages):
        tokens = tokenizer.encode(part)
        ids += tokens
        marks += [int(learnt)] * len(tokens)
        size += len(part.encode("utf-8", "surrogateescape")) if learnt else 0
    if tokenizer.end_of_document is not None:
        ids.append(tokenizer.end_of_document)
        marks.append(1)
    return np.asarray(ids, np.int64), np.asarray(marks, np.int64), size


def _held_out(found: list[_Encoded], held_out: int | None) -> int:
    """How many conversations at the end are held out."""
    total = sum(size for _, _, size in found)
    wanted = min(total // HELD_OUT_SHARE, HELD_OUT_MOST) if held_out is None else held_out
    number = held = 0
    while held < wanted and number < len(found):
        number += 1
        held += found[-number][2]
    if number == len(found):
        if held_out is None:  # so few that one is all
            return number - 1
        raise ValueError(
            f"held_out: expected fewer bytes than the assistant says ({total}), found {held_out}"
        )
    return number


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
