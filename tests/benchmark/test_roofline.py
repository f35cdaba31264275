"""The roofline of a card's results: what is drawn, and what cannot be."""

from __future__ import annotations

from pathlib import Path

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


def test_a_share_of_the_roof_beside_each_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure: matplotlib.figure.Figure, *args: object, **kwargs: object) -> None:
        drawn.append([text.get_text() for panel in figure.axes for text in panel.texts])
        save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    draw_roofline([case(), case(device="a CPU"), case(dtype="float32")], tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")
    shares = [text for text in drawn[0] if text.endswith("%")]
    assert shares == ["100%", "50%"]


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
