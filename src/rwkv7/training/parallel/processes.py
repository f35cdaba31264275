"""The processes that torchrun started, one a card, joined into a group."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

__all__ = ["joined", "launched"]

# What torchrun tells each process; without all of them there is none beside this one.
_TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = 600.0  # seconds in which a collective must have all ranks


def launched() -> bool:
    """Whether torchrun, or who says the same in the environment, started this process."""
    return all(name in os.environ for name in _TOLD)


@contextmanager
def joined(device: str | None = None) -> Iterator[torch.device]:
    """The default process group while the block runs, over NCCL on GPUs and Gloo elsewhere.

    Args:
        device: "cuda" (each process of a machine takes the GPU of its number), "cpu", or None for
            GPUs where there are any.

    Gives the device of this process. Raises ValueError when torchrun did not start it, for another
    device, and when this machine has fewer GPUs than processes.
    """
    if not launched():
        raise ValueError(
            "expected a process that torchrun started (torchrun --nproc-per-node 2 -m rwkv7 …); "
            f"found no {next(name for name in _TOLD if name not in os.environ)} in the environment"
        )
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cuda", "cpu"):
        raise ValueError(f'device: expected "cuda" or "cpu" with several processes, found {kind!r}')
    own = torch.device(kind)
    if kind == "cuda":
        number, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= cards:
            raise ValueError(
                f"device: expected a GPU for each process of this machine, found {cards}; "
                f"start it with --nproc-per-node {cards}"
            )
        own = torch.device("cuda", number)
        torch.cuda.set_device(own)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    try:
        yield own
    finally:
        dist.destroy_process_group()
