"""From measured results in JSON files to the tables in the documents, and nothing by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rwkv7.files import write_atomically

from .measure import BASELINE

BEGIN = "<!-- rwkv7 bench: begin; made from the results, do not edit -->"
END = "<!-- rwkv7 bench: end -->"
_SHORT = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def results_in(folder: Path) -> list[dict[str, Any]]:
    """The newest result for each device, number of threads, shape and dtype in the JSON files.

    ValueError names a file that holds no results.
    """
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            case = {name: run[name] for name in ("date", "device", "threads", "cases")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a file of `rwkv7 bench` ({error!r})") from None
        for found in case.pop("cases"):
            key = (run["device"], run["threads"], found["shape"], found["dtype"])
            if key not in newest or newest[key]["date"] <= case["date"]:
                newest[key] = {**case, **found}
    return list(newest.values())


def update_tables(document: Path, cases: Sequence[dict[str, Any]]) -> None:
    """Replace what stands between the markers in `document` by a table for each case.

    ValueError where the markers are missing.
    """
    text = document.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{document}: expected the lines {BEGIN} and {END} around the table")
    tables = "\n\n".join(_markdown(case) for case in cases)
    changed = f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"
    write_atomically(document, lambda file: _write_text(file, changed))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def columns() -> list[str]:
    """The headings that go with `row`."""
    return ["", "forward", "training", "memory", "memory", "speed", "error y", "worst gradient"]


def row(result: dict[str, Any], cases: Sequence[dict[str, Any]]) -> list[str]:
    """One result as texts; its speed is that of the token loop among `cases`, for training."""
    loop = next((r for r in cases if r["subject"] == BASELINE), {}).get("training_s")
    own = result["training_s"]
    errors = result["errors"]
    gradients = {name: error for name, error in errors.items() if name.startswith("d")}
    worst = max(gradients, key=lambda name: gradients[name], default=None)
    return [
        result["subject"],
        _milliseconds(result["forward_s"]),
        _milliseconds(own),
        _memory(result["forward_mib"]),
        _memory(result["training_mib"]),
        f"{loop / own:.1f}x" if loop and own else "",
        f"{errors['y']:.1e}" if "y" in errors else result["note"],
        f"{gradients[worst]:.1e} ({worst})" if worst else "",
    ]


def _markdown(case: dict[str, Any]) -> str:
    shape = case["shape"].split("x")
    sizes = ", ".join(f"{name} {size}" for name, size in zip("BTHN", shape, strict=True))
    threads = f", {case['threads']} threads" if case["device_type"] == "cpu" else ""
    lines = [
        f"{sizes}, {_SHORT[case['dtype']]}; {case['device']}{threads}, torch {case['torch']}, "
        f"{case['date'][:10]}. Speed: training against the token loop.",
        "",
        "| backend | forward | forward + backward | peak memory, forward | peak memory, both "
        "| speed | error of y | worst gradient |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    measured = [r for r in case["results"] if r["forward_s"] is not None]
    lines += [f"| {' | '.join(row(result, case['results']))} |" for result in measured]
    return "\n".join(lines)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.3g} ms"


def _memory(mib: float | None) -> str:
    return "" if mib is None else f"{mib:.3g} MiB"
