"""The processes of a run: one alone, or those that torchrun started, one a card.

`joined` makes a group of them, `Crew` has them agree. How they share a step's work is in team.py
and parallel/.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

__all__ = ["Crew", "LostProcessError", "OtherProcessError", "joined", "launched", "lost_processes"]

# What torchrun tells each process; without all of them there is none beside this one.
_TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = datetime.timedelta(minutes=10)  # in which a step's collective must have all ranks
# While one process reads a text the others wait. One that ends is noticed at once: its connections
# are closed.
LONG = datetime.timedelta(days=30)

T = TypeVar("T")


class OtherProcessError(Exception):
    """Another process of the run met a problem, of which it tells; all of them stop."""


class LostProcessError(RuntimeError):
    """Another process of the run ended without a word."""


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
    device, and when this machine has fewer GPUs than processes; ConnectionError when the processes
    do not meet.
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
        # All processes of the machine see it, so that none waits for one that gave up.
        if max(number + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > cards:
            raise ValueError(
                f"device: expected a GPU for each process of this machine, found {cards}; "
                f"start it with --nproc-per-node {max(cards, 1)}, or with --device cpu"
            )
        own = torch.device("cuda", number)
        torch.cuda.set_device(own)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            f"the processes that torchrun started did not meet: {reason}"
        ) from error
    lost = False
    try:
        yield own
    except RuntimeError:  # out of memory, or another process is gone
        lost = True
        raise
    finally:
        if not lost:  # to take leave would be to wait for the others
            dist.destroy_process_group()


class Crew:
    """The processes of the default group, or this one alone where there is none.

    All of them make it, and call its methods in the same order. rank, size: this one's place among
    them, and how many there are; the first has the rank 0.
    """

    def __init__(self) -> None:
        alone = not (dist.is_available() and dist.is_initialized())
        self.rank, self.size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
        self._group = None if self.size == 1 else dist.new_group(backend="gloo", timeout=LONG)

    @property
    def first(self) -> bool:
        """Whether this is the process that holds the run's folder and tells of it."""
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives here, when all have done it. Where it fails in some process, the first
        such one raises what it met, and all others OtherProcessError."""
        if self.size == 1:
            return work()
        try:
            result, problem = work(), None
        except Exception as error:
            problem = error
        found = self.gather(None if problem is None else str(problem) or type(problem).__name__)
        failed = [rank for rank, message in enumerate(found) if message is not None]
        if not failed:
            return result
        if problem is not None and failed[0] == self.rank:
            raise problem
        raise OtherProcessError(f"process {failed[0]} of {self.size}: {found[failed[0]]}")

    def on_first(self, work: Callable[[], T]) -> T | None:
        """Has the first process do it while the others wait; they get None. Raises as `together`
        does."""
        return self.together(lambda: work() if self.first else None)

    def gather(self, value: T) -> list[T]:
        """The `value` of every process, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with lost_processes():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def any(self, here: bool) -> bool:
        """Whether it is so in any process; all get one answer, such as when to stop."""
        if self.size == 1:
            return here
        flag = torch.tensor(int(here))
        with lost_processes():
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def from_first(self, value: T) -> T:
        """The first process's value, everywhere."""
        if self.size == 1:
            return value
        shared: list[Any] = [value]
        with lost_processes():
            dist.broadcast_object_list(shared, group=self._group, group_src=0)
        return shared[0]


@contextmanager
def lost_processes() -> Iterator[None]:
    """Turns what a collective raises when a process is gone into LostProcessError."""
    try:
        yield
    except RuntimeError as error:
        # Gloo's errors have no type of their own; they begin with the place in its source.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise LostProcessError(
                "another process of this run ended without a word, so that all of them stop; what "
                "was saved is whole: go on with --resume"
            ) from error
        raise
