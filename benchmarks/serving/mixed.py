"""Requests of mixed lengths through the engine, beside full equal batches of the bare model."""

from __future__ import annotations

import random
import time

import torch

from rwkv7 import RWKV7
from rwkv7.benchmark.clock import seconds
from rwkv7.engine import Engine, Request
from rwkv7.sampling import Sampler

from .models import Parts, step_seconds


def mixed(model: RWKV7, slots: int, count: int, alone: int = 40) -> Parts:
    """Requests of mixed lengths through the engine, beside full equal batches of the bare model.

    With `deterministic=True` too, and there about `alone` of them once more by themselves.
    """
    longest = 256 if count >= 1000 else 16
    prefill_tokens = 8 * longest
    decode = slots / step_seconds(model, slots)
    prompt = torch.zeros(1, prefill_tokens, dtype=torch.int64, device=model.device)
    with torch.no_grad():
        once = seconds(lambda: model.hidden(prompt), model.device)
    yield (
        "bare model",
        {
            "slots": slots,
            "decode_tokens_per_s": decode,
            "prefill_tokens_per_s": prefill_tokens / once,
        },
    )
    took = {}
    texts = _requests(model.config.vocab_size, count, longest)
    for name, deterministic in (("engine", False), ("deterministic", True)):
        engine = Engine(
            model, slots=slots, max_prefill_tokens=prefill_tokens, deterministic=deterministic
        )
        drawn, elapsed = _run(engine, texts)
        read = sum(len(text.tokens) for text in texts)
        count_drawn = sum(map(len, drawn))
        ideal = read * once / prefill_tokens + count_drawn / decode
        took[name] = elapsed
        yield (
            name,
            {
                "requests": count,
                "slots": slots,
                "seconds": elapsed,
                "drawn_tokens_per_s": count_drawn / elapsed,
                "share_of_bare": ideal / elapsed,
            },
        )
        if deterministic:
            # Evenly from all of them: alone, each one takes as long as slots of them do together.
            some = range(0, count, max(1, count // alone))
            differ = sum(_run(engine, [texts[i]])[0] != [drawn[i]] for i in some)
            yield "deterministic, alone", {"compared": len(some), "differ": differ}
        del engine
    yield "deterministic / engine", {"speed": took["engine"] / took["deterministic"]}


def _requests(vocabulary: int, count: int, longest: int) -> list[Request]:
    """Prompts and answers of 1 to `longest` ids; every second one is drawn at random."""
    chance = random.Random(1)
    found = []
    for number in range(count):
        tokens = [chance.randrange(vocabulary) for _ in range(chance.randint(1, longest))]
        sampler = Sampler(float(number % 2), seed=number)
        found.append(Request(tokens, max_tokens=chance.randint(1, longest), sampler=sampler))
    return found


def _run(engine: Engine, texts: list[Request]) -> tuple[list[tuple[int, ...]], float]:
    """(the ids drawn of each, seconds)."""
    start = time.perf_counter()
    handles = [engine.submit(text) for text in texts]
    engine.run_until_idle()
    drawn = [handle.result().tokens for handle in handles]
    return drawn, time.perf_counter() - start
