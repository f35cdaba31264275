"""A model is trained from nothing on a text, byte by byte, and writes on the way.

    python examples/pretrain_from_zero.py [steps]

The same as `rwkv7 train TEXT --out RUN …`; the text is the one of `rwkv7 demo`.
"""

import sys
import tempfile
from pathlib import Path

from rwkv7.demo_text import load_text
from rwkv7.training import TrainSettings, console_report, train_model

BYTES = 200_000


def main(steps: int = 120) -> None:
    """Train two small layers, and print bits per byte of text that they never saw."""
    settings = TrainSettings(
        steps=steps,
        layers=2,
        width=64,
        head_size=32,
        window=128,
        batch=8,
        lr=5e-3,
        lr_final=5e-4,
        held_out=4096,
        sample_every=max(1, steps // 2),
        sample_prompt="And the ",
    )
    with tempfile.TemporaryDirectory() as folder:
        text, run = Path(folder, "text.txt"), Path(folder, "run")
        text.write_bytes(load_text()[:BYTES])
        result = train_model(settings, [text], run, device="cpu", report=console_report())
        print("files of the run:", ", ".join(sorted(path.name for path in run.iterdir())))
    assert result.evaluation is not None  # a finished run with held-out text has one
    print(f"held out: {result.evaluation.carried:.3f} bits per byte; 8 knows nothing")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
