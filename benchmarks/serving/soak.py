"""Many short requests, some of them cancelled: what is left of them at the end."""

from __future__ import annotations

import gc
import random
import time

import torch

from rwkv7 import RWKV7
from rwkv7.engine import Engine, Request

from .models import Figures


def soak(model: RWKV7, slots: int, count: int) -> Figures:
    """Short requests, some of them cancelled; the pool and the memory before and after."""
    chance = random.Random(0)
    engine = Engine(model, slots=slots)
    # What is made once and kept, such as masks, is made before the count.
    first = [engine.submit(Request([1] * length, max_tokens=2)) for length in (*range(1, 9), 99)]
    engine.run_until_idle()
    del first
    before, start = _memory(model.device), time.perf_counter()
    waiting, reasons = [], {"length": 0, "cancelled": 0}
    for number in range(count):
        length = chance.randint(1, 8)
        tokens = [chance.randrange(model.config.vocab_size) for _ in range(length)]
        waiting.append(engine.submit(Request(tokens, max_tokens=chance.randint(1, 8))))
        if chance.random() < 0.2:
            chance.choice(waiting).cancel()
        if number % slots == slots - 1:
            engine.step()
            for handle in [handle for handle in waiting if handle.done]:
                reasons[handle.result().finish_reason] += 1
                waiting.remove(handle)
    engine.run_until_idle()
    for handle in waiting:
        reasons[handle.result().finish_reason] += 1
    waiting.clear()
    del handle
    elapsed = time.perf_counter() - start
    after = _memory(model.device)
    return {
        "soak": {
            "requests": count,
            "cancelled": reasons["cancelled"],
            "seconds": elapsed,
            "slots_free": f"{engine.free_slots} of {slots}",
            "tensors_before": before["tensors"],
            "tensors_after": after["tensors"],
            "memory_before": before,
            "memory_after": after,
        }
    }


def _memory(device: torch.device) -> dict[str, int]:
    """How many tensors there are, and the bytes that a GPU's are in."""
    gc.collect()
    found = {"tensors": sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())}
    if device.type == "cuda":
        found["bytes"] = torch.cuda.memory_allocated(device)
    return found
