"""`rwkv7 bench`: time the operator's backends, keep the results, make tables of them."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import torch

    from rwkv7.benchmark import Shape


def bench(
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="BxTxHxN", help="Sizes, such as 2x1024x4x64; may be repeated."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp64, fp32, bf16 or fp16. Default: fp32, on a GPU bf16.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda. Default: the best there is.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="How many the CPU may use. Default: torch's own.")
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where results are kept, as JSON.")
    ] = Path("benchmarks/results"),
    table: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Time nothing: make FILE's tables from the results."),
    ] = None,
) -> None:
    """Time the operator's backends side by side, and a plain token loop beside them.

    Forward alone, forward and backward, peak memory beyond the inputs, and the errors against
    the recurrence in float64. Every run leaves a JSON file in FOLDER; --table puts the newest of
    them between the markers in a document.
    """
    from rwkv7.benchmark import Shape, default_shapes, results_in, update_tables
    from rwkv7.machine import device_called

    if table is not None:
        cases = results_in(out)
        if not cases:
            raise ValueError(f"--out: no results in {out}; run `rwkv7 bench` first")
        update_tables(table, cases)
        print(f"{table}: {len(cases)} tables from {out}")
        return
    place = device_called(device)
    shapes = [Shape.parse(text) for text in shape] if shape else default_shapes(place)
    kind = _dtype(dtype, place)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    run = _run(shapes, kind, place)
    path = out / _file_name(run)
    text = json.dumps(run, indent=1) + "\n"

    from rwkv7.files import write_atomically

    write_atomically(path, lambda file: _write_text(file, text))
    print(f"kept in {path}")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    import torch

    from rwkv7.machine import dtype_called

    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return dtype_called(name)


def _run(shapes: list[Shape], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    import torch

    from rwkv7.benchmark import measurements
    from rwkv7.machine import describe, device_name

    console, progress = Console(), Console(stderr=True)
    run: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "machine": describe(),
        "cases": [],
    }
    for shape in shapes:
        results = []
        for measurement in measurements(shape, dtype, device):
            with progress.status(f"{shape}: {measurement.subject}"):
                results.append(dataclasses.asdict(measurement.run()))
        case = {
            "shape": str(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "device_type": device.type,
            "torch": torch.__version__,
            "results": results,
        }
        run["cases"].append(case)
        _show(console, run, case)
    return run


def _show(console: Console, run: dict[str, Any], case: dict[str, Any]) -> None:
    from rwkv7.benchmark.table import columns, row

    title = f"B x T x H x N = {case['shape']}, {case['dtype']}, {run['device']}"
    if case["device_type"] == "cpu":
        title += f", {run['threads']} threads"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in columns():
        table.add_column(name, justify="right" if name else "left")
    for result in case["results"]:
        style = "dim" if result["forward_s"] is None else "red" if result["ok"] is False else ""
        table.add_row(*row(result, case["results"]), style=style)
    console.print(table)
    console.print("speed: forward and backward against the token loop\n", style="dim")


def _file_name(run: dict[str, Any]) -> str:
    device = re.sub(r"[^a-z0-9]+", "-", run["device"].lower()).strip("-")
    stamp = re.sub(r"[^0-9T]", "", run["date"].partition("+")[0])
    return f"operator-{stamp}-{device}.json"
