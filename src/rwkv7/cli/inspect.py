"""`rwkv7 inspect`: say what a checkpoint, a state or another file is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def inspect(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file, or a folder of a model or a run.")
    ],
    json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Say what a file is: its kind, sizes, ranks, dtypes, metadata, and what is wrong with it.

    Knows checkpoints in official and in flash-linear-attention's names, runs, states, sessions,
    tuned states and LoRA adapters, and other generations of RWKV by name. Nothing in a file is
    executed. The exit code is 1 when it cannot be used as it is.
    """
    from rwkv7.cli import printable
    from rwkv7.inspection import describe, in_words

    found = describe(file)
    if json:
        print(found.to_json())
    else:
        lines = {"file": found.path, "kind": found.kind}
        lines |= {name: in_words(fact, name) for name, fact in found.facts.items()}
        width = max(map(len, lines))
        for name, text in lines.items():
            print(f"{printable(name.replace('_', ' ')):{width}}  {printable(text)}")
        if found.problem:
            print(f"error: {printable(found.problem)}", file=sys.stderr)
    if found.problem:
        raise typer.Exit(1)
