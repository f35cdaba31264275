"""The text that comes with the package, and how it is divided.

data/README.md says where it is from. Other texts are read by `rwkv7.training.data`.
"""

from __future__ import annotations

import lzma
from importlib import resources

# The last 256 KiB are never trained on: what the demo's table is measured on.
HELD_OUT_BYTES = 262_144


def load_text() -> bytes:
    """The King James text: 4,234,842 bytes of ASCII, a heading a chapter and a line a verse."""
    packed = resources.files("rwkv7").joinpath("data/king_james.txt.xz").read_bytes()
    return lzma.decompress(packed)


def split(text: bytes, held_out: int = HELD_OUT_BYTES) -> tuple[bytes, bytes]:
    """(train, held_out): `text` cut once, its last `held_out` bytes for measuring only.

    ValueError when the text is too short to leave anything to train on.
    """
    if not 0 < held_out < len(text):
        raise ValueError(
            f"held_out: expected 1 to {len(text) - 1} bytes of a text of {len(text)}, "
            f"found {held_out}"
        )
    return text[:-held_out], text[-held_out:]
