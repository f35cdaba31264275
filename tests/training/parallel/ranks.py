"""Processes that stay up between tests and run functions together, as the ranks of a group.

Starting Python and torch takes seconds, so the processes are started once. They meet through a file
(no port that another could hold), and whoever does not answer in time is killed: a collective that
some rank never joins fails its test and does not hang the suite.
"""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

START = 120.0  # seconds for a process to import torch on a busy machine
PATIENCE = 120.0  # seconds for one test's work, which takes one or two


class Ranks:
    """Up to `most` processes; `run` has the first of them run a function as one group."""

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most, self._jobs = folder, most, 0
        self._context = torch.multiprocessing.get_context("spawn")
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(*args) on `size` ranks with a default process group; each one's result."""
        if not self._processes:
            self._start()
        self._jobs += 1
        meeting = self._folder / f"meeting-{self._jobs}"
        pipes = self._pipes[:size]
        for rank, pipe in enumerate(pipes):
            pipe.send((meeting, rank, size, function, args))
        results = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(PATIENCE):
                self.stop()
                pytest.fail(f"rank {rank} of {size} did not answer in {PATIENCE:g} seconds")
            problem, result = pipe.recv()
            if problem:
                self.stop()
                pytest.fail(f"rank {rank} of {size}:\n{problem}")
            results.append(result)
        return results

    def stop(self) -> None:
        """End the processes, whatever they are doing."""
        for process in self._processes:
            process.kill()
            process.join(5)
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        for _ in range(self._most):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)
        for pipe in self._pipes:
            if not pipe.poll(START) or pipe.recv() != "ready":
                self.stop()
                pytest.fail(f"the processes did not start in {START:g} seconds")


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    pipe.send("ready")
    while True:
        meeting, rank, size, function, args = pipe.recv()
        dist.init_process_group(
            "gloo",
            init_method=meeting.as_uri(),
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=PATIENCE),
        )
        try:
            answer = None, function(*args)
        except Exception:
            answer = traceback.format_exc(), None
        pipe.send(answer)
        dist.destroy_process_group()
