"""Tables in the documents: what stands between two markers is made from the results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rwkv7.files import write_atomically

from .pages import run_tables, runs_in
from .table import results_in, tables

BEGIN = "<!-- rwkv7 bench: begin; made from the results, do not edit -->"
BEGIN_SCRIPTS = "<!-- rwkv7 bench: begin scripts; made from the results, do not edit -->"
END = "<!-- rwkv7 bench: end -->"

_SECTIONS: dict[str, Callable[[Path], list[str]]] = {
    BEGIN: lambda folder: tables(results_in(folder)),
    BEGIN_SCRIPTS: lambda folder: run_tables(runs_in(folder)),
}


def update_tables(document: Path, folder: Path) -> int:
    """Replace what stands between markers in `document` by tables; how many texts there are.

    `BEGIN` takes the operator's, `BEGIN_SCRIPTS` those of benchmark scripts; `folder` has the
    results. ValueError where there is no marker, or nothing for it, or a file is not whole.
    """
    changed, count = document.read_text(encoding="utf-8"), 0
    for marker, made in _SECTIONS.items():
        before, begin, rest = changed.partition(marker)
        if not begin:
            continue
        _, end, after = rest.partition(END)
        if not end:
            raise ValueError(f"{document}: expected the line {END} after {marker}")
        texts = made(folder)
        if not texts:
            raise ValueError(f"{document}: no results for {marker} in {folder}; measure first")
        changed, count = before + "\n\n".join([begin, *texts, end]) + after, count + len(texts)
    if not count:
        raise ValueError(
            f"{document}: expected the lines {BEGIN} or {BEGIN_SCRIPTS}, and {END} after the tables"
        )
    write_atomically(document, lambda file: file.write_text(changed, encoding="utf-8"))
    return count
