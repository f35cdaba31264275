"""One process to a run, and a crashed one does not lock it for ever."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rwkv7.training.lock import NEWBORN, RunIsBusyError, run_lock

HOST = socket.gethostname()


def test_the_second_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        with pytest.raises(RunIsBusyError, match=f"process {os.getpid()} on"), run_lock(tmp_path):
            pass
        assert (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()
    with run_lock(tmp_path):
        pass


def test_a_living_process_is_respected_and_a_dead_one_is_not(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        write(tmp_path, process.pid, HOST)
        with pytest.raises(RunIsBusyError, match=f"process {process.pid}"), run_lock(tmp_path):
            pass
    finally:
        process.communicate(b"\n")
    with run_lock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_whose_lock_counts(tmp_path: Path) -> None:
    # A process of this number that was before us, for instance in a restarted container.
    write(tmp_path, os.getpid(), HOST)
    with run_lock(tmp_path):
        pass
    # Nobody here can tell whether a process of another machine is alive.
    write(tmp_path, 1, "another-machine")
    with pytest.raises(RunIsBusyError, match="on another-machine"), run_lock(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "[]", "3", '{"pid": Infinity, "host": ""}', "[" * 100_000])
def test_a_lock_that_names_nobody_is_waited_for(tmp_path: Path, content: str) -> None:
    """Its process is about to write it, or was killed before it did."""
    path = tmp_path / "lock"
    path.write_text(content)
    writing = threading.Timer(0.3, lambda: write(tmp_path, 1, "another-machine"))
    writing.start()
    with pytest.raises(RunIsBusyError, match="on another-machine"), run_lock(tmp_path):
        pass
    writing.join()
    path.write_text(content)
    old = path.stat().st_mtime - NEWBORN - 1
    os.utime(path, (old, old))
    with run_lock(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_stays_without_content_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with run_lock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pid", [10**30, 0, -1])
def test_a_number_of_no_process_does_not_lock(tmp_path: Path, pid: int) -> None:
    write(tmp_path, pid, HOST)
    with run_lock(tmp_path):
        pass


def test_a_full_disk_leaves_no_lock_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="No space left") as caught, run_lock(tmp_path):
        pass
    assert caught.value.filename == str(tmp_path / "lock")
    assert list(tmp_path.iterdir()) == []


def write(run: Path, pid: int, host: str) -> None:
    (run / "lock").write_text(json.dumps({"pid": pid, "host": host}))
