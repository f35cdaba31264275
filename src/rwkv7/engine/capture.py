"""A call of fixed shape as a CUDA graph: the host starts it with one copy and one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def graph_memory() -> Any:
    """Memory for graphs that never run at once; what is captured first should be the largest."""
    return torch.cuda.graph_pool_handle()


def captured(
    run: Callable[[Tensor], Result], given: Tensor, memory: Any
) -> Callable[[Tensor], Result]:
    """`run` as a CUDA graph: what it returns is called with tensors like `given`, on the host.

    Args:
        run: twice called before the capture; it must not look at values.
        given: on the GPU; each call's argument is copied into it.
        memory: what `graph_memory` gave. A result is overwritten by the next call.
    """
    with torch.cuda.device(given.device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # what is compiled or set up by a first call cannot be captured
                run(given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            result = run(given)

    def replay(argument: Tensor) -> Result:
        with torch.cuda.device(given.device):
            given.copy_(argument, non_blocking=True)
            graph.replay()
        return result

    return replay
