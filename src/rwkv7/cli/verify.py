"""`rwkv7 verify`: the parity table, on the screen, as a plot and as JSON."""

from __future__ import annotations

import datetime
import itertools
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rwkv7.verification import Check, Refusal, Row, Sizes

_DTYPES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def verify(
    against: Annotated[
        str | None, typer.Option(metavar="PEERS", help="Check these too: fla, rwkv or fla,rwkv.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw errors and bounds (.png, .svg).")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every number.")
    ] = None,
) -> None:
    """Check every backend that can run here against the recurrence in float64.

    With the initial state None, zero and random, in every dtype: the relative error of y, of the
    final state and of each gradient, beside its bound. The exit code is 1 when anything of this
    library's fails; what a peer's numbers miss is shown, and changes nothing.
    """
    from rwkv7.files import check_destination
    from rwkv7.machine import best_device
    from rwkv7.verification import Sizes, backend_checks, peer_checks

    start = time.perf_counter()
    if plot is not None:
        from rwkv7.verification.plot import draw, picture_format

        picture_format(plot)
    for file in (plot, json_file):
        if file is not None:
            check_destination(file)
    names = [name.strip() for name in (against or "").split(",") if name.strip()]
    if against is not None and not names:
        raise ValueError(f"against: expected fla, rwkv or fla,rwkv, found {against!r}")
    sizes = Sizes()
    devices = list({"cpu": _cpu(), best_device().type: best_device()}.values())
    peers, refused_peers = peer_checks(names, sizes, devices)
    checks, refusals = backend_checks(sizes, devices)
    rows = _run(checks + peers)
    seconds = time.perf_counter() - start
    console = Console()
    _show(console, rows, refusals + refused_peers, sizes, seconds)
    if json_file is not None:
        _write_json(json_file, rows, refusals + refused_peers, sizes)
    if plot is not None:
        draw(rows, plot)
        console.print(f"drawn in {plot}", highlight=False)
    if not all(row.ok for row in rows if not row.peer):
        raise typer.Exit(1)


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def _run(checks: list[Check]) -> list[Row]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(checks))
        rows = []
        for check in checks:
            progress.update(task, description=f"{check.subject} on {check.device}")
            rows += check.run()
            progress.advance(task)
    return rows


def _show(
    console: Console, rows: list[Row], refusals: list[Refusal], sizes: Sizes, seconds: float
) -> None:
    console.print(
        "Relative errors against the recurrence in float64 "
        f"(B {sizes.B}, T {sizes.T}, H {sizes.H}, K {sizes.K}, V {sizes.V}); "
        "dr to dS0 are gradients, the last that of the initial state.\n",
        highlight=False,
    )
    for (subject, device), group in itertools.groupby(rows, lambda row: (row.subject, row.device)):
        members = list(group)
        cost = ": what it would have cost" if members[0].mistake else ""
        console.print(Text(f"{subject} on {device}{cost}", style="bold"))  # a table's is cut
        console.print(_table(members))
    for crash in dict.fromkeys(f"{row.subject}: {row.crash}" for row in rows if row.crash):
        console.print(Text(crash, style="bold red"))
    for refusal in refusals:
        console.print(Text(f"not here: {refusal.subject}: {refusal.reason}", style="yellow"))
    ours = [row.ok for row in rows if not row.peer]
    theirs = [row.ok for row in rows if row.peer]
    line = f"{sum(ours)} of {len(ours)} rows within their bounds, {seconds:.1f} s"
    if theirs:
        line += f"; of the peers' {len(theirs)}: {sum(theirs)}"
    console.print(Text(line, style="bold green" if all(ours) else "bold red"))


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    names = _names(rows)
    table.add_column("", no_wrap=True)
    for name in names or ["raised"]:
        table.add_column("dS0" if name == "dstate" else name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for dtype, group in itertools.groupby(rows, lambda row: row.dtype):
        members = list(group)
        bounds = {name: measure for row in members for name, measure in row.measures.items()}
        cells = [_number(bounds[name].bound) for name in names]
        table.add_row(f"{_short(dtype)} {'bound' if names else ''}", *cells, style="dim")
        for row in members:
            table.add_row(f"     {row.state}", *(_cell(row, n) for n in names), _verdict(row))
    return table


def _names(rows: list[Row]) -> list[str]:
    """The results that any of the rows has, in their order."""
    return list(dict.fromkeys(name for row in rows[::-1] for name in row.measures))


def _short(dtype: object) -> str:
    return _DTYPES[str(dtype).removeprefix("torch.")]


def _cell(row: Row, name: str) -> Text:
    if name not in row.measures:
        return Text("-", style="dim")
    measure = row.measures[name]
    return Text(_number(measure.error), style="" if measure.ok else "bold red")


def _number(error: float) -> str:
    """1.7e-3 or 6e-16: at most six characters, so that nine of them fit a narrow screen."""
    if error == 0 or not math.isfinite(error):
        return "0" if error == 0 else str(error)
    mantissa, _, exponent = f"{error:.1e}".partition("e")
    if abs(int(exponent)) > 9:
        mantissa, _, exponent = f"{error:.0e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _verdict(row: Row) -> Text:
    if row.mistake:
        return Text("seen", style="green") if row.ok else Text("MISSED", style="bold red")
    if row.ok:
        return Text("ok", style="green")
    return Text("off", style="yellow") if row.peer else Text("FAIL", style="bold red")


def _write_json(path: Path, rows: list[Row], refusals: list[Refusal], sizes: Sizes) -> None:
    import dataclasses

    from rwkv7.files import write_atomically
    from rwkv7.machine import describe

    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe(),
        "sizes": dataclasses.asdict(sizes),
        "ok": all(row.ok for row in rows if not row.peer),
        "rows": [_plain(row) for row in rows],
        "not here": {refusal.subject: refusal.reason for refusal in refusals},
    }
    text = json.dumps(report, indent=1)
    write_atomically(path, lambda file: _write_text(file, text + "\n"))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _plain(row: Row) -> dict[str, Any]:
    # JSON has no NaN; a text keeps the file readable everywhere.
    errors = {
        name: {
            "error": measure.error if measure.error < float("inf") else str(measure.error),
            "bound": measure.bound,
            "ok": measure.ok,
        }
        for name, measure in row.measures.items()
    }
    return {
        "subject": row.subject,
        "device": row.device,
        "dtype": str(row.dtype).removeprefix("torch."),
        "state": row.state,
        "ok": row.ok,
        "mistake on purpose": row.mistake,
        "crash": row.crash,
        "peer": row.peer,
        "errors": errors,
    }
