"""From the operator's measured results in JSON files to their tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rwkv7.files import json_object
from rwkv7.wkv7.tolerance import RESULTS

from .subjects import BASELINE

_SHORT = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_TIMES = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
# What the cases of one table have in common, and what else a case must have.
_SHARED = ("device", "threads", "work", "dtype")
_OWN = ("shape", "device_type", "torch", "results")

Case = dict[str, Any]


def files_in(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each JSON file of the folder and what it holds, by name; ValueError for one that is none."""
    for path in sorted(folder.glob("*.json")):
        try:
            run = json_object(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: not a file of results ({error})") from None
        yield path, run


def results_in(folder: Path) -> list[Case]:
    """The newest result for each device, number of threads, work, dtype and shape in the files.

    Those of benchmark scripts are passed over. ValueError names a file that holds no results.
    """
    newest: dict[tuple[Any, ...], Case] = {}
    for path, run in files_in(folder):
        if "benchmark" in run:
            continue
        try:
            case = {name: run[name] for name in ("date", "device", "threads", "cases")}
            for found in case.pop("cases"):
                whole = {**case, **found}
                if lacking := {*_SHARED, *_OWN} - whole.keys():
                    raise KeyError(*sorted(lacking))
                key = tuple(whole[name] for name in (*_SHARED, "shape"))
                if key not in newest or newest[key]["date"] <= whole["date"]:
                    newest[key] = whole
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a file of `rwkv7 bench` ({error!r})") from None
    return list(newest.values())


def tables(cases: Sequence[Case]) -> list[str]:
    """As markdown; cases of the same device, number of threads, work and dtype share a table."""
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        groups.setdefault(tuple(case[name] for name in _SHARED), []).append(case)
    return [_markdown(group) for group in groups.values()]


def columns(work: str) -> list[str]:
    """The headings that go with `row`."""
    return ["", *_COLUMNS[work]]


def row(result: Case, case: Case) -> list[str]:
    """One result of `case` as texts, empty for what was not measured."""
    shown = [text(result, case["results"]) for text in _COLUMNS[case["work"]].values()]
    return [result["subject"], *shown]


def yardstick(results: Sequence[Case]) -> Case | None:
    """Whom the speeds are against: the fastest of the peers, without any the token loop."""
    timed = [r for r in results if r["forward_s"]]
    peers = [r for r in timed if r["peer"]]
    loops = [r for r in timed if r["subject"] == BASELINE]
    return min(peers or loops, key=lambda r: r["training_s"] or r["forward_s"], default=None)


def _markdown(cases: Sequence[Case]) -> str:
    first = cases[0]
    threads = f", {first['threads']} threads" if first["device_type"] == "cpu" else ""
    dates = sorted({case["date"][:10] for case in cases})
    lines = [
        f"**{first['work'].capitalize()}**, {_SHORT[first['dtype']]}; {first['device']}{threads}, "
        f"torch {first['torch']}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}.",
        "",
    ]
    names = ["B x T x H x N", *columns(first["work"])]
    lines.append(f"| {' | '.join(names)} |")
    lines.append(f"|---|---|{'--:|' * (len(names) - 2)}")
    for case in cases:
        shape = case["shape"].replace("/", ", packed: ")
        for result in case["results"]:
            if result["errors"] or result["forward_s"]:
                lines.append(f"| {shape} | {' | '.join(row(result, case))} |")
    return "\n".join(lines)


def _time(name: str) -> Callable[[Case, Sequence[Case]], str]:
    return lambda result, _: seconds_text(result[name])


def seconds_text(seconds: float | None) -> str:
    """In the unit of its size; empty for None."""
    if seconds is None:
        return ""
    unit, size = next((u, x) for u, x in _TIMES.items() if seconds >= x or u == "µs")
    return f"{digits(seconds / size)} {unit}"


def digits(number: float) -> str:
    """Three of them, zeros at the end too, and all before the point."""
    return f"{number:,.{2 if number < 10 else 1 if number < 100 else 0}f}"


def _memory(name: str) -> Callable[[Case, Sequence[Case]], str]:
    return lambda result, _: "" if result[name] is None else f"{digits(result[name])} MiB"


def _speed(name: str) -> Callable[[Case, Sequence[Case]], str]:
    def text(result: Case, results: Sequence[Case]) -> str:
        other = yardstick(results)
        if other is None or not result[name] or not other[name]:
            return ""
        return f"{other[name] / result[name]:.2f}x"

    return text


def _error(name: str) -> Callable[[Case, Sequence[Case]], str]:
    return lambda result, _: f"{result['errors'][name]:.1e}" if name in result["errors"] else ""


def _worst_gradient(result: Case, _: Sequence[Case]) -> str:
    gradients = {name: x for name, x in result["errors"].items() if name.startswith("d")}
    worst = max(gradients, key=lambda name: gradients[name], default=None)
    return f"{gradients[worst]:.1e} ({worst})" if worst else ""


def _share(result: Case, _: Sequence[Case]) -> str:
    return "" if result["copy_share"] is None else f"{result['copy_share']:.0%}"


_COLUMNS: dict[str, dict[str, Callable[[Case, Sequence[Case]], str]]] = {
    "operator": {
        "forward": _time("forward_s"),
        "speed": _speed("forward_s"),
        "forward + backward": _time("training_s"),
        "speed, both": _speed("training_s"),
        "peak memory": _memory("training_mib"),
        "first call": _time("first_call_s"),
        "error of y": _error("y"),
        "state": _error("state"),
        "worst gradient": _worst_gradient,
    },
    "repeated key": {name: _error(name) for name in RESULTS},
    "decoding": {
        "a step": _time("forward_s"),
        "speed": _speed("forward_s"),
        "of copy speed": _share,
        "first call": _time("first_call_s"),
        "error of y": _error("y"),
        "state": _error("state"),
    },
}
