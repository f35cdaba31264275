"""`rwkv7 eval`: what a model makes of texts and tests in files, as a table or as JSON."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from rwkv7.cli import printable
from rwkv7.evaluation import evaluate_file
from rwkv7.files import check_destination, write_atomically
from rwkv7.nn import RWKV7
from rwkv7.tokenizer import Tokenizer, tokenizer_of

from .terminal import DeviceName, TokenizerName, check_together, read_model, say

Figures = dict[str, float | int | str]


def eval(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A checkpoint, or a folder that train wrote.")
    ],
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="FILE", help="Texts, and tests in .jsonl.")
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,...", help="Tasks of lm-evaluation-harness (the extra harness)."
        ),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Of --harness: examples before each question.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Of --harness: only the first questions of a task.")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Of --harness: where more tasks are, as .yaml files.")
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file too.")
    ] = None,
    tokenizer: TokenizerName = None,
    device: DeviceName = None,
) -> None:
    """Measure a model on files.

    A text gives its loss, perplexity and bits per byte, read from start to end with the state
    carried. A .jsonl file holds one test a line: {"context": …, "choices": […], "answer": 0} for
    multiple choice, or {"text": …} for the last word of a text, as in LAMBADA. Tasks of
    lm-evaluation-harness are fetched by it; `python -m rwkv7.evaluation.harness` has all of its
    options.
    """
    tasks = [task.strip() for task in (harness or "").split(",") if task.strip()]
    if not files and not tasks:
        raise ValueError("FILE: expected a file, or --harness with a task, found neither")
    of_tasks = {"shots": shots, "limit": limit, "task_folder": task_folder}
    check_together("--harness", tasks or None, of_tasks)
    if json_out is not None:
        check_destination(json_out)
    for file in files or ():
        file.open("rb").close()  # what is not there is said before the model is read
    asked = None
    if tasks:
        from rwkv7.evaluation.harness import HarnessTasks

        asked = HarnessTasks(tasks, shots=shots, limit=limit, folder=task_folder)
    network = read_model(model, device)
    text = tokenizer_of(network.config.vocab_size, tokenizer)
    results = [_evaluated(network, text, file) for file in files or ()]
    if asked is not None:
        results += asked.evaluate(network, text)
    _show(results)
    if json_out is not None:
        _keep(json_out, {"model": str(model), "results": results})


def _evaluated(model: RWKV7, tokenizer: Tokenizer, file: Path) -> Figures:
    say(f"reading {file}")
    with _bar(file.name) as on_progress:
        return {"file": str(file), **evaluate_file(model, tokenizer, file, on_progress)}


@contextlib.contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for as long as a file is read, where stderr is a terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        *(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
    )
    console = Console(stderr=True)
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task(printable(name), total=None)  # a text is tokenized first
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _show(results: list[Figures]) -> None:
    table = Table("what", "kind", "figures")
    for result in results:
        figures = ", ".join(
            f"{name.replace('_', ' ')} {x:.4g}" if isinstance(x, float) else f"{x:,} {name}"
            for name, x in result.items()
            if not isinstance(x, str)
        )
        name = result["task"] if "task" in result else Path(str(result["file"])).name
        table.add_row(str(name), str(result["kind"]), figures)
    Console().print(table)


def _keep(json_out: Path, content: dict[str, Any]) -> None:
    def write(path: Path) -> None:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    write_atomically(json_out, write)
