"""Tests of a model that stand in files: plain text, multiple choice, the last word of a text.

A file in .jsonl holds one test a line, all of one kind; every other file is a text. Showing the
results is left to the caller.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from rwkv7.files import json_object
from rwkv7.nn import RWKV7
from rwkv7.tokenizer import Tokenizer

from .scores import carried_bits, score

__all__ = ["evaluate_file"]

Check = Callable[[dict[str, Any]], "str | None"]
Progress = Callable[[int, int], None]  # how much is done, and of how much


def evaluate_file(
    model: RWKV7,
    tokenizer: Tokenizer,
    path: str | os.PathLike[str],
    on_progress: Progress | None = None,
) -> dict[str, float | int | str]:
    """The figures of one file, by name; "kind" says which they are.

    - "text": loss (nats a token), perplexity (of a token), bits_per_byte, tokens, bytes. Read
      from start to end with the state carried. It follows an end of document where the tokenizer
      has one; else its first token is charged log2(vocabulary) bits.
    - "choices", lines {"context": …, "choices": […], "answer": i}: accuracy, by the probability of
      the choices after the context, and accuracy_per_byte, by that probability's logarithm divided
      by a choice's bytes; questions. A choice is appended as it is, its space included.
    - "last word", lines {"text": …}: accuracy (greedy choice gives the word), perplexity (of a
      word), texts. The word is what follows the last space, with that space.

    `on_progress` hears how many tokens of a text, or continuations of the tests, are read, and of
    how many.

    Raises:
        OSError: the file is missing or unreadable.
        ValueError: it holds nothing, or a line that is no such test; says which line and why.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        return _text(model, tokenizer, path, on_progress)
    tests = _tests(path)
    if "choices" in tests[0][1]:
        questions = _checked(path, tests, _not_a_question)
        return _choices(model, tokenizer, questions, on_progress)
    return _last_words(model, tokenizer, _checked(path, tests, _not_a_text), on_progress)


def _text(
    model: RWKV7, tokenizer: Tokenizer, path: Path, on_progress: Progress | None
) -> dict[str, float | int | str]:
    content = path.read_bytes()
    if not content:
        raise ValueError(f"{path}: expected some text, found an empty file")
    tokens = tokenizer.encode(content)
    end = tokenizer.end_of_document
    given = tokens if end is None else [end, *tokens]
    bits = carried_bits(model, given, on_read=_out_of(len(given) - 1, on_progress))
    if end is None:
        bits += math.log2(model.config.vocab_size)
    loss = bits * math.log(2) / len(tokens)
    return {
        **{"kind": "text", "loss": loss, "perplexity": _exp(loss)},
        **{"bits_per_byte": bits / len(content), "tokens": len(tokens), "bytes": len(content)},
    }


def _choices(
    model: RWKV7,
    tokenizer: Tokenizer,
    tests: list[dict[str, Any]],
    on_progress: Progress | None,
) -> dict[str, float | int | str]:
    pairs = [
        (_context(tokenizer, test["context"]), tokenizer.encode(choice))
        for test in tests
        for choice in test["choices"]
    ]
    scores = iter(score(model, pairs, _out_of(len(pairs), on_progress)))
    right = right_per_byte = 0
    for test in tests:
        found = [next(scores).log_probability for _ in test["choices"]]
        sizes = [len(choice.encode()) for choice in test["choices"]]
        right += _largest(found) == test["answer"]
        per_byte = [p / size for p, size in zip(found, sizes, strict=True)]
        right_per_byte += _largest(per_byte) == test["answer"]
    count = len(tests)
    return {
        **{"kind": "choices", "accuracy": right / count},
        **{"accuracy_per_byte": right_per_byte / count, "questions": count},
    }


def _last_words(
    model: RWKV7,
    tokenizer: Tokenizer,
    tests: list[dict[str, Any]],
    on_progress: Progress | None,
) -> dict[str, float | int | str]:
    pairs = []
    for test in tests:
        before, _, word = test["text"].rstrip().rpartition(" ")
        pairs.append((_context(tokenizer, before), tokenizer.encode(f" {word}")))
    scores = score(model, pairs, _out_of(len(pairs), on_progress))
    loss = -sum(found.log_probability for found in scores) / len(scores)
    return {
        **{"kind": "last word", "accuracy": sum(found.greedy for found in scores) / len(scores)},
        **{"perplexity": _exp(loss), "texts": len(scores)},
    }


def _out_of(total: int, on_progress: Progress | None) -> Callable[[int], None] | None:
    return None if on_progress is None else lambda done: on_progress(done, total)


def _context(tokenizer: Tokenizer, text: str) -> list[int]:
    """`text` as ids, after an end of document where there is one; of something in any case."""
    end = tokenizer.end_of_document
    return [*([] if end is None else [end]), *tokenizer.encode(text)] or tokenizer.encode("\n")


def _tests(path: Path) -> list[tuple[int, dict[str, Any]]]:
    tests = []
    for number, line in _lines(path):
        try:
            tests.append((number, json_object(line)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from None
    if not tests:
        raise ValueError(f"{path}: expected a test in every line, found none")
    return tests


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _checked(
    path: Path, tests: list[tuple[int, dict[str, Any]]], check: Check
) -> list[dict[str, Any]]:
    for number, test in tests:
        if (wrong := check(test)) is not None:
            raise ValueError(f"{path}, line {number}: {wrong}")
    return [test for _, test in tests]


def _not_a_question(test: dict[str, Any]) -> str | None:
    context, choices, answer = test.get("context"), test.get("choices"), test.get("answer")
    if not _is_text(context):
        return f'"context" should be a text, is {context!r}'
    if not isinstance(choices, list) or not all(_is_text(x) and x for x in choices):
        return '"choices" should be a list of texts, none of them empty'
    if not choices:
        return '"choices" should hold at least one text, is []'
    if type(answer) is not int or not 0 <= answer < len(choices):
        return f'"answer" should be a number from 0 to {len(choices) - 1}, is {answer!r}'
    return None


def _not_a_text(test: dict[str, Any]) -> str | None:
    text = test.get("text")
    if not _is_text(text):
        return f'"text" should be a text (or "choices" a list of them), is {text!r}'
    if not text.rstrip().rpartition(" ")[0].strip():
        return '"text" should hold more than one word'
    return None


def _is_text(x: object) -> TypeGuard[str]:
    # JSON can spell half of a character that takes two, which no text has.
    return isinstance(x, str) and not any("\ud800" <= character <= "\udfff" for character in x)


def _largest(numbers: Sequence[float]) -> int:
    return max(range(len(numbers)), key=numbers.__getitem__)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
