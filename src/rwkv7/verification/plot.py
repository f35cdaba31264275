"""Errors beside their bounds as one picture: a panel a dtype, a mark a backend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from rwkv7.files import write_atomically
from rwkv7.wkv7.tolerance import BOUNDS, RESULTS

from .checks import Row

_LABELS = {"state": "final\nstate", "dstate": "dS₀"}
_MARKS = "os^vDP*X<>"
_MISTAKE = "#c1121f"
# A little below what rounding leaves of the numbers; nothing can be seen lower down.
_HIGHEST = 10.0
_LOWEST = {dtype: 1e-18 if dtype == torch.float64 else 1e-8 for dtype in BOUNDS}


def draw(rows: Sequence[Row], path: str | Path) -> None:
    """Draw the rows that hold wkv7's results into `path`, whose suffix names the format.

    Each mark is the largest error over the initial states; a mistake made on purpose is red.
    ValueError for a suffix that matplotlib cannot write.
    """
    path = Path(path)
    rows = [row for row in rows if set(row.measures) <= set(RESULTS)]
    dtypes = [dtype for dtype in BOUNDS if any(row.dtype == dtype for row in rows)]
    subjects = list(dict.fromkeys((row.subject, row.device) for row in rows))
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    suffix = picture_format(path)
    panels = figure.subplots(2, 2, sharex=True, squeeze=False).flatten()
    for panel, dtype in zip(panels, dtypes, strict=False):
        members = [row for row in rows if row.dtype == dtype]
        _draw_panel(panel, members, subjects)
        panel.set_title(f"{str(dtype).removeprefix('torch.')} inputs", loc="left", fontsize=11)
    for panel in panels[len(dtypes) :]:
        panel.set_visible(False)
    for panel in panels[0::2]:
        panel.set_ylabel("relative error")
    handles: dict[str, Any] = {}
    for panel in panels[: len(dtypes)]:
        handles |= {label: h for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    figure.suptitle(
        "Against the recurrence in float64: the largest error over the states None, zero, random",
        fontsize=12,
    )
    write_atomically(path, lambda file: figure.savefig(file, dpi=150, format=suffix))


def picture_format(path: str | Path) -> str:
    """The format that the suffix names, such as "png"; ValueError where it cannot be drawn."""
    suffix = Path(path).suffix.removeprefix(".")
    if suffix not in Figure().canvas.get_supported_filetypes():
        raise ValueError(f"{path}: expected a name in .png, .svg or .pdf, found {suffix!r}")
    return suffix


def _draw_panel(panel: Any, rows: list[Row], subjects: list[tuple[str, str]]) -> None:
    panel.set_yscale("log")
    panel.set_ylim(_LOWEST[rows[0].dtype], _HIGHEST)
    for x, name in enumerate(RESULTS):
        bound = BOUNDS[rows[0].dtype].of(name)
        panel.hlines(
            bound, x - 0.42, x + 0.42, color="black", lw=1.6, label="bound" if x == 0 else None
        )
    # Marks of one result stand side by side, always in the same place.
    step = 0.7 / max(1, len(subjects) - 1)
    exact = []
    for i, (subject, device) in enumerate(subjects):
        points = _largest([row for row in rows if (row.subject, row.device) == (subject, device)])
        if not points:
            continue
        mistake = any(row.mistake for row in rows if row.subject == subject)
        places = [x - 0.35 + step * i for x, _ in points]
        panel.plot(
            places,
            [_height(error) for _, error in points],
            linestyle="none",
            marker="x" if mistake else _MARKS[i % len(_MARKS)],
            color=_MISTAKE if mistake else f"C{i % 10}",
            markersize=6,
            label=subject if mistake else f"{subject} on {device}",
        )
        exact += [place for place, (_, error) in zip(places, points, strict=True) if error == 0]
    if exact:
        # Zero has no place on a log axis: these stand on the floor of the panel.
        panel.plot(
            exact,
            [0.03] * len(exact),
            transform=panel.get_xaxis_transform(),
            linestyle="none",
            marker="v",
            color="grey",
            markersize=4,
            label="exactly 0",
        )
    panel.set_xticks(range(len(RESULTS)), [_LABELS.get(name, name) for name in RESULTS])
    panel.tick_params(labelbottom=True)
    panel.set_xlim(-0.5, len(RESULTS) - 0.5)
    for x in range(0, len(RESULTS), 2):
        panel.axvspan(x - 0.5, x + 0.5, color="0.97", zorder=0)
    panel.grid(axis="y", color="0.9")
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _height(error: float) -> float:
    """Where an error stands; what is not a number, or off the scale, stands at the top."""
    if error == 0:
        return float("nan")
    return error if error < _HIGHEST / 2 else _HIGHEST / 2


def _largest(rows: list[Row]) -> list[tuple[int, float]]:
    """(place of the result, its largest error) for the results there are."""
    return [
        (x, _worst([row.measures[name].error for row in rows if name in row.measures]))
        for x, name in enumerate(RESULTS)
        if any(name in row.measures for row in rows)
    ]


def _worst(errors: list[float]) -> float:
    # max() would pass over a NaN that does not come first.
    return next((error for error in errors if error != error), max(errors))
