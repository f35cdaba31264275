"""`rwkv7 bench`: measure the operator, keep the results, make tables of them."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .terminal import DeviceName

if TYPE_CHECKING:
    import torch

    from rwkv7.benchmark import Shape, Subject

_PROFILED = 12  # kernels shown of a profile; all are kept

_WIDTH = 150

# A work and one shape of it.
Plan = list[tuple[str, "Shape"]]


def bench(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BxTxHxN",
            help="Such as 2x1024x4x64, or 1x4096x4x64/9 for 9 packed sequences; may be repeated.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="fp64, fp32, bf16 or fp16. Default: fp32, on a GPU bf16.")
    ] = None,
    device: DeviceName = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="How many the CPU may use. Default: torch's own.")
    ] = None,
    work: Annotated[
        str,
        typer.Option(help="operator, repeated-key, decoding, or several with commas between."),
    ] = "operator",
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="One of ours, or NAME:invariant, inside batch_invariant(); may be repeated. "
            "Default: all, and a token loop. Decoding has one way and asks for none."
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Peers in the same run: fla, or by chunk size fla:16,fla:64.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also the kernels, and the time in each.")
    ] = False,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where results are kept, as JSON.")
    ] = Path("benchmarks/results"),
    render: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Time nothing: put the results into FILE, as tables (.md) or drawn (.png, .svg).",
        ),
    ] = None,
) -> None:
    """Measure the operator's backends side by side, and a plain token loop or a peer beside them.

    Forward alone, forward and backward, peak memory beyond the inputs, the first call, and errors
    against the recurrence in float64. A run leaves a JSON file in FOLDER, whole after each of
    them; --render puts the newest between a document's markers, or draws a card's under its roof.
    """
    from rwkv7.machine import device_called

    if render is not None:
        return _render(render, out)
    place = device_called(device)
    kind = _dtype(dtype, place)
    plan = _plan(work, shape or [], place, against is not None)
    subjects = _subjects(plan, backend or [], against)
    _use(threads)
    out.mkdir(parents=True, exist_ok=True)
    print(f"kept in {_run(plan, kind, place, subjects, profile, out)}")


def _use(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _render(file: Path, folder: Path) -> None:
    from rwkv7.benchmark import results_in, update_tables

    if not any(folder.glob("*.json")):
        raise ValueError(f"--out: no results in {folder}; run `rwkv7 bench` first")
    if file.suffix == ".md":
        return print(f"{file}: {update_tables(file, folder)} tables from {folder}")
    from rwkv7.benchmark.roofline import draw_roofline

    draw_roofline(results_in(folder), file)
    print(f"{file}: drawn from {folder}")


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    import torch

    from rwkv7.machine import dtype_called

    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return dtype_called(name)


def _plan(work: str, shapes: list[str], device: torch.device, against: bool) -> Plan:
    from rwkv7.benchmark import WORKS, Shape, default_shapes

    plan = []
    for name in (text.replace("-", " ") for text in work.split(",")):
        if name not in WORKS:
            names = ", ".join(known.replace(" ", "-") for known in WORKS)
            raise ValueError(f"--work: expected one or more of {names}, found {work!r}")
        chosen = [Shape.parse(text) for text in shapes] or default_shapes(name, device, against)
        if name == "decoding" and any(shape.T != 1 or shape.S for shape in chosen):
            raise ValueError("--shape: expected T = 1 for decoding, such as 64x1x64x64")
        plan += [(name, shape) for shape in chosen]
    return plan


def _subjects(
    plan: Plan, backends: list[str], against: str | None
) -> Callable[[str], list[Subject]]:
    """Who takes part in a work: ours by name or all of them, and the peers."""
    from rwkv7.benchmark import FLA_CHUNKS, backend, fla, step, token_loop
    from rwkv7.wkv7.registry import backend_names

    if backends and all(name == "decoding" for name, _ in plan):
        raise ValueError("--backend: decoding is wkv7_step_, which chooses its own")
    # Chunk 64 is its own choice for a bounded decay.
    chunks = {"fla": 64, **{f"fla:{chunk}": chunk for chunk in FLA_CHUNKS}}
    wanted = [] if against is None else against.split(",")
    for name in wanted:
        if name not in chunks:
            raise ValueError(f"--against: expected one of {', '.join(chunks)}, found {name!r}")
    peers = [fla(chunks[name]) for name in wanted]
    # The loops over tokens take all memory on the shapes that peers are measured on.
    loops = [] if peers or backends else [token_loop()]
    names = backends or [name for name in backend_names() if not (peers and name == "reference")]
    ours = [backend(name) for name in dict.fromkeys(names)]

    def chosen(work: str) -> list[Subject]:
        # A peer has one way of decoding, whatever its chunks.
        return [step(), *peers[:1]] if work == "decoding" else [*loops, *ours, *peers]

    return chosen


def _run(
    plan: Plan,
    dtype: torch.dtype,
    device: torch.device,
    subjects: Callable[[str], list[Subject]],
    profile: bool,
    folder: Path,
) -> Path:
    import torch

    from rwkv7.benchmark import measurements
    from rwkv7.benchmark.record import file_name, header, write_json

    started = time.monotonic()
    run: dict[str, Any] = {**header(device), "cases": []}
    path = folder / file_name("operator", run)
    progress = Console(stderr=True)
    for work, shape in plan:
        case: dict[str, Any] = {
            "work": work,
            "shape": str(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "device_type": device.type,
            "torch": torch.__version__,
            "results": [],
        }
        run["cases"].append(case)
        for measurement in measurements(
            work, shape, dtype, device, subjects(work), profile=profile
        ):
            seconds = time.monotonic() - started
            progress.print(f"{seconds:6.1f} s  {work} {shape}: {measurement.subject}", style="dim")
            case["results"].append(dataclasses.asdict(measurement.run()))
            write_json(path, run)
        # A file has no width; a table squeezed into 80 columns is hard to read there.
        _show(Console(width=None if sys.stdout.isatty() else _WIDTH), run, case)
    results = [result for case in run["cases"] for result in case["results"]]
    if not any(result["errors"] for result in results):
        path.unlink()  # it would take the place of an older one in the tables
        raise ValueError(f"nothing was measured: {results[0]['note']}")
    return path


def _show(console: Console, run: dict[str, Any], case: dict[str, Any]) -> None:
    from rwkv7.benchmark.table import columns, row, yardstick

    title = f"{case['work']}, B x T x H x N = {case['shape']}, {case['dtype']}, {run['device']}"
    if case["device_type"] == "cpu":
        title += f", {run['threads']} threads"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in columns(case["work"]):
        table.add_column(name, justify="right" if name else "left")
    for result in case["results"]:
        style = "dim" if not result["errors"] else "red" if result["ok"] is False else ""
        table.add_row(*row(result, case), style=style)
    console.print(table)
    other = yardstick(case["results"])
    if other:
        console.print(f"speed: against {other['subject']}", style="dim")
    for result in case["results"]:
        if result["note"]:
            console.print(f"{result['subject']}: {result['note']}", style="dim", soft_wrap=True)
    for result in case["results"]:
        for kernel in result["kernels"][:_PROFILED]:
            name, ms, calls = str(kernel["kernel"])[:70], kernel["ms"], kernel["calls"]
            line = f"  {result['subject']:24} {ms:8.3f} ms {calls:6.1f} x  {name}"
            console.print(line, highlight=False, soft_wrap=True)
