"""From the files of benchmark scripts (`record`) to tables: one for parts with the same figures.

What a figure is called and how it is written depends on its key alone, whichever script it is from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .record import PEERS
from .table import digits, files_in, seconds_text

Part = dict[str, Any]
Run = dict[str, Any]

_MOST_ROWS = 20  # of a part's own table
_VERSIONS = ("torch", "triton", *PEERS)
_FAILED = {"out_of_memory": "out of memory", "error": "failed"}


def runs_in(folder: Path) -> list[Run]:
    """The runs of scripts in the folder's files, each with those parts that no newer one has.

    What is newest is asked for each benchmark, device, number of a CPU's threads and part; parts
    that were not begun do not count. ValueError names a file that is not whole or holds no results.
    """
    runs = [run | {"file": path} for path, run in files_in(folder) if _is_ours(path, run)]
    runs.sort(key=lambda run: (run["date"], run["command"]))
    newest: dict[tuple[Any, ...], int] = {}
    for number, run in enumerate(runs):
        run["parts"] = [part for part in run["parts"] if "not_run" not in part]
        newest |= {_key(run, part): number for part in run["parts"]}
    for number, run in enumerate(runs):
        run["parts"] = [part for part in run["parts"] if newest[_key(run, part)] == number]
    left = [run for run in runs if run["parts"]]
    return sorted(left, key=lambda run: (run["benchmark"], run["device"]))


def run_tables(runs: Sequence[Run]) -> list[str]:
    """For each run what it measured, on what and how, and its tables, as markdown.

    ValueError names a file, the part and the figure that cannot be written.
    """
    texts, last = [], ""
    for run in runs:
        heading = f"## {run['benchmark']}\n\n{run['about']}\n\n"
        try:
            texts.append(("" if run["benchmark"] == last else heading) + _markdown(run))
        except ValueError as error:
            raise ValueError(f"{run['file']}: {error}") from None
        last = run["benchmark"]
    return texts


def _is_ours(path: Path, run: Run) -> bool:
    if "benchmark" not in run:
        return False
    texts = all(isinstance(run.get(x), str) for x in ("benchmark", "about", "command", "date"))
    known = isinstance(run.get("machine"), dict) and {"device", "device_type", "threads"} <= set(
        run
    )
    parts = run.get("parts")
    whole = isinstance(parts, list) and all(isinstance(p, dict) and "part" in p for p in parts)
    if not (texts and known and whole):
        raise ValueError(f"{path}: not the whole file of a benchmark script")
    return True


def _key(run: Run, part: Part) -> tuple[Any, ...]:
    threads = run["threads"] if run["device_type"] == "cpu" else None
    return run["benchmark"], run["device"], threads, part["part"]


def _markdown(run: Run) -> str:
    machine = run["machine"]
    threads = [f"{run['threads']} threads"] if run["device_type"] == "cpu" else []
    versions = [f"{name} {machine[name]}" for name in _VERSIONS if name in machine]
    about = ", ".join([run["device"], *threads, *versions, run["date"][:10]])
    blocks = [f"{about}:", f"    {run['command']}"]
    groups: dict[tuple[str, ...], list[Part]] = {}
    for part in run["parts"]:
        keys = tuple(key for key in _SHOWN if _has(part, key))
        if keys:
            groups.setdefault(keys, []).append(part)
    blocks += [_table(keys, parts) for keys, parts in groups.items()]
    for part in run["parts"]:
        if rows := part.get("rows"):
            keys = tuple(key for key in _SHOWN if _has(rows[0], key))
            blocks.append(_table(keys, rows[:_MOST_ROWS]))
        blocks += [f"{part['part']}: {text}." for key, text in _FAILED.items() if key in part]
    return "\n\n".join(blocks)


def _table(keys: Sequence[str], parts: Iterable[Part]) -> str:
    shown = [key for key in keys if any(_at(part, key) is not None for part in parts)]
    names = ["", *(_SHOWN[key][0] for key in shown)]
    lines = [f"| {' | '.join(names)} |", f"|---|{'--:|' * len(shown)}"]
    for part in parts:
        cells = [_escaped(str(part["part"])), *(_cell(part, key) for key in shown)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _has(part: Part, key: str) -> bool:
    first, _, rest = key.partition(".")
    return first in part and (not rest or (isinstance(part[first], dict) and rest in part[first]))


def _at(part: Part, key: str) -> Any:
    first, _, rest = key.partition(".")
    return part[first][rest] if rest else part[first]


def _cell(part: Part, key: str) -> str:
    value = _at(part, key)
    try:
        return "" if value is None else _escaped(_SHOWN[key][1](value))
    except (TypeError, ValueError):
        raise ValueError(f"part {part['part']!r}, {key}: not a figure: {value!r}") from None


def _escaped(text: str) -> str:
    return " ".join(text.replace("|", r"\|").split())


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _error(value: float) -> str:
    return f"{value:.1e}"


def _nats(value: float) -> str:
    return f"{value:.3f}"


def _unit(unit: str, size: float = 1.0) -> Callable[[float], str]:
    return lambda value: f"{digits(value / size)} {unit}"


# Heading and way of writing for each figure; the order is that of the columns.
_SHOWN: dict[str, tuple[str, Callable[[Any], str]]] = {
    "text": ("text", str),
    "layers": ("layers", str),
    "width": ("width", str),
    "window": ("window", _whole),
    "batch": ("rows", _whole),
    "steps": ("steps", _whole),
    "lr": ("learning rate", str),
    "requests": ("requests", _whole),
    "slots": ("slots", str),
    "tokens_per_s": ("tokens/s", _whole),
    "peer_tokens_per_s": ("peer's tokens/s", _whole),
    "one_by_one_tokens_per_s": ("tokens/s one by one", _whole),
    "decode_tokens_per_s": ("decoding, tokens/s", _whole),
    "prefill_tokens_per_s": ("prefill, tokens/s", _whole),
    "drawn_tokens_per_s": ("tokens/s drawn", _whole),
    "step_s": ("a step", seconds_text),
    "seconds": ("time", seconds_text),
    "device_s": ("on the device", seconds_text),
    "speed": ("speed", _times),
    "mfu": ("MFU", _share),
    "share_of_bare": ("of the bare model's speed", _share),
    "share_of_bound": ("of the bound", _share),
    "share_of_products": ("of the products' rate", _share),
    "share_of_step": ("of a step", _share),
    "compared": ("compared", _whole),
    "differ": ("of them different", _whole),
    "peak_gib": ("peak memory", _unit("GiB")),
    "beyond_model_gib": ("beyond the model", _unit("GiB")),
    "peak_mib": ("peak memory", _unit("MiB")),
    "file_mib": ("file", _unit("MiB")),
    "copies": ("copies of the file", _nats),
    "memory_of_fastest": ("memory, of the fastest's", _share),
    "memory_of_smallest": ("of the smallest's", _share),
    "fastest": ("fastest", str),
    "smallest": ("smallest", str),
    "parameters": ("parameters", _whole),
    "loss": ("loss", _nats),
    "last_loss": ("last loss", _nats),
    "held_out_bits_per_byte": ("bits per byte, held out", _nats),
    "whole": ("gradients apart", _error),
    "median": ("median parameter", _error),
    "worst": ("worst parameter", _error),
    "worst_parameter": ("which", str),
    "bytes_per_s": ("copies", _unit("GB/s", 1e9)),
    "flops_per_s": ("products", _unit("TFLOP/s", 1e12)),
    "weights_bytes": ("weights", _unit("GB", 1e9)),
    "fused_us": ("fused", _unit("µs")),
    "plain_us": ("plain", _unit("µs")),
    "gain": ("gain", _times),
    "difference": ("difference", _error),
    "fused.forward_ms": ("forward, fused", _unit("ms")),
    "plain.forward_ms": ("plain", _unit("ms")),
    "forward_gain": ("gain", _times),
    "fused.training_ms": ("forward + backward, fused", _unit("ms")),
    "plain.training_ms": ("plain", _unit("ms")),
    "training_gain": ("gain", _times),
    "fused.training_share": ("of copy speed", _share),
    "fused.peak_mib": ("peak memory, fused", _unit("MiB")),
    "plain.peak_mib": ("plain", _unit("MiB")),
    "ms": ("time", _unit("ms")),
    "share": ("share", _share),
    "cancelled": ("cancelled", _whole),
    "slots_free": ("slots free at the end", str),
    "tensors_before": ("tensors before", _whole),
    "tensors_after": ("after", _whole),
}
