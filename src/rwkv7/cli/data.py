"""`rwkv7 data`: text and records tokenized into PREFIX.bin and PREFIX.idx, and a look into them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from rwkv7.cli import printable
from rwkv7.files import check_destination
from rwkv7.tokenizer import Tokenizer, get_tokenizer
from rwkv7.training.data import (
    BadRecords,
    Corpus,
    build_corpus,
    corpus_prefix,
    find_text,
    open_corpus,
)

__all__ = ["data"]

SAMPLE = 64  # tokens of a document that are shown


def build(
    texts: Annotated[
        list[Path],
        typer.Argument(metavar="IN...", help="Text, .jsonl, .parquet and .arrow files, folders."),
    ],
    out: Annotated[Path, typer.Option(metavar="PREFIX", help="Makes PREFIX.bin and PREFIX.idx.")],
    tokenizer: Annotated[str, typer.Option(help='"byte", or "world" (extra "world").')] = "byte",
    key: Annotated[str, typer.Option(help="Key or column that holds the text.")] = "text",
    on_bad: Annotated[
        str, typer.Option(help='A record that cannot be read: "stop", or "skip" it.')
    ] = "stop",
) -> None:
    """Tokenize text and records into a corpus in Megatron's format.

    A plain text file is one document, a record of the other formats another. The files appear when
    they are whole; read them with `rwkv7 train PREFIX`.
    """
    if out.suffix in (".bin", ".idx"):
        raise ValueError(f"out: expected a name without the suffix {out.suffix}, found {out}")
    for path in (out.with_name(f"{out.name}{suffix}") for suffix in (".bin", ".idx")):
        check_destination(path)
        if path.exists():
            raise ValueError(f"out: {path} exists; remove it, or choose another name")
    encoder, text = get_tokenizer(tokenizer), find_text(texts)
    console = Console(stderr=True)
    bad = BadRecords(
        on_bad, lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)
    )
    columns = (
        TextColumn("tokenizing"),
        *(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()),
    )
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task("", total=text.size)
        made = build_corpus(
            text,
            out,
            encoder,
            key=key,
            bad=bad,
            on_read=lambda read: progress.update(task, completed=read),
        )
    print(f"{out}.bin, {out}.idx: {made.documents:,} documents, {made.tokens:,} {tokenizer} tokens")
    if text.skipped:
        print(f"left out: {text.skipped:,} files that are not text", file=sys.stderr)
    if bad.count:
        print(BadRecords.in_words(bad.count), file=sys.stderr)


def show(
    prefix: Annotated[Path, typer.Argument(metavar="PREFIX", help="Of PREFIX.bin and PREFIX.idx.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Shows text (default: byte for 8-bit tokens, else world)."),
    ] = None,
    document: Annotated[int, typer.Option(help="The document to show the start of.")] = 0,
) -> None:
    """Say how many documents and tokens a corpus has, and show the start of one."""
    found = corpus_prefix(prefix)
    if found is None:
        raise ValueError(f"prefix: there is no pair {prefix}.bin and {prefix}.idx")
    corpus = open_corpus(found)
    lengths, dtype = corpus.lengths(), corpus.tokens.dtype
    print(f"documents  {len(corpus):,}")
    print(f"tokens     {len(corpus.tokens):,}, {dtype.name}, {corpus.tokens.nbytes:,} bytes")
    if len(corpus) == 0:
        return
    if not 0 <= document < len(corpus):
        raise ValueError(f"document: expected 0 to {len(corpus) - 1}, found {document}")
    print(f"lengths    {lengths.min():,} to {lengths.max():,}, {lengths.mean():,.1f} on average")
    named = tokenizer or ("byte" if dtype.itemsize == 1 else "world")
    print(f"document {document}, as {named} tokens:")
    print(_sample(corpus, document, get_tokenizer(named)))


data = {"build": build, "show": show}


def _sample(corpus: Corpus, document: int, tokenizer: Tokenizer) -> str:
    ids = corpus.document(document)[:SAMPLE].tolist()
    text = tokenizer.decode_bytes(ids).decode("utf-8", "replace")
    shown = "\n".join(printable(line) for line in text.split("\n"))
    return f"{' '.join(map(str, ids))}\n{shown}"
