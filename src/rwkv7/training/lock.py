"""One process to a run: a lock file that a crashed process does not leave locked.

Uses nothing but a file that only one process can create, so that it works on every system.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rwkv7.files import json_object

__all__ = ["RunIsBusyError", "run_lock"]

NEWBORN = 2.0  # seconds in which a lock file may still be without its content
_held: set[Path] = set()  # by this process


class RunIsBusyError(ValueError):
    """Another process is at work in the folder of the run."""


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Holds RUN/lock while the block runs. Raises RunIsBusyError when another process does.

    The lock of a process of this machine that is no longer alive is taken over; so is one that
    stays without content, for its process was killed as it began.
    """
    path = run.resolve() / "lock"
    if not _create(path):
        _wait_for_content(path)
        _remove_if_stale(path)
        if not _create(path):
            raise RunIsBusyError(_busy(path))
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        path.unlink(missing_ok=True)


def _create(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
    except OSError as error:  # a full disk: what is left would lock the run for nobody
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    return True


def _remove_if_stale(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        seen = path.read_bytes()
        if path in _held or not _stale(seen, time.time() - path.stat().st_mtime):
            return
        # Renaming decides between two processes that both saw the stale lock. Should the other
        # have renewed it in between, what was taken away is its new lock and goes back.
        aside = path.with_name(f"lock.{os.getpid()}")
        path.rename(aside)
        if aside.read_bytes() == seen:
            aside.unlink()
        else:
            aside.rename(path)


def _wait_for_content(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        while _owner(path.read_bytes()) is None and time.time() - path.stat().st_mtime <= NEWBORN:
            time.sleep(0.05)


def _owner(content: bytes) -> tuple[int, object] | None:
    """Number and host of the process that a lock names; None where it names none."""
    try:
        owner = json_object(content)
        return int(owner["pid"]), owner["host"]
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def _stale(content: bytes, age: float) -> bool:
    owner = _owner(content)
    if owner is None:
        return age > NEWBORN
    pid, host = owner
    # This very process does not hold it, or `_held` would say so: its number was used before.
    return host == socket.gethostname() and (pid == os.getpid() or not _alive(pid))


def _alive(pid: int) -> bool:
    if pid < 1:  # to os.kill not a process but a group of them
        return False
    if sys.platform == "win32":  # where os.kill would end the process that it asks about
        import ctypes

        kernel, synchronize, timeout = ctypes.windll.kernel32, 0x00100000, 0x102
        handle = kernel.OpenProcess(synchronize, False, pid)
        alive = bool(handle) and kernel.WaitForSingleObject(handle, 0) == timeout
        if handle:
            kernel.CloseHandle(handle)
        return alive
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # no such process, or too large for any
        return False
    except OSError:  # alive, and not ours
        return True
    return True


def _busy(path: Path) -> str:
    owner = None
    with contextlib.suppress(OSError):
        owner = _owner(path.read_bytes())
    pid, host = owner or ("?", "some machine")
    who = f"process {pid} on {host}"
    return (
        f"{path.parent}: {who} is training in this folder. Wait for it, or choose another folder; "
        f"if it is certain that none is, delete {path}"
    )
