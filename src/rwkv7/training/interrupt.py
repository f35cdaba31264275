"""Ctrl-C and SIGTERM as a question that the training loop asks between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["interruptible"]


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C or SIGTERM came while the block ran.

    The second one raises KeyboardInterrupt at once. Outside the main thread, where Python handles
    no signals, the answer is always no.
    """
    came = False

    def note(number: int, frame: Any) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    names = ("SIGINT", "SIGTERM")  # Windows may lack the second
    signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = [signal.signal(number, note) for number in signals]
    try:
        yield lambda: came
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)
