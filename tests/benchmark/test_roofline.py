"""The roofline of a card's results: what is drawn, and what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest

from rwkv7.benchmark.roofline import draw_roofline
from rwkv7.machine import card_limits

H100 = "NVIDIA H100 80GB HBM3"


def case(device: str = H100, **others: object) -> dict[str, object]:
    """A result that moves its bytes at the speed of the card's memory forwards, and half of it."""
    limits = card_limits(H100)
    assert limits is not None
    floor = 2 * 64 * (2 * 512 * 3) / limits.bytes  # of one tensor
    result = {"subject": "ours", "forward_s": 7 * floor, "training_s": 40 * floor}
    found = {"work": "operator", "dtype": "bfloat16", "device": device, "date": "2026-01-01"}
    return {**found, "shape": "2x512x3x64", "results": [result], **others}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The panels of what was drawn last."""
    panels: list[Any] = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure: matplotlib.figure.Figure, *args: object, **kwargs: object) -> None:
        panels[:] = figure.axes
        save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return panels


def test_a_share_of_the_roof_beside_each_bar(tmp_path: Path, drawn: list[Any]) -> None:
    draw_roofline([case(), case(device="a CPU"), case(dtype="float32")], tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")
    shares = [text.get_text().strip() for panel in drawn for text in panel.texts]
    assert shares == ["100%", "50%"]


def test_each_shape_has_its_bars_under_its_own_roof(tmp_path: Path, drawn: list[Any]) -> None:
    """Forward 9 N operations for 14 bytes; what was measured one way only keeps its row."""
    slow = {"subject": "ours", "forward_s": 1.0, "training_s": None}
    wide = case(shape="1x512x3x128/4", results=[slow, {**slow, "subject": "theirs"}])
    draw_roofline([case(), wide], tmp_path / "roof.png")
    limits = card_limits(H100)
    assert limits is not None
    forward, both = drawn
    roofs = [line.get_xdata()[0] for line in forward.lines]
    assert roofs == pytest.approx([9 * N / 14 * limits.bytes / 1e12 for N in (64, 128)])
    names = [label.get_text() for label in forward.get_yticklabels()]
    assert names == ["2x512x3x64", "1x512x3x128, packed: 4"]
    assert (len(forward.patches), len(both.patches)) == (3, 1)
    assert len({round(bar.get_y(), 6) for bar in forward.patches}) == 3
    assert list(forward.get_yticks()) == list(both.get_yticks())
    bars = forward.patches
    assert bars[0].get_facecolor() == bars[1].get_facecolor() != bars[2].get_facecolor()


@pytest.mark.parametrize(
    ("cases", "name", "line"),
    [
        ([case(device="a CPU")], "roof.png", "--render: no operator results in 16 bits"),
        ([case()], "roof.docx", "expected a name in .png, .svg or .pdf"),
    ],
)
def test_what_cannot_be_drawn(
    cases: list[dict[str, object]], name: str, line: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=line):
        draw_roofline(cases, tmp_path / name)
    assert not list(tmp_path.iterdir())
