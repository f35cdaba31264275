"""An official checkpoint is trained on with other text and written back as an official checkpoint.

    python examples/continue_checkpoint.py [steps]

The same as `rwkv7 train TEXT --from rwkv7.pth --out RUN --save tuned.pth`. The checkpoint here is a
small one made for the purpose; a published one goes the same way.
"""

import sys
import tempfile
from pathlib import Path

import torch

from rwkv7 import RWKV7, ModelConfig, load_model, save_model
from rwkv7.training import console_report, tune_model

TEXT = "The state goes in as an argument and comes out as a result. " * 200


def main(steps: int = 60) -> None:
    """Begin with a .pth in bf16, train all of it, and compare its dtype, names and weights."""
    torch.manual_seed(0)
    config = ModelConfig.from_sizes(vocab_size=256, width=64, layers=2, head_size=32)
    with tempfile.TemporaryDirectory() as folder:
        base, text, saved = (Path(folder, name) for name in ("base.pth", "text.txt", "tuned.pth"))
        save_model(RWKV7(config).bfloat16(), base)
        text.write_text(TEXT)
        given = {"steps": steps, "window": 64, "batch": 4, "lr": 3e-3, "held_out": 600}
        result = tune_model(
            base,
            given,
            [text],
            Path(folder, "run"),
            device="cpu",
            report=console_report(),
            save=saved,
        )
        before, after = (torch.load(path, weights_only=True) for path in (base, saved))
        dtype = load_model(saved, device="cpu").dtype
    assert result.evaluation is not None  # a finished run with held-out text has one
    print(f"held out: {result.evaluation.carried:.3f} bits per byte")
    print("the same names and shapes:", shapes(before) == shapes(after), dtype)


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    """The shape of each tensor by its name."""
    return {name: x.shape for name, x in tensors.items()}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
