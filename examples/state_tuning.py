"""Only the states that texts begin with are trained: a few kilobytes that change what a model says.

    python examples/state_tuning.py [steps]

The same as `rwkv7 train chat.jsonl --from rwkv7.pth --chat --tune state --out RUN` and then
`rwkv7 generate rwkv7.pth --state-in RUN/state.pth`. First a small model is made that has read some
text, for a frozen model must know something.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from rwkv7 import load_model, save_model
from rwkv7.demo_text import load_text
from rwkv7.generate import Session
from rwkv7.sampling import Sampler
from rwkv7.tokenizer import ByteTokenizer
from rwkv7.training import TrainSettings, train_model, tune_model
from rwkv7.training.watch.log import read_log

QUESTION, ANSWER = "Who made the light?", "It was made on the first day."


def main(steps: int = 60) -> None:
    """Tune the states on one conversation and let the model answer without and with them."""
    torch.manual_seed(0)
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    with tempfile.TemporaryDirectory() as folder:
        base, chat, run = (Path(folder, name) for name in ("base.pth", "chat.jsonl", "run"))
        make_base(base, Path(folder), steps)
        before = base.read_bytes()
        chat.write_text((json.dumps({"messages": messages}) + "\n") * 8)
        given = {"chat": True, "tune": "state", "steps": steps, "window": 96, "batch": 4}
        tune_model(base, given, [chat], run, device="cpu")
        losses = [line["loss"] for line in read_log(run / "log.jsonl") if "loss" in line]
        print(f"loss on the answer: {losses[0]:.2f} before, {losses[-1]:.2f} after")
        print("the model is untouched:", base.read_bytes() == before)
        print("bytes of the tuned state:", (run / "state.pth").stat().st_size)
        for name, state in (("without", None), ("with   ", run / "state.pth")):
            print(name, repr(answer(base, state)))


def make_base(path: Path, folder: Path, steps: int) -> None:
    """A small model that has read a little, as an official checkpoint."""
    text = folder / "text.txt"
    text.write_bytes(load_text()[:60_000])
    settings = TrainSettings(
        steps=steps, layers=2, width=64, head_size=32, window=96, batch=8, lr=5e-3, held_out=0
    )
    train_model(settings, [text], folder / "reading", device="cpu")
    save_model(load_model(folder / "reading", device="cpu"), path)


def answer(base: Path, state: Path | None) -> str:
    """What the model says to the question, at most 40 bytes, always the likeliest one."""
    model, tokenizer = load_model(base, device="cpu").eval(), ByteTokenizer()
    session = Session.load(state, model) if state else Session(greedy())
    session.sampler = greedy()
    session.feed(model, tokenizer.encode(f"User: {QUESTION}\n\nAssistant:"))
    return tokenizer.decode_bytes(session.run(model, 40)).decode(errors="replace")


def greedy() -> Sampler:
    """Takes the likeliest token."""
    return Sampler(temperature=0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
