"""Measured results of a GPU under its roof: operations a second against operations a byte.

Counted is what the recurrence asks for, not what a backend does: tensors moved once, and the
operations of the token loop. So all backends share a place on the axis, and height is speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rwkv7.files import write_atomically
from rwkv7.machine import CardLimits, card_limits
from rwkv7.verification.plot import picture_format

from .sample import Shape
from .table import Case

__all__ = ["draw_roofline"]

# What is measured, its tensors [B, T, H, N] in 16 bits, and its operations a state element and
# token: decay 1, S a 2, (S a) bᵀ 2, v kᵀ 2, S r 2; backwards twice as many.
_WORKS = {"forward_s": ("forward", 7, 9), "training_s": ("forward + backward", 20, 27)}
_MARKS = "os^vDP*X"


def draw_roofline(cases: Sequence[Case], path: str | Path) -> None:
    """Draw the newest operator results of a card in 16 bits into `path` (.png, .svg, .pdf).

    ValueError where there are none, or the suffix names no format.
    """
    path = Path(path)
    suffix = picture_format(path)
    known = [
        case
        for case in cases
        if case["work"] == "operator"
        and case["dtype"] in ("bfloat16", "float16")
        and card_limits(case["device"]) is not None
    ]
    if not known:
        raise ValueError("--render: no operator results in 16 bits of a card with known limits")
    device = max(known, key=lambda case: str(case["date"]))["device"]
    limits = card_limits(device)
    assert limits is not None
    mine = [case for case in known if case["device"] == device]
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    panels = figure.subplots(1, len(_WORKS), sharey=True)
    for panel, seconds in zip(panels, _WORKS, strict=True):
        _draw_roof(panel, limits)
        _draw_points(panel, mine, limits, seconds)
    panels[0].set_ylabel("10¹² operations of the recurrence a second")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    figure.suptitle(f"The operator on {device}, 16 bits: share of the roof beside each mark")
    write_atomically(path, lambda file: figure.savefig(file, dpi=150, format=suffix))


def _draw_roof(panel: Any, limits: CardLimits) -> None:
    ridge = limits.flops / limits.bytes
    ends = [12.0, ridge, 700.0]
    panel.loglog(ends, [min(limits.flops, x * limits.bytes) / 1e12 for x in ends], color="black")
    for text, x, y, place in (
        (f"memory, {limits.bytes / 1e12:.2f} TB/s ", 90, 90 * limits.bytes, ("right", "bottom")),
        (f"products, {limits.flops / 1e12:.0f} TFLOP/s", 700, limits.flops, ("right", "bottom")),
    ):
        panel.annotate(text, (x, y / 1e12), ha=place[0], va=place[1])
    panel.set_xlabel("operations of the recurrence a byte that must move")
    panel.set_ylim(3, 2.5 * limits.flops / 1e12)
    panel.grid(which="major", color="0.9")
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _draw_points(panel: Any, cases: list[Case], limits: CardLimits, seconds: str) -> None:
    """All marks belong at one place of the axis; shapes stand side by side to be told apart."""
    name, tensors, operations = _WORKS[seconds]
    subjects = list(dict.fromkeys(r["subject"] for case in cases for r in case["results"]))
    for number, case in enumerate(cases):
        shape = Shape.parse(case["shape"])
        intensity = operations * shape.N / (2 * tensors)
        for result in case["results"]:
            if not result[seconds]:
                continue
            work = operations * shape.N**2 * shape.B * shape.T * shape.H
            speed = work / result[seconds]
            at = (intensity * 1.4 ** (number - (len(cases) - 1) / 2), speed / 1e12)
            panel.plot(
                *at,
                marker=_MARKS[number % len(_MARKS)],
                linestyle="none",
                color=f"C{subjects.index(result['subject'])}",
                label=f"{result['subject']}, {case['shape']}",
            )
            share = f"{speed / (intensity * limits.bytes):.0%}"
            panel.annotate(share, at, xytext=(6, -3), textcoords="offset points", fontsize=8)
    panel.set_title(name, loc="left", fontsize=11)
