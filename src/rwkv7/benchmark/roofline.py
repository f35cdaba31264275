"""Measured results of a GPU under its roof: operations of the recurrence a second.

Counted is what the recurrence asks for, not what a backend does: tensors moved once, and the
operations of the token loop. So operations a byte, and the roof over them, depend on N alone: on an
axis of them all shapes would lie at one place, and here each has bars of its own under its roof.
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
_GAP = 1.0  # between the bars of two shapes, in bars


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
    rows = sum(_GAP + len(case["results"]) for case in mine)
    figure = Figure(figsize=(11, 1.9 + 0.2 * rows), layout="constrained")
    panels = figure.subplots(1, len(_WORKS), sharey=True)
    handles: dict[str, Any] = {}
    for panel, seconds in zip(panels, _WORKS, strict=True):
        _draw_panel(panel, mine, limits, seconds)
        handles |= {label: h for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    panels[0].invert_yaxis()
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False
    )
    figure.suptitle(
        f"The operator on {device}, 16 bits: share of the roof beside each bar\n"
        f"roof: what {limits.bytes / 1e12:.2f} TB/s and {limits.flops / 1e12:.0f} TFLOP/s allow",
        fontsize=12,
    )
    write_atomically(path, lambda file: figure.savefig(file, dpi=150, format=suffix))


def _draw_panel(panel: Any, cases: list[Case], limits: CardLimits, seconds: str) -> None:
    """A group of bars for each shape, and a line at its roof across them."""
    name, tensors, operations = _WORKS[seconds]
    subjects = list(dict.fromkeys(r["subject"] for case in cases for r in case["results"]))
    middles: list[float] = []
    top = 0.0
    for case in cases:
        shape = Shape.parse(case["shape"])
        roof = min(limits.flops, operations * shape.N / (2 * tensors) * limits.bytes) / 1e12
        work = operations * shape.N**2 * shape.B * shape.T * shape.H / 1e12
        # What was not measured keeps its row: the panels share them.
        for at, result in enumerate(case["results"]):
            if result[seconds]:
                speed, subject = work / result[seconds], result["subject"]
                color = f"C{subjects.index(subject)}"
                panel.barh(top + at, speed, height=0.85, color=color, label=subject)
                panel.text(speed, top + at, f" {speed / roof:.0%}", va="center", fontsize=8)
        bottom = top + len(case["results"]) - 1
        panel.plot([roof] * 2, [top - 0.6, bottom + 0.6], color="black", lw=2, label="roof")
        middles.append((top + bottom) / 2)
        top = bottom + 1 + _GAP
    panel.set_yticks(middles, [case["shape"].replace("/", ", packed: ") for case in cases])
    panel.tick_params(axis="y", length=0)
    panel.set_xlim(left=0)
    panel.set_xlabel("10¹² operations of the recurrence a second")
    panel.set_title(name, loc="left", fontsize=11)
    panel.grid(axis="x", color="0.9")
    panel.set_axisbelow(True)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
