"""One sequence on several cards: each holds a piece, and the gradient is that of the whole.

    python examples/context_parallel.py

Starts two processes of the CPU through torchrun, as GPUs would have one each. Each of them runs the
model on its half of the tokens; the state and the token shifts go from one to the other, and their
gradients back. Then the gradients are summed and set beside those of the whole sequence in one
piece.
"""

import subprocess
import sys

import torch
import torch.distributed as dist

from rwkv7 import RWKV7, ModelConfig
from rwkv7.training.loss import next_token_loss
from rwkv7.training.parallel import ContextParallel, joined, launched, sum_gradients


def work(tokens: int = 97) -> None:
    """What each process does."""
    config = ModelConfig.from_sizes(vocab_size=64, width=32, layers=2, head_size=16)
    with joined("cpu") as device:
        torch.manual_seed(0)  # the same weights and tokens in every process
        model = RWKV7(config, device=device)
        for x in model.parameters():
            torch.nn.init.normal_(x, std=0.1)
        ids = torch.randint(64, (1, tokens + 1), device=device)
        inputs, targets = ids[:, :-1], ids[:, 1:]

        pieces = [x.tensor_split(dist.get_world_size(), 1) for x in (inputs, targets)]
        mine, wanted = (x[dist.get_rank()] for x in pieces)
        parallel = ContextParallel(model)
        features, state = parallel.hidden(mine)
        next_token_loss(parallel.head, features, wanted, denominator=tokens).backward()
        sum_gradients(model.parameters())
        found = [x.grad.clone() for x in model.parameters()]

        features, whole = model.hidden(inputs)
        model.zero_grad()
        next_token_loss(model.head, features, targets).backward()
        expected = [x.grad for x in model.parameters()]
        if dist.get_rank() == 0:
            pairs = [*zip(found, expected, strict=True)]
            worst = max(_difference(x, y) for x, y in pairs if y.any())
            wkv = _difference(state.layers[-1].wkv, whole.layers[-1].wkv)
            print(f"{mine.shape[1]} of {tokens} tokens in the first process")
            print(f"the state after all of them differs by {wkv:.1e}")
            print(f"the worst of {len(pairs)} gradients differs by {worst:.1e}")


def _difference(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(((x - y).norm() / y.norm()).detach())


def main() -> None:
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*call, __file__], stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, end="")


if __name__ == "__main__":
    work() if launched() else main()
