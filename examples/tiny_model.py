"""A tiny model learns a sentence, is saved amid a text, and goes on as if never stopped.

    python examples/tiny_model.py [steps]

For real text there is `rwkv7 train`; this is the model used by hand: logits and state out, loss,
step.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from rwkv7 import RWKV7, ModelConfig, load_model, save_model
from rwkv7.generate import Session
from rwkv7.sampling import Sampler
from rwkv7.tokenizer import ByteTokenizer

TEXT = "The state goes in as an argument and comes out as a result. "


def train(model: RWKV7, tokens: torch.Tensor, steps: int) -> None:
    """Plain next-token training on one row of tokens [1, T]."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
    for step in range(steps):
        logits, _ = model(tokens[:, :-1])
        loss = cross_entropy(logits[0], tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3}  loss {loss.item():.3f}")


def main(steps: int = 120) -> None:
    """Train, write 40 bytes, save, and let a model read from disk write the next 40."""
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    model = RWKV7(ModelConfig.from_sizes(vocab_size=256, width=64, layers=2, head_size=32))
    train(model, torch.tensor([tokenizer.encode(TEXT * 4)]), steps)
    model.eval()

    whole = Session(Sampler(temperature=0.5, seed=7))
    whole.feed(model, tokenizer.encode("The state"))
    uninterrupted = list(whole.run(model, 80))

    with tempfile.TemporaryDirectory() as folder:
        weights, saved = Path(folder, "model.safetensors"), Path(folder, "session.safetensors")
        session = Session(Sampler(temperature=0.5, seed=7))
        session.feed(model, tokenizer.encode("The state"))
        first = list(session.run(model, 40))
        save_model(model, weights)
        session.save(saved, model)

        again = load_model(weights, device="cpu").eval()
        second = list(Session.load(saved, again).run(again, 40))

    print("first  ", repr(tokenizer.decode_bytes(first).decode(errors="replace")))
    print("second ", repr(tokenizer.decode_bytes(second).decode(errors="replace")))
    print("the same as one uninterrupted text:", first + second == uninterrupted)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
