"""Inference for many requests at once: continuous batching over a pool of states."""

from .engine import Engine
from .handle import Handle
from .pool import MemoryBudget, memory_budget
from .prefix_cache import PrefixCache
from .request import Completion, Event, Logprob, Request, RequestFailed
from .store import StateStore

__all__ = [
    "Completion",
    "Engine",
    "Event",
    "Handle",
    "Logprob",
    "MemoryBudget",
    "PrefixCache",
    "Request",
    "RequestFailed",
    "StateStore",
    "memory_budget",
]
